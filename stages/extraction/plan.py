"""What extraction has to do: what a config needs and the cache lacks, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kdhiera.cache.commit import Cache
from kdhiera.cache.encoding import NEEDS_BASIS
from kdhiera.cache.fingerprint import base_identity, column_identity
from kdhiera.cache.layout import CACHE_FILE, COMMITS, PartId, parse_column
from kdhiera.cache.quarantine import given_up
from kdhiera.cache.records import PartCommits, Versions
from kdhiera.config import RunConfig
from kdhiera.data.patterns import expand
from kdhiera.data.shards import ShardIndex, try_index_shards
from kdhiera.data.tars import ShardError
from kdhiera.devices import resolve_device, resolve_precision
from kdhiera.errors import UsageError
from kdhiera.stages.assemble import columns_of, versions
from kdhiera.stages.extraction.worker import BasisTask, PartTask
from kdhiera.stores import open_store
from kdhiera.teachers.base import Teacher
from kdhiera.teachers.build import build_teachers, check_teachers, warn_of_scores

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The shards of a config.

    Args:
        found: Those that can be read.
        unreadable: How many are no tar at all.
        problems: What is wrong with any of them, in words.
    """

    found: tuple[ShardIndex, ...]
    unreadable: int
    problems: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Identities:
    """What the config's teachers make.

    Args:
        config: The run, with teacher precisions resolved.
        base: Identity of the base.
        columns: Identity of every column, by column id.
    """

    config: RunConfig
    base: Mapping[str, Any]
    columns: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Prospect:
    """What there is before any work.

    Args:
        shards: The shards of the config.
        identities: What its teachers make.
        cache: Its cache, which is of these identities; None if there is none yet.
    """

    shards: Shards
    identities: Identities
    cache: Cache | None


@dataclass(frozen=True, kw_only=True)
class ExtractPlan:
    """What is to be done, in this order.

    Args:
        cache: Folder or address of the cache.
        exists: Whether there is a cache already.
        keeps: What masks it covers, in words.
        probe: Stored rows to replay first: the cache was made with other library versions.
        bases: Columns whose basis is made first.
        parts: Parts that lack something; those that were given up before come last.
        given_up: How many of them were.
        num_parts: Parts of the config in all, one a shard and view.
    """

    cache: str
    exists: bool
    keeps: str
    probe: int
    bases: BasisTask | None
    parts: tuple[PartTask, ...]
    given_up: int
    num_parts: int

    @property
    def num_clips(self) -> int:
        """Samples of the parts that lack something."""
        return sum(len(part.shard.samples) for part in self.parts)

    def describe(self) -> str:
        """For people: one line for every kind of work."""
        what = "add to" if self.exists else "make"
        lines = [f"plan      {what} {self.cache}, which keeps {self.keeps}"]
        if self.probe:
            lines.append(
                f"          replay {self.probe} stored rows: library versions are not those that "
                "the cache was made with"
            )
        if self.bases is not None:
            lines.append(
                f"          make the basis of {', '.join(self.bases.columns)} from "
                f"{self.bases.num_rows} clips"
            )
        for (base, columns), parts in sorted(self._kinds().items(), reverse=True):
            clips = sum(len(part.shard.samples) for part in parts)
            names = ", ".join(columns)
            work = f"rows and {names}" if base else f"{names}, replaying the rows that are there"
            lines.append(f"          {len(parts):,} parts, {clips:,} clips: {work}")
        if self.given_up:
            lines.append(f"          {self.given_up:,} of them were given up before: tried last")
        if not self.parts:
            lines.append(f"          nothing to do: all {self.num_parts:,} parts are there")
        elif len(self.parts) < self.num_parts:
            done = self.num_parts - len(self.parts)
            lines.append(f"          {done:,} of {self.num_parts:,} parts are complete already")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "cache": self.cache,
            "exists": self.exists,
            "keeps": self.keeps,
            "probe_rows": self.probe,
            "bases": list(self.bases.columns) if self.bases else [],
            "num_parts": self.num_parts,
            "given_up": self.given_up,
            "work": [
                {
                    "rows": base,
                    "columns": list(columns),
                    "parts": len(parts),
                    "clips": sum(len(part.shard.samples) for part in parts),
                }
                for (base, columns), parts in sorted(self._kinds().items(), reverse=True)
            ],
        }

    def _kinds(self) -> dict[tuple[bool, tuple[str, ...]], list[PartTask]]:
        kinds: dict[tuple[bool, tuple[str, ...]], list[PartTask]] = {}
        for part in self.parts:
            kinds.setdefault((part.base, tuple(part.columns)), []).append(part)
        return kinds


def look_at(config: RunConfig) -> Prospect:
    """Shards, teachers and cache of a run, after all that extraction would refuse.

    Raises:
        UsageError: If there are no shards, weights or layers such as the config names, or its
            masks are not planned.
        MismatchError: If the cache was made for another config.
    """
    gaps = config.plan_gaps()
    if gaps:
        raise UsageError(
            f"objective asks for masks that `masks` does not plan: {'; '.join(gaps)}; plan them in "
            "`masks`, or choose others in `objective`"
        )
    shards = index_all(config)
    identities = identify(config)
    cache = existing_cache(identities.config)
    if cache is not None:
        cache.check(identities.base)
        for column, identity in identities.columns.items():
            if cache.columns.identity(column) is not None:
                cache.columns.check(column, identity)
    return Prospect(shards=shards, identities=identities, cache=cache)


def index_all(config: RunConfig) -> Shards:
    """Index every shard; one that is no tar at all is a problem, not a crash.

    Raises:
        UsageError: If none can be read, or one is listed twice.
    """
    found: list[ShardIndex] = []
    problems: list[str] = []
    unreadable = 0
    for index in try_index_shards(expand(config.data.shards)):
        if isinstance(index, ShardError):
            problems.append(str(index))
            unreadable += 1
            continue
        found.append(index)
        problems += [f"{index.path}: {p}" for p in index.problems]
        crowded = _crowded(index, config.data.video_extensions)
        if crowded:
            problems.append(
                f"{index.path}: {crowded} samples hold several videos and only the first is used: "
                "names are split at their first dot"
            )
    if not found:
        raise UsageError(f"none of the shards can be read: {'; '.join(problems)}")
    seen: dict[str, str] = {}
    for index in found:
        if index.shard_id in seen:
            raise UsageError(
                f"{index.path} and {seen[index.shard_id]} are the same shard: list it once"
            )
        seen[index.shard_id] = index.path
    for problem in problems:
        logger.warning("%s", problem)
    return Shards(found=tuple(found), unreadable=unreadable, problems=tuple(problems))


def identify(config: RunConfig) -> Identities:
    """Load the teachers once to know what they make.

    `precision: auto` means what a column was made with, or else what the hardware does.
    """
    config = resolve_precisions(config)
    device = torch.device("cpu")
    teachers = build_teachers(config, device=device)
    if existing_cache(config) is None:  # none is made for teachers that cannot fill it
        check_teachers(config, teachers, device=device, must_run=False)
    warn_of_scores(config, teachers)
    return identities_of(config, teachers)


def identities_of(config: RunConfig, teachers: Mapping[str, Teacher]) -> Identities:
    """What loaded teachers make.

    Args:
        config: The run, with teacher precisions resolved.
        teachers: All of its teachers.
    """
    columns = {
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
    scorer = None
    if config.scores.source != "uniform":
        teacher = teachers[config.scores.teacher]
        scorer = {
            **teacher.identity,
            "weights_sha256": teacher.weights_sha256,
            "precision": config.teachers[config.scores.teacher].precision,
        }
    base = base_identity(config, score_teacher=scorer)
    return Identities(config=config, base=base, columns=columns)


def existing_cache(config: RunConfig) -> Cache | None:
    """The config's cache, or None if there is none yet."""
    there = open_store(config.cache.dir).exists(CACHE_FILE)
    return Cache.open(config.cache.dir) if there else None


def has_commits(config: RunConfig) -> bool:
    """Whether something is committed where the config's cache is, or was."""
    return bool(open_store(config.cache.dir).names(COMMITS))


def make_plan(config: RunConfig, cache: Cache | None, shards: Sequence[ShardIndex]) -> ExtractPlan:
    """Hold what the config needs against what is committed.

    Args:
        config: The run.
        cache: The cache, checked against the config; None if there is none yet.
        shards: The shards to extract.
    """
    columns = columns_of(config)
    parts = []
    committed = cache.commits({shard.shard_id for shard in shards}) if cache else {}
    for shard in shards:
        for view in range(config.views.num):
            part = PartId(shard_id=shard.shard_id, view=view)
            commits = committed.get(part)
            there = commits.columns if commits else {}
            lacks = {c: key for c, key in columns.items() if c not in there}
            if commits is None or lacks:
                parts.append(PartTask(shard=shard, view=view, base=commits is None, columns=lacks))
    before = given_up(cache) if cache and parts else {}
    # A complete view can be trained on; what always fails must not keep the rest waiting.
    parts.sort(key=lambda task: (task.part in before, task.view))
    return ExtractPlan(
        cache=config.cache.dir,
        exists=cache is not None,
        keeps=(cache.mask_plan if cache else config.mask_plan).describe(),
        probe=config.extract.probe_rows
        if parts and cache and _made_otherwise(cache, committed)
        else 0,
        bases=_bases(config, cache, shards, {c for part in parts for c in part.columns}),
        parts=tuple(parts),
        given_up=sum(task.part in before for task in parts),
        num_parts=len(shards) * config.views.num,
    )


def _made_otherwise(cache: Cache, committed: Mapping[PartId, PartCommits]) -> bool:
    """Whether something is committed, and nothing of it with the versions that are here.

    Args:
        cache: The cache.
        committed: What there is of the config's shards; only where that is nothing, all shards
            being new to the cache, the others are looked at.
    """
    made_by: set[Versions] = set()
    for commits in (committed or cache.commits()).values():
        made_by |= {commits.base.versions, *(c.versions for c in commits.columns.values())}
    return bool(made_by) and versions() not in made_by


def _bases(
    config: RunConfig, cache: Cache | None, shards: Sequence[ShardIndex], columns: set[str]
) -> BasisTask | None:
    """The making of the bases that are missing, from the first shards in sorted order."""
    lacks = {
        column: key
        for column, key in columns_of(config).items()
        if column in columns
        and parse_column(column).encoding in NEEDS_BASIS
        and not (cache and cache.columns.has_basis(column))
    }
    if not lacks:
        return None
    ordered = tuple(sorted(shards, key=lambda shard: shard.shard_id))
    return BasisTask(shards=ordered, columns=lacks, num_rows=config.extract.calibration_rows)


def _crowded(index: ShardIndex, extensions: Sequence[str]) -> int:
    """Samples with more than one video: `take.001.mp4` and `take.002.mp4` share a key."""
    videos = (
        sum(m.extension.rpartition(".")[2] in extensions for m in sample.members)
        for sample in index.samples
    )
    return sum(count > 1 for count in videos)


def resolve_precisions(config: RunConfig) -> RunConfig:
    """The run with `precision: auto` replaced by what it means; see `identify`."""
    device = resolve_device(config.extract.device)
    cache = existing_cache(config)
    teachers = dict(config.teachers)
    for name, teacher in teachers.items():
        if teacher.precision != "auto":
            continue
        hardware = "bf16" if resolve_precision("auto", device) == torch.bfloat16 else "fp32"
        precision = (cache and _used_precision(cache, name)) or hardware
        teachers[name] = teacher.model_copy(update={"precision": precision})
    return config.model_copy(update={"teachers": teachers})


def _used_precision(cache: Cache, teacher: str) -> str | None:
    """Precision that a teacher computed with when the cache's columns were made."""
    for column in cache.columns.names():
        identity = cache.columns.identity(column)
        if parse_column(column).teacher == teacher and identity is not None:
            return str(identity["precision"])
    return None
