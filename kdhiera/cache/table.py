"""Rows of a part: one a sample, good or bad, in the order of the source shard."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdhiera.views import ClipView, RowStatus

_SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("message", pa.string()),
        ("array_row", pa.int32()),
        ("num_frames", pa.int32()),
        ("frame_indices", pa.list_(pa.int32())),
        ("pts_seconds", pa.list_(pa.float64())),
        ("crop", pa.list_(pa.int32())),
        ("flip", pa.bool_()),
        ("decoder", pa.string()),
        ("clip_crc32c", pa.uint32()),
        ("kept_crc32c", pa.uint32()),
        ("source_offset", pa.int64()),
        ("source_bytes", pa.int64()),
        ("labels", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one sample in one view.

    Args:
        uid: Identity of the sample, the same in every view and on every machine.
        key: Key of the sample in its shard.
        status: Whether it has arrays, or why not.
        message: The reason in words; empty for a good row.
        num_frames: Frames that the video shows; 0 where unknown.
        view: Frames, crop and flip; None where none was drawn.
        pts_seconds: Presentation times of the sampled frames.
        decoder: Backend that decoded it; empty for none.
        clip_crc32c: Checksum of the whole clip's bytes; None where there is no clip.
        source_offset: Byte of the shard where the sample begins.
        source_bytes: Bytes of the sample in the shard.
        labels: JSON values by label name.
    """

    uid: str
    key: str
    status: RowStatus
    message: str = ""
    num_frames: int = 0
    view: ClipView | None = None
    pts_seconds: tuple[float, ...] = ()
    decoder: str = ""
    clip_crc32c: int | None = None
    source_offset: int
    source_bytes: int
    labels: Mapping[str, Any]


def count_statuses(rows: Iterable[Row]) -> dict[str, int]:
    """Rows by status, sorted by name; only what occurs."""
    return dict(sorted(Counter(row.status.value for row in rows).items()))


def samples_digest(rows: Iterable[Row]) -> str:
    """Hash of which samples there are, in order: equal in every view of a shard."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.uid, row.key, row.source_offset]).encode())
    return digest.hexdigest()


def rows_digest(rows: Sequence[Row], kept_crc32c: Sequence[int]) -> str:
    """Hash of what a column depends on: samples, statuses, kept units and their pixels.

    Two attempts with equal digests may share each other's columns.

    Args:
        rows: All rows.
        kept_crc32c: Checksum of units and pixels of every good row, in order.
    """
    digest = hashlib.sha256(samples_digest(rows).encode())
    checksums = iter(kept_crc32c)
    for row in rows:
        kept = next(checksums) if row.status is RowStatus.OK else None
        digest.update(json.dumps([row.status.value, kept]).encode())
    return digest.hexdigest()


def to_parquet(rows: Sequence[Row], kept_crc32c: Sequence[int]) -> bytes:
    """All rows as one Parquet file; good rows are numbered in order.

    Args:
        rows: All rows.
        kept_crc32c: Checksum of units and pixels of every good row, in order.
    """
    good = [row.status is RowStatus.OK for row in rows]
    numbers = iter(range(len(rows)))
    checksums = iter(kept_crc32c)
    columns = {
        "uid": [row.uid for row in rows],
        "key": [row.key for row in rows],
        "status": [row.status.value for row in rows],
        "message": [row.message for row in rows],
        "array_row": [next(numbers) if ok else None for ok in good],
        "num_frames": [row.num_frames for row in rows],
        "frame_indices": [list(row.view.frame_indices) if row.view else None for row in rows],
        "pts_seconds": [list(row.pts_seconds) for row in rows],
        "crop": [list(row.view.crop) if row.view else None for row in rows],
        "flip": [row.view.flip if row.view else None for row in rows],
        "decoder": [row.decoder for row in rows],
        "clip_crc32c": [row.clip_crc32c for row in rows],
        "kept_crc32c": [next(checksums) if ok else None for ok in good],
        "source_offset": [row.source_offset for row in rows],
        "source_bytes": [row.source_bytes for row in rows],
        "labels": [json.dumps(dict(row.labels), sort_keys=True) for row in rows],
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=_SCHEMA), sink, compression="zstd")
    return sink.getvalue()


def read_columns(data: bytes, columns: Sequence[str]) -> Any:
    """Some columns of a rows file as an Arrow table, decoded by this thread alone."""
    return pq.read_table(pa.BufferReader(data), columns=list(columns), use_threads=False)


def from_parquet(data: bytes) -> list[Row]:
    """All rows of a rows file; inverse of `to_parquet`."""
    return [_row(record) for record in pq.read_table(pa.BufferReader(data)).to_pylist()]


def _row(record: Mapping[str, Any]) -> Row:
    view = None
    if record["crop"] is not None:
        y, x, height, width = record["crop"]
        view = ClipView(
            frame_indices=tuple(record["frame_indices"]),
            crop=(y, x, height, width),
            flip=record["flip"],
        )
    return Row(
        uid=record["uid"],
        key=record["key"],
        status=RowStatus(record["status"]),
        message=record["message"],
        num_frames=record["num_frames"],
        view=view,
        pts_seconds=tuple(record["pts_seconds"]),
        decoder=record["decoder"],
        clip_crc32c=record["clip_crc32c"],
        source_offset=record["source_offset"],
        source_bytes=record["source_bytes"],
        labels=json.loads(record["labels"]),
    )
