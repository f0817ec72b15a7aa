"""What it costs to notice that a file of chunks is another one of the same size.

Three ways, against reading all rows of a part once: its end at first touch (what readers do),
the whole file at first touch, and a checksum of every row that is read.
"""

from __future__ import annotations

import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import torch

from benchmarks.report import publish
from kdhiera.cache.commit import Cache
from kdhiera.cache.fingerprint import base_identity, column_identity
from kdhiera.cache.layout import END_BYTES, PartId, is_chunk_file
from kdhiera.cache.reader import CacheReader
from kdhiera.cache.records import Commit, SourceInfo
from kdhiera.cache.rows import KeptRows
from kdhiera.cache.table import Row
from kdhiera.cache.writer import Attempt, kept_crc32c
from kdhiera.config import load
from kdhiera.views import RowStatus

ROWS, BATCH, WIDTH, RUNS = 512, 32, 384, 5
LAYERS = ("3", "6", "9", "12")
PART = PartId(shard_id="part-0123456789ab", view=0)


def run() -> None:
    """Write a part of the demo's geometry with four layers of int8, and time all of it."""
    with tempfile.TemporaryDirectory() as folder:
        cache, columns = _write(Path(folder))
        chunks = {
            f"{cache.folder(commit)}/{name}": size
            for commit in _commits(cache)
            for name, (size, _) in cache.read_record(commit)["files"].items()
            if is_chunk_file(name)
        }
        order = np.random.default_rng(0).permutation(ROWS)
        batches = np.split(order, ROWS // BATCH)
        reader = CacheReader(cache, num_views=1, columns=columns)
        rows = [reader.read(batch, view=0) for batch in batches]

        def fresh() -> None:
            touched = CacheReader(cache, num_views=1, columns=columns)
            touched.read(order[:1], view=0)

        ways: dict[str, Callable[[], object]] = {
            "read all rows": lambda: [reader.read(batch, view=0) for batch in batches],
            "open and touch first, all checks": fresh,
            "ends of all chunk files": lambda: _ends(cache, chunks),
            "all chunk files, crc32": lambda: _whole(cache, chunks, zlib.crc32),
            "all chunk files, crc32c": lambda: _whole(cache, chunks, google_crc32c.value),
            "every row, crc32c": lambda: list(map(_row_checksums, rows)),
        }
        seconds = {what: [_time(way) for _ in range(RUNS)] for what, way in ways.items()}
    whole = np.median(seconds["read all rows"])
    publish(
        "integrity",
        seconds,
        {f"{what} / read all rows": float(np.median(s) / whole) for what, s in seconds.items()},
    )


def _time(way: Callable[[], object]) -> float:
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def _ends(cache: Cache, chunks: dict[str, int]) -> None:
    for data in cache.store.read_ends(chunks, END_BYTES):
        assert data is not None
        zlib.crc32(data)


def _whole(cache: Cache, chunks: dict[str, int], checksum: Callable[[bytes], int]) -> None:
    for key in chunks:
        checksum(cache.store.read(key))


def _row_checksums(rows: KeptRows) -> None:
    for i in range(len(rows.units)):
        kept_crc32c(rows.units[i], rows.pixels[i])
        google_crc32c.value(rows.scores[i])
        for arrays in rows.columns.values():
            for values in arrays.values():
                google_crc32c.value(values[i])


def _commits(cache: Cache) -> tuple[Commit, ...]:
    (commits,) = cache.commits().values()
    return (commits.base, *commits.columns.values())


def _write(root: Path) -> tuple[Cache, tuple[str, ...]]:
    config = load("configs/demo.yaml", ["cache.encoding=int8"])
    cache = Cache.create_or_open(
        root / "cache", base_identity(config, score_teacher={}), provenance={}
    )
    columns = tuple(f"image.{layer}.int8" for layer in LAYERS)
    for layer, column in zip(LAYERS, columns, strict=True):
        identity = column_identity(
            config, "image", layer, identity={}, weights_sha256="", precision="fp32"
        )
        cache.columns.ensure(column, identity, provenance={})
    rng = np.random.default_rng(0)
    grid, kept = cache.grid, cache.max_kept
    row = Row(uid="", key="", status=RowStatus.OK, source_offset=0, source_bytes=0, labels={})
    source = SourceInfo(path="part.tar", num_bytes=0, sha256=None)
    with Attempt(
        cache,
        PART,
        source=source,
        columns=dict.fromkeys(columns, WIDTH),
        provenance={},
        lease_seconds=1e6,
    ) as attempt:
        for start in range(0, ROWS, BATCH):
            units = np.stack(
                [np.sort(rng.choice(grid.num_units, kept, replace=False)) for _ in range(BATCH)]
            )
            attempt.append_rows(
                [replace(row, uid=f"{start + i}", key=f"{start + i}") for i in range(BATCH)],
                units=units.astype(np.int16),
                scores=rng.random((BATCH, grid.slots, grid.units_per_slot), np.float32),
                pixels=rng.integers(0, 256, (BATCH, kept, 2, 32, 32, 3), dtype=np.uint8),
            )
            for column in columns:
                features = torch.from_numpy(
                    rng.standard_normal((BATCH, kept, 4, WIDTH), dtype=np.float32)
                )
                attempt.append_features(column, features, np.zeros(BATCH, np.uint8))
        attempt.commit()
    return cache, columns


if __name__ == "__main__":
    run()
