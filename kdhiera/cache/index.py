"""Which samples a run can train on: numbered over shards, then in the shard's order.

A sample counts if it is good in every view and column asked for. Where nothing of a shard
is bad its numbers are implicit; otherwise two or three small integers a sample are kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int32

from kdhiera.cache.arrays import read_array
from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import ColumnStatus, PartId, column_group, commit_folder
from kdhiera.cache.records import BaseCommit, PartCommits
from kdhiera.cache.snapshot import Snapshot
from kdhiera.cache.table import read_columns
from kdhiera.errors import MismatchError
from kdhiera.views import RowStatus

_THREADS = 8
_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What a reader covers of what the cache was asked for.

    Args:
        num_views: Views asked for.
        num_shards: Shards asked for.
        num_samples: Samples of the shards that are there in every view and column.
        trainable: Samples that are good in every view and column.
        rows: Rows (a sample in a view) by status.
        columns: Good rows by column status, by column.
        missing: Parts that lack their base or a column, with what they lack.
    """

    num_views: int
    num_shards: int
    num_samples: int
    trainable: int
    rows: Mapping[str, int]
    columns: Mapping[str, Mapping[str, int]]
    missing: Mapping[PartId, tuple[str, ...]]

    def describe(self) -> str:
        """One line for logs and reports."""
        share = 100.0 * self.trainable / self.num_samples if self.num_samples else 0.0
        bad = {s: n for s, n in self.rows.items() if s != RowStatus.OK.value}
        for column, statuses in self.columns.items():
            bad |= {f"{column} {s}": n for s, n in statuses.items() if s != "ok"}
        reasons = ", ".join(f"{n:,} {name}" for name, n in bad.items())
        text = (
            f"{self.trainable:,} of {self.num_samples:,} samples are trainable ({share:.1f} %) in "
            f"{self.num_views} views of {self.num_shards:,} shards"
        )
        if reasons:
            text += f"; bad rows: {reasons}"
        if self.missing:
            text += f"; {len(self.missing):,} parts are not extracted yet"
        return text


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardIndex:
    """Trainable samples of a shard; None stands for 0, 1, 2, ... (nothing is bad)."""

    shard_id: str
    num_samples: int
    ordinals: Int[np.ndarray, " n"] | None
    array_rows: tuple[Int[np.ndarray, " n"] | None, ...]  # by view


@dataclass(frozen=True, kw_only=True)
class Index:
    """Trainable samples of a set of shards.

    Args:
        parts: What is committed of every part that is read.
        shards: Their samples, in sorted order of shards.
        coverage: What became of the rest.
    """

    parts: Mapping[PartId, PartCommits]
    shards: Sequence[ShardIndex]
    coverage: Coverage


def build_index(
    cache: Cache,
    *,
    num_views: int,
    columns: Sequence[str],
    shards: Collection[str] | None,
    allow_partial: bool,
    snapshot: Snapshot | None = None,
) -> Index:
    """List what is committed and number its trainable samples.

    Args:
        cache: The cache.
        num_views: Views 0 .. num_views-1 are asked for.
        columns: Columns asked for.
        shards: Shard ids asked for; None means all that the cache has a part of.
        allow_partial: Leave out shards that lack a view or a column instead of refusing.
        snapshot: Read exactly these commits; `shards` and `allow_partial` then say nothing.

    Raises:
        MismatchError: If something asked for is not committed, or nothing is there.
        DamagedError: If a record or status is damaged, or views of a shard disagree.
    """
    if snapshot is None:
        found = cache.commits()
    else:
        snapshot.check(num_views=num_views, columns=columns)
        found, shards = snapshot.find(cache), None
    names = sorted({p.shard_id for p in found} if shards is None else set(shards))
    missing: dict[PartId, tuple[str, ...]] = {}
    used: dict[str, list[PartCommits]] = {}
    for name in names:
        parts = [PartId(shard_id=name, view=view) for view in range(num_views)]
        lacks = {p: gap for p in parts if (gap := _lacks(found.get(p), columns))}
        missing |= lacks
        if not lacks:
            used[name] = [found[p] for p in parts]
    if missing and not allow_partial:
        raise MismatchError(_explain_missing(cache, missing))
    if not used:
        raise MismatchError(
            f"the cache in {cache.url} has no shard with {num_views} views and the columns "
            f"{', '.join(columns) or '(none)'}: run `kdhiera extract-teachers CONFIG`"
        )
    with ThreadPoolExecutor(_THREADS) as pool:
        indexed = list(pool.map(lambda views: _index_shard(cache, views, columns), used.values()))
    committed = {view.base.part: view for views in used.values() for view in views}
    return Index(
        parts=committed,
        shards=indexed,
        coverage=_coverage(names, num_views, columns, committed, indexed, missing),
    )


def _lacks(commits: PartCommits | None, columns: Sequence[str]) -> tuple[str, ...]:
    if commits is None:
        return ("base", *columns)
    return tuple(c for c in columns if c not in commits.columns)


def _explain_missing(cache: Cache, missing: Mapping[PartId, tuple[str, ...]]) -> str:
    shown = [f"{part} lacks {', '.join(gap)}" for part, gap in list(missing.items())[:_NAMED]]
    if len(missing) > _NAMED:
        shown.append(f"and {len(missing) - _NAMED:,} parts more")
    return (
        f"the cache in {cache.url} does not have all that this run asks for: {'; '.join(shown)}. "
        "Run `kdhiera extract-teachers CONFIG` to fill it, or set cache.allow_partial=true to "
        "train on what is there"
    )


def _index_shard(cache: Cache, views: Sequence[PartCommits], columns: Sequence[str]) -> ShardIndex:
    """Number a shard's trainable samples; files are read only if a row of it is bad."""
    first = views[0].base
    for view in views[1:]:
        if view.base.samples_digest != first.samples_digest:
            raise cache.damaged(view.base.part, f"its samples are not those of {first.part}")
    if len({view.base.source.sha256 for view in views} - {None}) > 1:
        raise MismatchError(_explain_bytes(cache, [view.base for view in views]))
    clean = all(
        view.base.array_rows == first.num_rows
        and all(set(view.columns[c].statuses) <= {"ok"} for c in columns)
        for view in views
    )
    if clean:
        return ShardIndex(
            shard_id=first.part.shard_id,
            num_samples=first.num_rows,
            ordinals=None,
            array_rows=(None,) * len(views),
        )
    rows = np.stack([_good_rows(cache, view, columns) for view in views])
    ordinals = np.flatnonzero((rows >= 0).all(0)).astype(np.int32)
    return ShardIndex(
        shard_id=first.part.shard_id,
        num_samples=len(ordinals),
        ordinals=ordinals,
        array_rows=tuple(np.ascontiguousarray(r) for r in rows[:, ordinals]),
    )


def _explain_bytes(cache: Cache, bases: Sequence[BaseCommit]) -> str:
    made = [f"{b.part} of {b.source.path}, sha256 {str(b.source.sha256)[:12]}" for b in bases]
    folders = [f"{cache.url}/{commit_folder(base.part)}" for base in bases]
    return (
        f"views of one shard were made of different bytes: {'; '.join(made)}. Remove those that "
        f"are of the wrong ones ({', '.join(folders)}) and run `kdhiera extract-teachers CONFIG` "
        "with the right shard"
    )


def _good_rows(
    cache: Cache, commits: PartCommits, columns: Sequence[str]
) -> Int32[np.ndarray, " samples"]:
    """Array row of every sample of a part, -1 where the row or a column of it is bad."""
    table = read_columns(cache.read_file(commits.base, "rows.parquet"), ["array_row"])
    rows = table["array_row"].fill_null(-1).to_numpy().astype(np.int32)
    good = np.ones(commits.base.array_rows, bool)
    for column in columns:
        commit = commits.columns[column]
        if set(commit.statuses) <= {"ok"}:
            continue
        status = read_array(cache, commit, f"{column_group(column)}/status")
        good &= status == ColumnStatus.OK
    return np.where((rows >= 0) & np.append(good, False)[rows], rows, np.int32(-1))


def _coverage(
    names: Sequence[str],
    num_views: int,
    columns: Sequence[str],
    used: Mapping[PartId, PartCommits],
    shards: Sequence[ShardIndex],
    missing: Mapping[PartId, tuple[str, ...]],
) -> Coverage:
    rows: Counter[str] = Counter()
    statuses: dict[str, Counter[str]] = {c: Counter() for c in columns}
    for commits in used.values():
        rows.update(commits.base.statuses)
        for column in columns:
            statuses[column].update(commits.columns[column].statuses)
    return Coverage(
        num_views=num_views,
        num_shards=len(names),
        num_samples=sum(c.base.num_rows for p, c in used.items() if p.view == 0),
        trainable=sum(shard.num_samples for shard in shards),
        rows=dict(sorted(rows.items())),
        columns={column: dict(sorted(counts.items())) for column, counts in statuses.items()},
        missing=missing,
    )
