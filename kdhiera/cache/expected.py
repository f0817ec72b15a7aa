"""Which shards a cache is meant to hold, and which of them a run means.

Commits say what is there. A shard that was planned and never reached has none; its record
under `CACHE/shards/` lets training refuse instead of quietly using less data. The record
holds where the shard lay, so that a config's `data.shards` chooses among what is cached
without a shard being there.
"""

from __future__ import annotations

import fnmatch
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from kdhiera.cache.commit import Cache
from kdhiera.storage import make_folder, write_atomic

FOLDER = "shards"


def expect_shard(cache: Cache, shard_id: str, *, path: str) -> None:
    """Note that extraction of a shard has been asked for.

    Args:
        cache: The cache.
        shard_id: Identity of the shard.
        path: Where it lies now; the latest word counts.
    """
    folder = cache.root / FOLDER
    make_folder(folder)
    record = {"path": os.path.abspath(path), "time": time.time()}
    write_atomic(folder / shard_id, json.dumps(record).encode())


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
    folder = cache.root / FOLDER
    for file in folder.iterdir() if folder.is_dir() else ():
        if not file.name.startswith("."):
            record = json.loads(file.read_bytes())
            path = record["path"]
            newest[path] = max(newest.get(path, (0.0, "")), (record["time"], file.name))
    wanted = [os.path.abspath(pattern) for pattern in patterns]
    chosen = {p: i for p, (_, i) in newest.items() if any(_matches(p, w) for w in wanted)}
    return frozenset((chosen or {p: i for p, (_, i) in newest.items()}).values())


def _matches(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or Path(path) == Path(pattern)
