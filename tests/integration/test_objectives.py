"""Every target, loss and head on real features, from extraction to export."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kdhiera.cache.commit import Cache
from kdhiera.cache.reader import CacheReader
from kdhiera.config import RunConfig
from kdhiera.errors import MismatchError, UsageError
from kdhiera.objective.targets import PhiS
from kdhiera.progress import Progress, make_progress
from kdhiera.stages.assemble import columns_of
from kdhiera.stages.distill import distill, student_of
from kdhiera.stages.distillation.source import open_cache
from kdhiera.stages.distillation.statistics import calibration_reads
from kdhiera.stages.export import export_original
from kdhiera.student.export import load_exported
from kdhiera.training import checkpoint
from kdhiera.training.metrics import read_metrics

MakeRun = Callable[..., RunConfig]


@pytest.fixture
def progress() -> Progress:
    with make_progress() as made:
        yield made


def kept_tokens(config: RunConfig, column: str) -> np.ndarray:
    """Features of all kept units: every second clip in view 0, the others in view 1."""
    reader = CacheReader(Cache.open(config.cache.dir), num_views=2, columns=(column,))
    found = []
    for view in (0, 1):
        rows = reader.read(np.arange(view, reader.num_samples, 2), view=view)
        found.append(rows.columns[column]["codes"][rows.units >= 0].reshape(-1, 384))
    return np.concatenate(found).astype(np.float64)


@pytest.mark.usefixtures("own_cache")
def test_phi_s_turns_what_the_cache_keeps(make_run: MakeRun, progress: Progress) -> None:
    objective = {"normalise": "phi_s", "layers": {"image": [6, 12]}, "teachers": ["image"]}
    config = make_run("phi", objective=objective, train={"max_steps": 3})
    statistics = open_cache(config).statistics
    for column, key in columns_of(config).items():
        if key[0] != "image":
            continue
        found = statistics[key]
        assert isinstance(found, PhiS)
        tokens = kept_tokens(config, column)
        assert found.count == len(tokens)
        targets = (tokens - found.mean.numpy()) @ found.matrix.numpy().T
        np.testing.assert_allclose(targets.mean(0), 0, atol=1e-6)
        np.testing.assert_allclose(targets.var(0), 1, rtol=1e-6)
        gram = found.matrix @ found.matrix.T
        np.testing.assert_allclose(gram / gram[0, 0], np.eye(384), atol=1e-9)
    summary = distill(config, progress=progress).training
    assert 0.9 < summary.first["loss"] / mean_smooth_l1(tokens, found) < 1.1
    state = checkpoint.load_latest(Path(config.run_dir) / "checkpoints")
    assert state is not None
    frozen = state["learner"]["statistics"]["image/12"]
    assert torch.equal(frozen["matrix"], found.matrix)
    live = make_run("live", objective=objective, cache={"mode": "live"})
    with pytest.raises(UsageError, match=r"normalise=phi_s needs the statistics of a cache"):
        distill(live, progress=progress)


def mean_smooth_l1(tokens: np.ndarray, statistics: PhiS) -> float:
    """What a fresh head, which predicts next to nothing, pays for one layer's targets."""
    far = np.abs((tokens - statistics.mean.numpy()) @ statistics.matrix.numpy().T)
    return float(np.where(far < 1, far**2 / 2, far - 0.5).mean())


@pytest.mark.usefixtures("own_cache")
def test_every_option_of_the_method_trains(make_run: MakeRun, progress: Progress) -> None:
    """At once: finer taps, mixed and read by MLPs, layer weights, dropped teachers, UNIC's loss."""
    config = make_run(
        "options",
        student={
            "head": "mlp",
            "mix": True,
            "taps": {"image": ["stage2.end", "stage4.end"], "video": ["block:5"]},
        },
        objective={
            "normalise": "phi_s",
            "calibration_rows": 10,
            "loss": "cosine_smooth_l1",
            "layer_weights": {"image": {"6": 0.5}},
            "teacher_drop": 0.5,
        },
        train={"max_steps": 30, "lr": 0.05, "grad_checkpointing": True},
    )
    distill(config, progress=progress)
    lines = read_metrics(Path(config.run_dir))
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    plain = 0.5 * lines[0]["loss/image/6"] / 1.5 + lines[0]["loss/image/12"] / 1.5
    assert lines[0]["loss"] < plain + lines[0]["loss/video/3"]  # some sample did without one
    assert {f"explained_variance/{n}" for n in ("image/6", "image/12", "video/3")} < set(lines[0])

    trained = Path(config.run_dir) / "export"
    original = torch.load(export_original(config, None), weights_only=True)
    official = make_run("official", student={"init": str(trained / "hiera.pth")})
    from_original, _, _ = student_of(official, open_cache(official))
    assert len(original["model_state"]) == len(from_original.backbone.state_dict())
    start = make_run("start", student={"init": str(trained)}, train={"max_steps": 1})
    student, _, _ = student_of(start, open_cache(start))
    loaded = load_exported(trained).backbone.state_dict()
    for found in (student, from_original):
        assert all(torch.equal(loaded[n], v) for n, v in found.backbone.state_dict().items())
    distill(start, progress=progress)
    moved = shutil.copytree(trained, trained.with_name("moved"))
    elsewhere = {"max_steps": 1, "grad_checkpointing": True}
    same = make_run("start", student={"init": str(moved)}, train=elsewhere)
    distill(same, progress=progress)  # finished: neither path nor memory decides the result
    other = make_run("start", student={"init": f"{start.run_dir}/export"}, train={"max_steps": 1})
    with pytest.raises(MismatchError, match=r"init: want '\w{64}', the run has '\w{64}'"):
        distill(other, progress=progress)


def test_calibration_clips_are_spread_over_samples_and_views() -> None:
    reads = calibration_reads(1000, 2, 5)
    assert [(numbers.tolist(), view) for numbers, view in reads] == [
        ([0, 500, 999], 0), ([250, 749], 1)
    ]  # fmt: skip
    for num_samples, num_rows in ((7, 100), (100, 100), (1, 5)):
        chosen = [n for numbers, _ in calibration_reads(num_samples, 3, num_rows) for n in numbers]
        assert sorted(chosen) == list(range(num_samples))
    sizes = [len(numbers) for numbers, _ in calibration_reads(10_000, 2, 256)]
    assert sum(sizes) == 256
    assert max(sizes) <= 32
