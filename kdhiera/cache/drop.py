"""Removing a column, or parts, from a cache, at once for every reader; `gc` frees the bytes."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import PartId, column_file, column_folder
from kdhiera.cache.survey import Record, read_part
from kdhiera.errors import UsageError
from kdhiera.progress import counted, human_bytes

_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """What dropping a column removes.

    Args:
        cache: Folder or address.
        column: Column id.
        commits: Records of parts that have it.
        num_bytes: Bytes that nothing names afterwards, for `gc` to free.
        done: Whether it was removed, or would be.
    """

    cache: str
    column: str
    commits: int
    num_bytes: int
    done: bool

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def describe(self) -> str:
        """For people."""
        did, frees = ("dropped", "frees") if self.done else ("would drop", "would then free")
        return (
            f"{did:<9} {self.column} of {self.cache}: {counted(self.commits, 'part')} had it\n"
            f"next      `kdhiera cache gc {self.cache}` {frees} {human_bytes(self.num_bytes)}"
        )


def drop_column(cache: Cache, column: str, *, dry_run: bool = False) -> Dropped:
    """Remove a column: its identity first, so that no reader sees it half there.

    Interrupted, the same call goes on. A record that an extraction publishes meanwhile is
    taken back by its writer, which looks for the identity after it.

    Args:
        cache: The cache.
        column: Column id.
        dry_run: Only say what would go.

    Raises:
        UsageError: If the cache has no such column, with the nearest name that it has.
    """
    if not cache.store.exists(column_file(column)) and not _records(cache, column):
        _refuse_unknown(cache, column)
    records = _records(cache, column)
    with ThreadPoolExecutor(_THREADS) as pool:
        freed = sum(pool.map(lambda item: _own_bytes(cache, column, *item), records.items()))
    if not dry_run:
        cache.store.delete([column_file(column)])
        records = _records(cache, column)  # only now: none that is added later stays
        mine = [key for keys in records.values() for key in keys if _is_of(key, column)]
        folder = column_folder(column)
        rest = [f"{folder}/{name}" for name in cache.store.names(folder)]
        cache.store.delete([*mine, *rest])
    return Dropped(
        cache=cache.url,
        column=column,
        commits=len(records),
        num_bytes=freed,
        done=not dry_run,
    )


def _records(cache: Cache, column: str) -> dict[PartId, list[str]]:
    """All records of the parts that have the column."""
    return {
        part: keys
        for part, keys in cache.records().items()
        if any(_is_of(key, column) for key in keys)
    }


def _is_of(key: str, column: str) -> bool:
    return key.endswith(f"/{column}.json")


def _own_bytes(cache: Cache, column: str, part: PartId, keys: Iterable[str]) -> int:
    """Bytes of a part's files that no other record names."""
    mine: dict[str, int] = {}
    others: set[str] = set()
    for record in read_part(cache, part, list(keys)).records:
        if _is_of(record.key, column):
            mine |= _sizes(cache, record)
        else:
            others |= _sizes(cache, record).keys()
    return sum(size for name, size in mine.items() if name not in others)


def _sizes(cache: Cache, record: Record) -> dict[str, int]:
    if record.commit is None:
        return {}
    folder = cache.folder(record.commit)
    return {f"{folder}/{name}": size for name, (size, _) in record.files.items()}


def _refuse_unknown(cache: Cache, column: str) -> None:
    names = cache.columns.names()
    near = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? It has: " if near else "it has: "
    raise UsageError(
        f"the cache in {cache.url} has no column {column}; {hint}{', '.join(names) or 'none'}"
    )


def drop_commits(cache: Cache, parts: Mapping[PartId, Collection[str] | None]) -> None:
    """Remove commits of parts, so that the next extraction makes them again.

    Columns go before the base that they belong to: whenever this stops, what is left is whole.

    Args:
        cache: The cache.
        parts: Columns to remove of every part; None removes all of the part.
    """
    records = cache.records()
    for part, columns in parts.items():
        keys = records.get(part, [])
        if columns is not None:
            keys = [key for key in keys if any(_is_of(key, column) for column in columns)]
        cache.store.delete(sorted(keys, key=lambda key: _is_of(key, "base")))
