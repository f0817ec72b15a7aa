import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import GRID, MASKS, MemorySource, Setup
from torch.nn import functional as F

from kdhiera.config import ObjectiveConfig
from kdhiera.objective.targets import PhiS, TargetSpec
from kdhiera.schedule import Schedule
from kdhiera.seeding import seeded
from kdhiera.student.base import Student
from kdhiera.student.decoder import Decoders, DecoderSpec, build_decoders
from kdhiera.student.heads import Heads, HeadSpec, build_heads
from kdhiera.training.batches import Batch, make_batch, position_of
from kdhiera.training.jitter import jitter
from kdhiera.training.step import Learner, NonFiniteError

CPU = torch.device("cpu")


def learner(
    setup: Setup,
    dtype: torch.dtype = torch.float32,
    objective: ObjectiveConfig | None = None,
    **changes: object,
) -> Learner:
    objective = objective or ObjectiveConfig()
    student, targets = setup.student(), setup.targets()
    made = decoders_of if objective.kind == "masked" else heads_of
    return Learner(
        student=student,
        heads=made(student, targets),
        targets=targets,
        objective=objective,
        config=setup.config(**changes),
        schedule=Schedule(peak=1e-3, final=1e-3, warmup_steps=0, num_steps=100),
        device=CPU,
        dtype=dtype,
    )


def heads_of(student: Student, targets: list[TargetSpec]) -> Heads:
    specs = {
        spec.name: HeadSpec(
            tap=spec.tap, tokens=4, width_in=student.tap_shape(spec.tap)[1], width_out=spec.width
        )
        for spec in targets
    }
    return build_heads(specs, seed=1)


def decoders_of(student: Student, targets: list[TargetSpec]) -> Decoders:
    specs = {
        spec.teacher: DecoderSpec(
            taps={spec.tap: student.tap_shape(spec.tap)},
            targets={spec.name: spec.width},
            width=64,
            depth=1,
        )
        for spec in targets
    }
    return build_decoders(specs, GRID, seed=1)


def batch_of(
    setup: Setup, source: MemorySource, step: int = 0, ratio: float = MASKS.ratio
) -> Batch:
    samples = np.array([3, 1, 8, 5])
    position = position_of(step, steps_per_epoch=4, num_views=2, num_draws=2)
    rows = source.read(samples, view=position.view)
    masks = replace(MASKS, ratio=ratio)
    return make_batch(rows, masks, position, samples, predict_hidden=source.keep_all)


def test_losses_are_those_of_the_formula(setup: Setup, source: MemorySource) -> None:
    ours, same = learner(setup), learner(setup)
    batch = batch_of(setup, source)
    result = ours.step(batch, measure=True)
    with seeded("step", 0, 0, device=CPU), torch.no_grad():
        taps = same.student(batch.pixels, batch.units)
    wanted = {}
    for spec in setup.targets():
        target = F.layer_norm(batch.columns[spec.column]["codes"], (spec.width,), eps=1e-6)
        prediction = same.heads(taps, batch.units, batch.units)[spec.name]
        wanted[spec.name] = F.smooth_l1_loss(prediction, target)
    for name, value in wanted.items():
        torch.testing.assert_close(result.losses[name], value)
    torch.testing.assert_close(result.loss, wanted["image/9"] + 0.5 * wanted["video/3"])
    assert result.lr == 1e-3
    assert result.cosine is not None
    assert result.cosine.keys() == wanted.keys()


def test_teachers_are_dropped_sample_by_sample(setup: Setup, source: MemorySource) -> None:
    """With p = 1 every sample learns from its worse teacher alone."""
    source.features[:, [3, 5], ..., 16:] *= 10  # channels that only the image teacher has
    batch, raw = batch_of(setup, source), ObjectiveConfig(normalise="none")
    alone = [
        quiet(setup, raw).step(batch.map(lambda t, r=row: t[r : r + 1]), measure=False).losses
        for row in range(4)
    ]
    weight = {"image/9": 1.0, "video/3": 0.5}
    worst = [max(losses, key=lambda name: losses[name].item()) for losses in alone]
    assert worst == ["image/9", "video/3", "video/3", "image/9"]
    wanted = [weight[name] * losses[name] for name, losses in zip(worst, alone, strict=True)]
    dropping = ObjectiveConfig(normalise="none", teacher_drop=1.0)
    result = quiet(setup, dropping).step(batch, measure=False)
    torch.testing.assert_close(result.loss, torch.stack(wanted).mean())
    mean = torch.stack([losses["image/9"] for losses in alone]).mean()
    torch.testing.assert_close(result.losses["image/9"], mean)


def test_teacher_drop_does_not_care_for_the_order_of_a_batch(
    setup: Setup, source: MemorySource
) -> None:
    batch, half = batch_of(setup, source), ObjectiveConfig(teacher_drop=0.5)
    first = quiet(setup, half).step(batch, measure=False)
    turned = quiet(setup, half).step(batch.map(lambda t: t.flip(0)), measure=False)
    torch.testing.assert_close(first.loss, turned.loss)
    later = replace(batch, position=replace(batch.position, step=1))
    assert not torch.equal(quiet(setup, half).step(later, measure=False).loss, first.loss)


def quiet(setup: Setup, objective: ObjectiveConfig | None = None) -> Learner:
    """A learner without drop-path, so that samples do not share a draw."""
    made = learner(setup, objective=objective)
    made.student.eval()
    return made


def test_drop_path_is_a_function_of_seed_and_step(setup: Setup, source: MemorySource) -> None:
    torch.manual_seed(5)
    first = learner(setup).step(batch_of(setup, source), measure=False)
    outside = torch.rand(2)
    torch.manual_seed(99)
    again = learner(setup).step(batch_of(setup, source), measure=False)
    other = learner(setup, seed=1).step(batch_of(setup, source), measure=False)
    assert torch.equal(first.loss, again.loss)
    assert not torch.equal(first.loss, other.loss)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(2), outside)


def test_jitter_is_on_the_students_pixels_alone(setup: Setup, source: MemorySource) -> None:
    batch = batch_of(setup, source)
    ours = learner(setup, jitter=0.4)
    changed = jitter(batch.pixels, batch.samples.tolist(), 0.4, seed=0, step=0)
    wanted = learner(setup).step(replace(batch, pixels=changed), measure=False).loss
    assert torch.equal(ours.step(batch, measure=False).loss, wanted)
    assert not torch.equal(learner(setup).step(batch, measure=False).loss, wanted)


def test_clipping_bounds_the_gradient(setup: Setup, source: MemorySource) -> None:
    batch = batch_of(setup, source)
    free, clipped = learner(setup), learner(setup, clip_grad=0.01)
    norm = free.step(batch, measure=False).grad_norm
    assert torch.equal(clipped.step(batch, measure=False).grad_norm, norm)
    gradients = [p.grad for g in free.optimizer.param_groups for p in g["params"]]
    flat = torch.cat([g.double().flatten() for g in gradients if g is not None])
    assert flat.norm().item() == pytest.approx(norm.item(), rel=1e-4)
    bounded = [p.grad for g in clipped.optimizer.param_groups for p in g["params"]]
    flat = torch.cat([g.double().flatten() for g in bounded if g is not None])
    assert flat.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_bf16_comes_close_to_fp32(setup: Setup, source: MemorySource) -> None:
    batch = batch_of(setup, source)
    exact = learner(setup).step(batch, measure=False)
    coarse = learner(setup, torch.bfloat16).step(batch, measure=False)
    assert coarse.loss.dtype is torch.float32
    assert coarse.loss.item() == pytest.approx(exact.loss.item(), rel=1e-2)
    assert coarse.grad_norm.item() == pytest.approx(exact.grad_norm.item(), rel=0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_target_that_is_not_finite_stops_before_any_weight_changes(
    setup: Setup, source: MemorySource, value: float
) -> None:
    batch = batch_of(setup, source)
    batch.columns["video-3"]["codes"][0, 0, 0, 0] = value
    broken = learner(setup)
    before = {name: p.clone() for name, p in broken.student.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"teacher video, layer 3 \(the cached target"):
        broken.step(batch, measure=False)
    assert all(torch.equal(p, before[name]) for name, p in broken.student.state_dict().items())


def test_a_prediction_that_is_not_finite_is_told_apart(setup: Setup, source: MemorySource) -> None:
    broken = learner(setup)
    torch.nn.init.constant_(broken.heads["image/9"].linear.bias, float("inf"))
    with pytest.raises(NonFiniteError, match=r"teacher image, layer 9 \(the student's predict"):
        broken.step(batch_of(setup, source), measure=False)


def test_a_gradient_that_is_not_finite_names_its_parameter(
    setup: Setup, source: MemorySource
) -> None:
    broken = learner(setup)
    broken.heads["image/9"].linear.weight.register_hook(lambda g: g * float("nan"))
    before = {name: p.clone() for name, p in broken.heads.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"gradient of image/9.linear.weight is not finite"):
        broken.step(batch_of(setup, source), measure=False)
    assert all(torch.equal(p, before[name]) for name, p in broken.heads.state_dict().items())


def test_a_learner_goes_on_from_its_state(setup: Setup, source: MemorySource) -> None:
    first, second = learner(setup), learner(setup)
    first.step(batch_of(setup, source, 0), measure=True)
    second.load_state_dict(first.state_dict())
    a = first.step(batch_of(setup, source, 1), measure=True)
    b = second.step(batch_of(setup, source, 1), measure=True)
    assert torch.equal(a.loss, b.loss)
    assert a.explained_variance == b.explained_variance


def test_a_learner_goes_on_with_the_rotation_it_began_with(
    setup: Setup, source: MemorySource
) -> None:
    def made(seed: int) -> Learner:
        ours = learner(setup, objective=ObjectiveConfig(normalise="phi_s"))
        generator = torch.Generator().manual_seed(seed)
        ours.targets = [
            replace(spec, statistics=PhiS(
                mean=torch.randn(spec.width, generator=generator).double(),
                matrix=torch.randn(spec.width, spec.width, generator=generator).double(),
                count=9,
            ))
            for spec in ours.targets
        ]  # fmt: skip
        return ours

    first, second = made(0), made(1)
    first.step(batch_of(setup, source, 0), measure=False)
    second.load_state_dict(first.state_dict())
    a = first.step(batch_of(setup, source, 1), measure=False)
    b = second.step(batch_of(setup, source, 1), measure=False)
    assert torch.equal(a.loss, b.loss)


def test_position_decides_the_learning_rate(setup: Setup, source: MemorySource) -> None:
    ours = learner(setup)
    ours.schedule = Schedule(peak=1.0, final=0.0, warmup_steps=10, num_steps=20)
    batch = batch_of(setup, source)
    moved = replace(batch, position=replace(batch.position, step=4))
    assert ours.step(moved, measure=False).lr == 0.5


COMPILED = """
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, {folder!r})
from test_step import CPU, batch_of, learner
from tiny_run import MemorySource, Setup

import torch._inductor.config

from kdhiera.config import ObjectiveConfig
from kdhiera.errors import KdhieraError
from kdhiera.student import hiera, vit
from kdhiera.training.step import explain_compiler

hiera.SIZES = {{"nano": {{**hiera.SIZES["nano"], "stages": (1, 1, 1, 1)}}}}  # to be quicker
vit.SIZES = {{"nano": {{"width": 64, "depth": 2}}}}
torch.set_num_threads(1)
visible = ObjectiveConfig(teacher_drop=0.5, loss="cosine_smooth_l1")
masked = ObjectiveConfig(kind="masked")
counters = torch._dynamo.utils.counters
inductor = torch.compile
torch.compile = partial(torch.compile, fullgraph=True, backend="aot_eager")  # quick to compile
for kind, objective, ratios in (
    ("hiera", visible, (0.5, 0.5)),
    ("hiera", masked, (0.5, 0.75, 0.25, 0.5)),
    ("vit", visible, (0.5, 0.5)),
    ("vit", masked, (0.5, 0.5)),
):
    setup = Setup(run_dir=Path("unused"), kind=kind)
    source = MemorySource(keep_all=objective is masked)
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (learner(setup, objective=objective, compile=on) for on in (False, True))
    for step, ratio in enumerate(ratios):
        results = [
            each.step(batch_of(setup, source, step, ratio), measure=True)
            for each in (plain, compiled)
        ]
        assert torch.equal(results[0].loss, results[1].loss), results
        assert torch.equal(results[0].grad_norm, results[1].grad_norm), results
    assert not counters["graph_break"], counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == len(set(ratios)), counters["stats"]

torch._inductor.config.cpp.cxx = (None, "/nowhere/g++")
try:
    with explain_compiler(True):
        inductor(torch.sin)(torch.ones(3))
except KdhieraError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["visible", "masked"])
def test_a_vit_learns_under_both_objectives(tmp_path: Path, kind: str) -> None:
    setup = Setup(run_dir=tmp_path, kind="vit")
    ours = learner(setup, objective=ObjectiveConfig.model_validate({"kind": kind}))
    batch = batch_of(setup, MemorySource(keep_all=kind == "masked"))
    losses = [ours.step(batch, measure=False).loss.item() for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
def test_forward_and_losses_compile_into_one_graph() -> None:
    """No graph breaks, a compilation a ratio; the same losses and gradients, drop-path included.

    Without a compiler `train.compile` is refused in a sentence. In a process of its own: the
    shape checks of the tests are no part of the product, and no compiler sees through them.
    """
    code = COMPILED.format(folder=str(Path(__file__).parent))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("train.compile: torch cannot compile the step here (")
    assert "set train.compile=false, or install what is missing" in done.stdout
