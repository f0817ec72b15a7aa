"""The rows of a cache that training cannot use: how many, which, and their videos."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kdhiera.addresses import expand_braces
from kdhiera.cache.arrays import read_array
from kdhiera.cache.commit import Cache
from kdhiera.cache.expected import expected_shards
from kdhiera.cache.fingerprint import declared_base
from kdhiera.cache.layout import ColumnStatus, PartId, column_group
from kdhiera.cache.records import ColumnCommit, PartCommits
from kdhiera.cache.table import Row
from kdhiera.config import RunConfig
from kdhiera.views import RowStatus


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A sample that is not good in a view, or not in a column of it.

    Args:
        part: Shard and view.
        row: What the cache says of the sample.
        column: The column that it is bad in; None if the sample has no clip at all.
        status: In the column, or of the row.
    """

    part: PartId
    row: Row
    column: str | None
    status: str

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "status": self.status,
            "column": self.column,
            "key": self.row.key,
            "uid": self.row.uid,
            "shard": self.part.shard_id,
            "view": self.part.view,
            "message": self.row.message,
        }


@dataclass(frozen=True, kw_only=True)
class RowStatuses:
    """What became of all rows that a run asks for.

    Args:
        rows: Rows by status.
        columns: Good rows by column and status.
        bad: Those that are not good, in sorted order of shards and views.
    """

    rows: Mapping[str, int]
    columns: Mapping[str, Mapping[str, int]]
    bad: tuple[BadRow, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "bad": [bad.to_json() for bad in self.bad]}


def open_for(config: RunConfig) -> tuple[Cache, dict[PartId, PartCommits]]:
    """The config's cache, and what it holds of the config's shards and views.

    Raises:
        UsageError: If there is no cache.
        MismatchError: If it was made for other clips or scores.
    """
    cache = Cache.open(config.cache.dir)
    cache.check(declared_base(config), declared_only=True)
    patterns = [p for s in config.data.shards for p in expand_braces(s)]
    commits = cache.commits(expected_shards(cache, patterns))
    return cache, {part: commits[part] for part in sorted(commits) if part.view < config.views.num}


def statuses_of(
    cache: Cache, commits: Mapping[PartId, PartCommits], *, columns: Collection[str] | None = None
) -> RowStatuses:
    """Count rows by status and find the bad ones; what is good is not read.

    Args:
        cache: A cache.
        commits: The parts to look at.
        columns: Columns to look at; None for all that there are.

    Raises:
        DamagedError: If a file with bad rows is missing or damaged.
    """
    rows: Counter[str] = Counter()
    counts: dict[str, Counter[str]] = {}
    bad: list[BadRow] = []
    for part, found in commits.items():
        rows.update(found.base.statuses)
        there = {c: x for c, x in found.columns.items() if columns is None or c in columns}
        for column, commit in there.items():
            counts.setdefault(column, Counter()).update(commit.statuses)
        if found.base.bad or any(commit.bad for commit in there.values()):
            bad += _bad_rows(cache, part, cache.rows(found.base), there)
    return RowStatuses(
        rows=dict(rows), columns={c: dict(n) for c, n in counts.items()}, bad=tuple(bad)
    )


def _bad_rows(
    cache: Cache, part: PartId, rows: list[Row], columns: Mapping[str, ColumnCommit]
) -> Iterator[BadRow]:
    good = []
    for row in rows:
        if row.status is RowStatus.OK:
            good.append(row)
        else:
            yield BadRow(part=part, row=row, column=None, status=row.status.value)
    for column, commit in columns.items():
        if commit.bad:
            status = read_array(cache, commit, f"{column_group(column)}/status")
            for number in np.flatnonzero(status != ColumnStatus.OK):
                name = ColumnStatus(int(status[number])).name.lower()
                yield BadRow(part=part, row=good[number], column=column, status=name)
