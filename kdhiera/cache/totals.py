"""What the records of a cache add up to: one pass over all of them, nothing else is read.

Damaged records are listed and passed over: a cache can be looked at whatever state it is in.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from kdhiera.cache.commit import Cache
from kdhiera.cache.expected import shard_ids
from kdhiera.cache.layout import PARTS, PartId, attempt_folder, column_group, part_folder
from kdhiera.cache.records import BaseCommit, ColumnCommit
from kdhiera.cache.survey import Record, read_part
from kdhiera.progress import Progress

_THREADS = 8
_MANY = 1000  # parts from which on progress is shown


@dataclass(kw_only=True)
class Totals:
    """What is added up over parts.

    Attributes:
        bases: Base of every part that has one, in sorted order.
        samples: Samples of every shard.
        columns: Commits of every column by part.
        stored: Bytes that records name: by base array (`pixels`, `scores`, `units`), `rows`,
            by column, and `other`. Files that several records name count once.
        unnamed: Bytes of parts that no commit names; 0 if they were not looked for.
        times: When committed attempts began, in seconds since 1970.
        attempts: The process (`host/process`) of every committed attempt.
        versions: Versions of every package that was used.
        damaged: Records that cannot be believed, in words.
    """

    bases: dict[PartId, BaseCommit] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    columns: dict[str, dict[PartId, ColumnCommit]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    stored: Counter[str] = field(default_factory=Counter)
    unnamed: int = 0
    times: list[float] = field(default_factory=list)
    attempts: dict[str, str] = field(default_factory=dict)
    versions: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    damaged: list[str] = field(default_factory=list)

    @property
    def num_views(self) -> int:
        """Views that something is committed of."""
        return len({part.view for part in self.bases})

    def add(self, found: _Part) -> None:
        """Add what one part holds."""
        self.stored.update(found.stored)
        self.unnamed += found.unnamed
        self.damaged += found.damaged
        if found.base is None:
            return
        self.bases[found.part] = found.base
        self.samples.setdefault(found.part.shard_id, found.base.num_rows)
        for record in found.records:
            commit = record.commit
            assert commit is not None
            if isinstance(commit, ColumnCommit):
                self.columns[commit.column][found.part] = commit
            if "time" in record.provenance:
                self.times.append(float(record.provenance["time"]))
            process = str(record.provenance.get("process", "unknown"))
            self.attempts[attempt_folder(commit.part, commit.attempt)] = process
            for package, version in commit.versions:
                self.versions[package].add(version)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What one part adds."""

    part: PartId
    base: BaseCommit | None
    records: tuple[Record, ...]
    stored: Mapping[str, int]
    unnamed: int
    damaged: tuple[str, ...]


class _Kinds:
    """What files of attempts belong to; the same few names come again in every part."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = frozenset(columns)
        self._groups = {column_group(column): column for column in columns}
        self._known: dict[str, str] = {"rows.parquet": "rows"}

    def of(self, name: str) -> str:
        """A base array, `rows`, a column, or `other`."""
        kind = self._known.get(name)
        if kind is None:
            steps = name.split("/")
            in_base = steps[0] == "base.zarr" and len(steps) == 3
            kind = steps[1] if in_base else self._groups.get("/".join(steps[:3]), "other")
            self._known[name] = kind
        return kind


@dataclass(frozen=True, kw_only=True)
class Gaps:
    """What a cache was asked for and does not have.

    Args:
        unreached: Shards without any rows.
        missing: Parts of other shards that lack rows or columns, with what they lack; all
            views that some shard has count.
    """

    unreached: tuple[str, ...]
    missing: Mapping[PartId, tuple[str, ...]]

    def __bool__(self) -> bool:
        return bool(self.unreached or self.missing)


def sum_up(cache: Cache, *, unnamed: bool, progress: Progress | None = None) -> Totals:
    """Read all records of a cache.

    Args:
        cache: The cache.
        unnamed: Look for bytes that no commit names as well, which lists all files.
        progress: Where progress is shown if there is much to read.
    """
    totals = Totals()
    kinds = _Kinds(cache.columns.names())
    records = cache.records()
    shown = progress if len(records) > _MANY else None
    bar = shown.start("info", len(records), "parts") if shown else 0

    def look(item: tuple[PartId, list[str]]) -> _Part:
        return _look(cache, *item, kinds=kinds, unnamed=unnamed)

    with ThreadPoolExecutor(_THREADS) as pool:
        for part in pool.map(look, records.items()):
            totals.add(part)
            if shown:
                shown.advance(bar)
        if unnamed:
            folders = _without(cache, records)
            totals.unnamed += sum(pool.map(lambda folder: _walked(cache, folder), folders))
    if shown:
        shown.finish(bar)
    return totals


def find_gaps(cache: Cache, totals: Totals, columns: Sequence[str]) -> Gaps:
    """What is missing of the shards that were asked for.

    Args:
        cache: The cache.
        totals: Of it.
        columns: Columns that every part should have.
    """
    views = range(1 + max((part.view for part in totals.bases), default=-1))
    missing: dict[PartId, tuple[str, ...]] = {}
    for shard_id in sorted(totals.samples):
        for part in (PartId(shard_id=shard_id, view=view) for view in views):
            if part not in totals.bases:
                missing[part] = ("rows", *columns)
            elif lacks := tuple(c for c in columns if part not in totals.columns.get(c, {})):
                missing[part] = lacks
    return Gaps(unreached=tuple(sorted(shard_ids(cache) - totals.samples.keys())), missing=missing)


def _look(
    cache: Cache, part: PartId, keys: Sequence[str], *, kinds: _Kinds, unnamed: bool
) -> _Part:
    found = read_part(cache, part, keys)
    sound = [record for name, record in found.columns.items() if name in kinds.columns]
    if found.base_record is not None and found.base is not None:
        sound.insert(0, found.base_record)
    named: dict[str, int] = {}
    stored: Counter[str] = Counter()
    for record in sound:
        assert record.commit is not None
        folder = cache.folder(record.commit)
        for name, (size, _) in record.files.items():
            key = f"{folder}/{name}"
            if key not in named:
                named[key] = size
                stored[kinds.of(name)] += size
    attempts = {cache.folder(record.commit) for record in sound if record.commit is not None}
    leases = {f"{folder}/attempt.json" for folder in attempts}
    walked = cache.store.walk(part_folder(part)) if unnamed else ()
    return _Part(
        part=part,
        base=found.base,
        records=tuple(sound),
        stored=stored,
        unnamed=sum(e.num_bytes for e in walked if e.key not in named and e.key not in leases),
        damaged=tuple(record.problem for record in found.records if record.problem),
    )


def _without(cache: Cache, records: Iterable[PartId]) -> Iterator[str]:
    """Folders of parts that have no commit at all."""
    known = {part_folder(part) for part in records}
    for shard_id in cache.store.names(PARTS):
        for view in cache.store.names(f"{PARTS}/{shard_id}"):
            if (folder := f"{PARTS}/{shard_id}/{view}") not in known:
                yield folder


def _walked(cache: Cache, folder: str) -> int:
    return sum(entry.num_bytes for entry in cache.store.walk(folder))
