"""Runs from a real cache that grows while they are stopped."""

import os
import signal
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_loop import Watcher, lines_of
from tiny_run import SCHEDULE, WIDTH, MemorySource, Setup

from kdhiera.cache.commit import Cache
from kdhiera.cache.fingerprint import base_identity, column_identity
from kdhiera.cache.layout import PartId
from kdhiera.cache.reader import CacheReader
from kdhiera.cache.records import SourceInfo
from kdhiera.cache.rows import KeptRows
from kdhiera.cache.snapshot import load_snapshot, save_snapshot
from kdhiera.cache.stats import channel_statistics
from kdhiera.cache.table import Row
from kdhiera.cache.writer import Attempt
from kdhiera.config import ObjectiveConfig, RunConfig
from kdhiera.errors import MismatchError, StoppedError
from kdhiera.objective.targets import ChannelMoments
from kdhiera.training import checkpoint
from kdhiera.views import ClipView, RowStatus

COLUMNS = {"image.9.fp32": WIDTH, "video.3.fp32": 16}
STANDARDIZE = ObjectiveConfig(normalise="standardize")


def make_cache(root: Path) -> Cache:
    run = RunConfig.model_validate(
        {
            "name": "tiny",
            "run_dir": "runs",
            "data": {"shards": "shard-*.tar"},
            "clip": {"num_frames": 4, "height": 64, "width": 64},
            "teachers": {
                "image": {"kind": "timm", "model": "vit", "layers": [9]},
                "video": {"kind": "module", "factory": "a.b:c", "layers": [3]},
            },
            "scores": {"teacher": "image"},
            "masks": {"keep": "all"},
            "cache": {"dir": str(root), "encoding": "fp32"},
        }
    )
    identity = base_identity(run, score_teacher={"weights_sha256": "11"})
    cache = Cache.create_or_open(root, identity, provenance={})
    for column in COLUMNS:
        teacher, layer, _ = column.split(".")
        made = column_identity(
            run, teacher, layer, identity={}, weights_sha256="22", precision="fp32"
        )
        cache.columns.ensure(column, made, provenance={})
    return cache


def write_shard(cache: Cache, shard_id: str, num_rows: int = 9) -> None:
    """Random clips, all of whose units are kept."""
    clips = MemorySource(num_rows, num_views=1, seed=zlib.crc32(shard_id.encode()))
    view = ClipView(frame_indices=(0, 1, 2, 3), crop=(0, 0, 64, 64), flip=False)
    rows = [
        Row(
            uid=f"{shard_id}/{i}", key=f"{i}", status=RowStatus.OK, num_frames=4, view=view,
            pts_seconds=(0.0, 0.1, 0.2, 0.3), decoder="pyav", clip_crc32c=i, source_offset=512 * i,
            source_bytes=512, labels={},
        )
        for i in range(num_rows)
    ]  # fmt: skip
    units = np.tile(np.arange(8, dtype=np.int16), (num_rows, 1))
    with Attempt(
        cache,
        PartId(shard_id=shard_id, view=0),
        source=SourceInfo(path="shard.tar", num_bytes=1, sha256=None),
        columns=COLUMNS,
        base=None,
        provenance={},
        lease_seconds=1000.0,
    ) as attempt:
        pixels = np.random.default_rng(num_rows).integers(
            0, 256, (num_rows, 8, 2, 32, 32, 3), dtype=np.uint8
        )
        attempt.append_rows(rows, units=units, scores=clips.scores[0], pixels=pixels)
        for column, width in COLUMNS.items():
            features = torch.from_numpy(clips.features[0][..., :width].copy()) * 3 + 1
            attempt.append_features(column, features, np.zeros(num_rows, np.uint8))
            attempt.append_statistics(column, channel_statistics(features))
        attempt.commit()


@dataclass(frozen=True)
class Source:
    """A reader as the loop wants it."""

    reader: CacheReader

    @property
    def num_samples(self) -> int:
        return self.reader.num_samples

    def read(self, samples: np.ndarray, *, view: int) -> KeptRows:
        return self.reader.read(samples, view=view)


def run(
    cache: Cache, folder: Path, *, stop_at: int = -1, shift: float = 0.0
) -> list[dict[str, Any]]:
    """Train, from what the folder's snapshot names if it has one.

    `shift` falsifies the means that the run is started with.
    """
    folder.mkdir(exist_ok=True)
    reader = CacheReader(cache, num_views=1, columns=tuple(COLUMNS), snapshot=load_snapshot(folder))
    save_snapshot(folder, reader.snapshot)
    setup = Setup(run_dir=folder, identity={"snapshot": reader.snapshot_sha256}, masks=SCHEDULE)
    targets = [
        replace(spec, column=column, statistics=moments(reader, column, shift))
        for spec, column in zip(setup.targets(), COLUMNS, strict=True)
    ]
    setup.run(
        Source(reader),
        targets=targets,
        objective=STANDARDIZE,
        num_views=1,
        epochs=3,
        log_every=1,
        save_every=1,
        progress=Watcher(stop_at, lambda: os.kill(os.getpid(), signal.SIGTERM)),
    )
    return lines_of(folder)


def moments(reader: CacheReader, column: str, shift: float) -> ChannelMoments:
    found = reader.statistics(column)
    return ChannelMoments(
        mean=torch.tensor(found.mean) + shift, std=torch.tensor(found.std), count=found.count
    )


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    made = make_cache(tmp_path / "cache")
    for shard in ("b-0", "d-0"):
        write_shard(made, shard)
    return made


def test_a_run_that_goes_on_after_its_cache_has_grown_has_the_same_losses(
    cache: Cache, tmp_path: Path
) -> None:
    whole = run(cache, tmp_path / "whole")
    assert len(whole) == 12
    with pytest.raises(StoppedError, match="stopped after step 5 of 12"):
        run(cache, tmp_path / "stopped", stop_at=5)
    for shard in ("a-0", "c-0", "e-0"):
        write_shard(cache, shard)
    assert run(Cache.open(cache.url), tmp_path / "stopped") == whole
    fresh = run(cache, tmp_path / "fresh")
    assert len(fresh) == 33
    assert [line["loss"] for line in fresh[:12]] != [line["loss"] for line in whole]


def test_a_run_whose_commits_are_gone_is_refused(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        run(cache, tmp_path / "run", stop_at=5)
    cache.store.delete_folder("commits/d-0")
    with pytest.raises(MismatchError, match=r"base of d-0 view 0 .* is gone in the cache"):
        run(cache, tmp_path / "run")


def test_a_checkpoint_holds_the_statistics_and_a_run_goes_on_with_them(
    cache: Cache, tmp_path: Path
) -> None:
    with pytest.raises(StoppedError):
        run(cache, tmp_path / "run", stop_at=5)
    state = checkpoint.load_latest(tmp_path / "run" / "checkpoints")
    assert state is not None
    reader = CacheReader(cache, num_views=1, columns=tuple(COLUMNS))
    frozen = state["learner"]["statistics"]
    for name, column in zip(("image/9", "video/3"), COLUMNS, strict=True):
        found = reader.statistics(column)
        assert frozen[name]["column"] == column
        assert frozen[name]["count"] == found.count == 18 * 8 * 4
        assert frozen[name]["mean"].dtype is torch.float64
        assert np.array_equal(frozen[name]["mean"].numpy(), found.mean)
        assert np.array_equal(frozen[name]["std"].numpy(), found.std)


def test_a_run_goes_on_with_the_statistics_that_it_began_with(cache: Cache, tmp_path: Path) -> None:
    whole = run(cache, tmp_path / "whole")
    with pytest.raises(StoppedError):
        run(cache, tmp_path / "stopped", stop_at=5)
    assert run(cache, tmp_path / "stopped", shift=0.5) == whole
    assert run(cache, tmp_path / "fresh", shift=0.5) != whole


def test_a_part_that_was_made_anew_is_refused_though_its_statistics_are_the_same(
    cache: Cache, tmp_path: Path
) -> None:
    with pytest.raises(StoppedError):
        run(cache, tmp_path / "run", stop_at=5)
    cache.store.delete_folder("commits/d-0")  # as `cache verify --repair` does
    write_shard(cache, "d-0")
    with pytest.raises(MismatchError, match=r"base of d-0 view 0 .* was replaced by another one"):
        run(Cache.open(cache.url), tmp_path / "run")
