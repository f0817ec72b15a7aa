"""Which samples a run can train on: numbered over shards, then in the shard's order.

A sample counts if it is good in every view and column asked for. Records name what is bad, so
that no other file is read, and what is good costs no memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from kdhiera.cache.commit import Cache
from kdhiera.cache.gaps import Gaps, numbers_in
from kdhiera.cache.layout import PartId, commit_folder
from kdhiera.cache.records import BaseCommit, PartCommits
from kdhiera.cache.snapshot import Snapshot
from kdhiera.errors import MismatchError
from kdhiera.views import RowStatus

_NAMED = 3
_NO_GAPS = Gaps.of(())


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
    """Trainable samples of a shard.

    Args:
        shard_id: Which shard.
        num_samples: How many of its samples are good in every view and column.
        samples: Their places in the shard.
        rows: Places that have an array row, by view.
    """

    shard_id: str
    num_samples: int
    samples: Gaps
    rows: tuple[Gaps, ...]

    def places(self, numbers: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Places in the shard of trainable samples."""
        return self.samples.nth(numbers)

    def array_rows(self, places: Int[np.ndarray, " n"], view: int) -> Int[np.ndarray, " n"]:
        """Array rows in a view of the samples at these places."""
        return self.rows[view].rank(places)


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
        DamagedError: If a record is damaged, or views of a shard disagree.
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
    indexed = [_index_shard(cache, views, columns) for views in used.values()]
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
    """Number a shard's trainable samples."""
    first = views[0].base
    for view in views[1:]:
        if view.base.samples_digest != first.samples_digest:
            raise cache.damaged(view.base.part, f"its samples are not those of {first.part}")
    if len({view.base.source.sha256 for view in views} - {None}) > 1:
        raise MismatchError(_explain_bytes(cache, [view.base for view in views]))
    rows = tuple(_NO_GAPS if not view.base.bad else Gaps.of(view.base.bad) for view in views)
    bad = [numbers_in(view.base.bad) for view in views if view.base.bad]
    bad += [
        good.nth(numbers_in(view.columns[column].bad))
        for view, good in zip(views, rows, strict=True)
        for column in columns
        if view.columns[column].bad
    ]
    samples = Gaps.of_any(bad) if bad else _NO_GAPS
    return ShardIndex(
        shard_id=first.part.shard_id,
        num_samples=first.num_rows - len(samples),
        samples=samples,
        rows=rows,
    )


def _explain_bytes(cache: Cache, bases: Sequence[BaseCommit]) -> str:
    made = [f"{b.part} of {b.source.path}, sha256 {str(b.source.sha256)[:12]}" for b in bases]
    folders = [f"{cache.url}/{commit_folder(base.part)}" for base in bases]
    return (
        f"views of one shard were made of different bytes: {'; '.join(made)}. Remove those that "
        f"are of the wrong ones ({', '.join(folders)}) and run `kdhiera extract-teachers CONFIG` "
        "with the right shard"
    )


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
