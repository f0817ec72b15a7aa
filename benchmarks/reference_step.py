"""Figure 6: a masked student step against the same step of the original Hiera.

The original is PyPI's `hiera-transformer` (CC-BY-NC: for comparison only, no dependency
of this project). Put it into a folder of its own and name that in PYTHONPATH:

    pip install --no-deps --target /tmp/hiera hiera-transformer
    PYTHONPATH=/tmp/hiera python -m benchmarks reference_step
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import publish
from kdhiera.config import StudentConfig
from kdhiera.grid import Grid
from kdhiera.masking import num_visible
from kdhiera.student.base import set_fused_attention
from kdhiera.student.build import build_student
from kdhiera.student.hiera import hiera_args

ROUNDS = 5
DEMO = Grid(num_frames=8, height=128, width=128)
FULL = Grid(num_frames=16, height=224, width=224)
CASES = (  # size, grid, clips of a step, mask ratio
    ("nano", DEMO, 32, 0.8),
    ("base", FULL, 2, 0.8),
    ("base", FULL, 2, 0.9),
)


def run() -> None:
    """Forward and backward of both, in turn, on one thread: CPU time."""
    try:
        import hiera
    except ImportError:
        raise SystemExit(f"the original Hiera is not here.\n\n{__doc__}") from None
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {}
    figures: dict[str, float] = {}
    for size, grid, clips, ratio in CASES:
        for low in (False, True):
            name = f"{size}, ratio {ratio:g}, {'bf16' if low else 'fp32'}"
            steps = {
                f"{name}: student": _student(size, grid, clips, ratio, low),
                f"{name}: original": _original(hiera.Hiera, size, grid, clips, ratio, low),
            }
            for step in steps.values():
                step()
            for _ in range(ROUNDS):
                for what, step in steps.items():
                    began = time.process_time()
                    step()
                    seconds.setdefault(what, []).append(time.process_time() - began)
            ours, theirs = (statistics.median(seconds[what]) for what in steps)
            figures[f"{name}: student / original"] = ours / theirs
    publish("reference_step", seconds, figures)


def _units(grid: Grid, clips: int, ratio: float) -> Tensor:
    """The first units of every slot, as both are told to show."""
    each = num_visible(ratio, grid.units_per_slot)
    slots = torch.arange(grid.slots)[:, None] * grid.units_per_slot
    return (slots + torch.arange(each)).flatten().repeat(clips, 1)


def _student(size: str, grid: Grid, clips: int, ratio: float, low: bool) -> Callable[[], None]:
    config = StudentConfig.model_validate({"size": size, "drop_path": 0.0})
    student = build_student(config, grid, seed=0).train()
    set_fused_attention(student.backbone, not low)
    units = _units(grid, clips, ratio)
    pixels = torch.randint(0, 256, (*units.shape, 2, 32, 32, 3), dtype=torch.uint8)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            (tokens,) = student(pixels, units).values()
        tokens.float().square().mean().backward()
        student.zero_grad()

    return step


def _original(
    make: Callable[..., Any], size: str, grid: Grid, clips: int, ratio: float, low: bool
) -> Callable[[], None]:
    """With the original's own masking, on a clip that is normalised already."""
    options = hiera_args(StudentConfig.model_validate({"size": size, "drop_path": 0.0}), grid)
    options["input_size"] = tuple(options.pop("img_size"))
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    model = make(**(options | {"num_classes": 1})).train()
    mask = torch.zeros(clips, grid.num_units, dtype=torch.bool)
    mask.scatter_(1, _units(grid, clips, ratio), True)
    clip = torch.randn(clips, 3, grid.num_frames, grid.height, grid.width)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            tokens = model(clip, mask=mask)
        tokens.float().square().mean().backward()
        model.zero_grad()

    return step
