"""Parts that extraction gave up: which, why, and where their shards lay.

A part that fails every try (its shard always kills the worker, say) must not hold up the
others: it is noted here, tried last by the next run, and forgotten once it is done. A note
decides nothing about what is read.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from kdhiera.addresses import redact
from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import QUARANTINE, PartId, quarantine_file
from kdhiera.cache.records import seal, unseal
from kdhiera.errors import DamagedError

_KIND = "given up"


@dataclass(frozen=True, kw_only=True)
class GivenUp:
    """A part that was given up.

    Args:
        part: Shard and view.
        path: Where the shard lay.
        error: What the last try ended with, one line.
        tries: How often it was tried in that run.
        time: Seconds since 1970.
    """

    part: PartId
    path: str
    error: str
    tries: int
    time: float

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "shard": self.part.shard_id,
            "view": self.part.view,
            "path": self.path,
            "error": self.error,
            "tries": self.tries,
            "time": self.time,
        }


def give_up(cache: Cache, part: PartId, *, path: str, error: str, tries: int) -> None:
    """Note that a part was given up; the latest word counts.

    Args:
        cache: The cache.
        part: Shard and view.
        path: Where the shard lies.
        error: Why, one line.
        tries: How often it was tried.
    """
    body = {
        "kind": _KIND,
        "shard_id": part.shard_id,
        "view": part.view,
        "path": redact(path),
        "error": redact(error),
        "tries": tries,
        "time": time.time(),
    }
    cache.store.write(quarantine_file(part), seal(body))


def release(cache: Cache, parts: Collection[PartId]) -> None:
    """Forget that parts were given up."""
    cache.store.delete([quarantine_file(part) for part in parts])


def given_up(cache: Cache) -> dict[PartId, GivenUp]:
    """All parts that were given up and not done since, in sorted order.

    A note that is damaged is passed over: it is worth no more than another try.
    """
    names = cache.store.names(QUARANTINE)
    keys = [f"{QUARANTINE}/{name}" for name in names]
    found: dict[PartId, GivenUp] = {}
    for key, data in zip(keys, cache.store.read_many(keys), strict=True):
        try:
            body = unseal(data or b"", f"{cache.url}/{key}", kinds=(_KIND,))
        except DamagedError:
            continue
        part = PartId(shard_id=body["shard_id"], view=body["view"])
        found[part] = GivenUp(
            part=part,
            path=body["path"],
            error=body["error"],
            tries=body["tries"],
            time=body["time"],
        )
    return dict(sorted(found.items()))
