"""Removal of what no commit names: files of attempts that lost, died or were dropped.

Only what can be published no more is garbage: files of an attempt that has ended, or whose
lease ran out long ago. A file is kept as long as any record names it, whatever else is wrong
with that record; where a record cannot be read, nothing of its part is touched.

    ended    attempt -> records -> what they do not name goes
    expired  attempt -> records -> attempt.json goes -> records again -> the rest goes

An expired attempt's writer may still wake up. It looks for its `attempt.json` after every
record that it publishes: either the second look here sees the record, or the writer sees
that the file is gone and takes the record back.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from kdhiera.cache.columns import Columns
from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import (
    ATTEMPT_FILE,
    COLUMNS,
    COMMITS,
    PARTS,
    PartId,
    attempt_began,
    attempt_folder,
    column_folder,
    commit_folder,
    part_folder,
)
from kdhiera.cache.records import unseal
from kdhiera.errors import DamagedError
from kdhiera.progress import Progress
from kdhiera.stores import Entry

LEASE_SECONDS = 24 * 3600.0  # of an attempt that does not say, and of unfinished files
_LEASES = 2.0  # so many after its last sign of life an attempt has expired
_ATTEMPT_DEPTH = 4  # parts/<shard-id>/<view>/<attempt>
_THREADS = 8

_Unfinished = Mapping[str, Sequence[Entry]]


class Kind(StrEnum):
    """Why something is garbage, in words."""

    ENDED = "of attempts that have ended, named by no commit"
    EXPIRED = "of attempts that died: their lease ran out long ago"
    UNFINISHED = "that were never finished"
    BASIS = "of columns that are gone"


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """Files that can go, all for one reason.

    Args:
        folder: Where they lie.
        kind: Why they can go.
        num_files: How many; 0 for empty folders.
        num_bytes: Their size.
    """

    folder: str
    kind: Kind
    num_files: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Files that no commit names, of an attempt that may still publish them.

    Args:
        folder: The attempt.
        num_bytes: Their size.
        until: When they become garbage, in seconds since 1970.
    """

    folder: str
    num_bytes: int
    until: float


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What was found, and whether it was removed.

    Args:
        cache: Folder or address.
        removed: Whether the garbage is gone; otherwise it was only looked for.
        garbage: In sorted order of folders.
        waiting: What may become garbage.
        problems: What is left alone for other reasons, in words.
    """

    cache: str
    removed: bool
    garbage: tuple[Garbage, ...]
    waiting: tuple[Waiting, ...]
    problems: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes that are garbage."""
        return sum(item.num_bytes for item in self.garbage)

    @property
    def num_files(self) -> int:
        """Files that are garbage."""
        return sum(item.num_files for item in self.garbage)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "cache": self.cache,
            "removed": self.removed,
            "num_files": self.num_files,
            "num_bytes": self.num_bytes,
            "garbage": [{**vars(item), "kind": item.kind.name.lower()} for item in self.garbage],
            "waiting": [dict(vars(item)) for item in self.waiting],
            "problems": list(self.problems),
        }

    def describe(self) -> str:
        """For people: a line for every kind."""
        lines = [f"cache     {self.cache}"]
        for kind in Kind:
            mine = [item for item in self.garbage if item.kind is kind]
            if mine:
                files, size = sum(i.num_files for i in mine), sum(i.num_bytes for i in mine)
                lines.append(f"garbage   {size:,} bytes in {files:,} files {kind}")
        if self.waiting:
            size = sum(item.num_bytes for item in self.waiting)
            first = time.localtime(min(item.until for item in self.waiting))
            lines.append(
                f"waiting   {size:,} bytes of {len(self.waiting):,} attempts that may still be at "
                f"work; the first becomes garbage on {time.strftime('%Y-%m-%d at %H:%M', first)}"
            )
        lines += [f"problem   {problem}" for problem in self.problems]
        return "\n".join([*lines, f"result    {self._result()}"])

    def _result(self) -> str:
        if not self.garbage:
            return "nothing to remove"
        what = f"{self.num_bytes:,} bytes in {self.num_files:,} files"
        return f"removed {what}" if self.removed else f"nothing was removed; --yes removes {what}"


def collect(
    cache: Cache, *, remove: bool, progress: Progress, now: float | None = None
) -> Collected:
    """Find what no commit names and nobody can publish any more, and remove it if asked to.

    Safe beside extraction, training and other removals of garbage.

    Args:
        cache: The cache.
        remove: Remove it; otherwise only look.
        progress: Where progress is shown.
        now: Seconds since 1970; None asks this machine's clock.

    Raises:
        OSError: If something may not be removed.
    """
    now = time.time() if now is None else now
    unfinished = _unfinished(cache)
    shards = cache.store.names(PARTS)
    bar = progress.start("gc", len(shards), "shards")

    def look(shard_id: str) -> list[_Found]:
        found = [
            _collect_part(cache, part, unfinished, now=now, remove=remove)
            for part in _parts(cache, shard_id)
        ]
        progress.advance(bar)
        return found

    with ThreadPoolExecutor(_THREADS) as pool:
        found = [one for several in pool.map(look, shards) for one in several]
    progress.finish(bar)
    found += [
        _collect_unfinished(cache, unfinished.get("", ()), now=now, remove=remove),
        _collect_columns(cache, remove=remove),
    ]
    garbage = [item for one in found for item in one.garbage]
    waiting = [item for one in found for item in one.waiting]
    return Collected(
        cache=cache.url,
        removed=remove,
        garbage=tuple(sorted(garbage, key=lambda item: item.folder)),
        waiting=tuple(sorted(waiting, key=lambda item: item.folder)),
        problems=tuple(problem for one in found for problem in one.problems),
    )


@dataclass(frozen=True, kw_only=True)
class _Found:
    garbage: tuple[Garbage, ...] = ()
    waiting: tuple[Waiting, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    """An attempt as it lies in the store.

    Args:
        folder: Where.
        entries: Its files, finished or not.
        ended: Whether its writer said that it publishes nothing more.
        until: When it has expired if it did not.
    """

    folder: str
    entries: Sequence[Entry]
    ended: bool
    until: float

    @property
    def lease_key(self) -> str:
        return f"{self.folder}/{ATTEMPT_FILE}"

    def unnamed(self, named: Collection[str]) -> list[Entry]:
        """What can go; `attempt.json` goes last, and only if nothing else stays."""
        rest = [e for e in self.entries if e.key not in named]
        if len(rest) < len(self.entries):
            return [e for e in rest if e.key != self.lease_key]
        return sorted(rest, key=lambda e: e.key == self.lease_key)


def _unfinished(cache: Cache) -> _Unfinished:
    """Unfinished files by the attempt that they belong to; under "" those of none."""
    found: dict[str, list[Entry]] = {}
    for entry in cache.store.unfinished():
        parts = entry.key.split("/")
        of_attempt = parts[0] == PARTS and len(parts) > _ATTEMPT_DEPTH
        found.setdefault("/".join(parts[:_ATTEMPT_DEPTH]) if of_attempt else "", []).append(entry)
    return found


def _parts(cache: Cache, shard_id: str) -> Iterator[PartId]:
    for view in cache.store.names(f"{PARTS}/{shard_id}"):
        if view.isdecimal() and str(int(view)) == view:
            yield PartId(shard_id=shard_id, view=int(view))


def _collect_part(
    cache: Cache, part: PartId, unfinished: _Unfinished, *, now: float, remove: bool
) -> _Found:
    attempts = list(_attempts(cache, part, unfinished))  # before the records: see the module
    try:
        named = cache.named_files(part)
    except DamagedError as error:
        return _Found(
            problems=(f"part {part} is left alone: {error}. `kdhiera cache verify` says more",)
        )
    garbage: list[Garbage] = []
    waiting: list[Waiting] = []
    for attempt in attempts:
        entries = attempt.unnamed(named)
        if attempt.entries and not entries:
            continue
        if not attempt.ended and now < attempt.until:
            size = sum(entry.num_bytes for entry in entries)
            waiting.append(Waiting(folder=attempt.folder, num_bytes=size, until=attempt.until))
            continue
        if remove:
            entries = _remove_attempt(cache, part, attempt, entries)
        kind = Kind.ENDED if attempt.ended else Kind.EXPIRED
        garbage.append(_garbage(attempt.folder, kind, entries))
    if remove:
        cache.store.prune(commit_folder(part))
    return _Found(garbage=tuple(garbage), waiting=tuple(waiting))


def _attempts(cache: Cache, part: PartId, unfinished: _Unfinished) -> Iterator[_Attempt]:
    for name in cache.store.names(part_folder(part)):
        began = attempt_began(name)
        if began is None:  # nothing of ours
            continue
        folder = attempt_folder(part, name)
        entries = [*cache.store.walk(folder), *unfinished.get(folder, ())]
        ended, lease_seconds = _lease(cache, f"{folder}/{ATTEMPT_FILE}")
        alive = max([began, *(entry.modified for entry in entries)])
        until = alive + _LEASES * lease_seconds
        yield _Attempt(folder=folder, entries=entries, ended=ended, until=until)


def _lease(cache: Cache, key: str) -> tuple[bool, float]:
    """Whether an attempt has ended, and its lease; believed only if it is whole."""
    try:
        record = unseal(cache.store.read(key), key, kinds=("attempt",))
    except (FileNotFoundError, DamagedError):
        return False, LEASE_SECONDS
    return record["ended"], float(record["lease_seconds"])


def _remove_attempt(
    cache: Cache, part: PartId, attempt: _Attempt, entries: list[Entry]
) -> list[Entry]:
    """Remove what can go of an attempt; returns what went."""
    if not attempt.ended:
        cache.store.delete([attempt.lease_key])
        named = cache.named_files(part)
        entries = [entry for entry in entries if entry.key not in named]
    cache.store.delete(entry.key for entry in entries)
    cache.store.prune(attempt.folder)
    return entries


def _collect_unfinished(
    cache: Cache, entries: Iterable[Entry], *, now: float, remove: bool
) -> _Found:
    """Files outside of attempts whose writer died before it could rename or link them."""
    expired = [e for e in entries if now >= e.modified + _LEASES * LEASE_SECONDS]
    if remove:
        cache.store.delete(entry.key for entry in expired)
    return _Found(
        garbage=tuple(_garbage(e.key.rpartition("/")[0], Kind.UNFINISHED, [e]) for e in expired)
    )


def _collect_columns(cache: Cache, *, remove: bool) -> _Found:
    """Bases that serve no column; records of a column that is not there are only reported."""
    records = {key.rpartition("/")[2] for keys in cache.records().values() for key in keys}
    columns = Columns(cache.store)  # as they are now
    left = records - {"base.json"} - {f"{name}.json" for name in columns.names()}
    problems = [_left_behind(cache, name.removesuffix(".json")) for name in sorted(left)]
    garbage = []
    for column in cache.store.names(COLUMNS):
        folder = column_folder(column)
        try:
            basis = columns.basis_key(column)
        except DamagedError as error:
            problems.append(f"{folder} is left alone: {error}")
            continue
        if basis is None and f"{column}.json" in left:
            continue
        entries = [
            e
            for e in cache.store.walk(folder)
            if e.key.startswith(f"{folder}/basis-") and e.key != basis
        ]
        if entries:
            garbage.append(_garbage(folder, Kind.BASIS, entries))
        if remove:
            cache.store.delete(entry.key for entry in entries)
            cache.store.prune(folder)
    return _Found(garbage=tuple(garbage), problems=tuple(problems))


def _left_behind(cache: Cache, column: str) -> str:
    return (
        f"{COMMITS} name column {column}, which the cache does not know: "
        f"`kdhiera cache drop {cache.url} {column}` removes what is left of it, "
        "`kdhiera extract-teachers CONFIG` with the config it was made with brings it back"
    )


def _garbage(folder: str, kind: Kind, entries: Sequence[Entry]) -> Garbage:
    size = sum(entry.num_bytes for entry in entries)
    return Garbage(folder=folder, kind=kind, num_files=len(entries), num_bytes=size)
