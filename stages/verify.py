"""Everything that can be checked of a cache: its bytes, its shards, its features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdhiera.cache.commit import Cache
from kdhiera.cache.fingerprint import differences
from kdhiera.cache.info import natural_order
from kdhiera.cache.layout import parse_column
from kdhiera.cache.problems import Verified
from kdhiera.cache.repair import repair_at
from kdhiera.cache.verify import verify_at
from kdhiera.config import RunConfig
from kdhiera.errors import UsageError
from kdhiera.progress import Progress, counted

if TYPE_CHECKING:  # teachers and decoders: loaded where they are asked for
    from kdhiera.stages.replay import Replayed
    from kdhiera.stages.sources import Sources


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
        if self.sound or self.verified.problems:
            return "\n".join([*lines, *self.verified.conclusion()])
        return "\n".join([*lines, f"result    {'; '.join(self._reasons())}"])

    def _reasons(self) -> list[str]:
        reasons = ["the cache holds what was written"]
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
        return reasons


def check_cache(
    url: str,
    *,
    config: RunConfig | None,
    sources: bool,
    recompute: int,
    repair: bool,
    progress: Progress,
) -> CacheReport:
    """Verify a cache, and repair it if asked to.

    Args:
        url: Folder or address of the cache.
        config: The run that the cache was named by; None for a folder or address.
        sources: Whether to look at the shards too.
        recompute: Rows of every column to make again; 0 makes none.
        repair: Remove the commits of what is damaged.
        progress: Where progress is shown.

    Raises:
        UsageError: If there is no cache, or rows are to be made again without a config.
        MismatchError: If rows are to be made again and the config is not the cache's.
    """
    if recompute and config is None:
        raise UsageError(
            "--recompute runs the teachers again, so it needs the config that names them and the "
            "shards: give it instead of the cache's folder"
        )
    verified = verify_at(url, progress=progress)
    if repair and verified.problems:
        verified = repair_at(verified)
    usable = not verified.left and "cache.json" not in verified.removed
    found: Sources | None = None
    replayed: Replayed | None = None
    skipped: Mapping[str, str] = {}
    notes = []
    if sources and usable:
        from kdhiera.stages.sources import check_sources

        patterns = config.data.shards if config else ()
        found = check_sources(Cache.open(url), patterns=patterns, progress=progress)
    elif sources:
        notes.append("--sources: mend the cache first")
    if recompute and usable:
        assert config is not None
        replayed, skipped = _recompute(config, Cache.open(url), recompute, progress)
    elif recompute:
        notes.append("--recompute: mend the cache first")
    return CacheReport(
        verified=verified, sources=found, replayed=replayed, skipped=skipped, notes=tuple(notes)
    )


def _recompute(
    config: RunConfig, cache: Cache, num_rows: int, progress: Progress
) -> tuple[Replayed, dict[str, str]]:
    """Make rows of all columns again that the config's teachers can make."""
    from kdhiera.stages.extract_plan import identify
    from kdhiera.stages.replay import replay_rows

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
    replayed = replay_rows(
        identities.config, cache, num_rows=num_rows, columns=columns, progress=progress
    )
    compared = {column.column for column in replayed.columns}
    skipped |= {c: "no row of it could be made again" for c in columns if c not in compared}
    return replayed, skipped


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
