"""What can be wrong with a cache, and what mends it.

Mending removes as little as possible: what no commit names is not part of the cache, and the
next extraction computes it again. A problem rests on evidence, the contents of some small
files; where these have changed since, it says nothing any more and nothing is removed for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kdhiera.cache.survey import PartRecords, Record
from kdhiera.progress import counted, human_bytes, human_seconds
from kdhiera.stores import Store

_SHOWN = 20  # lines of one kind; JSON has all of them


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that is missing or wrong.

    Args:
        what: In words.
        where: The file that is missing or wrong.
        drops: Files whose removal lets extraction mend it, in the order of removal.
        restores: Records of shards to write again: shard id, path, time.
        evidence: sha256 of the small files that this rests on; None for one that is not there.
        seen: sha256 of what is to be removed, as it was looked at.
    """

    what: str
    where: str
    drops: tuple[str, ...] = ()
    restores: tuple[tuple[str, str, float], ...] = ()
    evidence: Mapping[str, str | None] = field(default_factory=dict)
    seen: Mapping[str, str] = field(default_factory=dict)

    @property
    def mendable(self) -> bool:
        """Whether repair can do something about it."""
        return bool(self.drops or self.restores)


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What a check of a whole cache found.

    Args:
        cache: Folder or address.
        parts: Parts that were checked.
        commits: Records that were checked.
        files: Files of parts that were read.
        num_bytes: Their bytes.
        seconds: Wall time.
        problems: All that is wrong.
        repaired: Whether repair has run.
        removed: Files that repair removed.
        restored: Records of shards that repair wrote again.
    """

    cache: str
    parts: int
    commits: int
    files: int
    num_bytes: int
    seconds: float
    problems: tuple[Problem, ...]
    repaired: bool = False
    removed: tuple[str, ...] = ()
    restored: tuple[str, ...] = ()

    @property
    def left(self) -> tuple[Problem, ...]:
        """Problems that are still there."""
        return tuple(p for p in self.problems if not (self.repaired and p.mendable))

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        problems = [
            {"what": p.what, "where": p.where, "drops": list(p.drops)} for p in self.problems
        ]
        return {
            "cache": self.cache,
            "parts": self.parts,
            "commits": self.commits,
            "files": self.files,
            "num_bytes": self.num_bytes,
            "seconds": self.seconds,
            "problems": problems,
            "repaired": self.repaired,
            "removed": list(self.removed),
            "restored": list(self.restored),
            "sound": not self.left,
        }

    def lines(self) -> list[str]:
        """For people: what was looked at, what is wrong, what was done about it."""
        return [
            f"cache     {self.cache}",
            f"checked   {counted(self.parts, 'part')}, {counted(self.commits, 'record')}, "
            f"{counted(self.files, 'file')}, "
            f"{human_bytes(self.num_bytes)} in {human_seconds(self.seconds)}",
            *_some("problem", [problem.what for problem in self.problems]),
            *_some("removed", self.removed),
            *_some("restored", self.restored),
        ]

    def conclusion(self) -> list[str]:
        """For people: how it stands, and what comes next."""
        if not self.problems:
            return ["result    sound"]
        left = counted(len(self.left), "problem")
        if not self.repaired:
            able = any(problem.mendable for problem in self.problems)
            advice = (
                f"run `kdhiera cache verify {self.cache} --repair` to mend the cache"
                if able
                else "repair can do nothing about it"
            )
            return [f"result    {left}; {advice}"]
        mended = len(self.problems) - len(self.left)
        lines = [f"result    {counted(mended, 'problem')} mended, {len(self.left):,} left"]
        if self.removed:
            lines.append("next      run `kdhiera extract-teachers CONFIG` to fill the cache again")
        return lines

    def describe(self) -> str:
        """For people."""
        return "\n".join([*self.lines(), *self.conclusion()])


def holds(store: Store, problem: Problem) -> bool:
    """Whether what a problem rests on is still as it was, and something to remove is."""
    evidence, seen = problem.evidence.items(), problem.seen.items()
    if not all(sha256_of(store, key) == sha256 for key, sha256 in evidence):
        return False
    return not seen or any(sha256_of(store, key) == sha256 for key, sha256 in seen)


def sha256_of(store: Store, key: str) -> str | None:
    """Of a small file, or None if it is not there."""
    try:
        return hashlib.sha256(store.read(key)).hexdigest()
    except FileNotFoundError:
        return None


def part_problem(found: PartRecords, owners: Sequence[Record], what: str, where: str) -> Problem:
    """Something wrong with records of a part; a base takes its columns along.

    Args:
        found: All records of the part.
        owners: Those that it is wrong with.
        what: In words.
        where: The file that is missing or wrong.
    """
    base = next((record for record in owners if record.is_base), None)
    columns = [record for record in (found.records if base else owners) if not record.is_base]
    gone = [*columns, *([base] if base else [])]
    return Problem(
        what=f"part {found.part}: {what}",
        where=where,
        drops=tuple(record.key for record in gone),
        evidence={base.key: base.sha256} if base else {},
        seen={record.key: record.sha256 for record in gone},
    )


def _some(name: str, lines: Sequence[str]) -> Iterator[str]:
    yield from (f"{name:<9} {line}" for line in lines[:_SHOWN])
    if len(lines) > _SHOWN:
        yield f"          ... and {len(lines) - _SHOWN:,} more (--json lists them)"
