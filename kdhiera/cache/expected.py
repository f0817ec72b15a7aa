"""Which shards a cache is meant to hold, so that an interrupted extraction is noticed.

Commits say what is there. A shard that was planned and never reached has none; its name
under `CACHE/shards/` lets training refuse instead of quietly using less data.
"""

from __future__ import annotations

from kdhiera.cache.commit import Cache
from kdhiera.storage import put_if_absent

FOLDER = "shards"


def expect_shard(cache: Cache, shard_id: str) -> None:
    """Note that extraction of a shard has been asked for; noting it twice is the same."""
    path = cache.root / FOLDER / shard_id
    if not path.exists():
        put_if_absent(path, b"")


def expected_shards(cache: Cache) -> frozenset[str]:
    """All shards whose extraction was ever asked for."""
    folder = cache.root / FOLDER
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return frozenset(name for name in names if not name.endswith(".tmp"))
