"""What one extraction actor does: parts, one after another.

Three things overlap, each bounded:

    children: decode (killable)  ->  this thread: teachers  ->  writer thread: encode, store
        `2 * batch_size` clips          one batch                  one batch
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from kdhiera.cache.commit import Cache
from kdhiera.cache.encoding import basis_to_npz, start_calibration
from kdhiera.cache.fingerprint import column_identity
from kdhiera.cache.layout import ColumnStatus, PartId, parse_column
from kdhiera.cache.reader import BaseRows, read_base
from kdhiera.cache.table import Row
from kdhiera.cache.writer import Attempt, CommitResult
from kdhiera.config import RunConfig
from kdhiera.data.clip import Clip, ClipRequest, DecodeFailure
from kdhiera.data.ordered import decode_samples
from kdhiera.data.sandbox import Sandbox
from kdhiera.data.shards import Sample, ShardIndex, ShardPass
from kdhiera.devices import resolve_device
from kdhiera.errors import KdhieraError, StoppedError
from kdhiera.featurize import Featurized
from kdhiera.machine import few_arenas
from kdhiera.stages.assemble import (
    columns_of,
    decode_limits,
    featurizer_of,
    provenance,
    unread_source,
)
from kdhiera.views import RowStatus

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PartTask:
    """One part to bring up to date.

    Args:
        shard: The shard's index.
        view: View number.
        base: Whether the rows themselves are missing (else they are replayed).
        columns: Missing columns by id, as (teacher, layer).
    """

    shard: ShardIndex
    view: int
    base: bool
    columns: Mapping[str, tuple[str, str]]

    @property
    def part(self) -> PartId:
        """Where the result goes."""
        return PartId(shard_id=self.shard.shard_id, view=self.view)

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.shard.shard_id} view {self.view}"


@dataclass(frozen=True, kw_only=True)
class BasisTask:
    """The making of bases, from the first good clips of view 0 in sorted order.

    Args:
        shards: In sorted order of their ids; as many are read as are needed.
        columns: Columns without a basis by id, as (teacher, layer).
        num_rows: Clips to make them from; fewer if there are not so many.
    """

    shards: tuple[ShardIndex, ...]
    columns: Mapping[str, tuple[str, str]]
    num_rows: int

    @property
    def name(self) -> str:
        """For people."""
        return f"basis of {', '.join(self.columns)}"


Task = PartTask | BasisTask


@dataclass(frozen=True, kw_only=True)
class PartResult:
    """What one task came to.

    Args:
        num_bytes: Bytes that were stored.
        seconds: Wall time.
    """

    num_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _RowClip:
    """One row of a part with its clip; without one, why is in the row or it is a mismatch."""

    row: Row
    clip: Clip | None


class PartExtractor:
    """Teachers, decoding children and a writer thread, kept warm from part to part.

    Args:
        config: The run; teacher precisions are resolved already.
        stop: Once set, the part at hand is abandoned at the next batch.
        on_counts: Told rows and bad rows done so far, after every batch.
    """

    def __init__(
        self, config: RunConfig, *, stop: threading.Event, on_counts: Callable[[int, int], None]
    ) -> None:
        self._config = config
        self._stop = stop
        self._on_counts = on_counts
        self._rows = self._bad = 0
        device = resolve_device(config.extract.device)
        torch.set_num_threads(config.extract.cpus_per_actor)
        few_arenas()
        self._cache = Cache.open(config.cache.dir)
        self._featurizer = featurizer_of(config, device=device, plan=self._cache.mask_plan)
        self._check_columns()
        self._widths = self._featurizer.widths(
            {name: teacher.layers for name, teacher in config.teachers.items()}
        )
        self._sandbox = Sandbox(
            decode_limits(config.decode),
            num_children=config.decode.num_children or config.extract.cpus_per_actor,
        )

    def _check_columns(self) -> None:
        """What is written under a column's name is what these very teachers make of it."""
        config, teachers = self._config, self._featurizer.teachers
        for column, (name, layer) in columns_of(config).items():
            identity = column_identity(
                config,
                name,
                layer,
                identity=teachers[name].identity,
                weights_sha256=teachers[name].weights_sha256,
                precision=config.teachers[name].precision,
            )
            self._cache.columns.check(column, identity)

    def close(self) -> None:
        """End the decoding children."""
        self._sandbox.close()

    def run(self, task: Task) -> PartResult:
        """Compute what is missing of one part and commit it, or make bases.

        Raises:
            StoppedError: If asked to stop; the attempt is abandoned, nothing is committed.
        """
        started = time.monotonic()
        num_bytes = self._make_bases(task) if isinstance(task, BasisTask) else self._fill(task)
        return PartResult(num_bytes=num_bytes, seconds=time.monotonic() - started)

    def _fill(self, task: PartTask) -> int:
        lacks = self._cache.missing(task.part, list(task.columns))  # another run may be at it
        if not lacks:
            return 0
        task = replace(task, base=lacks.base, columns={c: task.columns[c] for c in lacks.columns})
        result = self._run(task, replay=not task.base)
        if result.replay_needed:
            logger.info("%s: another run stored other rows; replaying those", task.name)
            result = self._run(task, replay=True)
        return result.num_bytes

    def _make_bases(self, task: BasisTask) -> int:
        """Calibrate on all tokens of the first good clips; a basis that is there stays."""
        drawn = (item for shard in task.shards for item in self._first_views(shard))
        good = itertools.islice((i for i in drawn if i.clip is not None), task.num_rows)
        calibrations = {
            column: start_calibration(parse_column(column).encoding, width=self._widths[key])
            for column, key in task.columns.items()
        }
        for batch in self._batches(good):
            clips = np.stack([item.clip.frames for item in batch if item.clip is not None])
            out = self._featurizer.teach(clips, layers=_layers(task.columns), with_scores=False)
            for column, (teacher, layer) in task.columns.items():
                units = self._featurizer.grid.tokens_to_units(out[teacher].features[layer].float())
                calibrations[column].add(units[units.isfinite().flatten(1).all(1)])
            self._rows += len(batch)
            self._on_counts(self._rows, self._bad)
            if self._stop.is_set():
                raise StoppedError(f"stopped at the {task.name}: run again to go on")
        num_bytes = 0
        for column, calibration in calibrations.items():
            if not calibration.num_units:
                raise KdhieraError(f"no clip of data.shards decodes: the {task.name} has no data")
            data = basis_to_npz(calibration.basis(error=self._config.cache.compact_error))
            self._cache.columns.publish_basis(column, data)
            num_bytes += len(data)
        return num_bytes

    def _run(self, task: PartTask, *, replay: bool) -> CommitResult:
        found = self._cache.part_commits(task.part) if replay else None
        base = found.base if found else None
        stored = read_base(self._cache, base) if base else None
        attempt = Attempt(
            self._cache,
            task.part,
            source=unread_source(task.shard),
            columns={column: self._widths[key] for column, key in task.columns.items()},
            base=base,
            provenance=provenance(),
            lease_seconds=self._config.extract.lease_seconds,
        )
        with (
            attempt,
            self._read(task.shard) as shard,
            ThreadPoolExecutor(1, thread_name_prefix="write") as writer,
        ):
            samples = shard.samples()
            drawn = self._replayed(task, stored, samples) if stored else None
            items = drawn or self._drawn(samples, task.view)
            written: Future[None] | None = None
            done = 0
            for batch in self._batches(items):
                units = None if stored is None else stored.units[done : done + len(batch)]
                out = self._teach(task, batch, units)
                if written is not None:
                    written.result()
                written = writer.submit(
                    self._write, task, attempt, batch, out, replay=base is not None
                )
                done += len(batch)
                self._rows += len(batch)
                self._bad += sum(item.clip is None for item in batch)
                self._on_counts(self._rows, self._bad)
                if self._stop.is_set():
                    raise StoppedError(f"stopped while extracting {task.name}: run again to go on")
            if written is not None:
                written.result()
            return attempt.commit(source_sha256=shard.sha256())

    def _first_views(self, shard: ShardIndex) -> Iterator[_RowClip]:
        with self._read(shard, hashed=False) as opened:
            yield from self._drawn(opened.samples(), 0)

    def _drawn(self, samples: Iterable[Sample], view: int) -> Iterator[_RowClip]:
        """All samples, each with a newly drawn view."""
        policy = self._config.view_policy
        wanted = (
            (sample, ClipRequest(uid=sample.uid, view=view, policy=policy)) for sample in samples
        )
        for sample, outcome in self._decode(wanted):
            clip = outcome if isinstance(outcome, Clip) else None
            yield _RowClip(row=row_of(sample, outcome), clip=clip)

    def _replayed(
        self, task: PartTask, stored: BaseRows, samples: Iterable[Sample]
    ) -> Iterator[_RowClip]:
        """The good rows of the committed base, each with exactly its stored view."""
        good = {r.uid: r for r in stored.rows if r.status is RowStatus.OK}
        policy = self._config.view_policy
        wanted = (
            (
                sample,
                ClipRequest(
                    uid=sample.uid,
                    view=task.view,
                    policy=policy,
                    replay=good[sample.uid].view,
                    replay_decoder=good[sample.uid].decoder,
                ),
            )
            for sample in samples
            if sample.uid in good
        )
        for sample, outcome in self._decode(wanted):
            row = good[sample.uid]
            same = isinstance(outcome, Clip) and outcome.crc32c == row.clip_crc32c
            yield _RowClip(row=row, clip=outcome if same and isinstance(outcome, Clip) else None)

    def _read(self, shard: ShardIndex, *, hashed: bool = True) -> ShardPass:
        return ShardPass(
            shard,
            video_extensions=self._config.data.video_extensions,
            max_video_bytes=self._config.decode.max_video_bytes,
            hashed=hashed,
        )

    def _decode(
        self, wanted: Iterable[tuple[Sample, ClipRequest]]
    ) -> Iterator[tuple[Sample, Clip | DecodeFailure]]:
        ahead = 2 * self._config.extract.batch_size
        return decode_samples(self._sandbox, wanted, in_flight=ahead)

    def _batches(self, rows: Iterable[_RowClip]) -> Iterator[list[_RowClip]]:
        """Consecutive items with up to `batch_size` clips among them."""
        batch: list[_RowClip] = []
        clips = 0
        for item in rows:
            batch.append(item)
            clips += item.clip is not None
            if clips >= self._config.extract.batch_size:
                yield batch
                batch, clips = [], 0
        if batch:
            yield batch

    def _teach(
        self, task: PartTask, batch: Sequence[_RowClip], units: np.ndarray | None
    ) -> Featurized | None:
        present = [i for i, item in enumerate(batch) if item.clip is not None]
        if not present:
            return None
        return self._featurizer(
            np.stack([item.clip.frames for item in batch if item.clip is not None]),
            uids=[batch[i].row.uid for i in present],
            view=task.view,
            layers=_layers(task.columns),
            units=None if units is None else units[present],
        )

    def _write(
        self,
        task: PartTask,
        attempt: Attempt,
        batch: Sequence[_RowClip],
        out: Featurized | None,
        *,
        replay: bool,
    ) -> None:
        """Append one batch; in a replay, rows without a clip get `replay_mismatch`."""
        grid, bound = self._featurizer.grid, self._cache.max_kept
        if not replay:
            empty = np.zeros((0, grid.slots, grid.units_per_slot), np.float32)
            attempt.append_rows(
                [item.row for item in batch],
                units=out.units if out else np.zeros((0, bound), np.int16),
                scores=out.scores if out else empty,
                pixels=out.pixels if out else np.zeros((0, bound, 2, 32, 32, 3), np.uint8),
            )
        present = [item.clip is not None for item in batch if replay or item.clip is not None]
        index = torch.tensor([i for i, there in enumerate(present) if there], dtype=torch.long)
        for column, key in task.columns.items():
            status = np.full(len(present), ColumnStatus.REPLAY_MISMATCH, np.uint8)
            if out is None:
                shape = (len(present), bound, 4, self._widths[key])
                attempt.append_features(column, torch.zeros(shape), status)
                continue
            found = out.features[key]
            status[index.numpy()] = np.where(
                out.finite[key], int(ColumnStatus.OK), int(ColumnStatus.NONFINITE)
            )
            if len(index) < len(present):
                whole = found.new_zeros(len(present), *found.shape[1:])
                whole[index.to(found.device)] = found
                found = whole
            attempt.append_features(column, found, status)
            attempt.append_statistics(column, out.statistics[key])


def _layers(columns: Mapping[str, tuple[str, str]]) -> dict[str, list[str]]:
    """Layers by teacher."""
    layers: dict[str, list[str]] = {}
    for teacher, layer in columns.values():
        layers.setdefault(teacher, []).append(layer)
    return layers


def row_of(sample: Sample, outcome: Clip | DecodeFailure) -> Row:
    """What is recorded of a sample."""
    if isinstance(outcome, DecodeFailure):
        return Row(
            uid=sample.uid,
            key=sample.key,
            status=outcome.status,
            message=outcome.message,
            source_offset=sample.offset,
            source_bytes=sample.num_bytes,
            labels=sample.labels,
        )
    return Row(
        uid=sample.uid,
        key=sample.key,
        status=RowStatus.OK,
        message=sample.message,
        num_frames=outcome.num_frames,
        view=outcome.view,
        pts_seconds=outcome.pts_seconds,
        decoder=outcome.decoder,
        clip_crc32c=outcome.crc32c,
        source_offset=sample.offset,
        source_bytes=sample.num_bytes,
        labels=sample.labels,
    )
