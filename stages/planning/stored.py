"""What a clip takes in a cache, in every encoding: some clips are stored, and the files measured.

    calibrate on half of them -> own cache     the run's encoding and masks, timed
                              -> others        the other encodings, the same units
                              -> whole         all encodings, every unit kept (or only planned)

The caches lie in a temporary folder and are written by what writes every cache.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kdhiera.cache.calibration import Calibration
from kdhiera.cache.commit import Cache
from kdhiera.cache.encoding import ENCODINGS, NEEDS_BASIS, basis_to_npz, start_calibration
from kdhiera.cache.expected import expect_shard
from kdhiera.cache.fingerprint import Identity, declared_base, mask_plan_of
from kdhiera.cache.layout import ColumnStatus, PartId, column_id, parse_column
from kdhiera.cache.records import SourceInfo
from kdhiera.cache.table import Row
from kdhiera.cache.totals import sum_up
from kdhiera.cache.writer import Attempt
from kdhiera.config import RunConfig
from kdhiera.data.clip import Clip
from kdhiera.data.shards import Sample
from kdhiera.featurize import Featurized, Featurizer, Layers, TargetKey
from kdhiera.progress import Progress
from kdhiera.stages.assemble import provenance
from kdhiera.stages.extraction.plan import Identities
from kdhiera.stages.extraction.worker import row_of

_PART = PartId(shard_id="trial", view=0)
_BASE = ("rows", "units", "scores", "pixels")
_DAY_SECONDS = 24 * 3600.0

Clips = Sequence[tuple[Sample, Clip]]


@dataclass(frozen=True, kw_only=True)
class ClipBytes:
    """Stored bytes of one good clip, every file of its arrays counted.

    Args:
        base: By `rows`, `units`, `scores` and `pixels`.
        layers: By (teacher, layer).
    """

    base: Mapping[str, float]
    layers: Mapping[TargetKey, float]

    @property
    def total(self) -> float:
        """Base and all layers."""
        return sum(self.base.values()) + sum(self.layers.values())


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What storing some clips came to.

    Args:
        clips: By encoding, and whether every unit is kept.
        part_bytes: Of a part, beside its clips: channel statistics and descriptions.
        cpu_seconds: CPU time to encode, compress, write and read back what a clip leaves.
        wall_seconds: The same by the clock.
        own: The cache in the run's encoding, complete.
    """

    clips: Mapping[tuple[str, bool], ClipBytes]
    part_bytes: float
    cpu_seconds: float
    wall_seconds: float
    own: Path


def store_clips(
    config: RunConfig,
    identities: Identities,
    base: Identity,
    featurizer: Featurizer,
    clips: Clips,
    *,
    folder: Path,
    progress: Progress,
) -> Stored:
    """Store the clips in every encoding, with the units that are planned and with all units.

    Args:
        config: The run.
        identities: What its teachers make.
        base: Identity of the base, whose masks say which units the run keeps.
        featurizer: The run's teachers.
        clips: Decoded clips; half of them calibrate.
        folder: Empty; gets the caches.
        progress: Where progress is shown.
    """
    layers = {name: teacher.layers for name, teacher in config.teachers.items()}
    bar = progress.start("store", 2 * len(clips) + len(clips) // 2, "clips")
    calibrations: dict[TargetKey, Calibration] = {}
    for batch in _batches(clips[: len(clips) // 2], featurizer.batch_size):
        _calibrate(calibrations, featurizer, batch, layers)
        progress.advance(bar, len(batch))
    widths = featurizer.widths(layers)
    bases = {
        key: basis_to_npz(calibration.basis(error=config.cache.compact_error))
        for key, calibration in calibrations.items()
    }

    def store(name: str, base: Identity, encodings: Sequence[str]) -> _Store:
        return _Store(folder / name, base, _columns(identities, encodings), widths, bases)

    encoding, keeps_all = config.cache.encoding, mask_plan_of(base).keep_all
    own = store("own", base, (encoding,))
    others = store("others", base, [e for e in ENCODINGS if e != encoding])
    elsewise = {**base, "masks": _masks(config, keep_all=not keeps_all)}
    apart = store("apart", elsewise, ENCODINGS)
    for stores in ((own, others), (apart,)):
        looking = replace(featurizer, plan=stores[0].cache.mask_plan)
        for batch in _batches(clips, featurizer.batch_size):
            out = looking(
                np.stack([clip.frames for _, clip in batch]),
                uids=[sample.uid for sample, _ in batch],
                view=0,
                layers=layers,
            )
            for one in stores:
                one.add([row_of(sample, clip) for sample, clip in batch], out)
            progress.advance(bar, len(batch))
        for one in stores:
            one.commit()
    progress.finish(bar)
    kept = own.clip_bytes() | others.clip_bytes()
    return Stored(
        clips={(e, keeps_all): found for e, found in kept.items()}
        | {(e, not keeps_all): found for e, found in apart.clip_bytes().items()},
        part_bytes=own.part_bytes(),
        cpu_seconds=own.cpu_seconds / len(clips),
        wall_seconds=own.wall_seconds / len(clips),
        own=folder / "own",
    )


class _Store:
    """A cache with one part, filled batch by batch."""

    def __init__(
        self,
        folder: Path,
        base: Identity,
        columns: Mapping[str, tuple[TargetKey, Identity]],
        widths: Mapping[TargetKey, int],
        bases: Mapping[TargetKey, bytes],
    ) -> None:
        made_by = provenance()
        self.cache = Cache.create_or_open(folder, base, provenance=made_by)
        self._columns = {column: key for column, (key, _) in columns.items()}
        for column, (key, identity) in columns.items():
            self.cache.columns.ensure(column, identity, provenance=made_by)
            if parse_column(column).encoding in NEEDS_BASIS:
                self.cache.columns.publish_basis(column, bases[key])
        expect_shard(self.cache, _PART.shard_id, path=_PART.shard_id)
        self._attempt = Attempt(
            self.cache,
            _PART,
            source=SourceInfo(path=_PART.shard_id, num_bytes=0, sha256="0" * 64),
            columns={column: widths[key] for column, key in self._columns.items()},
            provenance=made_by,
            lease_seconds=_DAY_SECONDS,
        )
        self._num_rows = 0
        self.cpu_seconds = self.wall_seconds = 0.0

    def add(self, rows: Sequence[Row], out: Featurized) -> None:
        """Append clips, all of them good."""
        began = time.process_time(), time.perf_counter()
        self._attempt.append_rows(rows, units=out.units, scores=out.scores, pixels=out.pixels)
        for column, key in self._columns.items():
            status = np.where(out.finite[key], ColumnStatus.OK, ColumnStatus.NONFINITE)
            self._attempt.append_features(column, out.features[key], status.astype(np.uint8))
            self._attempt.append_statistics(column, out.statistics[key])
        self._num_rows += len(rows)
        self._took(began)

    def commit(self) -> None:
        """Publish the part."""
        began = time.process_time(), time.perf_counter()
        self._attempt.commit()
        self._took(began)

    def clip_bytes(self) -> dict[str, ClipBytes]:
        """Bytes of a clip by encoding."""
        stored = self._stored()
        base = {name: stored[name] / self._num_rows for name in _BASE}
        layers: dict[str, dict[TargetKey, float]] = {}
        for column, key in self._columns.items():
            encoding = parse_column(column).encoding
            layers.setdefault(encoding, {})[key] = stored[column] / self._num_rows
        return {e: ClipBytes(base=base, layers=found) for e, found in layers.items()}

    def part_bytes(self) -> float:
        """Bytes of a part that are of no clip."""
        return self._stored()["other"]

    def _stored(self) -> Counter[str]:
        return sum_up(self.cache, unnamed=False).stored

    def _took(self, began: tuple[float, float]) -> None:
        self.cpu_seconds += time.process_time() - began[0]
        self.wall_seconds += time.perf_counter() - began[1]


def _calibrate(
    calibrations: dict[TargetKey, Calibration], featurizer: Featurizer, batch: Clips, layers: Layers
) -> None:
    """Take in all units of a batch of clips, as the basis of a run does."""
    frames = np.stack([clip.frames for _, clip in batch])
    outputs = featurizer.teach(frames, layers=layers, with_scores=False)
    for teacher, names in layers.items():
        for name in names:
            units = featurizer.grid.tokens_to_units(outputs[teacher].features[name].float())
            key = teacher, name
            if key not in calibrations:
                calibrations[key] = start_calibration("compact", width=units.shape[-1])
            calibrations[key].add(units[units.isfinite().flatten(1).all(1)])


def _batches(clips: Clips, size: int) -> Iterator[Clips]:
    for start in range(0, len(clips), size):
        yield clips[start : start + size]


def _columns(
    identities: Identities, encodings: Sequence[str]
) -> dict[str, tuple[TargetKey, Identity]]:
    """Columns of all layers in some encodings, each with its identity."""
    found: dict[str, tuple[TargetKey, Identity]] = {}
    for own, identity in identities.columns.items():
        name = parse_column(own)
        for encoding in encodings:
            column = column_id(name.teacher, name.layer, encoding)
            found[column] = (name.teacher, name.layer), {**identity, "encoding": encoding}
    return found


def _masks(config: RunConfig, *, keep_all: bool) -> Any:
    """The masks of a base that keeps every unit, or what the config plans."""
    masks = config.masks.model_copy(update={"keep": "all" if keep_all else "plan"})
    return declared_base(config.model_copy(update={"masks": masks}))["masks"]
