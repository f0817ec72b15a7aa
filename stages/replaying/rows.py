"""Rows of a cache by the key or the identity of their sample."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from kdhiera.cache.commit import Cache
from kdhiera.cache.records import PartCommits
from kdhiera.cache.table import Row, read_columns
from kdhiera.data.clip import shown
from kdhiera.errors import UsageError
from kdhiera.views import RowStatus

_NEAR = 5  # keys that are proposed instead of an unknown one
_KEYS_COMPARED = 20_000


@dataclass(frozen=True, kw_only=True)
class FoundRow:
    """One row of a cache.

    Args:
        commits: Its part.
        number: Its place among the samples of the part.
        row: What the cache says of it.
        array_row: Its place among the good ones; None for a bad one.
    """

    commits: PartCommits
    number: int
    row: Row
    array_row: int | None


def find_rows(cache: Cache, key: str, *, view: int | None = None) -> list[FoundRow]:
    """All rows of a sample: of every view, and of every sample that has the key.

    Args:
        cache: The cache.
        key: Key of the sample, or its identity (`SHARD/OFFSET/KEY`).
        view: Only this view; None for all.

    Returns:
        In sorted order of shards and views.

    Raises:
        UsageError: If there is none, with keys that are like it.
        DamagedError: If a record or a file of rows is missing or damaged.
    """
    found: list[FoundRow] = []
    keys: list[str] = []
    for part, commits in sorted(cache.commits().items()):
        if view is not None and part.view != view:
            continue
        data = cache.read_file(commits.base, "rows.parquet")
        names = read_columns(data, ["uid", "key"]).to_pydict()
        hits = {n for n, pair in enumerate(zip(*names.values(), strict=True)) if key in pair}
        keys += names["key"][: _KEYS_COMPARED - len(keys)]
        good = 0
        for number, row in enumerate(cache.rows(commits.base) if hits else ()):
            is_good = row.status is RowStatus.OK
            if number in hits:
                place = good if is_good else None
                found.append(FoundRow(commits=commits, number=number, row=row, array_row=place))
            good += is_good
    if not found:
        near = [shown(k, 80) for k in difflib.get_close_matches(key, set(keys), n=_NEAR)]
        hint = f"; like it are: {', '.join(near)}" if near else ""
        where = "" if view is None else f" in view {view}"
        raise UsageError(
            f"no row of the cache in {cache.url} has the key {shown(key)}{where}{hint}"
        )
    return found
