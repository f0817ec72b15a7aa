"""Live teachers and the cache give the same batches, under every mask, objective, encoding."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from real_runs import write_tar

sys.path.insert(0, str(Path(__file__).parents[1] / "teachers"))

from small_models import TIMM_FAMILIES, timm_model

from kdhiera.cache.encoding import ENCODINGS, error_bound
from kdhiera.config import RunConfig, load
from kdhiera.errors import MismatchError, UsageError
from kdhiera.masking import MaskSpec, Scope, Strategy
from kdhiera.progress import make_progress
from kdhiera.stages.distill import distill
from kdhiera.stages.distillation.source import Opened, open_source
from kdhiera.stages.extract_teachers import extract
from kdhiera.training.batches import Batch, make_batch, position_of
from kdhiera.training.metrics import read_metrics


@pytest.fixture(scope="module")
def path(real_members: list[tuple[str, bytes]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight real clips, every unit kept; a small ViT decides the scores."""
    folder = tmp_path_factory.mktemp("live")
    write_tar(folder / "eight.tar", real_members[:16])
    family = TIMM_FAMILIES["dinov2-reg"]
    torch.save(timm_model(family).state_dict(), folder / "vit.pth")
    values = {
        "name": "live",
        "run_dir": str(folder / "run"),
        "data": {"shards": str(folder / "eight.tar")},
        "clip": {"num_frames": 4, "height": 64, "width": 64},
        "views": {"num": 2, "frame_stride": 3},
        "teachers": {
            "vit": {
                "kind": "timm",
                "weights": str(folder / "vit.pth"),
                "model": family.model,
                "options": dict(family.options),
                "layers": [2, 3],
                "precision": "fp32",
            },
            "pixels": {"kind": "pixels"},
            "edges": {"kind": "hog"},
        },
        "scores": {"teacher": "vit"},
        "masks": {"keep": "all", "ratio": 0.5, "draws": 2},
        "cache": {"dir": str(folder / "cache"), "encoding": "fp32"},
        "extract": {"batch_size": 4, "device": "cpu"},
        "ray": {"enabled": False},
        "student": {"size": "nano", "drop_path": 0.1, "decoder": {"depth": 1, "width": 64}},
        "train": {"epochs": 3, "batch_size": 4, "warmup_epochs": 0, "precision": "fp32"}
        | {"device": "cpu", "lr": 0.02, "log_every": 1},
    }
    written = folder / "live.yaml"
    written.write_text(yaml.safe_dump(values))
    with make_progress() as progress:
        for encoding in ENCODINGS:
            extract(load(written, [f"cache.encoding={encoding}"]), progress=progress)
    return written


@pytest.fixture(scope="module")
def live(path: Path) -> Iterator[Opened]:
    with open_source(load(path, ["cache.mode=live"]), None) as opened:
        yield opened


def cached(path: Path, *overrides: str) -> Opened:
    with open_source(load(path, overrides), None) as opened:
        return opened


def some_batch(
    opened: Opened, *, strategy: Strategy, scope: Scope, ratio: float, hidden: bool
) -> Batch:
    spec = MaskSpec(strategy=strategy, scope=scope, ratio=ratio, seed=0)
    position = position_of(0, steps_per_epoch=1, num_views=1, num_draws=1)
    position = dataclasses.replace(position, view=1, draw=1)
    samples = np.array([5, 0, 7, 2])
    rows = opened.source.read(samples, view=1)
    return make_batch(rows, spec, position, samples, predict_hidden=hidden)


def decoded(opened: Opened, batch: Batch, column: str, key: tuple[str, str]) -> torch.Tensor:
    return opened.codecs[key].decode(batch.columns[column], batch.target_units)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("strategy", list(Strategy))
def test_batches_are_bit_equal(path: Path, live: Opened, strategy: Strategy, hidden: bool) -> None:
    stored = cached(path)
    for scope, ratio in ((Scope.SLOT, 0.5), (Scope.SLOT, 0.75), (Scope.CLIP, 0.25)):
        how: Any = {"strategy": strategy, "scope": scope, "ratio": ratio, "hidden": hidden}
        ours, theirs = some_batch(stored, **how), some_batch(live, **how)
        for name in ("samples", "units", "target_units", "pixels"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert ours.columns.keys() == theirs.columns.keys()
        assert len(ours.columns) == 4
        for column, arrays in ours.columns.items():
            assert torch.equal(arrays["codes"], theirs.columns[column]["codes"]), column


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("hidden", [False, True])
def test_encodings_stay_within_their_bounds(
    path: Path, live: Opened, encoding: str, hidden: bool
) -> None:
    stored = cached(path, f"cache.encoding={encoding}")
    how: Any = {"strategy": Strategy.RANDOM, "scope": Scope.SLOT, "ratio": 0.5, "hidden": hidden}
    ours, theirs = some_batch(stored, **how), some_batch(live, **how)
    for key in stored.codecs:
        exact = decoded(live, theirs, f"{key[0]}.{key[1]}.fp32", key)
        found = decoded(stored, ours, f"{key[0]}.{key[1]}.{encoding}", key)
        spread = (exact - exact.mean((0, 1, 2))).square().sum()
        error = float((found - exact).square().sum() / spread)
        assert error <= error_bound(encoding, error=0.017), key
        assert error == 0 if encoding == "fp32" else error > 0, key


@pytest.mark.parametrize("kind", ["visible", "masked"])
def test_training_is_the_same(path: Path, kind: str) -> None:
    losses = []
    for mode in ("cached", "live"):
        run_dir = path.parent / f"{kind}-{mode}"
        overrides = [f"cache.mode={mode}", f"run_dir={run_dir}", f"objective.kind={kind}"]
        config = load(path, [*overrides, "objective.ratio=[0.5, 0.75]"])
        with make_progress() as progress:
            distill(config, progress=progress)
        lines = read_metrics(run_dir)
        losses.append([{k: v for k, v in line.items() if "loss" in k} for line in lines])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    assert losses[0][-1]["loss"] < losses[0][0]["loss"]


def small(path: Path, *overrides: str) -> RunConfig:
    folder = path.parent / "plan"
    return load(
        path, [f"cache.dir={folder}", "masks.keep=plan", "objective.kind=visible", *overrides]
    )


def test_hidden_units_must_be_kept(path: Path) -> None:
    with make_progress() as progress:
        extract(small(path), progress=progress)
        with pytest.raises(UsageError, match=r"every unit \(masks\.keep: all\), since hidden"):
            extract(small(path, "objective.kind=masked"), progress=progress)
        masked = small(path, "objective.kind=masked", f"run_dir={path.parent / 'none'}")
        with pytest.raises(MismatchError, match=r"every unit \(masks\.keep: all\), since hidden"):
            distill(masked, progress=progress)
        wanted = small(path, "objective.ratio=[0.5, 0.25]")
        with pytest.raises(UsageError, match=r"ratio 0\.25"):
            extract(wanted, progress=progress)


def test_more_ratios_than_steps_are_refused(path: Path) -> None:
    config = load(path, ["objective.ratio=[0.5, 0.6, 0.7]", "train.max_steps=2"])
    with (
        make_progress() as progress,
        pytest.raises(UsageError, match=r"names 3 ratios for equal shares of the steps, but .* 2"),
    ):
        distill(config, progress=progress)


def test_low_level_targets_where_they_are_visible_are_called_degenerate(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load(path, [f"run_dir={path.parent / 'told'}", "train.max_steps=1"])
    with make_progress() as progress:
        distill(config, progress=progress)
    told = [r.getMessage() for r in caplog.records if "degenerate control" in r.getMessage()]
    assert {words.split()[1] for words in told} == {"pixels", "edges"}
