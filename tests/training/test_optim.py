import math

import pytest
import torch

from kdhiera.config import StudentConfig, TrainConfig
from kdhiera.grid import Grid
from kdhiera.student.heads import HeadSpec, build_heads
from kdhiera.student.hiera import build
from kdhiera.training.optim import build_optimizer, build_schedule, parameter_groups


def test_decay_spares_norms_biases_and_position_embeddings() -> None:
    backbone = build(StudentConfig(size="nano"), Grid(num_frames=4, height=32, width=32), seed=0)
    heads = build_heads(
        {"a/1": HeadSpec(tap="block:1", tokens=64, width_in=32, width_out=8)}, seed=0
    )
    decayed, spared = parameter_groups((backbone, heads), weight_decay=0.05)
    names = {id(p): n for module in (backbone, heads) for n, p in module.named_parameters()}
    named = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in
             (decayed, spared)}  # fmt: skip
    assert named[0.05] | named[0.0] == set(names.values())
    assert not named[0.05] & named[0.0]
    assert named[0.05] == {n for n in names.values() if n.endswith("weight") and "norm" not in n}
    assert {"pos_embed_spatial", "pos_embed_temporal"} <= named[0.0]


def test_schedule_is_linear_then_a_cosine() -> None:
    config = TrainConfig(
        epochs=50, warmup_epochs=5.0, lr=1.5e-4, min_lr=1e-6, batch_size=512, weight_decay=0.05
    )
    schedule = build_schedule(config, num_steps=1000)
    peak = 3e-4
    assert schedule.warmup_steps == 100
    for step in range(1000):
        if step < 100:
            wanted = peak * (step + 1) / 100
        else:
            wanted = 1e-6 + (peak - 1e-6) * 0.5 * (1 + math.cos(math.pi * (step - 100) / 899))
        assert schedule.lr(step) == pytest.approx(wanted, rel=1e-12)
    assert schedule.lr(99) == schedule.lr(100) == pytest.approx(peak)
    assert schedule.lr(999) == pytest.approx(1e-6)


def test_cosine_part_equals_torchs() -> None:
    schedule = build_schedule(TrainConfig(warmup_epochs=0, batch_size=256), num_steps=40)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=schedule.peak)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=39, eta_min=1e-6)
    for step in range(40):
        assert schedule.lr(step) == pytest.approx(torchs.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        torchs.step()


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_the_shortest_runs_have_a_learning_rate(num_steps: int) -> None:
    for warmup in (0.0, 1.0, 400.0):
        schedule = build_schedule(TrainConfig(warmup_epochs=warmup), num_steps)
        assert all(0 < schedule.lr(step) <= schedule.peak for step in range(num_steps))


def test_the_optimiser_is_adamw_as_configured() -> None:
    module = torch.nn.Linear(2, 2)
    optimizer = build_optimizer((module,), TrainConfig(betas=(0.8, 0.9), weight_decay=0.1))
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert all(g["betas"] == (0.8, 0.9) for g in optimizer.param_groups)
