"""Figure 9: a cache of 10,000 shards, 8 columns and 10 million rows, and an epoch of it.

The commits are real records of rows that are not there: nothing but them is read when a reader
opens, when a run that was stopped finds its commits again, and when extraction plans. Every
measurement has a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import publish
from kdhiera.cache.commit import Cache
from kdhiera.cache.fingerprint import base_identity, column_identity
from kdhiera.cache.index import build_index
from kdhiera.cache.layout import ZARR_SHARD_ROWS, PartId, column_group, column_id, commit_file
from kdhiera.cache.reader import CacheReader
from kdhiera.cache.records import seal
from kdhiera.cache.snapshot import load_snapshot, save_snapshot
from kdhiera.config import RunConfig, load

SHARDS, ROWS, LAYERS, BAD = 10_000, 1_000, 8, 10
VIEWS, SHARDS_OF_VIEWS = 4, 1_000  # index only: bytes a row do not depend on how many shards
BATCH = 256
ROUNDS = 5
ATTEMPT = "20260101T000000Z-000000000000"
BLOCKS = -(-ROWS // ZARR_SHARD_ROWS)


def run() -> None:
    """Make caches without bad rows and with 1 % of them in every shard, and open them."""
    seconds: dict[str, list[float]] = {}
    figures: dict[str, float] = {}
    for kind, bad in (("clean", 0), ("1 % bad", BAD)):
        with tempfile.TemporaryDirectory() as folder:
            make_cache(Path(folder), bad)
            found = [_measure("open", folder) for _ in range(ROUNDS)]
            figures[f"index bytes a row, {kind}"] = _measure("index", folder)["bytes_a_row"]
            plans = [_measure("plan", folder)["seconds"] for _ in range(ROUNDS)]
            seconds[f"plan an extraction, {kind}"] = plans
        for what in found[0]:
            if what.endswith(" s"):
                seconds[f"{what.removesuffix(' s')}, {kind}"] = [f[what] for f in found]
            else:
                figures[f"{what}, {kind}"] = max(f[what] for f in found)
    with tempfile.TemporaryDirectory() as folder:
        make_cache(Path(folder), BAD, shards=SHARDS_OF_VIEWS, views=VIEWS)
        index = _measure("index", folder)
        figures[f"index bytes a row, 1 % bad, {VIEWS} views"] = index["bytes_a_row"]
    orders = [_measure("order", "-") for _ in range(ROUNDS)]
    seconds["order of an epoch"] = [order["seconds"] for order in orders]
    figures["order of an epoch, peak bytes a row"] = max(o["peak_bytes_a_row"] for o in orders)
    figures["order of an epoch, bytes a row"] = max(o["bytes_a_row"] for o in orders)
    figures["slowest opening in s"] = max(
        statistics.median(s) for what, s in seconds.items() if what.startswith("open")
    )
    publish("scale", seconds, figures)


def make_cache(folder: Path, bad: int, *, shards: int = SHARDS, views: int = 1) -> None:
    """Records of a cache, with `bad` bad rows spread over every part."""
    config = load("configs/demo.yaml", ["cache.encoding=int8"])
    identity = base_identity(config, score_teacher={"weights_sha256": "11"})
    cache = Cache.create_or_open(folder, identity, provenance={})
    for layer, column in enumerate(_columns()):
        cache.columns.ensure(column, _column(config, layer), provenance={})
    for i in range(shards):
        for view in range(views):
            part = PartId(shard_id=f"shard-{i:06d}-{i:012x}", view=view)
            base = seal(_base_record(cache, part, bad))
            _write(folder / commit_file(part, None), base)
            for column in _columns():
                record = _column_record(cache, part, column, base, bad)
                _write(folder / commit_file(part, column), seal(record))


def _measure(what: str, folder: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.scale", what, folder]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def _open(folder: str) -> dict[str, float]:
    """Open, save and find the snapshot again, plan: what a run does before its first byte."""
    before = _peak_mb()
    began = time.perf_counter()
    reader = CacheReader(Cache.open(folder), num_views=1, columns=_columns())
    opened = time.perf_counter()
    peak = _peak_mb()
    assert reader.num_samples in (SHARDS * ROWS, SHARDS * (ROWS - BAD)), reader.num_samples
    with tempfile.TemporaryDirectory() as run_dir:
        save_snapshot(Path(run_dir), reader.snapshot)
        saved = time.perf_counter()
        snapshot = load_snapshot(Path(run_dir))
        num_bytes = sum(path.stat().st_size for path in Path(run_dir).iterdir())
    assert snapshot == reader.snapshot
    resumed = time.perf_counter()
    CacheReader(Cache.open(folder), num_views=1, columns=_columns(), snapshot=snapshot)
    found = time.perf_counter()
    return {
        "open s": opened - began,
        "save a snapshot s": saved - opened,
        "open by a snapshot s": found - resumed,
        "resident MB": peak,
        "resident MB of imports": before,
        "snapshot in MB": num_bytes / 2**20,
    }


def _plan(folder: str) -> dict[str, float]:
    """What extraction asks of the cache before its first part."""
    from kdhiera.data.shards import ShardIndex
    from kdhiera.stages.extraction.plan import make_plan
    from kdhiera.stores import FileVersion

    layers = [str(layer) for layer in range(LAYERS)]
    config = load("configs/demo.yaml", [f"teachers.image.layers={json.dumps(layers)}"])
    shards = [
        ShardIndex(
            path=f"shard-{i:06d}.tar",
            shard_id=f"shard-{i:06d}-{i:012x}",
            version=FileVersion(num_bytes=0),
            samples=(),
            problems=(),
        )
        for i in range(SHARDS)
    ]
    cache = Cache.open(folder)
    began = time.perf_counter()
    plan = make_plan(config, cache, shards)
    seconds = time.perf_counter() - began
    assert plan.num_parts == 2 * SHARDS, plan
    return {"seconds": seconds}


def _index(folder: str) -> dict[str, float]:
    """All that the index holds: commits, gaps, and what Python spends on them."""
    cache = Cache.open(folder)
    views = 1 + max(part.view for part in cache.records())
    tracemalloc.start()
    index = build_index(
        cache, num_views=views, columns=_columns(), shards=None, allow_partial=False
    )
    held, _ = tracemalloc.get_traced_memory()
    return {"bytes_a_row": held / sum(s.num_samples for s in index.shards)}


def _order(_: str) -> dict[str, float]:
    from kdhiera.training.batches import epoch_order

    rows = SHARDS * ROWS
    began = time.perf_counter()
    order = epoch_order(0, 0, rows, BATCH, block=ZARR_SHARD_ROWS)
    seconds = time.perf_counter() - began
    assert order.shape == (rows // BATCH, BATCH), order.shape
    tracemalloc.start()
    order = epoch_order(0, 0, rows, BATCH, block=ZARR_SHARD_ROWS)
    held, peak = tracemalloc.get_traced_memory()
    return {"seconds": seconds, "peak_bytes_a_row": peak / rows, "bytes_a_row": held / rows}


def _columns() -> tuple[str, ...]:
    return tuple(column_id("image", str(layer), "int8") for layer in range(LAYERS))


def _column(config: RunConfig, layer: int) -> dict[str, Any]:
    return column_identity(
        config, "image", str(layer), identity={}, weights_sha256="22", precision="fp32"
    )


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)  # not synced: nothing here has to last


def _base_record(cache: Cache, part: PartId, bad: int) -> dict[str, object]:
    names = [f"base.zarr/{a}/c.{i}" for a in ("pixels", "scores", "units") for i in range(BLOCKS)]
    step = ROWS // bad if bad else 1
    first = [step * i + (part.view + i) % step for i in range(bad)]  # other rows in every view
    return {
        **_head("base", part, cache.fingerprint),
        "num_rows": ROWS,
        "array_rows": ROWS - bad,
        "statuses": {"decode_error": bad, "ok": ROWS - bad} if bad else {"ok": ROWS},
        "bad": [[row, row + 1] for row in first],
        "samples_digest": hashlib.sha256(part.shard_id.encode()).hexdigest(),
        "rows_digest": hashlib.sha256(part.shard_id.encode()).hexdigest(),
        "source": {"path": f"{part.shard_id}.tar", "num_bytes": 1, "sha256": None, "problems": []},
        **_files([*names, "rows.parquet"], names),
    }


def _column_record(
    cache: Cache, part: PartId, column: str, base: bytes, bad: int
) -> dict[str, object]:
    group = column_group(column)
    names = [f"{group}/{a}/c.{i}" for a in ("codes", "scale") for i in range(BLOCKS)]
    names.append(f"{group}/status/c.0")
    return {
        **_head("column", part, cache.columns.fingerprint(column)),
        "column": column,
        "base_sha256": hashlib.sha256(base).hexdigest(),
        "width": 384,
        "statuses": {"ok": ROWS - bad},
        "bad": [],
        "basis_sha256": None,
        **_files(names, names),
    }


def _files(names: list[str], chunks: list[str]) -> Mapping[str, object]:
    """Sizes and checksums as a record names them."""
    return {
        "files": dict.fromkeys(names, (12_499_719, 1_928_376_109)),
        "ends": dict.fromkeys(chunks, 1_928_376_109),
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


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    ways = {"open": _open, "plan": _plan, "index": _index, "order": _order}
    print(json.dumps(ways[sys.argv[1]](sys.argv[2])))
