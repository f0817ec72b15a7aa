"""Small real runs: real videos, real teachers, a small clip."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from real_runs import MakeConfig, Member, read_tar, write_config, write_tar

from kdhiera.config import RunConfig, load
from kdhiera.demo.prepare import Prepared
from kdhiera.progress import make_progress
from kdhiera.stages.extract_teachers import extract


@pytest.fixture(scope="session")
def real_members(demo: Prepared) -> list[Member]:
    """Members of 24 samples of the demo: `key.mp4` and `key.json` in turn."""
    shard = (demo.test or demo.unlabelled)[0]
    return read_tar(shard)[:48]


@pytest.fixture(scope="session")
def shards(real_members: list[Member], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two shards of twelve clips."""
    folder = tmp_path_factory.mktemp("shards")
    return [
        write_tar(folder / f"part-{i}.tar", real_members[24 * i : 24 * i + 24]) for i in range(2)
    ]


@pytest.fixture(scope="session")
def usual(demo: Prepared, shards: list[Path]) -> dict[str, Any]:
    """A config but for its folders."""
    return {
        "data": {"shards": [str(s) for s in shards]},
        "clip": {"num_frames": 4, "height": 64, "width": 64},
        "views": {"num": 2, "frame_stride": 3},
        "teachers": {
            "image": {
                "kind": "timm",
                "model": "vit_small_patch14_dinov2",
                "weights": str(demo.image_teacher),
                "layers": [6, 12],
                "precision": "fp32",
            },
            "video": {
                "kind": "module",
                "factory": "kdhiera.demo.teachers:transnetv2",
                "weights": str(demo.video_weights),
                "options": {"source": str(demo.video_source)},
                "layers": [3],
                "precision": "fp32",
            },
        },
        "scores": {"teacher": "image"},
        "masks": {"ratio": 0.5, "draws": 2},
        "cache": {"encoding": "fp32"},
        "extract": {"batch_size": 4, "device": "cpu"},
        "ray": {"enabled": False},
        "student": {"size": "nano", "drop_path": 0.1},
        "train": {
            "epochs": 10,
            "batch_size": 8,
            "lr": 1.0e-3,
            "warmup_epochs": 1,
            "precision": "fp32",
            "device": "cpu",
            "log_every": 1,
        },
    }


@pytest.fixture
def make_config(usual: dict[str, Any], tmp_path: Path) -> MakeConfig:
    """Writes a config file; keyword arguments are merged in, section by section."""
    return functools.partial(write_config, tmp_path, usual)


@pytest.fixture
def make_run(make_config: MakeConfig) -> Callable[..., RunConfig]:
    """The same, loaded."""
    return lambda name="small", **sections: load(make_config(name, **sections))


@pytest.fixture(scope="session")
def usual_cache(usual: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the usual config extracts, in this process; only to be read."""
    config = load(write_config(tmp_path_factory.mktemp("usual"), usual))
    with make_progress() as progress:
        extract(config, progress=progress)
    return Path(config.cache.dir)


@pytest.fixture
def own_cache(usual_cache: Path, tmp_path: Path) -> Path:
    """A copy of it, where the configs of `make_config` look for their cache."""
    return shutil.copytree(usual_cache, tmp_path / "cache")
