"""Stage 1: run the teachers once over the shards and fill the cache.

The driver lists shards, asks the cache what is missing, hands parts to actors and never
holds a feature. Whatever was committed stays; the same command goes on.
"""

from __future__ import annotations

import collections
import logging
import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kdhiera.cache.commit import Cache
from kdhiera.cache.expected import expect_shards
from kdhiera.cache.layout import PartId
from kdhiera.cache.quarantine import give_up, given_up, release
from kdhiera.config import RunConfig
from kdhiera.data.shards import ShardIndex
from kdhiera.devices import resolve_device
from kdhiera.errors import BadDataError, IncompleteError
from kdhiera.grid import TOKENS_PER_UNIT
from kdhiera.progress import Progress, human_bytes, human_seconds
from kdhiera.stages.assemble import columns_of, provenance
from kdhiera.stages.environment import record_environment
from kdhiera.stages.extraction.plan import (
    ExtractPlan,
    Identities,
    has_commits,
    look_at,
    make_plan,
)
from kdhiera.stages.extraction.pool import Outcome, run_here, run_on_ray
from kdhiera.stages.extraction.probe import probe_versions
from kdhiera.stages.extraction.retry import Retry, find_retries, reopen
from kdhiera.stages.extraction.worker import PartTask, Task
from kdhiera.stopping import stop_on_signals

logger = logging.getLogger(__name__)

MIN_ROWS_TO_JUDGE = 20


@dataclass(frozen=True, kw_only=True)
class ExtractSummary:
    """What a run of extraction found and made.

    Args:
        cache: Folder or address of the cache.
        plan: What was missing at the start.
        retried: What trying bad rows again came to; None if that was not asked for.
        dry_run: Whether only the plan was made.
        num_shards: Shards of the config.
        columns: Columns that the config asks for.
        rows: Rows of the config's committed parts by status.
        num_bytes: Bytes of those parts.
        dense_bytes: All tokens of the same clips and layers in fp16, for comparison.
        problems: What is wrong with shards, in words.
        failed: Parts that were given up, with the reason.
        seconds: Wall time.
    """

    cache: str
    plan: ExtractPlan
    retried: Retry | None
    dry_run: bool
    num_shards: int
    columns: tuple[str, ...]
    rows: dict[str, int]
    num_bytes: int
    dense_bytes: int
    problems: tuple[str, ...]
    failed: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        retried = self.retried.to_json() if self.retried else None
        return {**values, "plan": self.plan.to_json(), "retried": retried}

    def describe(self) -> str:
        """For people."""
        total = sum(self.rows.values())
        good = self.rows.get("ok", 0)
        lines = [
            f"cache     {self.cache}",
            f"shards    {self.num_shards}, {self.plan.num_parts} parts, "
            f"{len(self.plan.parts)} {'to do' if self.dry_run else 'were missing'}",
            f"columns   {', '.join(self.columns)}",
        ]
        if self.retried:
            lines.append(self.retried.describe())
        if total:
            share = 100 * good / total
            times = self.dense_bytes / max(self.num_bytes, 1)
            smaller = f"; {times:.1f} times smaller than dense fp16" if times else ""
            lines.append(f"coverage  {good} of {total} clips good ({share:.1f} %)")
            lines += [f"          {n} {s}" for s, n in sorted(self.rows.items()) if s != "ok"]
            lines.append(
                f"size      {human_bytes(self.num_bytes)}, "
                f"{human_bytes(self.num_bytes / max(good, 1))} a clip, pixels included{smaller}"
            )
        lines += [f"problem   {p}" for p in self.problems]
        lines += [f"failed    {f}" for f in self.failed]
        if not self.dry_run:
            lines.append(f"time      {human_seconds(self.seconds)}")
        return "\n".join(lines)


def extract(
    config: RunConfig,
    *,
    progress: Progress,
    dry_run: bool = False,
    retry: Sequence[str] = (),
    on_plan: Callable[[ExtractPlan], None] = lambda plan: None,
) -> ExtractSummary:
    """Compute what the config needs and the cache lacks.

    Args:
        config: The run.
        progress: Where progress is shown.
        dry_run: Only make the plan; nothing is written.
        retry: Statuses of bad rows to try again: parts in which that mends one are made anew.
        on_plan: Told the plan before any work.

    Raises:
        UsageError: Before any work: no shards, no weights, an unknown layer.
        MismatchError: If the cache was made for another config, or with library versions
            that do not give what is stored.
        BadDataError: If more than `data.max_bad_fraction` of the rows are bad.
        IncompleteError: If some shards could not be done; all others are committed.
        StoppedError: After SIGTERM or SIGINT, at a clean point.
    """
    started = time.monotonic()
    found = look_at(config)
    shards, identities, cache = found.shards, found.identities, found.cache
    config = identities.config
    if not dry_run and has_commits(config):  # an identity that was lost hides none of them
        cache = _open(config, identities)
    retried = None
    if retry and cache is not None:
        retried = find_retries(config, cache, shards.found, retry, progress=progress)
        if not dry_run:
            reopen(cache, retried)
    plan = make_plan(config, cache, shards.found)
    on_plan(plan)
    failed: list[str] = []
    if not dry_run:
        cache = _open(config, identities)
        device = resolve_device(config.extract.device)
        record_environment(Path(config.run_dir), "extract-teachers", device=device)
        if plan.probe:
            probe_versions(config, cache, num_rows=plan.probe)
        expect_shards(cache, {shard.shard_id: shard.path for shard in shards.found})
        failed = _work(config, cache, plan, progress)
    rows, num_bytes, dense_bytes = committed(config, cache, shards.found)
    summary = ExtractSummary(
        cache=config.cache.dir,
        plan=plan,
        retried=retried,
        dry_run=dry_run,
        num_shards=len(shards.found),
        columns=tuple(columns_of(config)),
        rows=dict(rows),
        num_bytes=num_bytes,
        dense_bytes=dense_bytes,
        problems=shards.problems,
        failed=tuple(failed),
        seconds=time.monotonic() - started,
    )
    _judge(config, rows, summary)
    if failed or shards.unreadable:
        raise IncompleteError(
            f"{summary.describe()}\nsome shards could not be extracted; all others are committed. "
            "Mend or remove them and run the same command again, which tries them last; `kdhiera "
            f"cache bad {summary.cache}` lists them",
            result=summary,
        )
    return summary


def _open(config: RunConfig, identities: Identities) -> Cache:
    """The cache with all columns of the config, made where they are not there."""
    made_by = provenance()
    cache = Cache.create_or_open(config.cache.dir, dict(identities.base), provenance=made_by)
    made_from = {**made_by, "config": config.model_dump(mode="json"), "folder": os.getcwd()}
    for column, identity in identities.columns.items():
        cache.columns.ensure(column, dict(identity), provenance=made_from)
    return cache


def _work(config: RunConfig, cache: Cache, plan: ExtractPlan, progress: Progress) -> list[str]:
    """Do what is planned; returns what was given up, in words."""
    if not plan.parts:
        return []
    total = plan.num_clips + (plan.bases.num_rows if plan.bases else 0)
    bar = progress.start("extract", total, "clips")
    shown = before = 0

    def on_counts(rows: int, bad: int) -> None:
        nonlocal shown
        now = min(before + rows, total)
        progress.advance(bar, max(0, now - shown))
        shown = max(shown, now)
        _judge(config, collections.Counter(ok=rows - bad, bad=bad))

    runner = run_on_ray if config.ray.enabled else run_here
    first: list[Task] = [plan.bases] if plan.bases else []
    outcomes: list[Outcome] = []
    quarantined = given_up(cache)
    with stop_on_signals() as stop:
        for tasks in (first, plan.parts):  # no part is encoded before its basis is there
            before = shown
            if tasks and all(o.result for o in outcomes):
                for outcome in runner(config, tasks, on_counts=on_counts, stop=stop):
                    outcomes.append(outcome)
                    _note(config, cache, outcome, quarantined)
    progress.finish(bar)
    return [f"{o.task.name}: {o.error}" for o in outcomes if o.result is None]


def _note(
    config: RunConfig, cache: Cache, outcome: Outcome, quarantined: Collection[PartId]
) -> None:
    """Put a part that was given up into quarantine, and one that was done out of it."""
    task = outcome.task
    if not isinstance(task, PartTask):
        return
    if outcome.result is None:
        tries, path = config.extract.max_attempts, task.shard.path
        give_up(cache, task.part, path=path, error=outcome.error, tries=tries)
    elif task.part in quarantined:
        release(cache, [task.part])


def committed(
    config: RunConfig,
    cache: Cache | None,
    shards: Sequence[ShardIndex],
) -> tuple[collections.Counter[str], int, int]:
    """Rows by status, stored bytes and dense fp16 bytes of the config's committed parts.

    Args:
        config: The run.
        cache: Its cache; None if there is none.
        shards: Its shards.
    """
    columns = columns_of(config)
    rows: collections.Counter[str] = collections.Counter()
    num_bytes = dense_bytes = 0
    tokens = config.clip.grid.num_units * TOKENS_PER_UNIT
    found = cache.commits({shard.shard_id for shard in shards}) if cache else {}
    for part, commits in found.items():
        if part.view >= config.views.num:
            continue
        wanted = [c for name, c in commits.columns.items() if name in columns]
        rows.update(commits.base.statuses)
        num_bytes += commits.base.num_bytes + sum(c.num_bytes for c in wanted)
        dense_bytes += sum(2 * commits.base.array_rows * tokens * c.width for c in wanted)
    return rows, num_bytes, dense_bytes


def _judge(
    config: RunConfig, rows: collections.Counter[str], summary: ExtractSummary | None = None
) -> None:
    total = sum(rows.values())
    bad = total - rows["ok"]
    limit = config.data.max_bad_fraction
    if total >= MIN_ROWS_TO_JUDGE and bad > limit * total:
        kinds = ", ".join(f"{n} {s}" for s, n in sorted(rows.items()) if s != "ok" and n)
        raise BadDataError(
            f"{bad} of {total} clips are bad ({kinds}), more than data.max_bad_fraction="
            f"{limit:g} allows: look at the rows' messages, or raise the limit",
            result=summary,
        )
