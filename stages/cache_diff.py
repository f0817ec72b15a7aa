"""What a run asks for and its cache does not have; no teacher and no shard is opened.

Compared is what the config declares, as training does it. Weights and preprocessing are
compared when extraction loads the teachers.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kdhiera.addresses import expand_braces
from kdhiera.cache.commit import Cache
from kdhiera.cache.expected import expected_shards, shard_records
from kdhiera.cache.fingerprint import (
    Difference,
    base_differences,
    declared_base,
    declared_column,
    differences,
    table,
)
from kdhiera.cache.info_text import some
from kdhiera.cache.layout import CACHE_FILE, PartId, column_id
from kdhiera.cache.records import PartCommits
from kdhiera.config import RunConfig
from kdhiera.data.patterns import expand
from kdhiera.errors import ExitCode, UsageError
from kdhiera.progress import counted
from kdhiera.stores import open_store

ROWS = "rows"  # what a part lacks that has nothing at all

Missing = Mapping[PartId, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class ColumnDiff:
    """One column of a run.

    Args:
        column: Column id.
        trained: Whether the objective asks for it; extraction makes all columns.
        known: Whether the cache has the column.
        differs: Fields in which the cache's differs.
    """

    column: str
    trained: bool
    known: bool
    differs: tuple[Difference, ...]


@dataclass(frozen=True, kw_only=True)
class CacheDiff:
    """A run held against its cache.

    Args:
        cache: Folder or address.
        exists: Whether there is a cache.
        base: Fields in which the base differs.
        keeps: What masks the cache covers, in words; empty if there is none.
        unplanned: What `objective` asks for and `masks` does not plan.
        not_kept: What `masks` plans and the cache does not keep.
        not_covered: What training would draw and the cache does not cover.
        columns: The run's columns.
        num_shards: Shards that the run asks for, as far as they are known to the cache.
        num_views: Views that the run asks for.
        missing: Parts of these that lack rows or columns, with what they lack.
        unseen: Shard files of the config that were never extracted.
        partial: Whether the run trains on what is there.
        live: Whether training runs the teachers itself and reads no cache.
    """

    cache: str
    exists: bool
    base: tuple[Difference, ...] = ()
    keeps: str = ""
    unplanned: tuple[str, ...] = ()
    not_kept: tuple[str, ...] = ()
    not_covered: tuple[str, ...] = ()
    columns: tuple[ColumnDiff, ...] = ()
    num_shards: int = 0
    num_views: int
    missing: Missing
    unseen: tuple[str, ...]
    partial: bool
    live: bool

    @property
    def exit_code(self) -> ExitCode:
        """Refused, or not all there, or all there."""
        if self.changes:
            return ExitCode.REFUSED
        there = self.exists and self.num_shards and not self.missing and not self.unseen
        return ExitCode.OK if there else ExitCode.INCOMPLETE

    @property
    def changes(self) -> tuple[str, ...]:
        """What to change where extraction or training would be refused; else empty."""
        anew = "or set cache.dir to another folder for a new cache"
        found: list[str] = []
        if self.unplanned:
            found.append("plan in `masks` what `objective` asks for, or ask for less")
        if self.base:
            found.append(f"go back to the clips, views and scores that the cache has, {anew}")
        if self.not_covered:
            found.append(
                f"choose objective.strategy, ratio and draws among what the cache keeps, {anew}"
            )
        elif self.not_kept:
            found.append(f"plan no more in `masks` than the cache keeps, {anew}")
        if differing := [column.column for column in self.columns if column.differs]:
            found.append(
                "go back to the teachers that the cache has, give these other names, or drop "
                f"what they made: `kdhiera cache drop {self.cache} {differing[0]}`"
            )
        return tuple(found)

    @property
    def distill(self) -> str:
        """Whether training would run, in words."""
        if self.live:
            return "would run without the cache (cache.mode=live)"
        if not self.exists:
            return "would not run: there is no cache yet"
        trained = [column for column in self.columns if column.trained]
        if self.base or self.not_covered or any(column.differs for column in trained):
            return "would be refused"
        if absent := [column.column for column in trained if not column.known]:
            return f"would not run: the cache has no {', '.join(absent)}"
        needed = {ROWS, *(column.column for column in trained)}
        lacking = {part.shard_id for part, lacks in self.missing.items() if needed & {*lacks}}
        not_whole = f"{counted(len(lacking), 'shard')} not whole"
        if lacking and not self.partial:
            return f"would not run: {not_whole} (cache.allow_partial=true leaves them out)"
        if len(lacking) == self.num_shards:
            return "would not run: no shard is whole"
        return "would run" + (f", leaving out {not_whole}" if lacking else "")

    @property
    def extract(self) -> tuple[str, ...]:
        """What extraction would do, in words."""
        if self.unplanned or self.base or self.not_kept or any(c.differs for c in self.columns):
            return ("would be refused",)
        work = [] if self.exists else ["would make a new cache"]
        for lacks, count in sorted(Counter(self.missing.values()).items()):
            what = f"{ROWS} and " + ", ".join(lacks[1:]) if lacks[0] == ROWS else ", ".join(lacks)
            work.append(f"would add {what} to {counted(count, 'part')}")
        if self.unseen:
            views = counted(self.num_views, "view")
            files = counted(len(self.unseen), "shard")
            work.append(f"would add {files} in {views}, never extracted: {some(self.unseen)}")
        return tuple(work) or ("has nothing to do",)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            **values,
            "base": [asdict(difference) for difference in self.base],
            "columns": [asdict(column) for column in self.columns],
            "missing": {str(part): list(lacks) for part, lacks in self.missing.items()},
            "distill": self.distill,
            "extract": list(self.extract),
            "changes": list(self.changes),
            "exit_code": int(self.exit_code),
        }

    def describe(self) -> str:
        """For people."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"cache     {self.cache}" + ("" if self.exists else " (not there yet)")
        if self.exists:
            yield from self._compared()
        if self.unplanned:
            yield f"masks     objective asks for what is not planned: {'; '.join(self.unplanned)}"
        first, *rest = self.extract
        yield f"extract   {first}"
        yield from (f"          {line}" for line in rest)
        yield f"distill   {self.distill}"
        if self.changes:
            first, *rest = self.changes
            yield f"change    {first}"
            yield from (f"          {line}" for line in rest)

    def _compared(self) -> Iterator[str]:
        if self.base:
            yield "base      was made for other clips or scores:"
            yield table(self.base)
        else:
            yield "base      the same"
        gaps = dict.fromkeys((*self.not_covered, *self.not_kept))
        yield f"masks     {'not covered: ' + '; '.join(gaps) if gaps else 'covered'}"
        yield f"          (it keeps {self.keeps})"
        for column in self.columns:
            use = "" if column.trained else ", not in the objective"
            state = "made in another way" if column.differs else "the same"
            yield f"column    {column.column}: {state if column.known else 'not there'}{use}"
            if column.differs:
                yield table(column.differs)
        total = self.num_shards * self.num_views
        lacking = [f"{part} lacks {', '.join(lacks)}" for part, lacks in self.missing.items()]
        named = f": {some(lacking, '; ')}" if lacking else ""
        yield f"parts     {total - len(lacking):,} of {total:,} are whole{named}"


def diff_cache(config: RunConfig) -> CacheDiff:
    """Hold a run against its cache.

    Args:
        config: The run.

    Raises:
        DamagedError: If a record of the cache is damaged.
        MismatchError: If it has another format version.
    """
    files = _files(config.data.shards)
    exists = open_store(config.cache.dir).exists(CACHE_FILE)
    if not exists:
        return CacheDiff(
            cache=config.cache.dir,
            exists=False,
            unplanned=config.plan_gaps(),
            num_views=config.views.num,
            missing={},
            unseen=files,
            partial=config.cache.allow_partial,
            live=config.cache.mode == "live",
        )
    cache = Cache.open(config.cache.dir)
    columns = _columns(config, cache)
    per_slot = cache.grid.units_per_slot
    base = tuple(base_differences(declared_base(config), cache.identity, declared_only=True))
    seen = {os.path.realpath(path) for path, _ in shard_records(cache).values()}
    patterns = [path for pattern in config.data.shards for path in expand_braces(pattern)]
    shards = sorted(expected_shards(cache, patterns))
    names = [column.column for column in columns]
    same_grid = not any(difference.field.startswith("clip.") for difference in base)
    return CacheDiff(
        cache=config.cache.dir,
        exists=True,
        base=base,
        keeps=cache.mask_plan.describe(),
        unplanned=config.plan_gaps(),
        not_kept=cache.mask_plan.lacks_plan(config.mask_plan, units_per_slot=per_slot)
        if same_grid
        else (),
        not_covered=cache.mask_plan.lacks_schedule(config.mask_schedule, units_per_slot=per_slot)
        if same_grid
        else (),
        columns=columns,
        num_shards=len(shards),
        num_views=config.views.num,
        missing=_missing(cache.commits(), shards, config.views.num, names),
        unseen=tuple(path for path in files if os.path.realpath(path) not in seen),
        partial=config.cache.allow_partial,
        live=config.cache.mode == "live",
    )


def _columns(config: RunConfig, cache: Cache) -> tuple[ColumnDiff, ...]:
    found = []
    for teacher, settings in config.teachers.items():
        for layer in settings.layers:
            column = column_id(teacher, layer, config.cache.encoding)
            has = cache.columns.identity(column)
            want = declared_column(config, teacher, layer)
            different = () if has is None else differences(want, has, declared_only=True)
            found.append(
                ColumnDiff(
                    column=column,
                    trained=layer in config.objective_layers.get(teacher, ()),
                    known=has is not None,
                    differs=tuple(different),
                )
            )
    return tuple(found)


def _missing(
    commits: Mapping[PartId, PartCommits],
    shards: Sequence[str],
    num_views: int,
    columns: Sequence[str],
) -> Missing:
    missing: dict[PartId, tuple[str, ...]] = {}
    for shard_id in shards:
        for part in (PartId(shard_id=shard_id, view=view) for view in range(num_views)):
            found = commits.get(part)
            if found is None:
                missing[part] = (ROWS, *columns)
            elif lacks := tuple(column for column in columns if column not in found.columns):
                missing[part] = lacks
    return missing


def _files(patterns: Sequence[str]) -> tuple[str, ...]:
    """Shards of the config that are there now; training does not need them."""
    found: dict[str, None] = {}
    for path in (path for pattern in patterns for path in expand_braces(pattern)):
        try:
            found |= dict.fromkeys(expand([path]))
        except UsageError:  # it is not there, or no pattern of shards at all
            continue
    return tuple(found)
