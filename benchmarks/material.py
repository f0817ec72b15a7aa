"""What the benchmarks of storage share: real clips, all that teachers say of them, and caches.

The demo's videos and teachers are run once; every cache is then written from those features by
the writer that extraction uses, so that encodings and mask plans differ and nothing else does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from kdhiera.cache.commit import Cache
from kdhiera.cache.encoding import NEEDS_BASIS, basis_to_npz, calibrate
from kdhiera.cache.fingerprint import base_identity, column_identity
from kdhiera.cache.layout import PartId, parse_column
from kdhiera.cache.records import SourceInfo
from kdhiera.cache.stats import channel_statistics
from kdhiera.cache.table import Row
from kdhiera.cache.writer import Attempt
from kdhiera.config import RunConfig, load
from kdhiera.data.clip import Clip, ClipRequest
from kdhiera.data.ordered import decode_samples
from kdhiera.data.sandbox import Sandbox
from kdhiera.data.shards import expand, index_shard, read_shard
from kdhiera.featurize import Featurizer
from kdhiera.stages.assemble import columns_of, decode_limits, featurizer_of
from kdhiera.views import RowStatus

BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Taught:
    """Some clips of one view and all that the teachers say of them.

    Args:
        view: View number.
        rows: Of the clips, all good.
        frames: The clips.
        scores: Scores of all units.
        features: Raw features of all tokens, unit-major, by (teacher, layer).
    """

    view: int
    rows: Sequence[Row]
    frames: UInt8[np.ndarray, "n f y x 3"]
    scores: Float32[np.ndarray, "n slots s"]
    features: Mapping[tuple[str, str], Float32[Tensor, "n units 4 c"]]

    def __getitem__(self, clips: slice) -> Taught:
        """Some of the clips."""
        return replace(
            self,
            rows=self.rows[clips],
            frames=self.frames[clips],
            scores=self.scores[clips],
            features={key: values[clips] for key, values in self.features.items()},
        )


def demo_config(*changes: str) -> RunConfig:
    """The demo's config with its teachers in fp32, and some settings changed."""
    names = load("configs/demo.yaml").teachers
    fixed = [f"teachers.{name}.precision=fp32" for name in names]
    return load("configs/demo.yaml", [*fixed, *changes])


def teach(config: RunConfig, *, shard: int, view: int, num_clips: int) -> Taught:
    """Decode the first good clips of a shard and run the teachers over them.

    Args:
        config: The run.
        shard: Number of the shard among the config's.
        view: View number.
        num_clips: How many clips; fewer if the shard has not so many.
    """
    featurizer = featurizer_of(config, device=torch.device("cpu"), keep_all=True)
    clips: list[Clip] = []
    rows: list[Row] = []
    for row, clip in _decoded(config, shard, view):
        rows.append(row)
        clips.append(clip)
        if len(clips) == num_clips:
            break
    frames = np.stack([clip.frames for clip in clips])
    scores, features = _features(config, featurizer, frames)
    return Taught(view=view, rows=rows, frames=frames, scores=scores, features=features)


def make_cache(folder: Path, config: RunConfig, calibration: Taught | None = None) -> Cache:
    """An empty cache that knows the config's columns.

    Args:
        folder: A new folder.
        config: The run; its encoding and mask plan are the cache's.
        calibration: Clips that bases are made from; others than are stored.
    """
    identity = base_identity(config, score_teacher={"weights_sha256": "-"})
    cache = Cache.create_or_open(folder, identity, provenance={})
    for column, (teacher, layer) in columns_of(config).items():
        made = column_identity(
            config, teacher, layer, identity={}, weights_sha256="-", precision="fp32"
        )
        cache.columns.ensure(column, made, provenance={})
        encoding = parse_column(column).encoding
        if encoding in NEEDS_BASIS:
            assert calibration is not None, encoding
            tokens = calibration.features[teacher, layer]
            basis = calibrate(encoding, tokens, error=config.cache.compact_error)
            cache.columns.publish_basis(column, basis_to_npz(basis))
    return cache


def write_part(cache: Cache, config: RunConfig, shard_id: str, taught: Taught) -> None:
    """Store some clips as a part, as extraction does."""
    plan, grid = cache.mask_plan, cache.grid
    units = np.full((len(taught.rows), cache.max_kept), -1, np.int16)
    for kept, row, scores in zip(units, taught.rows, taught.scores, strict=True):
        shown = plan.kept_units(scores, uid=row.uid, view=taught.view)
        kept[: len(shown)] = shown
    every = np.arange(len(units))[:, None]
    pixels = grid.frames_to_units(taught.frames)[every, np.maximum(units, 0)]
    columns = columns_of(config)
    attempt = Attempt(
        cache,
        PartId(shard_id=shard_id, view=taught.view),
        source=SourceInfo(path=f"{shard_id}.tar", num_bytes=1, sha256=None),
        columns={c: taught.features[key].shape[-1] for c, key in columns.items()},
        provenance={},
        lease_seconds=3600.0,
    )
    with attempt:
        attempt.append_rows(taught.rows, units=units, scores=taught.scores, pixels=pixels)
        for column, key in columns.items():
            kept_features = taught.features[key][every, np.maximum(units, 0)]
            attempt.append_features(column, kept_features, np.zeros(len(units), np.uint8))
            attempt.append_statistics(column, channel_statistics(taught.features[key]))
        attempt.commit()


def _decoded(config: RunConfig, shard: int, view: int) -> Iterator[tuple[Row, Clip]]:
    index = index_shard(expand(config.data.shards)[shard])
    samples = read_shard(index, video_extensions=config.data.video_extensions)
    wanted = ((s, ClipRequest(uid=s.uid, view=view, policy=config.view_policy)) for s in samples)
    with Sandbox(decode_limits(config.decode), num_children=1) as sandbox:
        for sample, clip in decode_samples(sandbox, wanted, in_flight=2 * BATCH):
            if not isinstance(clip, Clip):
                continue
            row = Row(
                uid=sample.uid,
                key=sample.key,
                status=RowStatus.OK,
                num_frames=clip.num_frames,
                view=clip.view,
                pts_seconds=clip.pts_seconds,
                decoder=clip.decoder,
                clip_crc32c=clip.crc32c,
                source_offset=sample.offset,
                source_bytes=sample.num_bytes,
                labels=sample.labels,
            )
            yield row, clip


def _features(
    config: RunConfig, featurizer: Featurizer, frames: UInt8[np.ndarray, "n f y x 3"]
) -> tuple[np.ndarray, dict[tuple[str, str], Tensor]]:
    """Scores and features of all units, a batch at a time."""
    layers = {name: teacher.layers for name, teacher in config.teachers.items()}
    scores: list[np.ndarray] = []
    features: dict[tuple[str, str], list[Tensor]] = {
        (teacher, layer): [] for teacher, names in layers.items() for layer in names
    }
    for start in range(0, len(frames), BATCH):
        clips = frames[start : start + BATCH]
        found = featurizer(clips, uids=[""] * len(clips), view=0, layers=layers)
        scores.append(found.scores)
        for key, pieces in features.items():
            pieces.append(found.features[key])
    return np.concatenate(scores), {key: torch.cat(pieces) for key, pieces in features.items()}
