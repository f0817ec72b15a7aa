"""Reading committed rows by global index, many rows and columns at once.

Samples are numbered over the shards in sorted order, then in the order of the shard; a
sample is there if it is good in every view and column asked for. What was committed when
the reader opened is what it reads, whatever is added meanwhile.

    sample -> (shard, ordinal) -> array row in the part of the view asked for
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Float32, Int, Int16

from kdhiera.cache.arrays import read_array, reading_context, start_opening
from kdhiera.cache.commit import Cache
from kdhiera.cache.encoding import Codec
from kdhiera.cache.index import ShardIndex, build_index
from kdhiera.cache.layout import (
    ArraySpec,
    PartId,
    base_arrays,
    column_group,
)
from kdhiera.cache.records import BaseCommit, PartCommits
from kdhiera.cache.rows import KeptRows
from kdhiera.cache.snapshot import Snapshot, take
from kdhiera.cache.stats import ChannelStatistics, from_npz, merge, nothing
from kdhiera.cache.table import Row, read_columns
from kdhiera.errors import DamagedError

_OPEN_PARTS = 512
_POOL_BYTES = 128 * 2**20  # indices of Zarr shards and blocks of small rows
_THREADS = 8
_OPENING_THREADS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class _OpenPart:
    uids: Any  # Arrow text array over all rows, good or bad
    arrays: Mapping[str, Any]  # by `base.zarr/NAME` and `COLUMN/NAME`


@dataclass(frozen=True, kw_only=True)
class BaseRows:
    """Rows of a part and what replaying them needs.

    Args:
        rows: Good and bad samples in the order of the shard.
        units: Kept units of the good ones, -1 pads at the end.
        scores: Scores of all units of the good ones.
    """

    rows: Sequence[Row]
    units: Int16[np.ndarray, "r k"]
    scores: Float32[np.ndarray, "r slots units"]


def read_base(cache: Cache, base: BaseCommit) -> BaseRows:
    """Rows of a committed base, to add columns to it.

    Raises:
        DamagedError: If a file of the base is missing or damaged.
    """
    return BaseRows(
        rows=cache.rows(base),
        units=read_array(cache, base, "base.zarr/units"),
        scores=read_array(cache, base, "base.zarr/scores"),
    )


class CacheReader:
    """Rows of a cache by sample number; safe to use from several threads and processes.

    A reader that is sent to another process opens its files there.

    Args:
        cache: A cache whose identity was checked against the run (`Cache.check`,
            `Cache.check_column`).
        num_views: Views 0 .. num_views-1 are asked for.
        columns: Columns asked for.
        shards: Shard ids asked for; None means all that the cache has a part of.
        allow_partial: Leave out shards that lack a view or a column instead of refusing.
        snapshot: Commits that an earlier reader took, to read exactly these; then `shards` and
            `allow_partial` say nothing.

    Raises:
        MismatchError: If something asked for is not committed, or nothing is there, or a
            commit of the snapshot is gone.
        DamagedError: If a record is damaged or views of a shard disagree.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        num_views: int,
        columns: Sequence[str],
        shards: Collection[str] | None = None,
        allow_partial: bool = False,
        snapshot: Snapshot | None = None,
    ) -> None:
        index = build_index(
            cache,
            num_views=num_views,
            columns=columns,
            shards=shards,
            allow_partial=allow_partial,
            snapshot=snapshot,
        )
        self.cache = cache
        self.num_views = num_views
        self.columns = tuple(columns)
        self.coverage = index.coverage
        self._shards = index.shards
        self._parts = index.parts
        self._starts = np.cumsum([0, *(s.num_samples for s in index.shards)])
        self._widths = {c: _width(index.parts, c) for c in columns}
        self._codecs = {c: cache.columns.codec(c, width) for c, width in self._widths.items()}
        self._checked: set[PartId] = set()
        self._prepare()

    def _prepare(self) -> None:
        """What belongs to one process."""
        self._context = reading_context(_POOL_BYTES)
        self._opened: OrderedDict[PartId, _OpenPart] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_context", "_opened", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._prepare()

    @cached_property
    def snapshot(self) -> Snapshot:
        """The commits that are read, by name."""
        return take(self._parts, num_views=self.num_views, columns=self.columns)

    @cached_property
    def snapshot_sha256(self) -> str:
        """Hash over the records of all that is read."""
        return self.snapshot.sha256

    @property
    def num_samples(self) -> int:
        """Trainable samples, numbered 0 upwards."""
        return int(self._starts[-1])

    def read(
        self,
        samples: Int[np.ndarray, " b"],
        *,
        view: int,
        columns: Sequence[str] | None = None,
    ) -> KeptRows:
        """Read one view of some samples, all arrays at once.

        Args:
            samples: Sample numbers, in any order, repeats allowed.
            view: View number.
            columns: Columns to read; None means all that the reader was opened with.

        Returns:
            Rows in the order of `samples`.

        Raises:
            DamagedError: If a byte that is needed is missing or wrong.
        """
        wanted = self.columns if columns is None else tuple(columns)
        base = self._empty(base_arrays(self.cache.grid, self.cache.max_kept), len(samples))
        codes = {column: self._empty(self._column_specs(column), len(samples)) for column in wanted}
        targets = {f"base.zarr/{n}": ts.array(out, copy=False) for n, out in base.items()}
        for column, arrays in codes.items():
            targets |= {f"{column}/{n}": ts.array(a, copy=False) for n, a in arrays.items()}
        uids = np.empty(len(samples), object)
        pending: list[tuple[PartId, str, Any]] = []
        located = {
            PartId(shard_id=shard.shard_id, view=view): where
            for shard, *where in self._locate(samples, view)
        }
        parts = self._open(located)
        with ts.Batch() as batch:  # reads are submitted together when it closes
            for part, (places, ordinals, rows) in located.items():
                uids[places] = parts[part].uids.take(ordinals).to_pylist()
                for name, target in targets.items():
                    stored = parts[part].arrays[name][rows]
                    pending.append((part, name, target[places].write(stored, batch=batch)))
        for part, name, future in pending:
            try:
                future.result()
            except ValueError as error:
                raise self._unreadable(part, f"{name}: {error}") from None
        return KeptRows(
            uids=tuple(uids),
            units=base["units"],
            scores=base["scores"],
            pixels=base["pixels"],
            columns=codes,
        )

    def width(self, column: str) -> int:
        """Channels of a column."""
        return self._widths[column]

    def uids(self, samples: Int[np.ndarray, " b"]) -> list[str]:
        """Identities of samples, the same in every view."""
        return self._table_values(samples, "uid")

    def labels(self, samples: Int[np.ndarray, " b"]) -> list[dict[str, Any]]:
        """Labels that samples carried in their shard; empty where they had none."""
        return [json.loads(text) for text in self._table_values(samples, "labels")]

    def statistics(self, column: str) -> ChannelStatistics:
        """Channel statistics of a column over all tokens, kept or not, of all parts that are read.

        Of every row that was good when the part was made and whose features are finite, those
        that the column's encoding cannot hold (`overflow`) included: two encodings of a layer
        have the same statistics.
        """
        return self._statistics[column]

    @cached_property
    def _statistics(self) -> Mapping[str, ChannelStatistics]:
        """Of all columns, merged in sorted order of parts; a file is read once."""
        merged = {column: nothing(width) for column, width in self._widths.items()}
        with ThreadPoolExecutor(_THREADS) as pool:
            for found in pool.map(self._part_statistics, sorted(self._parts)):
                for column, more in found.items():
                    merged[column] = merge((merged[column], more), self._widths[column])
        return merged

    def _part_statistics(self, part: PartId) -> dict[str, ChannelStatistics]:
        files: dict[str, bytes] = {}  # by attempt
        found = {}
        for column in self.columns:
            commit = self._parts[part].columns[column]
            if commit.attempt not in files:
                files[commit.attempt] = self.cache.read_file(commit, "stats.npz")
            found[column] = from_npz(files[commit.attempt], column)
        return found

    def codec(self, column: str) -> Codec:
        """How a column that the reader was opened with is stored."""
        return self._codecs[column]

    def _column_specs(self, column: str) -> dict[str, ArraySpec]:
        """Arrays of a column that travel with a batch: all but its status."""
        return self._codecs[column].specs(self.cache.max_kept)

    def _empty(self, specs: Mapping[str, ArraySpec], rows: int) -> dict[str, np.ndarray]:
        return {n: np.empty((rows, *spec.shape), spec.dtype) for n, spec in specs.items()}

    def _locate(
        self, samples: Int[np.ndarray, " b"], view: int
    ) -> Iterator[tuple[ShardIndex, np.ndarray, np.ndarray, np.ndarray]]:
        """Shards of some samples, each with places in the request, ordinals, array rows."""
        numbers = np.asarray(samples, np.int64)
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < self.num_samples):
            raise IndexError(f"samples are numbered 0 to {self.num_samples - 1}")
        if not 0 <= view < self.num_views:
            raise IndexError(f"views are numbered 0 to {self.num_views - 1}, got {view}")
        owners = np.searchsorted(self._starts, numbers, side="right") - 1
        for owner in np.unique(owners):
            shard = self._shards[owner]
            places = np.flatnonzero(owners == owner)
            ordinals = shard.places(numbers[places] - self._starts[owner])
            yield shard, places, ordinals, shard.array_rows(ordinals, view)

    def _table_values(self, samples: Int[np.ndarray, " b"], column: str) -> list[Any]:
        values = np.empty(len(samples), object)
        for shard, places, ordinals, _ in self._locate(samples, 0):
            part = PartId(shard_id=shard.shard_id, view=0)
            table = self._read_rows(self._parts[part].base, column)
            values[places] = table[column].take(ordinals).to_pylist()
        return list(values)

    def _read_rows(self, base: BaseCommit, column: str) -> Any:
        return read_columns(self.cache.read_file(base, "rows.parquet"), [column])

    def _open(self, parts: Collection[PartId]) -> dict[PartId, _OpenPart]:
        """Handles of some parts; the files of one are checked when it is touched first."""
        with self._lock:
            found = {part: self._opened[part] for part in parts if part in self._opened}
        missing = [part for part in parts if part not in found]
        if missing:
            with ThreadPoolExecutor(min(len(missing), _OPENING_THREADS)) as pool:
                found |= zip(missing, pool.map(self._check_and_open, missing), strict=True)
        with self._lock:
            for part in parts:
                self._opened[part] = found[part]
                self._opened.move_to_end(part)
            while len(self._opened) > _OPEN_PARTS:
                self._opened.popitem(last=False)
        return found

    def _check_and_open(self, part: PartId) -> _OpenPart:
        commits = self._parts[part]
        columns = {column: commits.columns[column] for column in self.columns}
        if part not in self._checked:
            self.cache.check_files(commits.base, *columns.values())
            self._checked.add(part)
        folder = f"{self.cache.folder(commits.base)}/base.zarr"
        opening = {
            f"base.zarr/{name}": self._start_opening(f"{folder}/{name}", spec)
            for name, spec in base_arrays(self.cache.grid, self.cache.max_kept).items()
        }
        for column, commit in columns.items():
            folder = f"{self.cache.folder(commit)}/{column_group(column)}"
            for name, spec in self._column_specs(column).items():
                opening[f"{column}/{name}"] = self._start_opening(f"{folder}/{name}", spec)
        uids = self._read_rows(commits.base, "uid")["uid"]
        try:
            arrays = {name: future.result() for name, future in opening.items()}
        except ValueError as error:
            raise self._unreadable(part, str(error)) from None
        return _OpenPart(uids=uids, arrays=arrays)

    def _unreadable(self, part: PartId, what: str) -> DamagedError:
        commits = self._parts[part]
        return self.cache.unreadable([commits.base, *commits.columns.values()], what)

    def _start_opening(self, folder: str, spec: ArraySpec) -> Any:
        store = self.cache.store.kvstore(folder)
        return start_opening(store, self._context, row_chunks=spec.row_chunks)


def _width(parts: Mapping[PartId, PartCommits], column: str) -> int:
    widths = {commits.columns[column].width for commits in parts.values()}
    if len(widths) != 1:
        raise DamagedError(f"parts of column {column} have different widths: {sorted(widths)}")
    return widths.pop()
