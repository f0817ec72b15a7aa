"""Whether every byte of a cache is what was written, and the removal of what is not.

Records are looked at one by one, so that any amount of damage is listed whole. Repair only
removes commits: what no commit names is not part of the cache, and the next extraction
computes it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import PartId, column_file, column_folder, commit_file
from kdhiera.cache.records import BaseCommit, ColumnCommit, Commit
from kdhiera.errors import DamagedError, UsageError


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that is missing or wrong.

    Args:
        what: In words.
        drops: Files whose removal lets extraction mend it, in the order of removal.
    """

    what: str
    drops: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What a check of a whole cache found.

    Args:
        cache: Folder or address.
        parts: Parts that were checked.
        commits: Records that were checked.
        num_bytes: Bytes that sound records name.
        problems: All that is wrong.
        removed: Files that repair removed.
    """

    cache: str
    parts: int
    commits: int
    num_bytes: int
    problems: tuple[Problem, ...]
    removed: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def describe(self) -> str:
        """For people."""
        lines = [
            f"cache     {self.cache}",
            f"checked   {self.parts:,} parts, {self.commits:,} records, {self.num_bytes:,} bytes",
            *(f"problem   {problem.what}" for problem in self.problems),
            *(f"removed   {key}" for key in self.removed),
        ]
        if not self.problems:
            lines.append("result    sound")
        elif self.removed:
            lines.append(
                "result    repaired: run `kdhiera extract-teachers CONFIG` to fill it again"
            )
        else:
            lines.append(f"result    {len(self.problems)} problems; --repair drops the damaged")
        return "\n".join(lines)


def verify(cache: Cache) -> Verified:
    """Read every byte that a commit names, and every record.

    Args:
        cache: The cache.
    """
    problems = list(_column_problems(cache))
    records = cache.records()
    num_commits = num_bytes = 0
    for part, keys in records.items():
        sound, found = _read_records(cache, part, keys)
        problems += found
        num_commits += len(keys)
        num_bytes += sum(commit.num_bytes for commit in sound)
        for problem in cache.file_problems(*sound, contents=True) if sound else ():
            needed = {commit.column for commit in problem.commits}
            problems.append(Problem(what=problem.what, drops=_drops(part, keys, needed)))
    return Verified(
        cache=cache.url,
        parts=len(records),
        commits=num_commits,
        num_bytes=num_bytes,
        problems=tuple(problems),
    )


def repair(cache: Cache, verified: Verified) -> Verified:
    """Remove the commits that need what is missing or wrong.

    Args:
        cache: The cache.
        verified: What `verify` found.
    """
    drops = dict.fromkeys(key for problem in verified.problems for key in problem.drops)
    bases = [key for key in drops if key.endswith("/base.json")]
    ordered = (*(key for key in drops if key not in bases), *bases)  # columns before their base
    cache.store.delete(ordered)
    return Verified(**{**vars(verified), "removed": ordered})


def drop_column(cache: Cache, column: str) -> int:
    """Remove a column: its identity first, so that no reader sees it half there.

    Args:
        cache: The cache.
        column: Column id.

    Returns:
        Commits that were removed.

    Raises:
        UsageError: If the cache has no such column.
    """
    keys = [key for keys in cache.records().values() for key in keys]
    mine = [key for key in keys if key.endswith(f"/{column}.json")]
    if not mine and column not in cache.columns.names():
        there = ", ".join(cache.columns.names()) or "none"
        raise UsageError(f"the cache in {cache.url} has no column {column}; it has: {there}")
    folder = column_folder(column)
    rest = [f"{folder}/{name}" for name in cache.store.names(folder)]
    cache.store.delete([column_file(column), *mine, *rest])
    return len(mine)


def _column_problems(cache: Cache) -> Iterator[Problem]:
    for column in cache.columns.names():
        try:
            cache.columns.record(column)
        except DamagedError as error:
            yield Problem(what=str(error), drops=(column_file(column),))


def _read_records(
    cache: Cache, part: PartId, keys: Sequence[str]
) -> tuple[list[Commit], list[Problem]]:
    """Records of a part that can be believed, and what is wrong with the others."""
    base: BaseCommit | None = None
    columns: list[ColumnCommit] = []
    problems: list[Problem] = []
    for key in keys:
        try:
            commit = cache.read_commit(key)
        except DamagedError as error:
            name = key.rpartition("/")[2].removesuffix(".json")
            drops = _drops(part, keys, {None if name == "base" else name})
            problems.append(Problem(what=str(error), drops=drops))
            continue
        if isinstance(commit, BaseCommit):
            base = commit
        elif commit is not None:
            columns.append(commit)
    sound: list[Commit] = [] if base is None else [base]
    for column in columns:
        drops = (commit_file(part, column.column),)
        if base is None or column.base_sha256 != base.sha256:
            what = f"part {part}: column {column.column} belongs to no base that is there"
            problems.append(Problem(what=what, drops=drops))
            continue
        try:
            cache.columns.check_basis(column.column, column.basis_sha256)
        except DamagedError as error:
            basis = cache.columns.basis_key(column.column)
            bad = (*drops, *((basis,) if basis else ()))
            problems.append(Problem(what=str(error), drops=bad))
            continue
        sound.append(column)
    return sound, problems


def _drops(part: PartId, keys: Sequence[str], columns: set[str | None]) -> tuple[str, ...]:
    """Records to remove; with a base all records of its part, the base last."""
    if None in columns:
        base = commit_file(part, None)
        return (*(key for key in keys if key != base), base)
    return tuple(commit_file(part, column) for column in sorted(c for c in columns if c))
