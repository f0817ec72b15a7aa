"""What a cache is and holds, on one screen."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kdhiera.cache.commit import Cache
from kdhiera.cache.info_text import screen
from kdhiera.cache.layout import column_group, parse_column
from kdhiera.cache.records import BaseCommit, Commit
from kdhiera.cache.totals import Gaps, Totals, find_gaps, sum_up
from kdhiera.errors import DamagedError
from kdhiera.grid import TOKENS_PER_UNIT
from kdhiera.progress import Progress

_LOOKED_AT = 8  # parts whose lists of kept units are read


@dataclass(frozen=True, kw_only=True)
class ColumnInfo:
    """One column.

    Args:
        column: Column id.
        teacher: Kind and model that made it.
        precision: That it computed in.
        width: Channels; 0 if no part has it.
        parts: Parts that have it.
        statuses: Good rows of these parts by column status.
        stored_bytes: Of its arrays.
        raw_bytes: Of the same before compression, padding included.
        dense_bytes: Of all tokens of the same clips in fp16.
        bits_per_value: Stored bits for every value of a kept unit; None if unknown.
    """

    column: str
    teacher: str
    precision: str
    width: int
    parts: int
    statuses: Mapping[str, int]
    stored_bytes: int
    raw_bytes: int
    dense_bytes: int
    bits_per_value: float | None


@dataclass(frozen=True, kw_only=True)
class MadeBy:
    """Who made the parts, when and with what.

    Args:
        first: When the first attempt that is committed began, in seconds since 1970.
        last: The same of the last one.
        processes: Attempts by `host/process`.
        versions: Versions of every package that was used.
    """

    first: float
    last: float
    processes: Mapping[str, int]
    versions: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Info:
    """What a cache is and holds.

    Args:
        cache: Folder or address.
        format: Version of its layout.
        fingerprint: Of the base.
        identity: Of the base: clips, views, scores, masks.
        keeps: Which masks it covers, in words.
        max_kept: Bound on the kept units of a clip.
        num_units: Units of a clip.
        kept_units: Mean kept units of a clip; None if no part was looked at.
        kept_from: Parts that the mean is taken from.
        num_shards: Shards that something is committed of.
        num_views: Views that something is committed of.
        num_samples: Samples of these shards.
        num_parts: Parts with rows.
        statuses: Rows by status.
        columns: All columns, in the order of their teachers and layers.
        base_bytes: Stored bytes of rows and base arrays.
        base_raw_bytes: Bytes of the base arrays before compression.
        other_bytes: Stored bytes of statistics and descriptions.
        dense_bytes: Bytes of all tokens of the same clips and layers in fp16, a layer that is
            stored in two encodings counted once.
        unnamed_bytes: Bytes that no commit names.
        gaps: What was asked for and is not there.
        made_by: Who made it; None if nothing is committed.
        damaged: Records that cannot be believed, in words.
    """

    cache: str
    format: int
    fingerprint: str
    identity: Mapping[str, Any]
    keeps: str
    max_kept: int
    num_units: int
    kept_units: float | None
    kept_from: int
    num_shards: int
    num_views: int
    num_samples: int
    num_parts: int
    statuses: Mapping[str, int]
    columns: tuple[ColumnInfo, ...]
    base_bytes: Mapping[str, int]
    base_raw_bytes: Mapping[str, int]
    other_bytes: int
    dense_bytes: int
    unnamed_bytes: int
    gaps: Gaps
    made_by: MadeBy | None
    damaged: tuple[str, ...]

    @property
    def column_bytes(self) -> int:
        """Stored bytes of all columns."""
        return sum(column.stored_bytes for column in self.columns)

    @property
    def stored_bytes(self) -> int:
        """All bytes that commits name."""
        return self.column_bytes + sum(self.base_bytes.values()) + self.other_bytes

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        gaps = {
            "unreached": list(self.gaps.unreached),
            "missing": {str(part): list(lacks) for part, lacks in self.gaps.missing.items()},
        }
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            **values,
            "columns": [asdict(column) for column in self.columns],
            "made_by": asdict(self.made_by) if self.made_by else None,
            "gaps": gaps,
            "stored_bytes": self.stored_bytes,
            "complete": not self.gaps,
        }

    def describe(self) -> str:
        """For people: one screen."""
        return "\n".join(screen(self))


def describe_cache(cache: Cache, *, progress: Progress | None = None) -> Info:
    """Sum up a cache.

    Args:
        cache: The cache.
        progress: Where progress is shown if there is much to read.
    """
    totals = sum_up(cache, unnamed=True, progress=progress)
    bases = list(totals.bases.values())
    statuses: Counter[str] = Counter()
    for base in bases:
        statuses.update(base.statuses)
    kept, kept_from = _kept_units(cache, bases)
    columns = [
        _column_info(cache, totals, column, identity, kept)
        for column, identity in _identities(cache, totals)
    ]
    rows = sum(base.array_rows for base in bases)
    return Info(
        cache=cache.url,
        format=cache.identity["format"],
        fingerprint=cache.fingerprint,
        identity=cache.identity,
        keeps=cache.mask_plan.describe(),
        max_kept=cache.max_kept,
        num_units=cache.grid.num_units,
        kept_units=kept,
        kept_from=kept_from,
        num_shards=len(totals.samples),
        num_views=totals.num_views,
        num_samples=sum(totals.samples.values()),
        num_parts=len(bases),
        statuses=dict(sorted(statuses.items())),
        columns=tuple(columns),
        base_bytes={name: totals.stored[name] for name in ("pixels", "scores", "units", "rows")},
        base_raw_bytes=_raw_bytes(cache, bases[0], "base.zarr", rows) if bases else {},
        other_bytes=totals.stored["other"],
        dense_bytes=_dense_bytes(columns),
        unnamed_bytes=totals.unnamed,
        gaps=find_gaps(cache, totals, [column.column for column in columns]),
        made_by=_made_by(totals),
        damaged=tuple(totals.damaged),
    )


def natural_order(column: str) -> tuple[str, bool, int, str, str]:
    """Key that sorts columns by teacher, then layers by number and named ones after them."""
    name = parse_column(column)
    number = int(name.layer) if name.layer.isdecimal() else 0
    return name.teacher, not name.layer.isdecimal(), number, name.layer, name.encoding


def _identities(cache: Cache, totals: Totals) -> list[tuple[str, Mapping[str, Any]]]:
    """All columns with their identities; that of a damaged one is empty."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    for column in cache.columns.names():
        try:
            identity = cache.columns.identity(column)
        except DamagedError as error:
            totals.damaged.append(str(error))
            identity = {}
        if identity is not None:
            found.append((column, identity))
    return sorted(found, key=lambda item: natural_order(item[0]))


def _column_info(
    cache: Cache,
    totals: Totals,
    column: str,
    identity: Mapping[str, Any],
    kept_units: float | None,
) -> ColumnInfo:
    commits = totals.columns.get(column, {})
    statuses: Counter[str] = Counter()
    for commit in commits.values():
        statuses.update(commit.statuses)
    rows = sum(totals.bases[part].array_rows for part in commits)
    one = next(iter(commits.values()), None)
    width = one.width if one else 0
    stored = totals.stored[column]
    teacher = identity.get("teacher", {})
    values = rows * (kept_units or 0) * TOKENS_PER_UNIT * width
    return ColumnInfo(
        column=column,
        teacher=_made_by_teacher(teacher),
        precision=str(identity.get("precision", "unknown")),
        width=width,
        parts=len(commits),
        statuses=dict(sorted(statuses.items())),
        stored_bytes=stored,
        raw_bytes=sum(_raw_bytes(cache, one, column_group(column), rows).values()) if one else 0,
        dense_bytes=2 * rows * cache.grid.num_units * TOKENS_PER_UNIT * width,
        bits_per_value=8 * stored / values if values else None,
    )


def _made_by_teacher(teacher: Mapping[str, Any]) -> str:
    name = teacher.get("model", teacher.get("factory", ""))
    return f"{teacher.get('kind', 'unknown')} {name}".rstrip()


def _raw_bytes(cache: Cache, commit: Commit, group: str, rows: int) -> dict[str, int]:
    """Bytes of a group's arrays before compression, from what one part says of their rows."""
    folder = f"{cache.folder(commit)}/{group}"
    found: dict[str, int] = {}
    for name in cache.store.names(folder):
        try:
            array = json.loads(cache.store.read(f"{folder}/{name}/zarr.json"))
            row = np.prod(array["shape"][1:], dtype=np.int64)
            found[name] = rows * int(row) * np.dtype(array["data_type"]).itemsize
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            continue  # the group's own zarr.json, or one that `verify` will name
    return found


def _dense_bytes(columns: Sequence[ColumnInfo]) -> int:
    layers: dict[tuple[str, str], int] = {}
    for column in columns:
        name = parse_column(column.column)
        layer = name.teacher, name.layer
        layers[layer] = max(layers.get(layer, 0), column.dense_bytes)
    return sum(layers.values())


def _kept_units(cache: Cache, bases: Sequence[BaseCommit]) -> tuple[float | None, int]:
    """Mean kept units of a clip, from a few parts spread over all."""
    from kdhiera.cache.arrays import read_array  # zarr: not needed to list caches

    good = [base for base in bases if base.array_rows]
    places = sorted({i * len(good) // _LOOKED_AT for i in range(_LOOKED_AT)}) if good else []
    kept = rows = looked = 0
    for place in places:
        try:
            units = read_array(cache, good[place], "base.zarr/units")
        except DamagedError:
            continue  # `verify` will name it
        kept, rows, looked = kept + int((units >= 0).sum()), rows + len(units), looked + 1
    return (kept / rows if rows else None), looked


def _made_by(totals: Totals) -> MadeBy | None:
    if not totals.times:
        return None
    return MadeBy(
        first=min(totals.times),
        last=max(totals.times),
        processes=dict(sorted(Counter(totals.attempts.values()).items())),
        versions={p: tuple(sorted(v)) for p, v in sorted(totals.versions.items())},
    )
