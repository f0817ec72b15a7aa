"""Whether the files of a commit say what its record says.

Checksums show that bytes are those that were written. What is looked at here is whether
they belong together: rows and their counts, arrays and their shapes, statuses, statistics.
Arrays are not decoded but for statuses: how they came to be was verified at commit.
"""

from __future__ import annotations

import itertools
import json
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from kdhiera.cache.arrays import open_array
from kdhiera.cache.commit import Cache
from kdhiera.cache.encoding import Codec
from kdhiera.cache.layout import (
    STATUS,
    ArraySpec,
    ColumnStatus,
    base_arrays,
    column_group,
    parse_column,
)
from kdhiera.cache.records import BaseCommit, ColumnCommit, Commit
from kdhiera.cache.stats import ChannelStatistics, from_npz
from kdhiera.cache.survey import Files, Record
from kdhiera.cache.table import (
    count_statuses,
    from_parquet,
    read_columns,
    rows_digest,
    samples_digest,
)
from kdhiera.grid import TOKENS_PER_UNIT
from kdhiera.views import RowStatus

Finding = tuple[str, str]  # path inside the attempt, what is wrong with it

_UNREADABLE = (
    KeyError,
    TypeError,
    ValueError,
    EOFError,
    zipfile.BadZipFile,
    pa.ArrowException,
)


def base_findings(cache: Cache, record: Record) -> Iterator[Finding]:
    """What contradicts a base record in its files, which match their checksums.

    Args:
        cache: The cache.
        record: Of a base.
    """
    base = record.commit
    assert isinstance(base, BaseCommit)
    data = cache.store.read(f"{cache.folder(base)}/rows.parquet")
    yield from (("rows.parquet", what) for what in _row_contradictions(base, data))
    expected = {"part": asdict(base.part), "fingerprint": record.fingerprint}
    yield from _group(cache, base, "base.zarr", expected)
    for name, spec in base_arrays(cache.grid, cache.max_kept).items():
        yield from _array(cache, base, record.files, f"base.zarr/{name}", spec, base.array_rows)


def column_findings(
    cache: Cache, record: Record, base: BaseCommit, codec: Codec | None
) -> Iterator[Finding]:
    """What contradicts a column record in its files, which match their checksums.

    Args:
        cache: The cache.
        record: Of a column.
        base: The base that it belongs to.
        codec: How it is stored; None leaves its arrays out, but for the status.
    """
    column = record.commit
    assert isinstance(column, ColumnCommit)
    group, rows = column_group(column.column), base.array_rows
    expected = {**asdict(parse_column(column.column)), "fingerprint": record.fingerprint}
    yield from _group(cache, column, group, expected)
    specs = {**(codec.specs(cache.max_kept) if codec else {}), "status": STATUS}
    wrong = [
        finding
        for name, spec in specs.items()
        for finding in _array(cache, column, record.files, f"{group}/{name}", spec, rows)
    ]
    yield from wrong
    if not wrong:
        yield from _statuses(cache, column, f"{group}/status", rows)
    try:
        data = cache.store.read(f"{cache.folder(column)}/stats.npz")
        found = from_npz(data, column.column)
    except _UNREADABLE as error:
        yield "stats.npz", f"does not hold the statistics of {column.column} ({error!r})"
        return
    tokens = cache.grid.num_units * TOKENS_PER_UNIT
    what = _implausible(found, width=column.width, tokens=tokens, column=column, rows=rows)
    if what:
        yield "stats.npz", f"the statistics of {column.column} {what}"


def _row_contradictions(base: BaseCommit, data: bytes) -> Iterator[str]:
    try:
        rows = from_parquet(data)
        table = read_columns(data, ["array_row", "kept_crc32c"])
        numbers, kept = table["array_row"].to_pylist(), table["kept_crc32c"].to_pylist()
    except _UNREADABLE as error:
        yield f"is no table of rows ({error!r})"
        return
    if len(rows) != base.num_rows:
        yield f"holds {len(rows):,} rows and its record says {base.num_rows:,}"
    statuses = count_statuses(rows)
    if statuses != dict(base.statuses):
        yield f"holds rows {_counts(statuses)} and its record says {_counts(base.statuses)}"
    good = [row.status is RowStatus.OK for row in rows]
    if sum(good) != base.array_rows:
        yield f"holds {sum(good):,} good rows and its record says {base.array_rows:,}"
    count = itertools.count()
    if numbers != [next(count) if ok else None for ok in good]:
        yield "does not number its good rows 0, 1, 2, ..."
    if samples_digest(rows) != base.samples_digest:
        yield "holds other samples than its record says"
    checksums = [value for value, ok in zip(kept, good, strict=True) if ok]
    if None in checksums or rows_digest(rows, checksums) != base.rows_digest:
        yield "holds other kept units or pixels than its record says"


def _group(
    cache: Cache, commit: Commit, group: str, expected: Mapping[str, object]
) -> Iterator[Finding]:
    """Whether a Zarr group says whose it is."""
    name = f"{group}/zarr.json"
    try:
        attributes = _json(cache, commit, name)["attributes"]
        wrong = [key for key, value in expected.items() if attributes.get(key) != value]
    except _UNREADABLE as error:
        yield name, f"describes no Zarr group ({error!r})"
        return
    if wrong:
        yield name, f"is of another cache, part or column (its {', '.join(wrong)})"


def _array(
    cache: Cache, commit: Commit, files: Files, array: str, spec: ArraySpec, rows: int
) -> Iterator[Finding]:
    """Whether an array has the shape that its record implies, and all of its chunks."""
    name = f"{array}/zarr.json"
    wanted = (rows, *spec.shape)
    try:
        found = _json(cache, commit, name)
        shape, dtype = tuple(found["shape"]), found["data_type"]
        chunks = _chunk_names(array, found)
    except _UNREADABLE as error:
        yield name, f"describes no Zarr array ({error!r})"
        return
    if (shape, dtype) != (wanted, spec.dtype):
        yield (
            name,
            f"describes {_shape(shape)} of {dtype} and the record {_shape(wanted)} of {spec.dtype}",
        )
    elif lacking := sorted(chunks - set(files)):
        yield array, f"lacks {', '.join(lacking[:3])} in its record"


def _chunk_names(array: str, metadata: Mapping[str, Any]) -> set[str]:
    """Files of all chunks (Zarr shards) of an array, by its metadata."""
    sizes = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    separator = metadata["chunk_key_encoding"]["configuration"]["separator"]
    counts = [-(-n // size) for n, size in zip(metadata["shape"], sizes, strict=True)]
    places = itertools.product(*(range(count) for count in counts))
    return {f"{array}/" + separator.join(["c", *map(str, place)]) for place in places}


def _statuses(cache: Cache, column: ColumnCommit, array: str, rows: int) -> Iterator[Finding]:
    """Whether the statuses of a column's rows are those that its record counts."""
    try:
        folder = cache.store.kvstore(f"{cache.folder(column)}/{array}")
        values = open_array(folder).read().result()
    except ValueError as error:
        yield array, f"cannot be read ({error})"
        return
    names = {int(status): status.name.lower() for status in ColumnStatus}
    counts = Counter(names.get(value, f"status {value}") for value in values.tolist())
    if counts != Counter(column.statuses) or sum(counts.values()) != rows:
        yield array, f"holds {_counts(counts)} and its record says {_counts(column.statuses)}"


def _implausible(
    found: ChannelStatistics, *, width: int, tokens: int, column: ColumnCommit, rows: int
) -> str:
    """What cannot be true of a column's statistics; empty if nothing.

    They cover all tokens of rows that are ok; rows beyond the encoding's range may count.
    """
    if (found.mean.shape, found.m2.shape) != ((width,), (width,)):
        return f"have {found.mean.shape} channels and the column {width}"
    if not (np.isfinite(found.mean).all() and np.isfinite(found.m2).all()):
        return "are not finite"
    if (found.m2 < 0).any():
        return "have a negative sum of squares"
    ok = column.statuses.get("ok", 0)
    if found.count % tokens or not ok * tokens <= found.count <= rows * tokens:
        return f"count {found.count:,} tokens, and {ok:,} good rows of {tokens:,} tokens are there"
    return ""


def _json(cache: Cache, commit: Commit, name: str) -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = json.loads(cache.store.read(f"{cache.folder(commit)}/{name}"))
    except FileNotFoundError:
        raise ValueError("it is not there") from None
    return found


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {name}" for name, n in sorted(counts.items())) or "none"


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
