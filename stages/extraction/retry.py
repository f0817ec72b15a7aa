"""Trying bad rows again: what decodes now is worth making its part anew.

A part is written once and never changed, so a single row cannot be replaced. The bad rows are
decoded first, which costs little; only the parts in which that mends a row are removed from the
cache, and extraction makes them again as it makes any part that is missing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdhiera.cache.commit import Cache
from kdhiera.cache.drop import drop_commits
from kdhiera.cache.layout import ColumnStatus, PartId
from kdhiera.cache.records import PartCommits
from kdhiera.config import RunConfig
from kdhiera.data.clip import Clip, ClipRequest, shown
from kdhiera.data.ordered import decode_samples
from kdhiera.data.sandbox import Sandbox
from kdhiera.data.shards import Sample, ShardIndex, read_sample
from kdhiera.errors import UsageError
from kdhiera.progress import Progress, counted
from kdhiera.stages.assemble import columns_of, decode_limits
from kdhiera.stages.bad_rows import BadRow, statuses_of
from kdhiera.views import RowStatus

COLUMN_STATUSES = tuple(s.name.lower() for s in ColumnStatus if s is not ColumnStatus.OK)
STATUSES = (*(s.value for s in RowStatus if s is not RowStatus.OK), *COLUMN_STATUSES)


@dataclass(frozen=True, kw_only=True)
class Retry:
    """What trying bad rows again came to.

    Args:
        tried: Bad rows that were decoded again.
        mended: Those that decode now, in words.
        parts: What is to be made again: columns by part, None for all of it.
        others: Columns of these parts that another config must make again.
    """

    tried: int
    mended: tuple[str, ...]
    parts: Mapping[PartId, tuple[str, ...] | None]
    others: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "tried": self.tried,
            "mended": list(self.mended),
            "parts": [
                {"shard": p.shard_id, "view": p.view, "columns": columns and list(columns)}
                for p, columns in self.parts.items()
            ],
            "other_columns": list(self.others),
        }

    def describe(self) -> str:
        """For people."""
        lines = [
            f"retry     {len(self.mended):,} of {counted(self.tried, 'bad row')} decode now; "
            f"{counted(len(self.parts), 'part')} to be made again"
        ]
        if self.others:
            lines.append(
                f"          of these parts, {', '.join(self.others)} were made by another config: "
                "extract with that one too"
            )
        return "\n".join(lines)


def parse_statuses(words: Sequence[str]) -> tuple[str, ...]:
    """Statuses as given on a command line: several times, or with commas; `all` is all.

    Raises:
        UsageError: If one is unknown.
    """
    names = [name.strip() for word in words for name in word.split(",") if name.strip()]
    for name in names:
        if name not in (*STATUSES, "all"):
            raise UsageError(
                f"unknown status {shown(name)!r}: use some of {', '.join(STATUSES)}, or all"
            )
    return STATUSES if "all" in names else tuple(dict.fromkeys(names))


def find_retries(
    config: RunConfig,
    cache: Cache,
    shards: Sequence[ShardIndex],
    statuses: Sequence[str],
    *,
    progress: Progress,
) -> Retry:
    """Decode bad rows of the config's parts again; nothing is changed.

    Args:
        config: The run; its limits and decoder are what rows are tried with.
        cache: Its cache.
        shards: Its shards.
        statuses: Of the rows to try. A column with such a row is made again without a trial.
        progress: Where progress is shown.

    Raises:
        DamagedError: If a file with bad rows is missing or damaged.
    """
    indices = {shard.shard_id: shard for shard in shards}
    found = cache.commits(set(indices))
    commits = {part: found[part] for part in sorted(found) if part.view < config.views.num}
    columns = columns_of(config)
    bad = [b for b in statuses_of(cache, commits, columns=columns).bad if b.status in statuses]
    parts: dict[PartId, tuple[str, ...] | None] = {}
    again: dict[PartId, dict[str, None]] = defaultdict(dict)
    for one in bad:
        if one.column is not None:
            again[one.part][one.column] = None
    parts |= {part: tuple(names) for part, names in again.items()}
    rows = [one for one in bad if one.column is None]
    bar = progress.start("retry", len(rows), "rows")
    mended: list[str] = []
    with Sandbox(
        decode_limits(config.decode),
        num_children=config.decode.num_children or config.extract.cpus_per_actor,
    ) as sandbox:
        for one, is_good in _tried(config, sandbox, indices, rows):
            progress.advance(bar)
            if is_good:
                parts[one.part] = None
                mended.append(f"{shown(one.row.uid)} view {one.part.view}")
    progress.finish(bar)
    return Retry(
        tried=len(rows), mended=tuple(mended), parts=parts, others=_others(commits, parts, columns)
    )


def reopen(cache: Cache, retry: Retry) -> None:
    """Remove from the cache what is to be made again."""
    drop_commits(cache, retry.parts)


def _tried(
    config: RunConfig,
    sandbox: Sandbox,
    indices: Mapping[str, ShardIndex],
    rows: Sequence[BadRow],
) -> Iterator[tuple[BadRow, bool]]:
    """Every row, and whether it decodes now."""

    def wanted() -> Iterator[tuple[Sample, ClipRequest]]:
        for one in rows:
            shard = indices[one.part.shard_id]
            ordinal = next(ref.ordinal for ref in shard.samples if shard.uid(ref) == one.row.uid)
            sample = read_sample(
                shard,
                ordinal,
                video_extensions=config.data.video_extensions,
                max_video_bytes=config.decode.max_video_bytes,
            )
            policy = config.view_policy
            yield sample, ClipRequest(uid=one.row.uid, view=one.part.view, policy=policy)

    ahead = 2 * config.extract.batch_size
    outcomes = decode_samples(sandbox, wanted(), in_flight=ahead)
    for one, (_, outcome) in zip(rows, outcomes, strict=True):
        yield one, isinstance(outcome, Clip)


def _others(
    commits: Mapping[PartId, PartCommits],
    parts: Mapping[PartId, tuple[str, ...] | None],
    columns: Mapping[str, object],
) -> tuple[str, ...]:
    """Columns that go with whole parts and that the config does not make."""
    there = {c for part, only in parts.items() if only is None for c in commits[part].columns}
    return tuple(sorted(there - set(columns)))
