"""Whether the shards that a cache was made from are still what they were.

A shard that is not found has moved, which harms nothing: training reads no shards. One that
is found with other bytes cannot be extracted from again: the cache now holds more than it.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import PartId, commit_file
from kdhiera.cache.records import SourceInfo
from kdhiera.cache.survey import read_part
from kdhiera.data.patterns import expand
from kdhiera.data.ranges import SourceError, is_there
from kdhiera.data.shards import ShardIndex, index_shard, shard_sha256, shard_stem
from kdhiera.data.tars import ShardError
from kdhiera.errors import UsageError
from kdhiera.progress import BYTES, Progress, counted

logger = logging.getLogger(__name__)

_THREADS = 4  # hashing is as fast as a disk


class SourceStatus(StrEnum):
    """What became of a shard."""

    OK = "ok"
    MOVED = "moved"
    CHANGED = "changed"


@dataclass(frozen=True, kw_only=True)
class SourceCheck:
    """One shard.

    Args:
        shard_id: Which shard.
        path: Where it was found, or else where it lay.
        status: What became of it.
        what: In words; empty if it is where it lay.
    """

    shard_id: str
    path: str
    status: SourceStatus
    what: str


@dataclass(frozen=True, kw_only=True)
class Sources:
    """All shards that something of a cache was made from."""

    checks: tuple[SourceCheck, ...]

    @property
    def changed(self) -> tuple[SourceCheck, ...]:
        """Shards whose bytes are not what they were."""
        return tuple(c for c in self.checks if c.status is SourceStatus.CHANGED)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        counts = Counter(check.status.value for check in self.checks)
        return {
            "counts": dict(sorted(counts.items())),
            "shards": [asdict(check) for check in self.checks],
        }

    def describe(self) -> str:
        """For people."""
        counts = Counter(check.status for check in self.checks)
        said = ", ".join(f"{counts[status]:,} {status}" for status in SourceStatus)
        lines = [f"sources   {counted(len(self.checks), 'shard')}: {said}"]
        lines += [f"{c.status.value:<9} {c.shard_id}: {c.what}" for c in self.checks if c.what]
        return "\n".join(lines)


def check_sources(cache: Cache, *, patterns: Sequence[str], progress: Progress) -> Sources:
    """Index every recorded shard again and hash all of its bytes.

    Args:
        cache: The cache; records of it that are damaged are passed over.
        patterns: Where shards may lie besides where they lay.
        progress: Where progress is shown.
    """
    recorded = _recorded(cache)
    elsewhere = _by_stem(patterns)
    total = sum(max(source.num_bytes for source in sources) for sources in recorded.values())
    bar = progress.start("sources", total, BYTES)

    def check(shard_id: str) -> SourceCheck:
        sources = recorded[shard_id]
        found = elsewhere.get(shard_id.rpartition("-")[0], ())
        checked = _check(shard_id, sources, found, known=recorded.keys())
        progress.advance(bar, max(source.num_bytes for source in sources))
        return checked

    with ThreadPoolExecutor(_THREADS) as pool:
        checks = tuple(pool.map(check, sorted(recorded)))
    progress.finish(bar)
    return Sources(checks=checks)


def _recorded(cache: Cache) -> dict[str, list[SourceInfo]]:
    """What each base says that it was made from, by shard."""
    found: dict[str, list[SourceInfo]] = defaultdict(list)

    def read(part: PartId) -> SourceInfo | None:
        base = read_part(cache, part, [commit_file(part, None)]).base
        return None if base is None else base.source

    parts = list(cache.records())
    with ThreadPoolExecutor(_THREADS) as pool:
        for part, source in zip(parts, pool.map(read, parts), strict=True):
            if source is not None:
                found[part.shard_id].append(source)
    return found


def _by_stem(patterns: Sequence[str]) -> dict[str, list[str]]:
    paths: dict[str, list[str]] = defaultdict(list)
    for pattern in patterns:
        try:
            for path in expand([pattern]):
                paths[shard_stem(path)].append(path)
        except UsageError as error:  # shards need not be there any more
            logger.warning("%s", error)
    return paths


def _check(
    shard_id: str,
    sources: Sequence[SourceInfo],
    elsewhere: Sequence[str],
    *,
    known: Collection[str],
) -> SourceCheck:
    lay = sources[0].path
    wrong: list[str] = []
    asides = ""
    for path in dict.fromkeys([*(source.path for source in sources), *elsewhere]):
        try:
            if not is_there(path):
                continue
            index = index_shard(path)
        except SourceError as error:
            asides += f"; {error}"
            continue
        except ShardError as error:
            wrong.append(str(error))
            continue
        if index.shard_id != shard_id:
            if path in elsewhere and path != lay:
                continue  # another shard of the same name
            if index.shard_id in known:
                asides += f"; {path} now holds {index.shard_id}"
            else:
                wrong.append(f"{path} now holds other samples")
            continue
        what = _differs(index, sources)
        if not what:
            moved = "" if path == lay else f"found at {path}, it lay at {lay}"
            return SourceCheck(shard_id=shard_id, path=path, status=SourceStatus.OK, what=moved)
        wrong.append(f"{path} {what}")
    if wrong:
        return SourceCheck(
            shard_id=shard_id, path=lay, status=SourceStatus.CHANGED, what="; ".join(wrong)
        )
    what = f"not found where it lay ({lay}){asides}"
    return SourceCheck(shard_id=shard_id, path=lay, status=SourceStatus.MOVED, what=what)


def _differs(index: ShardIndex, sources: Sequence[SourceInfo]) -> str:
    """How a shard's bytes differ from those that something was made from; empty if not."""
    try:
        found = shard_sha256(index)
    except SourceError as error:
        return f"cannot be read ({error})"
    for source in sources:
        if source.sha256 is not None and source.sha256 != found:
            return (
                f"has the same samples in other bytes (sha256 {found[:12]}, recorded "
                f"{source.sha256[:12]})"
            )
    return ""
