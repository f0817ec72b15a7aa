"""Removing the commits of what is damaged, so that extraction computes it again.

Columns go before the base that they belong to: whenever this stops, what is left is no worse
than it was, and the same command goes on. Only what still is as `verify` found it is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kdhiera.cache.commit import Cache
from kdhiera.cache.expected import write_shard_record
from kdhiera.cache.layout import CACHE_ASIDE, CACHE_FILE, shard_file
from kdhiera.cache.problems import Problem, Verified, holds, sha256_of
from kdhiera.cache.records import ColumnCommit, parse_commit
from kdhiera.errors import DamagedError
from kdhiera.stores import Store, open_store


def repair(cache: Cache, verified: Verified) -> Verified:
    """Remove what `verify` says must go, and write lost records of shards again.

    Args:
        cache: The cache.
        verified: What `verify` found.

    Returns:
        The same with what was done.
    """
    return _repair(cache.store, verified)


def repair_at(verified: Verified) -> Verified:
    """The same for a cache that may not even open, from `verify_at`."""
    return _repair(open_store(verified.cache), verified)


def _repair(store: Store, verified: Verified) -> Verified:
    removed: dict[str, None] = {}
    restored: list[str] = []
    mendable = [problem for problem in verified.problems if problem.mendable]
    for problem in mendable:  # first: what they rest on may go
        if problem.restores and holds(store, problem):
            for shard_id, path, when in problem.restores:
                write_shard_record(store, shard_id, path=path, when=when)
                restored.append(shard_file(shard_id))
    for problem in mendable:
        if problem.drops and holds(store, problem):
            removed |= dict.fromkeys(_remove(store, problem))
    return replace(verified, repaired=True, removed=tuple(removed), restored=tuple(restored))


def _remove(store: Store, problem: Problem) -> Iterator[str]:
    for key in problem.drops:
        seen = problem.seen.get(key, problem.evidence.get(key))
        if seen is None or sha256_of(store, key) != seen:
            continue  # another problem took it along, or it was made anew
        if key == CACHE_FILE:
            store.write(CACHE_ASIDE, store.read(key))
        store.delete([key])
        yield key
        if key.endswith("/base.json"):
            yield from _remove_bound(store, key, seen)


def _remove_bound(store: Store, base_key: str, sha256: str) -> Iterator[str]:
    """Columns that joined a base after it was looked at."""
    folder = base_key.rpartition("/")[0]
    keys = [f"{folder}/{name}" for name in store.names(folder) if name.endswith(".json")]
    for key, data in zip(keys, store.read_many(keys), strict=True):
        if data is None:
            continue
        try:
            commit, _ = parse_commit(data, key)
        except DamagedError:
            continue
        if isinstance(commit, ColumnCommit) and commit.base_sha256 == sha256:
            store.delete([key])
            yield key
