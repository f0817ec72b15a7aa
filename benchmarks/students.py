"""Figure 11: both kinds of student at equal compute: multiply-accumulates, and a training step."""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks.report import Table, publish
from kdhiera.cache.encoding import make_codec
from kdhiera.config import ObjectiveConfig, StudentConfig, TrainConfig
from kdhiera.devices import resolve_precision
from kdhiera.grid import Grid
from kdhiera.masking import num_visible
from kdhiera.objective.targets import TargetSpec
from kdhiera.student.base import Kind
from kdhiera.student.build import build_student, default_taps
from kdhiera.student.heads import HeadSpec, build_heads
from kdhiera.student.macs import visible_macs, whole_macs
from kdhiera.student.vit import SIZES
from kdhiera.training.batches import Batch, position_of
from kdhiera.training.optim import build_schedule
from kdhiera.training.step import Learner

RATIO, BATCH, ROUNDS, STEPS = 0.8, 32, 7, 3
DEMO = Grid(num_frames=8, height=128, width=128)
FULL = Grid(num_frames=16, height=224, width=224)
LAYERS = {"image": (384, 384, 384), "video": (128, 256)}  # widths of the demo
KINDS: tuple[Kind, ...] = ("hiera", "vit")
CPU = torch.device("cpu")


def run() -> None:
    """Count every size; time steps of both nano students in turn, on one thread."""
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {}
    figures: dict[str, float] = {}
    for precision in ("fp32", "bf16"):
        learners = {kind: _learner(kind, precision) for kind in KINDS}
        batch = _batch()
        for learner in learners.values():
            learner.step(batch, measure=False)
        names = {kind: f"CPU time of a step, {kind} nano, {precision}" for kind in KINDS}
        for _ in range(ROUNDS):
            for kind, learner in learners.items():
                began = time.process_time()
                for _ in range(STEPS):
                    learner.step(batch, measure=False)
                taken = (time.process_time() - began) / STEPS
                seconds.setdefault(names[kind], []).append(taken)
        middle = {kind: statistics.median(seconds[names[kind]]) for kind in KINDS}
        figures[f"vit / hiera, {precision}"] = middle["vit"] / middle["hiera"]
    publish("students", seconds, figures, {"10^9 multiply-accumulates a clip": _table()})


def _table() -> Table:
    table = {}
    for size in SIZES:
        grid = DEMO if size == "nano" else FULL
        hiera, vit = (_config(kind, size) for kind in KINDS)
        seen = visible_macs(hiera, grid, RATIO), visible_macs(vit, grid, RATIO)
        whole = whole_macs(hiera, grid), whole_macs(vit, grid)
        with torch.device("meta"):
            backbones = [build_student(c, grid, seed=0).backbone for c in (hiera, vit)]
        millions = [sum(p.numel() for p in b.parameters()) / 1e6 for b in backbones]
        table[size] = {
            "hiera, visible": seen[0] / 1e9,
            "vit, visible": seen[1] / 1e9,
            "ratio": seen[1] / seen[0],
            "hiera, whole": whole[0] / 1e9,
            "vit, whole": whole[1] / 1e9,
            "ratio, whole": whole[1] / whole[0],
            "hiera, 10^6 parameters": millions[0],
            "vit, 10^6 parameters": millions[1],
        }
    return table


def _config(kind: Kind, size: str) -> StudentConfig:
    return StudentConfig.model_validate({"kind": kind, "size": size, "drop_path": 0.0})


def _learner(kind: Kind, precision: str) -> Learner:
    """A nano student with a head for every layer of the two teachers."""
    config = _config(kind, "nano")
    train = TrainConfig.model_validate({"precision": precision, "device": "cpu"})
    targets = [
        TargetSpec(
            teacher=teacher,
            layer=str(number),
            tap=tap,
            column=f"{teacher}.{number}",
            width=width,
            weight=1.0,
            decode=make_codec("fp32", width=width).decode,
        )
        for teacher, widths in LAYERS.items()
        for number, (width, tap) in enumerate(
            zip(widths, default_taps(config, len(widths)), strict=True)
        )
    ]
    student = build_student(config, DEMO, sorted({spec.tap for spec in targets}), seed=0)
    specs = {}
    for spec in targets:
        tokens, width = student.tap_shape(spec.tap)
        specs[spec.name] = HeadSpec(
            tap=spec.tap, tokens=tokens, width_in=width, width_out=spec.width
        )
    return Learner(
        student=student,
        heads=build_heads(specs, seed=1),
        targets=targets,
        objective=ObjectiveConfig(),
        config=train,
        schedule=build_schedule(train, 1000),
        device=CPU,
        dtype=resolve_precision(train.precision, CPU),
    )


def _batch() -> Batch:
    """Noise, under a mask that shows the first units of every slot."""
    each = num_visible(RATIO, DEMO.units_per_slot)
    slots = torch.arange(DEMO.slots)[:, None] * DEMO.units_per_slot
    units = (slots + torch.arange(each)).flatten().repeat(BATCH, 1)
    generator = torch.Generator().manual_seed(0)
    shape = (*units.shape, 2, 32, 32, 3)
    return Batch(
        position=position_of(0, steps_per_epoch=1, num_views=1, num_draws=1),
        samples=torch.arange(BATCH),
        units=units,
        pixels=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        target_units=units,
        columns={
            f"{teacher}.{number}": {
                "codes": torch.randn(*units.shape, 4, width, generator=generator)
            }
            for teacher, widths in LAYERS.items()
            for number, width in enumerate(widths)
        },
    )
