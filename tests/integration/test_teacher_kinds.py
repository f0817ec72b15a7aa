"""Extraction with a teacher of every kind, on two real clips, through the command line."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from real_runs import Member, kdhiera, write_tar

sys.path.insert(0, str(Path(__file__).parents[1] / "teachers"))

from small_models import TIMM_FAMILIES, timm_model
from test_transformers_vit import library_model, save

from kdhiera.cache.commit import Cache
from kdhiera.cache.reader import CacheReader
from kdhiera.config import load
from kdhiera.errors import MismatchError, UsageError
from kdhiera.progress import make_progress
from kdhiera.stages.assemble import columns_of
from kdhiera.stages.distill import distill
from kdhiera.stages.extract_teachers import ExtractSummary, extract
from kdhiera.teachers.lowlevel import hog_targets, pixel_targets
from kdhiera.training.metrics import read_metrics

TEACHERS = Path(__file__).parents[1] / "teachers"


def model_teacher(kind: str, weights: Path, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "weights": str(weights), "layers": [2, 3], "precision": "fp32", **more}


@pytest.fixture(scope="module")
def config(real_members: list[Member], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine teachers of all kinds; those that have weights have random ones, on disk."""
    folder = tmp_path_factory.mktemp("kinds")
    write_tar(folder / "two.tar", real_members[:4])
    torch.save({"model": timm_model(TIMM_FAMILIES["dinov2-reg"]).state_dict()}, folder / "reg.pth")
    saved = {k: save(library_model(k), folder / k) for k in ("videomae", "vjepa2", "vit")}
    reg = TIMM_FAMILIES["dinov2-reg"]
    values = {
        "name": "kinds",
        "run_dir": str(folder / "run"),
        "data": {"shards": str(folder / "two.tar")},
        "clip": {"num_frames": 4, "height": 64, "width": 64},
        "views": {"num": 1, "frame_stride": 3},
        "teachers": {
            "reg": model_teacher("timm", folder / "reg.pth", model=reg.model, options=reg.options),
            **{k: model_teacher("transformers", path) for k, path in saved.items()},
            "pixels": {"kind": "pixels"},
            "edges": {"kind": "hog"},
            "mine": {"kind": "module", "factory": "module_teacher:build", "layers": ["mean"]},
        },
        "scores": {"teacher": "videomae", "source": "received_attention", "layer": 2},
        "masks": {"ratio": 0.5, "draws": 1},
        "cache": {"dir": str(folder / "cache"), "encoding": "fp32"},
        "extract": {"batch_size": 2, "device": "cpu"},
        "ray": {"enabled": False},
        "student": {"size": "nano", "drop_path": 0.0},
        "train": {"epochs": 2, "batch_size": 2, "warmup_epochs": 0, "precision": "fp32"}
        | {"device": "cpu"},
    }
    path = folder / "kinds.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(values))))
    return path


def run(*arguments: object) -> Any:
    """As a user does, with the module teacher beside where it runs."""
    return kdhiera(*arguments, cwd=TEACHERS)


@pytest.fixture(scope="module")
def extracted(config: Path) -> Any:
    path = os.environ.get("PYTHONPATH", "")
    with pytest.MonkeyPatch.context() as patch:  # modules, one thread: two clips are few
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), path]))
        patch.setenv("OMP_NUM_THREADS", "1")
        return run("extract-teachers", config)


def test_every_kind_fills_its_columns(config: Path, extracted: Any):
    assert extracted.returncode == 0, extracted.stderr
    settings = load(config)
    cache = Cache.open(settings.cache.dir)
    columns = columns_of(settings)
    assert len(columns) == 4 * 2 + 3
    rows = CacheReader(cache, num_views=1, columns=tuple(columns)).read(np.arange(2), view=0)
    assert all((rows.scores.reshape(2, 2, -1).std(-1) > 0).flatten())
    for column, arrays in rows.columns.items():
        codes = arrays["codes"]
        assert codes.shape[:3] == (2, rows.units.shape[1], 4), column
        assert np.isfinite(codes).all()
        assert codes.std() > 0
        assert not np.array_equal(codes[0], codes[1])
    assert kdhiera("cache", "verify", config).returncode == 0


def test_targets_without_weights_are_those_of_the_stored_pixels(config: Path, extracted: Any):
    """Pixels exactly; HOG but for a unit's border, whose gradients need its neighbours."""
    settings = load(config)
    cache = Cache.open(settings.cache.dir)
    columns = ("pixels.patch.fp32", "edges.patch.fp32")
    rows = CacheReader(cache, num_views=1, columns=columns).read(np.arange(2), view=0)
    first = torch.from_numpy(rows.pixels[:, :, 0]).flatten(0, 1)  # [rows x units, 32, 32, 3]
    expected = pixel_targets(first[:, None])[:, 0].reshape(*rows.units.shape, 4, 768)
    stored = torch.from_numpy(rows.columns["pixels.patch.fp32"]["codes"])
    kept = torch.from_numpy(rows.units >= 0)
    torch.testing.assert_close(stored[kept], expected[kept])
    edges = torch.from_numpy(rows.columns["edges.patch.fp32"]["codes"])[kept]
    alone = hog_targets(first[:, None])[:, 0].reshape(*rows.units.shape, 4, 108)[kept]
    near = torch.nn.functional.cosine_similarity(edges, alone, dim=-1)
    assert near.mean() > 0.9


def dry_run(config: Path, *overrides: str) -> ExtractSummary:
    with make_progress() as progress:
        return extract(load(config, overrides), progress=progress, dry_run=True)


def test_identities_hold_what_decides_features_and_no_more(config: Path, extracted: Any):
    assert not dry_run(config).plan.parts
    assert not dry_run(config, "teachers.vit.compile=true", "teachers.vit.weight=2").plan.parts
    for change, field in [
        ("scores.heads=[0]", "scores.heads"),
        ("scores.layer=3", "scores.layer"),
        ("scores.source=feature_norm", "scores.source"),
    ]:
        with pytest.raises(MismatchError, match=field):
            dry_run(config, change)
    with pytest.raises(MismatchError, match=r"teacher\.mean"):
        dry_run(config, "teachers.vit.mean=[0, 0, 0]")


def test_training_live_and_from_the_cache_is_the_same(config: Path, extracted: Any):
    """Every loss of every teacher and layer: fp32 columns, fp32 teachers."""
    losses = []
    for mode in ("live", "cached"):
        run_dir = config.parent / f"run-{mode}"
        settings = load(config, [f"cache.mode={mode}", f"run_dir={run_dir}"])
        with make_progress() as progress:
            distill(settings, progress=progress)
        lines = read_metrics(run_dir)
        losses.append([{k: v for k, v in line.items() if "loss" in k} for line in lines])
    live, cached = losses
    assert len(live) == 2
    for step, other in zip(live, cached, strict=True):
        assert step == pytest.approx(other, rel=0, abs=1e-5)
    assert {"loss/pixels/patch", "loss/vjepa2/3", "loss/mine/mean"} <= live[0].keys()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("scores.source=cls_attention", "needs a class token, which videomae does not have"),
        ("scores.layer=4", "scores.layer: teacher layer '4' does not exist"),
        ("scores.heads=[3]", "scores.heads names head 3, but videomae has heads 0 to 2"),
        ("teachers.vit.layers=[3, norn]", "teacher layer 'norn' does not exist"),
        ("teachers.vit.weights=nowhere", "no teacher weights at nowhere"),
        ("teachers.reg.options={}", "do not fit timm's vit_small_patch14_reg4_dinov2"),
        ("teachers.edges.layers=[12]", "a teacher of kind hog has the layer `patch` only"),
        ("teachers.vit.options={hidden_sise: 4}", "'hidden_sise': did you mean 'hidden_size'"),
    ],
)
def test_wrong_settings_end_before_any_work(override: str, words: str, config: Path):
    other = config.parent / "other"
    with pytest.raises(UsageError) as caught:
        dry_run(config, override, f"cache.dir={other}")
    assert words in str(caught.value)
    assert not other.exists()
