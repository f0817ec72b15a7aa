"""Everything that can be checked of a cache: its bytes, its shards, its features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdhiera.cache.commit import Cache
from kdhiera.cache.fingerprint import differences
from kdhiera.cache.info import natural_order
from kdhiera.cache.layout import CACHE_FILE, parse_column
from kdhiera.cache.problems import Verified
from kdhiera.cache.repair import repair_at
from kdhiera.cache.verify import verify_at
from kdhiera.config import RunConfig
from kdhiera.errors import DamagedError, UsageError
from kdhiera.progress import Progress, counted

if TYPE_CHECKING:  # teachers and decoders: loaded where they are asked for
    from kdhiera.stages.replaying.replay import Replayed
    from kdhiera.stages.replaying.sources import Sources


@dataclass(frozen=True, kw_only=True)
class CacheReport:
    """What was found, and what was done about it.

    Args:
        verified: Records and files.
        sources: Shards; None if not asked for.
        replayed: Rows made again; None if not asked for, or not possible.
        skipped: Columns that were not made again, with the reason.
        notes: What was asked for and could not be done.
    """

    verified: Verified
    sources: Sources | None
    replayed: Replayed | None
    skipped: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong, or nothing any more."""
        beyond = self.replayed.beyond if self.replayed else ()
        changed = self.sources.changed if self.sources else ()
        return not (self.verified.left or changed or beyond or self.notes)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        recompute = None
        if self.replayed:
            recompute = {**self.replayed.to_json(), "skipped": dict(self.skipped)}
        return {
            **self.verified.to_json(),
            "sources": self.sources.to_json() if self.sources else None,
            "recompute": recompute,
            "notes": list(self.notes),
            "sound": self.sound,
        }

    def describe(self) -> str:
        """For people."""
        lines = self.verified.lines()
        if self.sources:
            lines.append(self.sources.describe())
        if self.replayed:
            lines.append(_recompute_lines(self.replayed, self.skipped))
        lines += [f"left out  {note}" for note in self.notes]
        reasons = self._reasons()
        if reasons and not self.verified.problems:
            first = "the cache holds what was written"
            return "\n".join([*lines, f"result    {'; '.join([first, *reasons])}"])
        lines += self.verified.conclusion()
        return "\n".join([*lines, *(f"          {reason}" for reason in reasons)])

    def _reasons(self) -> list[str]:
        """Why it is not sound although every byte is what was written."""
        reasons = []
        if self.sources and self.sources.changed:
            reasons.append(
                f"{counted(len(self.sources.changed), 'shard')} not what it was made from: "
                "restore, or leave out of data.shards"
            )
        if self.replayed and self.replayed.beyond:
            reasons.append(
                "the config's teachers do not give what is stored: drop the columns that differ "
                "(`kdhiera cache drop`) and extract them again, or find out what has changed"
            )
        if self.notes:
            reasons.append("not all that was asked for was done")
        return reasons


@dataclass(frozen=True, kw_only=True)
class _Recompute:
    """What is to be made again, known before anything is read.

    Args:
        config: The run, with teacher precisions resolved.
        columns: Columns that its teachers make.
        skipped: The others, with the reason.
    """

    config: RunConfig
    columns: Mapping[str, tuple[str, str]]
    skipped: Mapping[str, str]


def check_cache(
    url: str,
    *,
    progress: Progress,
    config: RunConfig | None = None,
    sources: bool = False,
    recompute: int = 0,
    repair: bool = False,
) -> CacheReport:
    """Verify a cache, and repair it if asked to.

    Args:
        url: Folder or address of the cache.
        progress: Where progress is shown.
        config: The run that the cache was named by; None for a folder or address.
        sources: Whether to look at the shards too.
        recompute: Rows of every column to make again; 0 makes none.
        repair: Remove the commits of what is damaged.

    Raises:
        UsageError: If there is no cache, or rows are to be made again without a config.
        MismatchError: If rows are to be made again and the config is not the cache's.
    """
    if recompute and config is None:
        raise UsageError(
            "--recompute runs the teachers again, so it needs the config that names them and the "
            "shards: give it instead of the cache's folder"
        )
    planned = _plan_recompute(config, url) if config and recompute else None
    verified = verify_at(url, progress=progress)
    if repair and verified.problems:
        verified = repair_at(verified)
    usable = not verified.left and CACHE_FILE not in verified.removed
    found: Sources | None = None
    replayed: Replayed | None = None
    skipped: Mapping[str, str] = {}
    notes = []
    later = "the cache is damaged, or was: run this again once it is whole"
    if sources and usable:
        from kdhiera.stages.replaying.sources import check_sources

        patterns = config.data.shards if config else ()
        found = check_sources(Cache.open(url), patterns=patterns, progress=progress)
    elif sources:
        notes.append(f"--sources: {later}")
    if planned and usable:
        from kdhiera.stages.replaying.replay import NoSourceError

        try:
            replayed, skipped = _recompute(planned, Cache.open(url), recompute, progress)
        except NoSourceError as error:
            notes.append(f"--recompute: {error}")
    elif recompute:
        notes.append(f"--recompute: {later}")
    return CacheReport(
        verified=verified, sources=found, replayed=replayed, skipped=skipped, notes=tuple(notes)
    )


def _plan_recompute(config: RunConfig, url: str) -> _Recompute | None:
    """Which columns the config's teachers can make again; None if the cache is damaged.

    Raises:
        UsageError: If a shard or the weights of a teacher are not there.
        MismatchError: If the config is not the cache's.
    """
    from kdhiera.data.patterns import expand
    from kdhiera.stages.extraction.plan import identify

    expand(config.data.shards)
    try:
        cache = Cache.open(url)
        identities = identify(config)
        cache.check(identities.base, declared_only=True)
        made_by = {parse_column(column).teacher: i for column, i in identities.columns.items()}
        columns: dict[str, tuple[str, str]] = {}
        skipped: dict[str, str] = {}
        for column in sorted(cache.columns.names(), key=natural_order):
            name = parse_column(column)
            if column in identities.columns:
                cache.columns.check(column, identities.columns[column])
            elif name.teacher not in made_by:
                skipped[column] = "no teacher of the config has its name"
                continue
            elif not _same_teacher(cache, column, made_by[name.teacher]):
                skipped[column] = "another teacher made it, or in another precision"
                continue
            columns[column] = (name.teacher, name.layer)
    except DamagedError:  # what is damaged is said when all is read
        return None
    return _Recompute(config=identities.config, columns=columns, skipped=skipped)


def _recompute(
    planned: _Recompute, cache: Cache, num_rows: int, progress: Progress
) -> tuple[Replayed, dict[str, str]]:
    from kdhiera.stages.replaying.replay import replay_rows

    there = set(cache.columns.names())
    columns = {column: key for column, key in planned.columns.items() if column in there}
    replayed = replay_rows(
        planned.config, cache, num_rows=num_rows, columns=columns, progress=progress
    )
    compared = {column.column for column in replayed.columns}
    none = {c: "no row of it could be made again" for c in columns if c not in compared}
    return replayed, {**planned.skipped, **none}


def _same_teacher(cache: Cache, column: str, other: Mapping[str, Any]) -> bool:
    """Whether a column comes from the teacher that makes another one, in the same way."""
    own = ("layer", "encoding", "compact_error")
    has = cache.columns.identity(column) or {}
    first, second = ({k: v for k, v in i.items() if k not in own} for i in (other, has))
    return not differences(first, second)


def _recompute_lines(replayed: Replayed, skipped: Mapping[str, str]) -> str:
    lines = [
        f"recompute {counted(replayed.rows, 'row')} of {counted(replayed.parts, 'part')}: pixels "
        f"equal in {replayed.pixels_equal}"
    ]
    if replayed.scores_rows:
        lines.append(
            f"          scores moved by {replayed.scores_error:.1e} at most "
            f"(bound {replayed.scores_bound:.0e})"
        )
    width = max((len(c.column) for c in replayed.columns), default=0)
    lines += [
        f"          {c.column:<{width}}  {counted(c.rows, 'row')}, worst cosine "
        f"{c.worst_cosine:.6f}, error {c.error:.1e} of the variance (bound {c.bound:.0e})"
        for c in replayed.columns
    ]
    lines += [f"          {column}: left out, {why}" for column, why in skipped.items()]
    lines += [f"differs   {what}" for what in replayed.beyond]
    return "\n".join(lines)
