"""Figure 9: opening a cache of 10,000 shards and 10 million rows, and ordering an epoch of it.

The commits are real records of rows that are not there: nothing but them (and the tables of
shards with bad rows) is read when a reader opens. Every measurement has a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c

from benchmarks.report import publish
from kdhiera.cache.commit import Cache
from kdhiera.cache.fingerprint import base_identity, column_identity
from kdhiera.cache.index import build_index
from kdhiera.cache.layout import (
    ZARR_SHARD_ROWS,
    PartId,
    attempt_folder,
    column_group,
    column_id,
    commit_file,
)
from kdhiera.cache.reader import CacheReader
from kdhiera.cache.records import seal
from kdhiera.cache.table import Row, to_parquet
from kdhiera.config import RunConfig, load
from kdhiera.training.batches import epoch_order
from kdhiera.views import ClipView, RowStatus

SHARDS, ROWS, LAYERS, BAD = 10_000, 1_000, 8, 10
ROUNDS = 5
ATTEMPT = "20260101T000000Z-000000000000"
BLOCKS = -(-ROWS // ZARR_SHARD_ROWS)


def run() -> None:
    """Make two caches, without bad rows and with 1 % of them in every shard, and open them."""
    seconds: dict[str, list[float]] = {}
    figures: dict[str, float] = {}
    for kind, bad in (("clean", 0), ("1 % bad rows in every shard", BAD)):
        with tempfile.TemporaryDirectory() as folder:
            _make_cache(Path(folder), bad)
            found = [_measure("open", folder) for _ in range(ROUNDS)]
            index = _measure("index", folder)
        seconds[f"open, {kind}"] = [f["seconds"] for f in found]
        figures[f"resident memory in MB, {kind}"] = max(f["resident_mb"] for f in found)
        figures[f"index bytes a row, {kind}"] = index["bytes_a_row"]
    seconds["order of an epoch"] = [_measure("order", "-")["seconds"] for _ in range(ROUNDS)]
    figures["slowest median in s"] = max(statistics.median(s) for s in seconds.values())
    publish("scale", seconds, figures)


def _measure(what: str, folder: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.scale", what, folder]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def _columns() -> tuple[str, ...]:
    return tuple(column_id("image", str(layer), "int8") for layer in range(LAYERS))


def _open(folder: str) -> dict[str, float]:
    began = time.perf_counter()
    reader = CacheReader(Cache.open(folder), num_views=1, columns=_columns())
    seconds = time.perf_counter() - began
    assert reader.num_samples in (SHARDS * ROWS, SHARDS * (ROWS - BAD)), reader.num_samples
    status = Path("/proc/self/status").read_text()
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return {"seconds": seconds, "resident_mb": int(peak) / 1024}


def _index(folder: str) -> dict[str, float]:
    """All that the index holds: commits, row numbers, and what Python spends on them."""
    cache = Cache.open(folder)
    tracemalloc.start()
    index = build_index(cache, num_views=1, columns=_columns(), shards=None, allow_partial=False)
    held, _ = tracemalloc.get_traced_memory()
    return {"bytes_a_row": held / sum(s.num_samples for s in index.shards)}


def _order(_: str) -> dict[str, float]:
    began = time.perf_counter()
    order = epoch_order(0, 0, SHARDS * ROWS, 256, block=ZARR_SHARD_ROWS)
    seconds = time.perf_counter() - began
    assert order.shape == (SHARDS * ROWS // 256, 256), order.shape
    return {"seconds": seconds}


def _make_cache(folder: Path, bad: int) -> None:
    config = load("configs/demo.yaml", ["cache.encoding=int8"])
    identity = base_identity(config, score_teacher={"weights_sha256": "11"})
    cache = Cache.create_or_open(folder, identity, provenance={})
    for layer, column in enumerate(_columns()):
        cache.columns.ensure(column, _column(config, layer), provenance={})
    table = _table(bad)
    for i in range(SHARDS):
        part = PartId(shard_id=f"shard-{i:06d}-{i:012x}", view=0)
        base = seal(_base_record(cache, part, bad, table))
        _write(folder / commit_file(part, None), base)
        if bad:
            _write(folder / attempt_folder(part, ATTEMPT) / "rows.parquet", table)
        for column in _columns():
            _write(
                folder / commit_file(part, column), seal(_record(cache, part, column, base, bad))
            )


def _column(config: RunConfig, layer: int) -> dict[str, Any]:
    return column_identity(
        config, "image", str(layer), identity={}, weights_sha256="22", precision="fp32"
    )


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)  # not synced: nothing here has to last


def _table(bad: int) -> bytes:
    view = ClipView(frame_indices=tuple(range(8)), crop=(0, 0, 128, 128), flip=False)
    step = ROWS // bad if bad else ROWS + 1
    rows = [
        Row(
            uid=f"shard/{512 * i}/clip{i:06d}",
            key=f"clip{i:06d}",
            status=RowStatus.DECODE_ERROR if i % step == step - 1 else RowStatus.OK,
            view=None if i % step == step - 1 else view,
            source_offset=512 * i,
            source_bytes=512,
            labels={},
        )
        for i in range(ROWS)
    ]
    return to_parquet(rows, [i for i, row in enumerate(rows) if row.status is RowStatus.OK])


def _base_record(cache: Cache, part: PartId, bad: int, table: bytes) -> dict[str, object]:
    names = [f"base.zarr/{a}/c.{i}" for a in ("pixels", "scores", "units") for i in range(BLOCKS)]
    return {
        **_head("base", part, cache.fingerprint),
        "num_rows": ROWS,
        "array_rows": ROWS - bad,
        "statuses": {"decode_error": bad, "ok": ROWS - bad} if bad else {"ok": ROWS},
        "samples_digest": hashlib.sha256(part.shard_id.encode()).hexdigest(),
        "rows_digest": hashlib.sha256(part.shard_id.encode()).hexdigest(),
        "source": {"path": f"{part.shard_id}.tar", "num_bytes": 1, "sha256": None, "problems": []},
        "files": {
            **dict.fromkeys(names, (12_499_719, 1_928_376_109)),
            "rows.parquet": [len(table), google_crc32c.value(table)],
        },
    }


def _record(cache: Cache, part: PartId, column: str, base: bytes, bad: int) -> dict[str, object]:
    group = column_group(column)
    names = [f"{group}/{a}/c.{i}" for a in ("codes", "scale") for i in range(BLOCKS)]
    return {
        **_head("column", part, cache.columns.fingerprint(column)),
        "column": column,
        "base_sha256": hashlib.sha256(base).hexdigest(),
        "width": 384,
        "statuses": {"ok": ROWS - bad},
        "basis_sha256": None,
        "files": dict.fromkeys([*names, f"{group}/status/c.0"], (1_957_375, 829_020_155)),
    }


def _head(kind: str, part: PartId, fingerprint: str | None) -> Mapping[str, object]:
    names = ("av", "decord", "kdhiera", "numcodecs", "python", "timm", "torch", "zarr")
    return {
        "kind": kind,
        "shard_id": part.shard_id,
        "view": part.view,
        "attempt": ATTEMPT,
        "fingerprint": fingerprint,
        "provenance": {"machine": "x86_64", "versions": dict.fromkeys(names, "1.0.0")},
    }


if __name__ == "__main__":
    measured = {"open": _open, "index": _index, "order": _order}[sys.argv[1]](sys.argv[2])
    print(json.dumps(measured))
