"""Whether every byte of a cache is what was written, and belongs where it is.

Every part is looked at by itself, so that any amount of damage is listed whole, in memory
that does not grow with its size. Extraction, `drop` and `gc` may go on meanwhile: a finding
counts only if the records it rests on are still there, unchanged, when it is made.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kdhiera.cache.agreement import disagreements
from kdhiera.cache.checks import base_findings, column_findings
from kdhiera.cache.columns import Columns
from kdhiera.cache.commit import Cache, restoring
from kdhiera.cache.layout import (
    CACHE_FILE,
    COMMITS,
    END_BYTES,
    PartId,
    commit_file,
)
from kdhiera.cache.problems import Problem, Verified, holds, part_problem, sha256_of
from kdhiera.cache.records import BaseCommit, ColumnCommit
from kdhiera.cache.survey import PartRecords, Record, survey_part
from kdhiera.errors import DamagedError
from kdhiera.progress import Progress, human_bytes
from kdhiera.stores import Store, open_store

if TYPE_CHECKING:
    from kdhiera.cache.encoding import Codec

_THREADS = 8
_REMOTE_THREADS = 32  # a bucket answers slowly, and many at once
_LOOKS = 5  # at a part whose records change while it is looked at
_NAMED = 8  # files of a part that are named one by one: all of a cache's may be gone
_REPORT_SECONDS = 0.5
_ROTTEN = (errno.EIO, errno.EBADMSG, errno.EUCLEAN)  # a disk that cannot give bytes back


def verify(cache: Cache, *, progress: Progress | None = None) -> Verified:
    """Read every record, and every byte that a record names.

    Args:
        cache: The cache.
        progress: Where progress is shown.
    """
    started = time.monotonic()
    parts = list(cache.records())
    known = _Known(cache)
    report = _Report(progress, len(parts))
    with ThreadPoolExecutor(_REMOTE_THREADS if "://" in cache.url else _THREADS) as pool:
        checked = list(pool.map(partial(_check_part, cache, known, report), parts))
    report.finish()
    found = [problem for part in checked for problem in part.problems]
    whole = disagreements(cache, [part.found for part in checked])
    return Verified(
        cache=cache.url,
        parts=sum(bool(part.found.records) for part in checked),
        commits=sum(len(part.found.records) for part in checked),
        files=sum(part.num_files for part in checked),
        num_bytes=sum(part.num_bytes for part in checked),
        seconds=time.monotonic() - started,
        problems=(*(p for p in whole if holds(cache.store, p)), *found),
    )


def verify_at(url: str | Path, *, progress: Progress | None = None) -> Verified:
    """The same for a cache that may not even open.

    Args:
        url: Its folder or `s3://` address.
        progress: Where progress is shown.

    Raises:
        UsageError: If there is none.
        MismatchError: If it has another format version.
    """
    store = open_store(url)
    if not store.exists(CACHE_FILE) and store.names(COMMITS):
        return _unopened(store, f"{url}/{CACHE_FILE} is missing. {restoring(url, damaged=False)}")
    try:
        cache = Cache.open(url)
    except DamagedError as error:
        return _unopened(store, str(error))
    return verify(cache, progress=progress)


def _unopened(store: Store, what: str) -> Verified:
    """Nothing can be said of a cache whose identity cannot be believed but that."""
    found = sha256_of(store, CACHE_FILE)
    problem = Problem(
        what=what,
        where=CACHE_FILE,
        drops=() if found is None else (CACHE_FILE,),
        evidence={CACHE_FILE: found},
    )
    return Verified(
        cache=store.url, parts=0, commits=0, files=0, num_bytes=0, seconds=0.0, problems=(problem,)
    )


class _Known:
    """What columns are, read once for all parts; a change meanwhile is found at the end."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._lock = threading.Lock()
        self._fingerprints: dict[str, str | None] = {}
        self._codecs: dict[tuple[str, int], Codec | None] = {}

    def fingerprint(self, column: str) -> str | None:
        """Of a column; None if it has no identity, empty if that is damaged."""
        with self._lock:
            if column not in self._fingerprints:
                try:
                    found = Columns(self._cache.store).fingerprint(column)
                except DamagedError:
                    found = ""
                self._fingerprints[column] = found
            return self._fingerprints[column]

    def codec(self, column: str, width: int) -> Codec | None:
        """How a column is stored; None if its basis is gone or damaged."""
        with self._lock:
            if (column, width) not in self._codecs:
                try:
                    codec = Columns(self._cache.store).codec(column, width)
                except (DamagedError, ValueError, KeyError):
                    codec = None
                self._codecs[column, width] = codec
            return self._codecs[column, width]


class _Report:
    """How far it has come, told from several threads."""

    def __init__(self, progress: Progress | None, parts: int) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._task = progress.start("verify", parts, "parts") if progress else 0
        self._bytes = 0
        self._told = 0.0

    def read(self, num_bytes: int) -> None:
        with self._lock:
            self._bytes += num_bytes
            now = time.monotonic()
            if self._progress and now - self._told > _REPORT_SECONDS:
                self._told = now
                self._progress.advance(self._task, 0, read=human_bytes(self._bytes))

    def part(self) -> None:
        if self._progress:
            with self._lock:
                self._progress.advance(self._task, 1, read=human_bytes(self._bytes))

    def finish(self) -> None:
        if self._progress:
            self._progress.finish(self._task)


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """What is remembered of a part.

    Args:
        found: All of its records, without their lists of files.
        problems: What is wrong with the part by itself.
        num_files: Files that were read.
        num_bytes: Their bytes.
    """

    found: PartRecords
    problems: tuple[Problem, ...]
    num_files: int
    num_bytes: int


def _check_part(cache: Cache, known: _Known, report: _Report, part: PartId) -> _Checked:
    """Look at a part until nothing changes meanwhile, or nothing is wrong with it."""
    for _ in range(_LOOKS):
        checked = _look(cache, known, report, part)
        sure = tuple(p for p in checked.problems if holds(cache.store, p))
        if len(sure) == len(checked.problems):
            break
    report.part()
    return replace(checked, problems=sure)


def _look(cache: Cache, known: _Known, report: _Report, part: PartId) -> _Checked:
    found = survey_part(cache, part)
    problems = [*_record_problems(part, found)]
    sound = [*found.columns.values()]
    if found.base_record and found.base is not None:
        sound.insert(0, found.base_record)
    files = _Files(cache, report, sound)
    wrong = list(files.problems())
    for key, what in wrong[:_NAMED]:
        owners = files.owners[key]
        problems.append(part_problem(found, owners, f"{cache.url}/{key} {what}", key))
    if rest := wrong[_NAMED:]:
        all_owners = {record.key: record for key, _ in rest for record in files.owners[key]}
        what = f"{len(rest):,} more of its files are missing or wrong, such as {rest[0][0]}"
        problems.append(part_problem(found, list(all_owners.values()), what, rest[0][0]))
    for record in sound:
        if record.key not in files.broken:
            problems += _contradictions(cache, known, found, record)
    return _Checked(
        found=PartRecords(
            part=part, records=tuple(replace(record, files={}, ends={}) for record in found.records)
        ),
        problems=tuple(problems),
        num_files=len(files.owners),
        num_bytes=sum(size for size, _ in files.wanted.values()),
    )


def _record_problems(part: PartId, found: PartRecords) -> Iterator[Problem]:
    """Records that cannot be believed, and columns without the base they belong to."""
    for record in found.records:
        if record.problem:
            yield part_problem(found, [record], record.problem, record.key)
    base = found.base_record
    orphans = [
        record
        for record in found.records
        if isinstance(record.commit, ColumnCommit) and record.commit.column not in found.columns
    ]
    if not orphans or (base is not None and base.problem):  # those go with it
        return
    names = ", ".join(str(record.commit.column) for record in orphans if record.commit)
    what = "there is none" if base is None else "another one is there"
    key = commit_file(part, None)
    yield Problem(
        what=f"part {part}: the base that {names} belong to is not there ({what})",
        where=key,
        drops=tuple(record.key for record in orphans),
        evidence={key: None if base is None else base.sha256},
        seen={record.key: record.sha256 for record in orphans},
    )


class _Files:
    """The files that some records of one part name, and which of these are wrong."""

    def __init__(self, cache: Cache, report: _Report, records: Sequence[Record]) -> None:
        self._store = cache.store
        self._report = report
        self.wanted: dict[str, tuple[int, int]] = {}
        self.ends: dict[str, int] = {}
        self.owners: dict[str, list[Record]] = {}
        self.broken: set[str] = set()
        for record in records:
            assert record.commit is not None
            for name, entry in record.files.items():
                key = f"{cache.folder(record.commit)}/{name}"
                self.wanted[key] = entry
                self.owners.setdefault(key, []).append(record)
                if name in record.ends:
                    self.ends[key] = record.ends[name]

    def problems(self) -> Iterator[tuple[str, str]]:
        """Keys of files that are missing or wrong, with what is wrong."""
        for key, (size, crc32c) in self.wanted.items():
            what = self._wrong(key, size, crc32c)
            if what:
                self.broken |= {record.key for record in self.owners[key]}
                yield key, what
            self._report.read(size)

    def _wrong(self, key: str, size: int, crc32c: int) -> str:
        try:
            found = self._store.checksum(key)
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            if error.errno not in _ROTTEN:
                raise
            return f"cannot be read ({os.strerror(error.errno or 0)})"
        if found[0] != size:
            return f"has {found[0]:,} bytes and was written with {size:,}"
        same = found[1] == crc32c and (key not in self.ends or self._ends_right(key, size))
        return "" if same else "does not match its checksum"

    def _ends_right(self, key: str, size: int) -> bool:
        """Chunks end in a crc32c, which makes that of their file blind to what they hold."""
        (end,) = self._store.read_ends({key: size}, END_BYTES)
        return end is not None and zlib.crc32(end) == self.ends[key]


def _contradictions(
    cache: Cache, known: _Known, found: PartRecords, record: Record
) -> Iterator[Problem]:
    """What a record with whole files says that its files do not."""
    commit, base = record.commit, found.base
    assert commit is not None
    assert base is not None
    if isinstance(commit, BaseCommit):
        if record.fingerprint != cache.fingerprint:  # judged when all are known
            return
        findings = base_findings(cache, record)
    else:
        made_under = known.fingerprint(commit.column)
        if made_under is None or (made_under and made_under != record.fingerprint):
            return
        codec = known.codec(commit.column, commit.width)
        findings = column_findings(cache, record, base, codec)
    try:
        for name, what in findings:
            key = f"{cache.folder(commit)}/{name}"
            yield part_problem(found, [record], f"{cache.url}/{key} {what}", key)
    except FileNotFoundError as error:  # it was there a moment ago
        yield part_problem(found, [record], f"{error.filename} vanished", record.key)
