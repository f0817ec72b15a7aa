"""Which shards a cache is meant to hold, and which of them a run means.

Commits say what is there. A shard that was planned and never reached has none; its record
under `CACHE/shards/` lets training refuse instead of quietly using less data. The record
holds where the shard lay, so that a config's `data.shards` chooses among what is cached
without a shard being there.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kdhiera.addresses import matches, redact, scheme_of, without_file_scheme
from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import COMMITS, SHARDS, shard_file
from kdhiera.cache.records import seal, unseal
from kdhiera.errors import DamagedError
from kdhiera.stores import Store

ShardRecord = tuple[str, float]  # where it lay, when that was noted


def expect_shard(cache: Cache, shard_id: str, *, path: str) -> None:
    """Note that extraction of a shard has been asked for.

    Args:
        cache: The cache.
        shard_id: Identity of the shard.
        path: Where it lies now, a path or an address; the latest word counts.
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


def expect_shards(cache: Cache, paths: Mapping[str, str]) -> None:
    """Note that extraction of some shards has been asked for, where that is news.

    A record that is lost or damaged is written anew.

    Args:
        cache: The cache.
        paths: Where every shard lies now, by shard id.
    """
    known: dict[str, ShardRecord] = {}
    for name, data in _stored(cache):
        with contextlib.suppress(DamagedError):
            known[name] = _parse(cache, name, data)
    newest = _newest(known)
    for shard_id, path in paths.items():
        if newest.get(_absolute(path)) != shard_id:
            expect_shard(cache, shard_id, path=path)


def expected_shards(cache: Cache, patterns: Sequence[str]) -> frozenset[str]:
    """Shards that were extracted, or meant to be, from where `patterns` point.

    Of several shards that lay under one path (a file was replaced) only the newest counts.

    Args:
        cache: The cache.
        patterns: Paths, addresses and globs, braces expanded; the files need not exist.

    Returns:
        Shard ids. If none matches (the shards were extracted elsewhere, or have moved),
        all there are.

    Raises:
        DamagedError: If a record is damaged, or that of a shard with commits is gone.
    """
    records = shard_records(cache)
    for shard_id in cache.store.names(COMMITS):
        if shard_id not in records and any(cache.store.walk(f"{COMMITS}/{shard_id}")):
            raise _damaged(f"{cache.url}/{SHARDS}/{shard_id} is missing")
    newest = _newest(records)
    wanted = [_absolute(pattern) for pattern in patterns]
    chosen = {i for path, i in newest.items() if any(_matches(path, w) for w in wanted)}
    return frozenset(chosen or newest.values())


def shard_ids(cache: Cache) -> frozenset[str]:
    """Shards that were asked for, by the names of their records alone."""
    return frozenset(cache.store.names(SHARDS))


def shard_records(cache: Cache) -> dict[str, ShardRecord]:
    """Where every shard that was asked for lay, and when that was noted, by shard id.

    Raises:
        DamagedError: If a record is damaged.
    """
    return {name: _parse(cache, name, data) for name, data in _stored(cache)}


def _stored(cache: Cache) -> Iterator[tuple[str, bytes]]:
    names = cache.store.names(SHARDS)
    found = cache.store.read_many(f"{SHARDS}/{name}" for name in names)
    return ((n, data) for n, data in zip(names, found, strict=True) if data is not None)


def _newest(records: Mapping[str, ShardRecord]) -> dict[str, str]:
    """The shard that was last seen under every path."""
    newest: dict[str, tuple[float, str]] = {}
    for shard_id, (path, when) in records.items():
        newest[path] = max(newest.get(path, (0.0, "")), (when, shard_id))
    return {path: shard_id for path, (_, shard_id) in newest.items()}


def _parse(cache: Cache, shard_id: str, data: bytes) -> ShardRecord:
    path = f"{cache.url}/{SHARDS}/{shard_id}"
    try:
        record = unseal(data, path, kinds=("shard",))
    except DamagedError as error:
        raise _damaged(str(error)) from None
    if record["shard_id"] != shard_id:
        raise _damaged(f"{path} is damaged: it is the record of {record['shard_id']}")
    return record["path"], record["time"]


def _damaged(what: str) -> DamagedError:
    return DamagedError(f"{what}. Run `kdhiera extract-teachers CONFIG`, which writes it anew")


def _absolute(path: str) -> str:
    if scheme_of(path) in ("", "file:"):
        return os.path.abspath(without_file_scheme(path))
    return redact(path)


def _matches(path: str, pattern: str) -> bool:
    return matches(path, pattern) or Path(path) == Path(pattern)
