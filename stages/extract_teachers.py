"""Stage 1: run the teachers once over the shards and fill the cache.

The driver lists shards, asks the cache what is missing, hands parts to actors and never
holds a feature. Whatever was committed stays; the same command goes on.
"""

from __future__ import annotations

import collections
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kdhiera.cache.commit import Cache
from kdhiera.cache.expected import expect_shard
from kdhiera.cache.fingerprint import base_identity, column_identity
from kdhiera.cache.layout import PartId, column_id
from kdhiera.config import RunConfig
from kdhiera.data.shards import ShardError, ShardIndex, expand, index_shard
from kdhiera.devices import resolve_device, resolve_precision
from kdhiera.errors import BadDataError, IncompleteError, UsageError
from kdhiera.grid import TOKENS_PER_UNIT
from kdhiera.progress import Progress, human_bytes, human_seconds
from kdhiera.stages.assemble import columns_of, provenance
from kdhiera.stages.extract_worker import PartTask
from kdhiera.stages.pool import run_here, run_on_ray
from kdhiera.stopping import stop_on_signals
from kdhiera.teachers.build import build_teachers

logger = logging.getLogger(__name__)

MIN_ROWS_TO_JUDGE = 20


@dataclass(frozen=True, kw_only=True)
class ExtractSummary:
    """What a run of extraction found and made.

    Args:
        cache: Folder of the cache.
        dry_run: Whether only the plan was made.
        num_shards: Shards of the config.
        num_parts: Their parts, one a shard and view.
        parts_missing: Parts that lacked something at the start.
        columns: Columns that the config asks for.
        rows: Rows of the config's committed parts by status.
        num_bytes: Bytes of those parts.
        dense_bytes: All tokens of the same clips and layers in fp16, for comparison.
        problems: What is wrong with shards, in words.
        failed: Parts that were given up, with the reason.
        seconds: Wall time.
    """

    cache: str
    dry_run: bool
    num_shards: int
    num_parts: int
    parts_missing: int
    columns: tuple[str, ...]
    rows: dict[str, int]
    num_bytes: int
    dense_bytes: int
    problems: tuple[str, ...]
    failed: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def describe(self) -> str:
        """For people."""
        total = sum(self.rows.values())
        good = self.rows.get("ok", 0)
        lines = [
            f"cache     {self.cache}",
            f"shards    {self.num_shards}, {self.num_parts} parts, "
            f"{self.parts_missing} {'to do' if self.dry_run else 'were missing'}",
            f"columns   {', '.join(self.columns)}",
        ]
        if total:
            share = 100 * good / total
            lines.append(f"coverage  {good} of {total} clips good ({share:.1f} %)")
            lines += [f"          {n} {s}" for s, n in sorted(self.rows.items()) if s != "ok"]
            lines.append(
                f"size      {human_bytes(self.num_bytes)}, "
                f"{human_bytes(self.num_bytes / max(good, 1))} a clip, pixels included; "
                f"{self.dense_bytes / max(self.num_bytes, 1):.1f} times smaller than dense fp16"
            )
        lines += [f"problem   {p}" for p in self.problems]
        lines += [f"failed    {f}" for f in self.failed]
        if not self.dry_run:
            lines.append(f"time      {human_seconds(self.seconds)}")
        return "\n".join(lines)


def extract(config: RunConfig, *, progress: Progress, dry_run: bool = False) -> ExtractSummary:
    """Compute what the config needs and the cache lacks.

    Args:
        config: The run.
        progress: Where progress is shown.
        dry_run: Only say what would be done; nothing is written.

    Raises:
        UsageError: Before any work: no shards, no weights, an unknown layer.
        MismatchError: If the cache was made for another config.
        BadDataError: If more than `data.max_bad_fraction` of the rows are bad.
        IncompleteError: If some shards could not be done; all others are committed.
        StoppedError: After SIGTERM or SIGINT, at a clean point.
    """
    started = time.monotonic()
    shards, problems = _index(config)
    config, identities, base = _identify(config)
    columns = columns_of(config)
    root = Path(config.cache.dir)
    cache = None
    if not dry_run:
        cache = Cache.create_or_open(root, base, provenance=provenance())
        for column, identity in identities.items():
            cache.ensure_column(column, identity, provenance=provenance())
    elif (root / "cache.json").exists():
        cache = Cache.open(root)
        cache.check(base)
    tasks = list(_missing(config, cache, shards, columns))
    failed: list[str] = []
    if tasks and cache is not None and not dry_run:
        failed = _work(config, cache, tasks, progress)
    rows, num_bytes, dense_bytes = _committed(config, cache, shards, columns)
    summary = ExtractSummary(
        cache=config.cache.dir,
        dry_run=dry_run,
        num_shards=len(shards),
        num_parts=len(shards) * config.views.num,
        parts_missing=len(tasks),
        columns=tuple(columns),
        rows=dict(rows),
        num_bytes=num_bytes,
        dense_bytes=dense_bytes,
        problems=tuple(problems),
        failed=tuple(failed),
        seconds=time.monotonic() - started,
    )
    _judge(config, rows)
    if failed or len(shards) < len(expand(config.data.shards)):
        raise IncompleteError(
            f"{summary.describe()}\nsome shards could not be extracted; all others are committed. "
            "Mend or remove them and run the same command again"
        )
    return summary


def _index(config: RunConfig) -> tuple[list[ShardIndex], list[str]]:
    """Index every shard; one that is no tar at all is a problem, not a crash."""
    shards, problems = [], []
    for path in expand(config.data.shards):
        try:
            index = index_shard(path)
        except ShardError as error:
            problems.append(str(error))
            continue
        shards.append(index)
        problems += [f"{path}: {p}" for p in index.problems]
        crowded = _crowded(index, config.data.video_extensions)
        if crowded:
            problems.append(
                f"{path}: {crowded} samples hold several videos and only the first is used: names "
                "are split at their first dot"
            )
    if not shards:
        raise UsageError(f"none of the shards can be read: {'; '.join(problems)}")
    seen: dict[str, str] = {}
    for index in shards:
        if index.shard_id in seen:
            raise UsageError(
                f"{index.path} and {seen[index.shard_id]} are the same shard: list it once"
            )
        seen[index.shard_id] = index.path
    for problem in problems:
        logger.warning("%s", problem)
    return shards, problems


def _crowded(index: ShardIndex, extensions: Sequence[str]) -> int:
    """Samples with more than one video: `take.001.mp4` and `take.002.mp4` share a key."""
    videos = (
        sum(m.extension.rpartition(".")[2] in extensions for m in sample.members)
        for sample in index.samples
    )
    return sum(count > 1 for count in videos)


def _identify(
    config: RunConfig,
) -> tuple[RunConfig, dict[str, dict[str, Any]], dict[str, Any]]:
    """Load the teachers once to know them; precisions are resolved in the returned config.

    `precision: auto` means what a column was made with, or else what the hardware does.
    """
    config = _resolve_precisions(config)
    teachers = build_teachers(config, device=torch.device("cpu"))
    described = {
        name: {
            **teacher.identity,
            "weights_sha256": teacher.weights_sha256,
            "precision": config.teachers[name].precision,
        }
        for name, teacher in teachers.items()
    }
    identities = {
        column: column_identity(
            config,
            name,
            layer,
            identity=teachers[name].identity,
            weights_sha256=teachers[name].weights_sha256,
            precision=config.teachers[name].precision,
        )
        for column, (name, layer) in columns_of(config).items()
    }
    scorer = None if config.scores.source == "uniform" else described[config.scores.teacher]
    return config, identities, base_identity(config, score_teacher=scorer)


def _resolve_precisions(config: RunConfig) -> RunConfig:
    device = resolve_device(config.extract.device)
    root = Path(config.cache.dir)
    cache = Cache.open(root) if (root / "cache.json").exists() else None
    teachers = dict(config.teachers)
    for name, teacher in teachers.items():
        if teacher.precision != "auto":
            continue
        columns = [column_id(name, layer, config.cache.encoding) for layer in teacher.layers]
        known = [i for i in (cache.column_identity(c) for c in columns if cache) if i]
        hardware = "bf16" if resolve_precision("auto", device) == torch.bfloat16 else "fp32"
        precision = known[0]["precision"] if known else hardware
        teachers[name] = teacher.model_copy(update={"precision": precision})
    return config.model_copy(update={"teachers": teachers})


def _missing(
    config: RunConfig,
    cache: Cache | None,
    shards: Sequence[ShardIndex],
    columns: dict[str, tuple[str, str]],
) -> Iterator[PartTask]:
    for view in range(config.views.num):
        for shard in shards:
            part = PartId(shard_id=shard.shard_id, view=view)
            lacks = cache.missing(part, list(columns)) if cache else None
            if lacks is None or lacks:
                wanted = columns if lacks is None else {c: columns[c] for c in lacks.columns}
                base = lacks is None or lacks.base
                yield PartTask(shard=shard, view=view, base=base, columns=wanted)


def _work(
    config: RunConfig, cache: Cache, tasks: Sequence[PartTask], progress: Progress
) -> list[str]:
    """Run the tasks; returns those that were given up, in words."""
    for shard in {task.shard.shard_id: task.shard for task in tasks}.values():
        expect_shard(cache, shard.shard_id, path=shard.path)
    total = sum(len(task.shard.samples) for task in tasks)
    bar = progress.start("extract", total, "clips")
    shown = 0

    def on_counts(rows: int, bad: int) -> None:
        nonlocal shown
        progress.advance(bar, max(0, min(rows, total) - shown))
        shown = max(shown, min(rows, total))
        _judge(config, collections.Counter(ok=rows - bad, bad=bad))

    runner = run_on_ray if config.ray.enabled else run_here
    with stop_on_signals() as stop:
        outcomes = list(runner(config, tasks, on_counts=on_counts, stop=stop))
    progress.finish(bar)
    return [f"{o.task.name}: {o.error}" for o in outcomes if o.result is None]


def _committed(
    config: RunConfig,
    cache: Cache | None,
    shards: Sequence[ShardIndex],
    columns: dict[str, tuple[str, str]],
) -> tuple[collections.Counter[str], int, int]:
    """Rows by status, stored bytes and dense fp16 bytes of the config's committed parts."""
    rows: collections.Counter[str] = collections.Counter()
    num_bytes = dense_bytes = 0
    tokens = config.clip.grid.num_units * TOKENS_PER_UNIT
    for view in range(config.views.num if cache else 0):
        for shard in shards:
            assert cache is not None
            found = cache.part_commits(PartId(shard_id=shard.shard_id, view=view))
            if found is None:
                continue
            wanted = [c for name, c in found.columns.items() if name in columns]
            rows.update(found.base.statuses)
            num_bytes += found.base.num_bytes + sum(c.num_bytes for c in wanted)
            dense_bytes += sum(2 * found.base.array_rows * tokens * c.width for c in wanted)
    return rows, num_bytes, dense_bytes


def _judge(config: RunConfig, rows: collections.Counter[str]) -> None:
    total = sum(rows.values())
    bad = total - rows["ok"]
    limit = config.data.max_bad_fraction
    if total >= MIN_ROWS_TO_JUDGE and bad > limit * total:
        kinds = ", ".join(f"{n} {s}" for s, n in sorted(rows.items()) if s != "ok" and n)
        raise BadDataError(
            f"{bad} of {total} clips are bad ({kinds}), more than data.max_bad_fraction="
            f"{limit:g} allows: look at the rows' messages, or raise the limit"
        )
