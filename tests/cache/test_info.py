"""What info, ls and drop say, against what is counted independently."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from forging import forge
from tiny_cache import COLUMNS, add_column, begin, content, fill, make_cache, write_part

from kdhiera.cache.commit import Cache
from kdhiera.cache.drop import drop_column
from kdhiera.cache.expected import expect_shard
from kdhiera.cache.info import Info, describe_cache, natural_order
from kdhiera.cache.layout import PartId, commit_file
from kdhiera.cache.listing import list_caches
from kdhiera.cache.records import seal, unseal
from kdhiera.errors import KdhieraError, UsageError

PARTS = tuple(PartId(shard_id=shard, view=view) for shard in ("a-0", "b-0") for view in (0, 1))
A0, A1, B0, B1 = PARTS
BAD = {"a-0": (2,), "b-0": ()}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards in two views, nine good rows a view."""
    root = tmp_path_factory.mktemp("pristine") / "cache"
    cache = make_cache(root)
    for part in PARTS:
        write_part(cache, part, content(part, bad=BAD[part.shard_id]))
    return root


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "cache"))


def info_of(root: Path) -> Info:
    return describe_cache(Cache.open(root))


def attempts(root: Path) -> list[Path]:
    return sorted((root / "parts").glob("*/*/*"))


def size_of(paths: list[Path]) -> int:
    files = [f for p in paths for f in (p.rglob("*") if p.is_dir() else [p]) if f.is_file()]
    return sum(f.stat().st_size for f in files)


def test_rows_and_views_are_those_of_the_tables(pristine: Path) -> None:
    info = info_of(pristine)
    tables = [pq.read_table(a / "rows.parquet") for a in attempts(pristine)]
    statuses = [status for table in tables for status in table["status"].to_pylist()]
    assert dict(info.statuses) == {s: statuses.count(s) for s in sorted(set(statuses))}
    assert (info.num_shards, info.num_views, info.num_parts) == (2, 2, 4)
    assert info.num_samples == sum(len(table) for table in tables) // 2


def test_bytes_are_those_on_the_disk(pristine: Path) -> None:
    info = info_of(pristine)
    found = attempts(pristine)
    for name in ("pixels", "scores", "units"):
        assert info.base_bytes[name] == size_of([a / "base.zarr" / name for a in found])
    assert info.base_bytes["rows"] == size_of([a / "rows.parquet" for a in found])
    for column in info.columns:
        _, layer, encoding = column.column.split(".")
        teacher = column.column.split(".")[0]
        groups = [a / "targets.zarr" / teacher / f"{layer}.{encoding}" for a in found]
        assert column.stored_bytes == size_of(groups)
    leases = size_of([a / "attempt.json" for a in found])
    du = subprocess.run(["du", "-sb", "--apparent-size", pristine / "parts"], capture_output=True)
    folders = sum(
        p.stat().st_size
        for p in (pristine / "parts", *(pristine / "parts").rglob("*"))
        if p.is_dir()
    )
    assert info.stored_bytes + leases == int(du.stdout.split()[0]) - folders
    assert info.unnamed_bytes == 0


def test_sizes_before_compression_are_those_of_the_arrays(pristine: Path) -> None:
    info = info_of(pristine)
    raw = {column.column: 0 for column in info.columns}
    dense = dict(raw)
    kept: list[int] = []
    for attempt in attempts(pristine):
        base = zarr.open_group(attempt / "base.zarr", mode="r")
        units = np.asarray(base["units"])
        kept += (units >= 0).sum(1).tolist()
        for column in raw:
            teacher, layer, encoding = column.split(".")
            group = zarr.open_group(attempt / "targets.zarr", mode="r")
            arrays = group[f"{teacher}/{layer}.{encoding}"]
            assert isinstance(arrays, zarr.Group)
            raw[column] += sum(array.nbytes for _, array in arrays.arrays())
            dense[column] += 2 * len(units) * 8 * 4 * arrays["codes"].shape[-1]
    assert {c.column: c.raw_bytes for c in info.columns} == raw
    assert {c.column: c.dense_bytes for c in info.columns} == dense
    assert info.dense_bytes == sum(dense.values())
    assert (info.kept_units, info.kept_from) == (pytest.approx(np.mean(kept)), 4)
    assert (info.max_kept, info.num_units) == (4, 8)
    for column in info.columns:
        values = sum(kept) * 4 * column.width
        assert column.bits_per_value == pytest.approx(8 * column.stored_bytes / values)


def test_what_no_commit_names_is_counted(root: Path) -> None:
    cache = Cache.open(root)
    drop_column(cache, COLUMNS[0])
    attempt = begin(cache, PartId(shard_id="c-0", view=0), ())
    fill(attempt, content(attempt.part), ())
    groups = [a / "targets.zarr/image" for a in attempts(root)]
    lost = size_of([attempt.folder])
    info = info_of(root)
    assert info.unnamed_bytes == size_of(groups) + lost
    assert "cache gc" in info.describe()
    assert [c.column for c in info.columns] == [COLUMNS[1]]


def test_gaps_are_named(root: Path) -> None:
    cache = Cache.open(root)
    expect_shard(cache, "c-0", path="/data/c-0.tar")
    (root / commit_file(A1, COLUMNS[0])).unlink()
    for column in (*COLUMNS, None):
        (root / commit_file(B1, column)).unlink()
    info = info_of(root)
    assert info.gaps.unreached == ("c-0",)
    assert info.gaps.missing == {A1: (COLUMNS[0],), B1: ("rows", *COLUMNS)}
    said = info.describe()
    assert "complete  no: 1 shard without rows (c-0); 2 parts not whole" in said
    assert "a-0 view 1 lacks image.1.int8" in said
    assert "2 of 3" in said  # parts that have the column


def test_who_made_it_is_told_from_the_records(root: Path) -> None:
    assert info_of(root).made_by is None  # these records do not say when they were made
    for number, part in enumerate(PARTS):
        for column in (None, *COLUMNS):
            made_by = {
                "process": f"host{number % 2}/7",
                "time": 1000.0 + number,
                "versions": {"torch": f"2.{number // 2}"},
            }
            forge(root, part, column, provenance=made_by)
    made = info_of(root).made_by
    assert made is not None
    assert (made.first, made.last) == (1000.0, 1003.0)
    assert made.processes == {"host0/7": 2, "host1/7": 2}
    assert made.versions == {"torch": ("2.0", "2.1")}
    assert "2 processes on host0, host1" in info_of(root).describe()


def test_one_screen_says_what_it_is(pristine: Path) -> None:
    info = info_of(pristine)
    said = info.describe()
    assert len(said.splitlines()) < 40
    for words in (
        "4 x 64 x 64, dense frames at stride 4",
        "cls_attention of vit",
        "attention at ratio 0.5 and above, 1 draw",
        "2 shards in 2 views, 10 samples: 20 rows, 18 good, 2 decode_error",
        "complete  yes",
    ):
        assert words in said
    values = json.loads(json.dumps(info.to_json()))
    assert values["stored_bytes"] == info.stored_bytes
    assert values["complete"] is True


def test_damage_is_pointed_at_and_the_rest_is_told(root: Path) -> None:
    (root / commit_file(A0, None)).write_bytes(b"x")
    (root / f"columns/{COLUMNS[0]}/column.json").write_bytes(b"x")
    info = info_of(root)
    assert len(info.damaged) == 2
    assert info.num_parts == 3
    assert "kdhiera cache verify" in info.describe().splitlines()[-1]


def test_columns_are_ordered_by_layer_number() -> None:
    names = ["a.10.int8", "a.9.int8", "a.norm.int8", "a.9.fp16", "b.1.int8"]
    assert sorted(names, key=natural_order) == [
        "a.9.fp16",
        "a.9.int8",
        "a.10.int8",
        "a.norm.int8",
        "b.1.int8",
    ]


def test_an_empty_cache_has_nothing(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", ())
    info = info_of(tmp_path / "cache")
    assert (info.stored_bytes, info.num_shards, info.made_by) == (0, 0, None)
    assert "columns   none" in info.describe()


# ls


def test_caches_in_any_state_are_listed(pristine: Path, tmp_path: Path) -> None:
    for name in ("whole", "deep/er/cut", "broken", "lost", "newer", "records", ".hidden"):
        shutil.copytree(pristine, tmp_path / name)
    (tmp_path / "deep/er/cut" / commit_file(A1, COLUMNS[0])).unlink()
    (tmp_path / "broken/cache.json").write_bytes(b"x")
    (tmp_path / "lost/cache.json").unlink()
    (tmp_path / "records" / commit_file(A0, None)).write_bytes(b"x")
    body = unseal((tmp_path / "newer/cache.json").read_bytes(), "")
    body["identity"]["format"] = 99
    (tmp_path / "newer/cache.json").write_bytes(seal(body))
    make_cache(tmp_path / "empty", ())
    (tmp_path / "other").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)
    listing = list_caches(str(tmp_path))
    states = {Path(c.cache).relative_to(tmp_path).as_posix(): c.state for c in listing.caches}
    assert states == {
        "broken": "damaged",
        "deep/er/cut": "incomplete",
        "empty": "empty",
        "lost": "damaged",
        "newer": "other format",
        "records": "damaged",
        "whole": "complete",
    }
    whole = next(c for c in listing.caches if c.state == "complete")
    assert whole.stored_bytes == info_of(pristine).stored_bytes
    assert (whole.shards, whole.views, whole.columns) == (2, 2, COLUMNS)
    assert whole.clips == "4 x 64 x 64"
    said = listing.describe()
    assert all(name in said for name in states)
    assert json.loads(json.dumps(listing.to_json()))["caches"]


def test_a_link_is_followed_once(pristine: Path, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(pristine)
    (tmp_path / "b").symlink_to(pristine)
    (only,) = list_caches(str(tmp_path)).caches
    assert only.cache == str(tmp_path / "a")
    (itself,) = list_caches(str(pristine)).caches
    assert itself.cache == str(pristine)


def test_a_folder_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no folder"):
        list_caches(str(tmp_path / "nowhere"))
    assert "no cache in" in list_caches(str(tmp_path)).describe()


def test_caches_in_a_bucket_are_listed_and_described(s3_url: str, pristine: Path) -> None:
    cache = make_cache(f"{s3_url}/below/cache")
    write_part(cache, A0)
    (only,) = list_caches(s3_url).caches
    assert (only.cache, only.state, only.shards) == (f"{s3_url}/below/cache", "complete", 1)
    info = describe_cache(cache)
    assert info.statuses == {"ok": 5}
    assert only.stored_bytes == info.stored_bytes > 0
    assert list_caches(f"{s3_url}/other").caches == ()


# drop


def test_drop_says_what_gc_will_free(root: Path) -> None:
    cache = Cache.open(root)
    before = info_of(root)
    planned = drop_column(cache, COLUMNS[0], dry_run=True)
    assert info_of(root) == before
    dropped = drop_column(cache, COLUMNS[0])
    assert (dropped.commits, dropped.num_bytes) == (planned.commits, planned.num_bytes)
    assert dropped.num_bytes == info_of(root).unnamed_bytes
    assert (planned.done, dropped.done) == (False, True)
    assert "cache gc" in dropped.describe()
    assert not list((root / "columns" / COLUMNS[0]).iterdir())


def test_an_unknown_column_is_answered_with_the_nearest(root: Path) -> None:
    cache = Cache.open(root)
    with pytest.raises(UsageError, match=r"did you mean image\.1\.int8"):
        drop_column(cache, "image.1.int4")
    with pytest.raises(UsageError, match=r"it has: image\.1\.int8, video\.2\.int8"):
        drop_column(cache, "zzz")


def test_an_interrupted_drop_is_finished_by_the_same_call(root: Path) -> None:
    (root / f"columns/{COLUMNS[0]}/column.json").unlink()
    (root / commit_file(A0, COLUMNS[0])).unlink()
    cache = Cache.open(root)
    assert drop_column(cache, COLUMNS[0]).commits == 3
    assert all(COLUMNS[0] not in commits.columns for commits in cache.commits().values())
    with pytest.raises(UsageError):
        drop_column(cache, COLUMNS[0])


def test_a_column_committed_while_it_is_dropped_does_not_stay(root: Path) -> None:
    """Its writer looks for the column after publishing, `drop` lists records after removing it."""
    cache = Cache.open(root)
    base = cache.commits()[A0].base
    (root / commit_file(A0, COLUMNS[0])).unlink()
    attempt = begin(cache, A0, COLUMNS[:1], base=base)
    fill(attempt, content(A0, bad=BAD["a-0"]), COLUMNS[:1], rows=False)
    cache.columns.fingerprint(COLUMNS[0])
    drop_column(Cache.open(root), COLUMNS[0])
    with pytest.raises(KdhieraError, match="removed from the cache while"):
        attempt.commit()
    assert not (root / commit_file(A0, COLUMNS[0])).exists()


def test_a_writer_never_fills_a_column_that_was_made_anew(root: Path) -> None:
    """It began when the column was of the weights that it computes with."""
    (root / commit_file(A0, COLUMNS[0])).unlink()
    old = make_cache(root)  # has compared the column with what it writes
    base = old.commits()[A0].base
    drop_column(Cache.open(root), COLUMNS[0])
    with pytest.raises(KdhieraError, match=r"column image\.1\.int8 was removed"):
        begin(Cache.open(root), A0, COLUMNS[:1], base=base)
    add_column(Cache.open(root), COLUMNS[0], weights="33")
    for _ in range(2):  # a second try is no better
        with pytest.raises(KdhieraError, match="removed from the cache while"):
            write_part(old, A0, content(A0, bad=BAD["a-0"]), COLUMNS[:1], base=base)
        assert not (root / commit_file(A0, COLUMNS[0])).exists()
