"""Files whose checksums fit and whose contents contradict their record, or one another."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from forging import attempt_of, forge
from tiny_cache import SOURCE, begin, content, fill, write_part
from verified_cache import (
    A0,
    A0_BASE,
    A1,
    COLUMNS,
    COMPACT,
    DAMAGES,
    INT8,
    assert_heals,
    check,
    expected_drops,
    extract,
    of,
    only,
    widths,
)

from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import PartId, commit_file
from kdhiera.cache.records import seal, unseal
from kdhiera.cache.repair import repair


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with widths():
        yield Path(extract(tmp_path_factory.mktemp("pristine") / "cache").url)


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "cache"))


# contents that contradict their record, with checksums that fit


def change_rows(root: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    path = attempt_of(root, A0) / "rows.parquet"
    pq.write_table(change(pq.read_table(path)), path)


def set_column(name: str, values: Sequence[object]) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        index = table.column_names.index(name)
        return table.set_column(index, table.schema.field(name), pa.array(values, table[name].type))

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.slice(0, 4), "holds 4 rows and its record says 5"),
        (
            set_column("status", ["ok", "ok", "too_short", "ok", "ok"]),
            "holds rows 4 ok, 1 too_short and its record says 1 decode_error, 4 ok",
        ),
        (set_column("array_row", [0, 1, None, 3, 2]), "does not number its good rows"),
        (set_column("array_row", [0, 1, 2, 3, 4]), "does not number its good rows"),
        (set_column("key", ["clip000", "x", "clip002", "clip003", "clip004"]), "other samples"),
        (set_column("kept_crc32c", [1, 2, None, 3, 4]), "other kept units or pixels"),
        (lambda t: t.drop_columns(["uid"]), "is no table of rows"),
    ],
)
def test_rows_that_contradict_their_record(root: Path, change: Any, words: str) -> None:
    change_rows(root, change)
    forge(root, A0, None)
    found = check(root)
    assert any(words in problem.what for problem in found.problems), found.describe()
    for problem in found.problems:
        assert problem.where.endswith("rows.parquet")
        assert set(problem.drops) == expected_drops({None})
    assert_heals(root, found)


def test_counts_of_a_record_that_contradict_its_rows(root: Path) -> None:
    forge(root, A0, None, num_rows=6, statuses={"ok": 5, "decode_error": 1}, array_rows=5)
    found = check(root)
    assert {Path(p.where).name for p in found.problems if None in owners_of(p)} == {
        "rows.parquet",
        "zarr.json",
    }
    assert_heals(root, found)


def owners_of(problem: Any) -> set[str | None]:
    return {None} if A0_BASE in problem.drops else {"column"}


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    body = json.loads(path.read_bytes())
    change(body)
    path.write_text(json.dumps(body))


@pytest.mark.parametrize(
    ("column", "name", "change", "words"),
    [
        (
            None,
            "base.zarr/zarr.json",
            lambda body: body["attributes"].update(fingerprint="0"),
            "is of another cache, part or column (its fingerprint)",
        ),
        (
            None,
            "base.zarr/zarr.json",
            lambda body: body["attributes"]["part"].update(view=1),
            "is of another cache, part or column (its part)",
        ),
        (
            INT8,
            "targets.zarr/image/1.int8/zarr.json",
            lambda body: body["attributes"].update(fingerprint="0"),
            "is of another cache, part or column (its fingerprint)",
        ),
        (
            None,
            "base.zarr/pixels/zarr.json",
            lambda body: body.update(shape=[3, *body["shape"][1:]]),
            "describes 3 x 4 x 2 x 32 x 32 x 3 of uint8 and the record 4 x 4 x 2",
        ),
        (
            INT8,
            "targets.zarr/image/1.int8/codes/zarr.json",
            lambda body: body.update(data_type="uint8"),
            "describes 4 x 4 x 4 x 8 of uint8 and the record 4 x 4 x 4 x 8 of int8",
        ),
        (
            COMPACT,
            "targets.zarr/video/2.compact/codes/zarr.json",
            lambda body: body.update(shape=[4, 5, 4, 6]),
            "describes 4 x 5 x 4 x 6",
        ),
        (INT8, "targets.zarr/image/1.int8/scale/zarr.json", dict.clear, "no Zarr array"),
    ],
)
def test_metadata_that_contradicts_its_record(
    root: Path, column: str | None, name: str, change: Any, words: str
) -> None:
    edit_json(attempt_of(root, A0) / name, change)
    forge(root, A0, column)
    problem = only(check(root))
    assert words in problem.what
    assert problem.where.endswith(name)
    assert set(problem.drops) == expected_drops({column})
    assert_heals(root, check(root))


def test_a_chunk_that_its_record_does_not_name(root: Path) -> None:
    path = root / commit_file(A0, INT8)
    body = unseal(path.read_bytes(), "")
    del body["files"]["targets.zarr/image/1.int8/codes/c.0.0.0.0"]
    path.write_bytes(seal(body))
    problem = only(check(root))
    assert "lacks targets.zarr/image/1.int8/codes/c.0.0.0.0" in problem.what
    assert_heals(root, check(root))


def test_statuses_that_contradict_their_record(root: Path) -> None:
    forge(root, A0, INT8, statuses={"ok": 3, "overflow": 1})
    found = check(root)
    assert "holds 4 ok and its record says 3 ok, 1 overflow" in only(found).what
    assert_heals(root, found)
    group = zarr.open_group(attempt_of(root, A0) / "targets.zarr", mode="r+")
    status = group["video/2.compact/status"]
    assert isinstance(status, zarr.Array)
    status[1] = 9
    forge(root, A0, COMPACT)
    assert "holds 3 ok, 1 status 9 and its record says 4 ok" in only(check(root)).what
    assert_heals(root, check(root))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.update({f"{INT8}.mean": np.full(8, np.nan)}), "are not finite"),
        (lambda f: f.update({f"{INT8}.m2": np.full(8, -1.0)}), "negative sum of squares"),
        (
            lambda f: f.update({f"{INT8}.{name}": np.zeros(7) for name in ("mean", "m2")}),
            "have (7,) channels",
        ),
        (lambda f: f.update({f"{INT8}.count": np.array(100)}), "count 100 tokens"),
        (lambda f: f.update({f"{INT8}.count": np.array(5 * 32)}), "count 160 tokens"),
        (lambda f: f.update({f"{INT8}.count": np.array(3 * 32)}), "count 96 tokens"),
        (lambda f: f.pop(f"{INT8}.m2"), "does not hold the statistics"),
    ],
)
def test_statistics_that_cannot_be_true(root: Path, change: Any, words: str) -> None:
    path = attempt_of(root, A0) / "stats.npz"
    with np.load(path) as arrays:
        values = dict(arrays)
    change(values)
    np.savez(path, allow_pickle=False, **values)
    forge(root, A0, INT8)
    forge(root, A0, COMPACT)
    problem = only(check(root))
    assert words in problem.what
    assert problem.where.endswith("stats.npz")
    assert problem.drops == (commit_file(A0, INT8),)
    assert_heals(root, check(root))


def test_rows_lost_to_an_encoding_are_sound(root: Path) -> None:
    cache = Cache.open(root)
    what = of(A0)
    features = {k: v.copy() for k, v in what.features.items()}
    for column in COLUMNS:
        (root / commit_file(A0, column)).unlink()
        features[column][:, 0] = 1.0  # a unit that is kept
    features[INT8][0] = np.inf
    features[COMPACT][1] = 1e30
    base = cache.commits()[A0].base
    write_part(cache, A0, replace(what, features=features), COLUMNS, base=base)
    counts = {c: Cache.open(root).commits()[A0].columns[c].statuses for c in COLUMNS}
    assert counts[INT8] == {"ok": 3, "nonfinite": 1}
    assert check(root).problems == ()


# between parts


def test_views_of_other_bytes_or_samples_disagree(root: Path) -> None:
    body = unseal((root / commit_file(A1, None)).read_bytes(), "")
    forge(root, A1, None, source={**body["source"], "sha256": "cd" * 32})
    problem = only(check(root))
    assert "a-0 view 1: was made of other bytes than a-0 view 0" in problem.what
    assert set(problem.drops) == {commit_file(A1, c) for c in (None, *COLUMNS)}
    assert_heals(root, check(root))

    cache = Cache.open(root)
    for column in (*COLUMNS, None):
        (root / commit_file(A1, column)).unlink()
    shutil.rmtree(root / "parts/a-0/1")
    write_part(cache, A1, content(A1, 4), COLUMNS)  # one sample fewer
    problem = only(check(root))
    assert "a-0 view 1: holds other samples than a-0 view 0" in problem.what
    assert_heals(root, check(root))


def test_the_odd_one_of_three_views_is_dropped(root: Path) -> None:
    body = unseal((root / A0_BASE).read_bytes(), "")
    third = PartId(shard_id="a-0", view=2)
    write_part(Cache.open(root), third, content(third, bad=(2,)), COLUMNS)
    forge(root, A0, None, source={**body["source"], "sha256": "cd" * 32})
    assert set(only(check(root)).drops) == expected_drops({None})


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_lost_record_of_a_shard_is_written_again(root: Path, damage: str) -> None:
    path = root / "shards/b-0"
    DAMAGES[damage](path)
    found = check(root)
    assert only(found).where == "shards/b-0"
    mended = repair(Cache.open(root), found)
    assert (mended.removed, mended.restored) == ((), ("shards/b-0",))
    assert check(root).problems == ()
    body = unseal(path.read_bytes(), "")
    assert body["path"] == str(Path(SOURCE.path).absolute())


def test_a_damaged_record_of_a_shard_that_was_never_reached_is_dropped(root: Path) -> None:
    (root / "shards/c-0").write_bytes(seal({"other": 1}))
    assert only(check(root)).drops == ("shards/c-0",)
    assert_heals(root, check(root))
    shutil.copy(root / "shards/a-0", root / "shards/c-0")
    assert "is not the record of that shard" in only(check(root)).what
    assert_heals(root, check(root))


def test_garbage_is_no_damage(root: Path) -> None:
    attempt = begin(Cache.open(root), PartId(shard_id="c-0", view=0), COLUMNS)
    fill(attempt, content(attempt.part), COLUMNS)  # begun and never ended
    (root / "parts/a-0/0/nothing").mkdir()
    (root / "commits/a-0/0/.base.json.123.tmp").write_bytes(b"half")
    (root / "commits/notes.txt").write_bytes(b"mine")
    shutil.copytree(root / "commits/a-0/0", root / "commits/a-0/00")
    assert check(root).problems == ()
