"""Which stored rows stand for all: a few, spread evenly over shards and views."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from kdhiera.cache.arrays import read_array
from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import ColumnStatus, PartId, column_group
from kdhiera.cache.records import PartCommits
from kdhiera.data.ranges import SourceError
from kdhiera.data.shards import ShardIndex, index_shard, shard_stem
from kdhiera.data.tars import ShardError

logger = logging.getLogger(__name__)

Columns = Mapping[str, tuple[str, str]]  # (teacher, layer) by column id


def spread(available: Mapping[PartId, int], count: int) -> dict[PartId, list[int]]:
    """Choose rows so that shards and views are used alike; the same ones every time.

    Going through the shards in order, the view changes with every row.

    Args:
        available: Rows of every part.
        count: Rows to choose, at least 1; all there are if these are fewer.

    Returns:
        Places of the chosen rows among those of their part, ascending, by part.
    """
    parts = sorted(part for part, rows in available.items() if rows)
    if not parts:
        return {}
    views: dict[int, list[PartId]] = defaultdict(list)
    for part in parts:
        views[part.view].append(part)
    order = sorted(views)
    chosen: Counter[PartId] = Counter()
    for i in range(count):
        along = (i + 0.5) / count
        view = order[i % len(order) if count >= len(order) else int(along * len(order))]
        chosen[views[view][int(along * len(views[view]))]] += 1
    _fill_up(chosen, {part: available[part] for part in parts})
    return {
        part: [(2 * k + 1) * available[part] // (2 * chosen[part]) for k in range(chosen[part])]
        for part in parts
        if chosen[part]
    }


def _fill_up(chosen: Counter[PartId], available: Mapping[PartId, int]) -> None:
    """Move what small parts do not have to parts that still have rows."""
    over = 0
    for part, rows in available.items():
        over += max(0, chosen[part] - rows)
        chosen[part] = min(chosen[part], rows)
    while over and (room := [p for p, rows in available.items() if chosen[p] < rows]):
        for part in sorted(room, key=lambda p: chosen[p])[:over]:
            chosen[part] += 1
            over -= 1


class ShardFinder:
    """Shards among some files, by id; a tar is indexed only if its name may be the shard's.

    Args:
        paths: Of tars.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths: dict[str, list[str]] = defaultdict(list)
        for path in paths:
            self._paths[shard_stem(path)].append(path)
        self._found: dict[str, ShardIndex | None] = {}

    def may_have(self, shard_id: str) -> bool:
        """Whether a shard may be among them, by names alone."""
        return self._found.get(shard_id, ...) is not None and bool(self._named(shard_id))

    def find(self, shard_id: str) -> ShardIndex | None:
        """A shard's index, or None if it is not among them."""
        if shard_id not in self._found:
            self._found[shard_id] = None
            for path in self._named(shard_id):
                try:
                    index = index_shard(path)
                except ShardError:
                    continue
                except SourceError as error:
                    logger.warning("%s", error)
                    continue
                if index.shard_id == shard_id:
                    self._found[shard_id] = index
        return self._found[shard_id]

    def _named(self, shard_id: str) -> list[str]:
        return self._paths.get(shard_id.rpartition("-")[0], [])


def choose_rows(
    cache: Cache,
    commits: Mapping[PartId, PartCommits],
    shards: ShardFinder,
    columns: Columns,
    num_rows: int,
) -> dict[PartId, dict[str | None, list[int]]]:
    """Array rows to look at again, by part and column, in sorted order.

    Args:
        cache: The cache.
        commits: Parts to choose from.
        shards: Where their shards are found; parts whose shard is not are passed over.
        columns: Columns to look at; None stands for what the base holds besides.
        num_rows: Rows of each of them, good in it.
    """
    while True:
        parts = {p: c for p, c in commits.items() if shards.may_have(p.shard_id)}
        chosen: dict[PartId, dict[str | None, list[int]]] = defaultdict(dict)
        for column in (None, *columns):
            good = {p: n for p, c in parts.items() if (n := _num_good(c, column))}
            for part, places in spread(good, num_rows).items():
                rows = _good_rows(cache, parts[part], column)
                chosen[part][column] = [int(rows[place]) for place in places]
        if not [part for part in chosen if shards.find(part.shard_id) is None]:
            return {part: chosen[part] for part in sorted(chosen)}


def _num_good(commits: PartCommits, column: str | None) -> int:
    if column is None:
        return commits.base.array_rows
    commit = commits.columns.get(column)
    return 0 if commit is None else commit.statuses.get("ok", 0)


def _good_rows(cache: Cache, commits: PartCommits, column: str | None) -> np.ndarray:
    """Array rows that are good in a column; its statuses are read only if one is not."""
    rows = commits.base.array_rows
    if column is None or _num_good(commits, column) == rows:
        return np.arange(rows)
    commit = commits.columns[column]
    status = read_array(cache, commit, f"{column_group(column)}/status")
    return np.flatnonzero(status == ColumnStatus.OK)
