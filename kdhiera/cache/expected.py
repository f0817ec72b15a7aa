"""Which shards a cache is meant to hold, and which of them a run means.

Commits say what is there. A shard that was planned and never reached has none; its record
under `CACHE/shards/` lets training refuse instead of quietly using less data. The record
holds where the shard lay, so that a config's `data.shards` chooses among what is cached
without a shard being there.
"""

from __future__ import annotations

import fnmatch
import os
import time
from collections.abc import Sequence
from pathlib import Path

from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import SHARDS, shard_file
from kdhiera.cache.records import redact, seal, unseal
from kdhiera.stores import Store


def expect_shard(cache: Cache, shard_id: str, *, path: str) -> None:
    """Note that extraction of a shard has been asked for.

    Args:
        cache: The cache.
        shard_id: Identity of the shard.
        path: Where it lies now; the latest word counts.
    """
    write_shard_record(cache.store, shard_id, path=path, when=time.time())


def write_shard_record(store: Store, shard_id: str, *, path: str, when: float) -> None:
    """Write the record of a shard that was asked for.

    Args:
        store: Of the cache.
        shard_id: Identity of the shard.
        path: Where it lay.
        when: Seconds since 1970 when it lay there.
    """
    record = {"kind": "shard", "shard_id": shard_id, "path": _absolute(path), "time": when}
    store.write(shard_file(shard_id), seal(record))


def expected_shards(cache: Cache, patterns: Sequence[str]) -> frozenset[str]:
    """Shards that were extracted, or meant to be, from where `patterns` point.

    Of several shards that lay under one path (a file was replaced) only the newest counts.

    Args:
        cache: The cache.
        patterns: Paths and globs, braces expanded; the files need not exist.

    Returns:
        Shard ids. If none matches (the shards were extracted elsewhere, or have moved),
        all there are.
    """
    newest: dict[str, tuple[float, str]] = {}
    for shard_id, (path, when) in shard_records(cache).items():
        newest[path] = max(newest.get(path, (0.0, "")), (when, shard_id))
    wanted = [_absolute(pattern) for pattern in patterns]
    chosen = {p: i for p, (_, i) in newest.items() if any(_matches(p, w) for w in wanted)}
    return frozenset((chosen or {p: i for p, (_, i) in newest.items()}).values())


def shard_ids(cache: Cache) -> frozenset[str]:
    """Shards that were asked for, by the names of their records alone."""
    return frozenset(cache.store.names(SHARDS))


def shard_records(cache: Cache) -> dict[str, tuple[str, float]]:
    """Where every shard that was asked for lay, and when that was noted, by shard id.

    Raises:
        DamagedError: If a record is damaged.
    """
    names = cache.store.names(SHARDS)
    found = cache.store.read_many(f"{SHARDS}/{name}" for name in names)
    records = {
        name: unseal(data, f"{cache.url}/{SHARDS}/{name}")
        for name, data in zip(names, found, strict=True)
        if data is not None
    }
    return {name: (record["path"], record["time"]) for name, record in records.items()}


def _absolute(path: str) -> str:
    return redact(path) if "://" in path else os.path.abspath(path)


def _matches(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or Path(path) == Path(pattern)
