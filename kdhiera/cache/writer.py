"""One attempt at a part: write into a fresh folder, verify, then publish.

    append_rows, append_features, ... -> whole Zarr shards as they fill
    commit: rest + rows.parquet + stats.npz -> fsync -> read back -> base.json -> columns

Until `commit` publishes, nothing of the attempt can be seen; when it fails or the
process dies, its folder is garbage and another attempt starts from nothing.

`attempt.json` stands between a writer and the removal of garbage. Removal deletes it first,
then looks once more for records, then deletes the rest; a writer looks for it after every
record that it published. Whichever comes first, one of them sees the other: no clock and no
process that slept through its lease makes a record outlive the files that it names.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

import google_crc32c
import numpy as np
import torch
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor

from kdhiera.addresses import redact
from kdhiera.cache.arrays import ArrayWriter, create_group, read_array
from kdhiera.cache.commit import Cache
from kdhiera.cache.encoding import Codec
from kdhiera.cache.gaps import runs_of
from kdhiera.cache.layout import (
    ATTEMPT_FILE,
    END_BYTES,
    STATUS,
    ColumnStatus,
    PartId,
    attempt_file,
    attempt_folder,
    base_arrays,
    column_group,
    commit_file,
    is_chunk_file,
    new_attempt,
    parse_column,
)
from kdhiera.cache.records import BaseCommit, SourceInfo, seal
from kdhiera.cache.stats import ChannelStatistics, merge, to_npz
from kdhiera.cache.table import Row, count_statuses, rows_digest, samples_digest, to_parquet
from kdhiera.errors import KdhieraError, MismatchError
from kdhiera.storage import disk_errors, write_atomic
from kdhiera.stores import Files
from kdhiera.views import RowStatus


@dataclass(frozen=True, kw_only=True)
class CommitResult:
    """What became of an attempt.

    Args:
        won_base: This attempt's base is the committed one.
        adopted: Another attempt's base won and is equal; the columns were bound to it.
        published: Columns that this attempt committed; one that another attempt
            committed first is left to it.
        replay_needed: Another attempt's base won and differs: the columns were discarded
            and the winner's rows must be replayed.
        num_bytes: Bytes of the files that were committed.
    """

    won_base: bool
    adopted: bool
    published: tuple[str, ...]
    replay_needed: bool
    num_bytes: int


class _ColumnWriter:
    """The arrays of one column and what was seen of it."""

    def __init__(
        self,
        arrays: Mapping[str, ArrayWriter],
        *,
        width: int,
        codec: Codec,
        basis_sha256: str | None,
    ) -> None:
        self.arrays = arrays
        self.width = width
        self.codec = codec
        self.basis_sha256 = basis_sha256
        self.num_rows = 0
        self.statuses: list[UInt8[np.ndarray, " n"]] = []
        self.statistics = merge((), width)


class Attempt:
    """Writes a part's base, columns, or both; a context manager.

    Leaving the context without `commit` abandons the attempt.

    Args:
        cache: Where to write; it must know the columns (`Columns.ensure`) and their bases.
        part: Which part.
        source: The shard; its hash may be known only when all of it has been read.
        columns: Width of every column to write, by column id.
        base: The committed base to add columns to, features being appended in its array
            order; None writes rows and base itself.
        provenance: Versions and the like, recorded with every commit.
        lease_seconds: After this long the attempt may not publish any more.

    """

    def __init__(
        self,
        cache: Cache,
        part: PartId,
        *,
        source: SourceInfo,
        columns: Mapping[str, int],
        base: BaseCommit | None = None,
        provenance: Mapping[str, object],
        lease_seconds: float,
    ) -> None:
        self.cache, self.part = cache, part
        self._source = replace(source, path=redact(source.path))
        self._provenance = provenance
        self._rows: list[Row] = []
        self._units: list[Int[np.ndarray, " k"]] = []  # of every good row
        self._kept_crc32c: list[int] = []
        self._bound_to = base
        if base:
            assert base.part == part, (base.part, part)
            self._units = list(read_array(cache, base, "base.zarr/units"))
        self._lease_seconds = lease_seconds
        self._began, self._began_monotonic = time.time(), time.monotonic()
        self._ended = False
        self._base: dict[str, ArrayWriter] = {}
        self._columns: dict[str, _ColumnWriter] = {}
        self.attempt = new_attempt(self._began)
        self._key = attempt_folder(part, self.attempt)
        self.folder = cache.store.stage(self._key)
        try:
            with disk_errors(self.folder):
                write_atomic(self.folder / ATTEMPT_FILE, self._lease(ended=False))
                self._base = {} if base else self._create_base()
                self._columns = self._create_columns(columns)
        except BaseException:
            self.abandon()
            raise

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._ended:
            self.abandon()

    @property
    def num_good(self) -> int:
        """Good rows so far, or of the committed base."""
        return len(self._units)

    def append_rows(
        self,
        rows: Sequence[Row],
        *,
        units: Int[np.ndarray, "good k"],
        scores: Float[np.ndarray, "good slots units"],
        pixels: UInt8[np.ndarray, "good k 2 32 32 3"],
    ) -> None:
        """Add samples in the order of the shard.

        Args:
            rows: Good and bad ones.
            units: Kept units of every good row of `rows`, ascending, padded with -1 to K.
            scores: Scores of all their units.
            pixels: Their kept pixels; what stands at padded units is not stored.
        """
        assert self._base, "this attempt does not write the base"
        good = sum(row.status is RowStatus.OK for row in rows)
        assert len(units) == len(scores) == len(pixels) == good, (len(units), good)
        numbers = units.astype(np.int16)
        kept = np.where((numbers < 0)[:, :, None, None, None, None], np.uint8(0), pixels)
        with self._writing():
            self._base["units"].append(numbers)
            self._base["scores"].append(scores)
            self._base["pixels"].append(kept)
        self._kept_crc32c += [kept_crc32c(u, p) for u, p in zip(numbers, kept, strict=True)]
        self._units += list(numbers)
        self._rows += rows

    def append_features(
        self, column: str, features: Float32[Tensor, "n k 4 c"], status: UInt8[np.ndarray, " n"]
    ) -> None:
        """Add the next rows of a column, in array order (good rows only).

        Args:
            column: Column id.
            features: Raw features of the kept units; what stands at padded units, and in
                rows whose status is not ok, is not stored.
            status: A `ColumnStatus` for every row. An ok row with a value that is not
                finite becomes `nonfinite` here, one beyond the encoding's range `overflow`.
        """
        target = self._columns[column]
        start, stop = target.num_rows, target.num_rows + len(features)
        assert stop <= self.num_good, "append the rows before their features"
        if start == stop:
            return
        units = torch.from_numpy(np.stack(self._units[start:stop]).astype(np.int64))
        units = units.to(features.device)
        kept = features.masked_fill((units < 0)[:, :, None, None], 0.0)
        finite = kept.flatten(1).abs().amax(1).isfinite().cpu().numpy()
        status = status.astype(np.uint8)
        status[(status == ColumnStatus.OK) & ~finite] = ColumnStatus.NONFINITE
        lost = torch.from_numpy(status != ColumnStatus.OK).to(features.device)
        codec = target.codec.to(features.device)
        encoded = codec.encode(kept.masked_fill(lost[:, None, None, None], 0.0), units)
        beyond = ~encoded.representable.cpu().numpy()
        status[(status == ColumnStatus.OK) & beyond] = ColumnStatus.OVERFLOW
        with self._writing():
            for name, values in encoded.arrays.items():
                target.arrays[name].append(values.cpu().numpy())
            target.arrays["status"].append(status)
        target.statuses.append(status)
        target.num_rows = stop

    def append_statistics(self, column: str, statistics: ChannelStatistics) -> None:
        """Add to a column's channel statistics.

        Args:
            column: Column id.
            statistics: Of *all* tokens of more good rows, before units were picked. Rows
                that `overflow` count: statistics are of what the teacher says, whatever
                the encoding; rows that are not finite or were not replayed do not.

        Raises:
            ValueError: If they are not finite.
        """
        if not (np.isfinite(statistics.mean).all() and np.isfinite(statistics.m2).all()):
            raise ValueError(f"statistics of {column} are not finite: leave nonfinite rows out")
        target = self._columns[column]
        target.statistics = merge((target.statistics, statistics), target.width)

    def commit(self, *, source_sha256: str | None = None) -> CommitResult:
        """Write what is left, verify everything, and publish it.

        Args:
            source_sha256: Of the shard as it was read; None if `source` said it.

        Returns:
            What was published; the rest of the part is another attempt's.

        Raises:
            MismatchError: If the shard's bytes are not those that another view, or the
                base, was made of. Nothing was published then.
            KdhieraError: If what was written does not read back, the disk is full, or the
                lease has run out. Nothing was published then.
        """
        self._source = replace(self._source, sha256=source_sha256 or self._source.sha256)
        _refuse_changed_source(self.cache, self.part, self._source)
        with self._writing():
            written = self._finish()
            self._verify()
            self._ends = file_ends(self.folder)
            files = self.cache.store.keep(self._key, self.folder)
        self._check_kept(files, written)
        self._check_lease()
        self._ended = True  # from here on a record may name this folder: it stays
        try:
            return self._publish(files)
        except BaseException:
            self._remove_unnamed(files)
            raise
        finally:  # nothing more is published, whatever happened
            self._mark_ended()

    def _publish(self, files: Files) -> CommitResult:
        base = self._bound_to or self._publish_base(files)
        won = base.attempt == self.attempt
        same = won or base is self._bound_to or base.rows_digest == self._rows_digest
        published: list[str] = []
        if same:
            self._check_lease()
            published = [c for c in self._columns if self._publish_column(c, files, base)]
        named = _base_files(files) if won else {}
        for column in published:
            named |= _column_files(files, column)
        self._keep_only(named, files)
        return CommitResult(
            won_base=won,
            adopted=bool(self._base) and same and not won,
            published=tuple(published),
            replay_needed=not same and bool(self._columns),
            num_bytes=sum(size for size, _ in named.values()),
        )

    def _keep_only(self, named: Collection[str], files: Files) -> None:
        """Remove what another attempt published first: it is kept once."""
        store = self.cache.store
        if not named:
            store.delete_folder(self._key)
            return
        lost = [name for name in files if name not in named and name != ATTEMPT_FILE]
        store.delete(f"{self._key}/{name}" for name in lost)
        store.prune(self._key)

    def _remove_unnamed(self, files: Files) -> None:
        """Leave no garbage on a disk that may be full, as far as that is possible."""
        with contextlib.suppress(KdhieraError, OSError):
            if not self.cache.store.writes_late:
                named = self.cache.named_files(self.part)
                self._keep_only({n for n in files if f"{self._key}/{n}" in named}, files)

    def abandon(self) -> None:
        """Give up before `commit`: remove the attempt's folder as far as that is possible."""
        assert not self._ended, "a commit may name this attempt"
        self._ended = True
        for array in self._array_writers():
            array.stop()
        self.cache.store.discard(self._key, self.folder)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Say in one sentence why nothing more can be written."""
        try:
            with disk_errors(self.folder):
                yield
        except (OSError, ValueError):
            if (self.folder / ATTEMPT_FILE).exists():
                raise
            raise self._collected() from None

    def _collected(self) -> KdhieraError:
        return KdhieraError(
            f"part {self.part} was not committed: its files in {self._key} were removed as "
            "garbage, which happens to an attempt long after its lease; run the same command again"
        )

    def _lease(self, *, ended: bool) -> bytes:
        record = {"kind": "attempt", "began": self._began, "lease_seconds": self._lease_seconds}
        return seal({**record, "ended": ended})

    def _mark_ended(self) -> None:
        """Note that this attempt publishes nothing more; without it garbage only stays longer."""
        store, key = self.cache.store, attempt_file(self.part, self.attempt)
        with contextlib.suppress(KdhieraError, OSError):
            if store.exists(key):
                store.write(key, self._lease(ended=True))

    @property
    def _rows_digest(self) -> str:
        return rows_digest(self._rows, self._kept_crc32c)

    def _create_base(self) -> dict[str, ArrayWriter]:
        folder = self.folder / "base.zarr"
        create_group(folder, {"part": asdict(self.part), "fingerprint": self.cache.fingerprint})
        specs = base_arrays(self.cache.grid, self.cache.max_kept)
        return {name: ArrayWriter(folder, name, spec) for name, spec in specs.items()}

    def _create_columns(self, widths: Mapping[str, int]) -> dict[str, _ColumnWriter]:
        if widths:
            create_group(self.folder / "targets.zarr", {"part": asdict(self.part)})
        for teacher in sorted({parse_column(c).teacher for c in widths}):
            create_group(self.folder / "targets.zarr" / teacher, {})
        writers: dict[str, _ColumnWriter] = {}
        for column, width in widths.items():
            folder = self.folder / column_group(column)
            name = parse_column(column)
            fingerprint = self.cache.columns.fingerprint(column)
            if fingerprint is None:
                raise KdhieraError(
                    f"part {self.part}: column {column} was removed from the cache; run the same "
                    "command again"
                )
            create_group(folder, {**asdict(name), "fingerprint": fingerprint})
            codec = self.cache.columns.codec(column, width)
            specs = {**codec.specs(self.cache.max_kept), "status": STATUS}
            writers[column] = _ColumnWriter(
                {n: ArrayWriter(folder, n, spec) for n, spec in specs.items()},
                width=width,
                codec=codec,
                basis_sha256=self.cache.columns.basis_sha256(column),
            )
        return writers

    def _array_writers(self) -> list[ArrayWriter]:
        columns = (a for column in self._columns.values() for a in column.arrays.values())
        return [*self._base.values(), *columns]

    def _finish(self) -> dict[str, bytes]:
        """Write all that is not yet on disk; returns the small files' contents."""
        for column, target in self._columns.items():
            assert target.num_rows == self.num_good, f"{column} lacks rows"
        for array in self._array_writers():
            array.finish()
        written: dict[str, bytes] = {}
        if self._base:
            written["rows.parquet"] = to_parquet(self._rows, self._kept_crc32c)
        if self._columns:
            statistics = {column: target.statistics for column, target in self._columns.items()}
            written["stats.npz"] = to_npz(statistics)
        for name, data in written.items():
            write_atomic(self.folder / name, data)
        return written

    def _verify(self) -> None:
        self._refuse([problem for array in self._array_writers() if (problem := array.verify())])

    def _check_kept(self, files: Files, written: Mapping[str, bytes]) -> None:
        self._refuse(
            [
                name
                for name, data in written.items()
                if files[name] != (len(data), google_crc32c.value(data))
            ]
        )

    def _refuse(self, wrong: Sequence[str]) -> None:
        if wrong and not (self.folder / ATTEMPT_FILE).exists():
            raise self._collected()
        if wrong:
            raise KdhieraError(
                f"part {self.part} was not committed: what was written to {self.folder} reads "
                f"back differently ({'; '.join(wrong)}). Check the disk and memory of this machine"
            )

    def _check_lease(self) -> None:
        """A machine that slept shows it in its clock, a clock set back in the monotonic one."""
        taken = max(time.monotonic() - self._began_monotonic, time.time() - self._began)
        if taken > self._lease_seconds:
            raise KdhieraError(
                f"part {self.part} was not committed: the attempt took longer than "
                f"extract.lease_seconds = {self._lease_seconds:g}; raise it or make smaller shards"
            )

    def _publish_base(self, files: Files) -> BaseCommit:
        """Publish the base unless there is one; returns the one that is committed."""
        body = {
            **self._record("base", self.cache.fingerprint),
            "source": asdict(self._source),
            "num_rows": len(self._rows),
            "array_rows": self.num_good,
            "statuses": count_statuses(self._rows),
            "bad": runs_of(np.array([row.status is not RowStatus.OK for row in self._rows], bool)),
            "samples_digest": samples_digest(self._rows),
            "rows_digest": self._rows_digest,
            **self._named(_base_files(files)),
        }
        key = commit_file(self.part, None)
        self._create(key, seal(body))
        try:
            base = self.cache.read_commit(key)  # by its name: a listing may be late
        except FileNotFoundError:
            raise self._removed("its rows were") from None
        assert isinstance(base, BaseCommit), base
        return base

    def _publish_column(self, column: str, files: Files, base: BaseCommit) -> bool:
        """Publish a column unless there is one; returns whether it is this attempt's."""
        target = self._columns[column]
        statuses = np.concatenate([np.empty(0, np.uint8), *target.statuses])
        counts = np.bincount(statuses, minlength=len(ColumnStatus))
        body = {
            **self._record("column", self.cache.columns.fingerprint(column)),
            "column": column,
            "base_sha256": base.sha256,
            "width": target.width,
            "statuses": {
                status.name.lower(): int(count)
                for status, count in zip(ColumnStatus, counts, strict=True)
                if count
            },
            "bad": runs_of(statuses != ColumnStatus.OK),
            "basis_sha256": target.basis_sha256,
            **self._named(_column_files(files, column)),
        }
        key, record = commit_file(self.part, column), seal(body)
        ours = self._create(key, record)
        if ours and not self._still_wanted(column, base):
            self._withdraw(key, record)
            raise self._removed(f"column {column} or its rows were")
        return ours

    def _create(self, key: str, record: bytes) -> bool:
        """Publish a record unless there is one; returns whether it is this attempt's.

        Raises:
            KdhieraError: If the attempt's files have been taken for garbage.
        """
        ours = self.cache.store.create(key, record)
        if ours and not self.cache.store.exists(attempt_file(self.part, self.attempt)):
            self._withdraw(key, record)
            raise self._collected()
        return ours

    def _withdraw(self, key: str, record: bytes) -> None:
        store = self.cache.store
        if store.read_many([key]) == [record]:  # it may have been dropped and made anew
            store.delete([key])

    def _removed(self, what: str) -> KdhieraError:
        return KdhieraError(
            f"part {self.part}: {what} removed from the cache while it was being extracted; run "
            "the same command again"
        )

    def _still_wanted(self, column: str, base: BaseCommit) -> bool:
        """Whether what the column was bound to is still there: it may have been dropped."""
        try:
            record = self.cache.store.read(commit_file(self.part, None))
        except FileNotFoundError:
            return False
        columns, basis = self.cache.columns, self._columns[column].basis_sha256
        same_base = hashlib.sha256(record).hexdigest() == base.sha256
        return same_base and columns.still_there(column) and columns.same_basis(column, basis)

    def _named(self, files: Files) -> dict[str, object]:
        """The list of files of a record, with the checksums of how its chunk files end."""
        ends = {name: self._ends[name] for name in files if name in self._ends}
        return {"files": files, "ends": ends}

    def _record(self, kind: str, fingerprint: str | None) -> dict[str, object]:
        return {
            "kind": kind,
            **asdict(self.part),
            "attempt": self.attempt,
            "fingerprint": fingerprint,
            "provenance": self._provenance,
        }


def kept_crc32c(units: Int[np.ndarray, " k"], pixels: UInt8[np.ndarray, "k 2 32 32 3"]) -> int:
    """Checksum of what a row keeps: its unit numbers (int16) and their pixels.

    Padding counts: pixels at padded units are zeros.
    """
    checksum = google_crc32c.value(np.ascontiguousarray(units, dtype=np.int16))
    return int(google_crc32c.extend(checksum, np.ascontiguousarray(pixels)))


def _base_files(files: Files) -> Files:
    return {n: e for n, e in files.items() if n == "rows.parquet" or n.startswith("base.zarr/")}


def _column_files(files: Files, column: str) -> Files:
    """A column's own files and those it shares: group metadata and statistics."""
    group = column_group(column)
    shared = {"stats.npz", "targets.zarr/zarr.json", f"{group.rpartition('/')[0]}/zarr.json"}
    return {n: e for n, e in files.items() if n in shared or n.startswith(f"{group}/")}


def file_ends(folder: Path) -> dict[str, int]:
    """crc32 of the last `END_BYTES` of every chunk file below a folder, by path in it.

    Of bytes that end in their own crc32c the crc32c is always the same: that of a file of
    chunks, each with its own, knows their sizes and nothing of their contents. Any other
    polynomial does.
    """
    ends: dict[str, int] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if is_chunk_file(name) and path.is_file():
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - END_BYTES))
                ends[name] = zlib.crc32(file.read())
    return ends


def _committed_base(cache: Cache, part: PartId) -> BaseCommit:
    """The base that is there, read by its name: a listing may be late."""
    try:
        base = cache.read_commit(commit_file(part, None))
    except FileNotFoundError:
        raise KdhieraError(
            f"part {part} was removed from the cache while it was being extracted; run the same "
            "command again"
        ) from None
    assert isinstance(base, BaseCommit), base
    return base


def _refuse_changed_source(cache: Cache, part: PartId, source: SourceInfo) -> None:
    """Views of one shard must come from the same bytes."""
    for known in cache.sources(part.shard_id):
        if source.sha256 and known.sha256 and source.sha256 != known.sha256:
            raise MismatchError(
                f"source_changed: {source.path} has the index of shard {part.shard_id} "
                f"but other bytes (sha256 {source.sha256[:12]}, and the cache was made of "
                f"{known.sha256[:12]} from {known.path}): restore the shard, or set cache.dir to "
                "another folder"
            )
