"""The cache of format 1 in `fixtures/v1` reads as it did when it was made, by any reader."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorstore as ts
import torch
import zarr
from tiny_cache import config, gc

from kdhiera.cache.commit import Cache
from kdhiera.cache.expected import expected_shards
from kdhiera.cache.fingerprint import column_identity
from kdhiera.cache.layout import PartId, column_group, parse_column
from kdhiera.cache.reader import CacheReader, read_base
from kdhiera.cache.records import ColumnCommit
from kdhiera.cache.stats import channel_statistics
from kdhiera.cache.verify import verify
from kdhiera.cache.writer import Attempt
from kdhiera.views import RowStatus

HERE = Path(__file__).parent / "fixtures" / "v1"
PARTS = [PartId(shard_id="videos-0123456789ab", view=view) for view in (0, 1)]
COLUMNS = ("image.9.bf16", "image.9.compact", "image.9.fp16", "image.9.fp32", "image.9.int8")
LOSSES = {"fp32": 0.0, "fp16": 1e-6, "bf16": 1e-4, "int8": 2e-3, "compact": 2e-2}


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with np.load(HERE / "expected.npz", allow_pickle=False) as found:
        return dict(found)


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return json.loads((HERE / "expected.json").read_text())


@pytest.fixture
def cache() -> Iterator[Cache]:
    """The fixture itself: whatever reads it leaves it as it is."""

    def hashes() -> dict[str, str]:
        files = (p for p in HERE.rglob("*") if p.is_file())
        return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    before = hashes()
    yield Cache.open(HERE / "cache")
    assert hashes() == before


def statuses(plain: dict[str, Any], column: str, view: int) -> list[int]:
    return plain["statuses"].get(column, [0] * 4) if view == 0 else [0] * 4


def test_a_reader_gives_every_trainable_row(
    cache: Cache, arrays: dict[str, np.ndarray], plain: dict[str, Any]
):
    good = [i for i, row in enumerate(plain["rows"][0]) if row["status"] == "ok"]
    for columns in (COLUMNS, *((column,) for column in COLUMNS)):
        lost = {row for c in columns for row, status in enumerate(statuses(plain, c, 0)) if status}
        kept = [row for row in range(len(good)) if row not in lost]
        reader = CacheReader(cache, num_views=2, columns=columns)
        assert reader.num_samples == len(kept)
        samples = np.arange(len(kept))
        wanted = [plain["rows"][0][good[row]] for row in kept]
        assert reader.labels(samples) == [row["labels"] for row in wanted]
        for view in (0, 1):
            rows = reader.read(samples, view=view)
            assert list(rows.uids) == [row["uid"] for row in wanted]
            for name in ("units", "scores", "pixels"):
                found = getattr(rows, name)
                assert found.dtype == arrays[f"{view}/{name}"].dtype
                np.testing.assert_array_equal(found, arrays[f"{view}/{name}"][kept])
            for column in columns:
                assert_features(reader, column, rows, view, kept, arrays)


def assert_features(reader, column, rows, view, kept, arrays) -> None:
    """As they were decoded when the cache was made, and close to what went in."""
    units = torch.from_numpy(rows.units.astype(np.int64))
    codes = {name: torch.from_numpy(values) for name, values in rows.columns[column].items()}
    decoded = reader.codec(column).decode(codes, units).numpy()
    padded = rows.units < 0
    before = arrays[f"{view}/{column}/decoded"][kept]
    np.testing.assert_allclose(decoded[~padded], before[~padded], rtol=1e-6, atol=1e-5)
    features = arrays[f"{view}/features"][kept]
    lost = ((decoded - features)[~padded] ** 2).sum() / (features[~padded] ** 2).sum()
    assert lost <= LOSSES[parse_column(column).encoding]


def test_statistics(cache: Cache, arrays: dict[str, np.ndarray]):
    reader = CacheReader(cache, num_views=2, columns=COLUMNS)
    for column in COLUMNS:
        found = reader.statistics(column)
        counts = [arrays[f"{view}/{column}/count"] for view in (0, 1)]
        means = [arrays[f"{view}/{column}/mean"] for view in (0, 1)]
        mean = (counts[0] * means[0] + counts[1] * means[1]) / sum(counts)
        m2 = sum(
            arrays[f"{view}/{column}/m2"] + counts[view] * (means[view] - mean) ** 2
            for view in (0, 1)
        )
        assert found.count == sum(counts)
        np.testing.assert_allclose(found.mean, mean, rtol=0, atol=1e-12)
        np.testing.assert_allclose(found.m2, m2, rtol=1e-12)


@pytest.mark.parametrize("reader", ["zarr", "tensorstore"])
def test_plain_readers_see_every_array(cache: Cache, arrays: dict[str, np.ndarray], reader: str):
    checked = 0
    for part, commits in cache.commits().items():
        for commit in (commits.base, *commits.columns.values()):
            is_column = isinstance(commit, ColumnCommit)
            inside = column_group(commit.column) if is_column else "base.zarr"
            folder = Path(cache.url) / cache.folder(commit) / inside
            for path in sorted(p.parent for p in folder.glob("*/zarr.json")):
                names = (
                    [str(part.view), commit.column, path.name]
                    if is_column
                    else [str(part.view), path.name]
                )
                expected = arrays["/".join(names)]
                if reader == "zarr":
                    found = zarr.open_array(path, mode="r")[...]
                else:
                    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
                    found = ts.open(spec).result().read().result()
                assert found.dtype == expected.dtype
                np.testing.assert_array_equal(found, expected)
                checked += 1
    stored = [
        name
        for name in arrays
        if name.rpartition("/")[2] not in ("features", "decoded", "count", "mean", "m2")
    ]
    assert checked == len(stored) > 2 * (3 + 5 * 2)


def test_rows_by_any_parquet_reader_and_by_ours(cache: Cache, plain: dict[str, Any]):
    for part, commits in cache.commits().items():
        path = Path(cache.url) / cache.folder(commits.base) / "rows.parquet"
        table = pq.read_table(path).to_pylist()
        numbers = iter(range(len(table)))
        for found, expected in zip(table, plain["rows"][part.view], strict=True):
            wanted = {**expected, "labels": None}
            assert json.loads(found["labels"]) == expected["labels"]
            assert {k: v for k, v in found.items() if k in wanted} | {"labels": None} == wanted
            assert found["array_row"] == (next(numbers) if found["status"] == "ok" else None)
        base = read_base(cache, commits.base)
        assert [row.uid for row in base.rows] == [row["uid"] for row in plain["rows"][part.view]]
        assert [row.status for row in base.rows].count(RowStatus.DECODE_ERROR) == 1
        assert base.rows[2].message == "no frame: Invalid data"


def test_statuses_by_name(cache: Cache):
    coverage = CacheReader(cache, num_views=2, columns=COLUMNS).coverage
    assert coverage.rows == {"decode_error": 2, "ok": 8}
    assert coverage.columns == {
        "image.9.bf16": {"ok": 8},
        "image.9.compact": {"ok": 8},
        "image.9.fp16": {"ok": 7, "overflow": 1},
        "image.9.fp32": {"nonfinite": 1, "ok": 7},
        "image.9.int8": {"ok": 7, "replay_mismatch": 1},
    }


def test_it_is_sound_and_holds_no_garbage(cache: Cache):
    assert verify(cache).problems == ()
    found = gc(cache, remove=False, later=1e9)
    assert (found.garbage, found.problems) == ((), ())
    assert list(cache.commits()) == PARTS
    assert expected_shards(cache, ["/data/*.tar"]) == {PARTS[0].shard_id}


def test_extraction_goes_on_with_it(cache: Cache, tmp_path: Path, arrays: dict[str, np.ndarray]):
    copy = Cache.open(Path(shutil.copytree(cache.url, tmp_path / "cache")))
    column = "image.norm.fp32"
    run = config(cache__encoding="fp32")
    identity = column_identity(
        run, "image", "norm", identity={}, weights_sha256="00", precision="fp32"
    )
    copy.columns.ensure(column, identity, provenance={})
    for part, commits in copy.commits().items():
        features = torch.from_numpy(arrays[f"{part.view}/features"])
        with Attempt(
            copy,
            part,
            source=commits.base.source,
            columns={column: features.shape[-1]},
            base=commits.base,
            provenance={},
            lease_seconds=1000.0,
        ) as attempt:
            attempt.append_features(column, features, np.zeros(len(features), np.uint8))
            everything = torch.cat([features, features], 1)  # as if the other units were the same
            attempt.append_statistics(column, channel_statistics(everything))
            assert attempt.commit().published == (column,)
    reader = CacheReader(Cache.open(copy.url), num_views=2, columns=(column, "image.9.bf16"))
    rows = reader.read(np.arange(4), view=1)
    np.testing.assert_array_equal(rows.columns[column]["codes"], arrays["1/features"])
    assert verify(Cache.open(copy.url)).problems == ()
