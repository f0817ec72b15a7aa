"""What of a cache is not good, as a list: rows, columns of rows, and parts that were given up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kdhiera.cache.commit import Cache
from kdhiera.cache.quarantine import GivenUp, given_up
from kdhiera.data.clip import shown
from kdhiera.progress import counted
from kdhiera.stages.bad_rows import BadRow, RowStatuses, statuses_of

_LISTED = 100  # rows for people; JSON has all


@dataclass(frozen=True, kw_only=True)
class BadList:
    """What of a cache is not good.

    Args:
        cache: Folder or address.
        statuses: Rows by status, and all that are not good.
        chosen: Those of the statuses that were asked for.
        quarantine: Parts that were given up and not done since.
    """

    cache: str
    statuses: RowStatuses
    chosen: tuple[BadRow, ...]
    quarantine: tuple[GivenUp, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "cache": self.cache,
            "rows": dict(self.statuses.rows),
            "columns": {c: dict(n) for c, n in self.statuses.columns.items()},
            "bad": [bad.to_json() for bad in self.chosen],
            "quarantine": [part.to_json() for part in self.quarantine],
        }

    def describe(self) -> str:
        """For people."""
        total = sum(self.statuses.rows.values())
        kinds = ", ".join(
            f"{count:,} {name}" for name, count in sorted(self.statuses.rows.items()) if count
        )
        lines = [f"cache     {self.cache}", f"rows      {total:,}: {kinds or 'none'}"]
        for column, counts in sorted(self.statuses.columns.items()):
            wrong = [f"{n:,} {s}" for s, n in sorted(counts.items()) if s != "ok" and n]
            if wrong:
                lines.append(f"column    {column}: {', '.join(wrong)}")
        lines += [_line(bad) for bad in self.chosen[:_LISTED]]
        if len(self.chosen) > _LISTED:
            lines.append(f"          and {len(self.chosen) - _LISTED:,} more: --json lists all")
        lines += [
            f"given up  {one.part}, {counted(one.tries, 'attempt')}: {shown(one.error)} "
            f"({shown(one.path)})"
            for one in self.quarantine
        ]
        if self.chosen:
            lines.append(
                f"next      `kdhiera replay {self.cache} KEY` says why; `kdhiera extract-teachers "
                "CONFIG --retry all` tries again"
            )
        if self.quarantine:
            lines.append(
                "next      `kdhiera extract-teachers CONFIG` tries what was given up again, last"
            )
        return "\n".join(lines)


def list_bad(cache: Cache, statuses: Sequence[str] = ()) -> BadList:
    """Find all that is not good; what is good is not read.

    Args:
        cache: The cache.
        statuses: List only rows of these; all if there are none.

    Raises:
        DamagedError: If a file with bad rows is missing or damaged.
    """
    commits = cache.commits()
    found = statuses_of(cache, {part: commits[part] for part in sorted(commits)})
    return BadList(
        cache=cache.url,
        statuses=found,
        chosen=tuple(bad for bad in found.bad if not statuses or bad.status in statuses),
        quarantine=tuple(given_up(cache).values()),
    )


def _line(bad: BadRow) -> str:
    column = f" in {bad.column}" if bad.column else ""
    why = f": {shown(bad.row.message)}" if bad.column is None else ""
    return f"bad       {shown(bad.row.uid)} view {bad.part.view}, {bad.status}{column}{why}"
