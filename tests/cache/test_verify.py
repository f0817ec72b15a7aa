"""Every injected damage is listed by verify, it alone, and repair lets extraction mend it."""

import errno
import itertools
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_cache
import torch
import zarr
from forging import attempt_of, forge
from tiny_cache import SOURCE, add_column, assert_holds, begin, content, fill, write_part

from kdhiera.cache.commit import Cache
from kdhiera.cache.drop import drop_column
from kdhiera.cache.encoding import basis_to_npz, calibrate
from kdhiera.cache.layout import PartId, commit_file
from kdhiera.cache.problems import Verified
from kdhiera.cache.reader import CacheReader
from kdhiera.cache.records import seal, unseal
from kdhiera.cache.repair import repair, repair_at
from kdhiera.cache.verify import verify, verify_at
from kdhiera.errors import DamagedError, MismatchError, UsageError
from kdhiera.progress import PlainProgress
from kdhiera.stores import LocalStore

INT8, COMPACT = "image.1.int8", "video.2.compact"
COLUMNS = (INT8, COMPACT)
PARTS = tuple(PartId(shard_id=shard, view=view) for shard in ("a-0", "b-0") for view in (0, 1))
WHAT = {"a-0": {"bad": (2,)}, "b-0": {}}
A0, A1, B0, B1 = PARTS
A0_BASE = commit_file(A0, None)


def of(part: PartId) -> tiny_cache.Content:
    return content(part, **WHAT[part.shard_id])


def extract(url: str | Path) -> Cache:
    """What extraction does: identities, bases of columns, then whatever parts lack."""
    cache = tiny_cache.make_cache(url, COLUMNS)
    if not cache.columns.has_basis(COMPACT):
        tokens = of(B0).tokens[COMPACT].reshape(-1, 8, 4, 6)
        basis = calibrate("compact", torch.from_numpy(tokens), error=0.01)
        cache.columns.publish_basis(COMPACT, basis_to_npz(basis))
    for part in PARTS:
        missing = cache.missing(part, COLUMNS)
        found = cache.part_commits(part)
        if missing:
            base = found.base if found else None
            write_part(cache, part, of(part), missing.columns, base=base)
    return cache


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two shards in two views; a plain column and one with a basis."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_cache.WIDTHS, COMPACT, 6)
        root = tmp_path_factory.mktemp("pristine") / "cache"
        extract(root)
        yield root


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "cache"))


def basis_key(root: Path) -> str:
    (found,) = (root / "columns" / COMPACT).glob("basis-*.npz")
    return found.relative_to(root).as_posix()


def check(root: Path | str) -> Verified:
    return verify(Cache.open(root))


def assert_heals(root: Path, found: Verified) -> None:
    """Repair leaves nothing wrong, and extraction brings back the same content."""
    mended = repair_at(found)
    assert mended.left == ()
    again = check(root) if (root / "cache.json").exists() else None
    assert again is None or not [p for p in again.problems if p.mendable]
    assert_complete(extract(root))


def assert_complete(cache: Cache) -> None:
    assert verify(cache).problems == ()
    reader = CacheReader(Cache.open(cache.url), num_views=2, columns=COLUMNS)
    assert_holds(reader, {part: of(part) for part in PARTS}, (INT8,))
    for column in COLUMNS:
        assert reader.statistics(column).count == 18 * 32  # one sample is bad in both views


def only(found: Verified) -> Any:
    assert len(found.problems) == 1, [p.what for p in found.problems]
    return found.problems[0]


# files


def named_files(root: Path) -> dict[str, set[str | None]]:
    """Files of part a-0 view 0 with the columns (None: the base) whose records name them."""
    owners: dict[str, set[str | None]] = {}
    for column in (None, *COLUMNS):
        body = unseal((root / commit_file(A0, column)).read_bytes(), "")
        for name in body["files"]:
            key = f"parts/a-0/0/{body['attempt']}/{name}"
            owners.setdefault(key, set()).add(column)
    return owners


def expected_drops(owners: set[str | None]) -> set[str]:
    columns = COLUMNS if None in owners else owners - {None}
    return {commit_file(A0, c) for c in columns} | ({A0_BASE} if None in owners else set())


DAMAGES: dict[str, Callable[[Path], object]] = {
    "remove": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "lengthen": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "flip": lambda path: path.write_bytes(flipped(path.read_bytes())),
}


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def test_a_sound_cache_is_sound(pristine: Path) -> None:
    found = check(pristine)
    assert found.problems == ()
    assert (found.parts, found.commits) == (4, 12)
    on_disk = [p for p in (pristine / "parts").rglob("*") if p.is_file()]
    named = [p for p in on_disk if p.name != "attempt.json"]
    assert found.files == len(named)
    assert found.num_bytes == sum(p.stat().st_size for p in named)
    assert "sound" in found.describe()
    assert json.loads(json.dumps(found.to_json()))["sound"] is True


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damaged_file_of_a_part_is_named_alone(root: Path, damage: str) -> None:
    files = named_files(root)
    assert len(files) == 24
    for part in PARTS[1:]:  # they need not be read each time
        shutil.rmtree((root / commit_file(part, None)).parent)
    for key, owners in files.items():
        path = root / key
        sound = path.read_bytes()
        DAMAGES[damage](path)
        problem = only(check(root))
        assert problem.where == key
        assert key in problem.what
        assert "part a-0 view 0" in problem.what
        assert set(problem.drops) == expected_drops(owners)
        path.write_bytes(sound)
    assert check(root).problems == ()


@pytest.mark.parametrize("owner", [None, *COLUMNS])
def test_a_damaged_file_is_mended_by_what_needs_it(root: Path, owner: str | None) -> None:
    files = named_files(root)
    key = next(k for k, owners in files.items() if owners == {owner} and "c." in k)
    (root / key).unlink()
    found = check(root)
    before = {p: p.stat().st_mtime_ns for p in (root / "commits").rglob("*.json")}
    mended = repair(Cache.open(root), found)
    assert set(mended.removed) == expected_drops({owner})
    gone = {root / key for key in mended.removed}
    after = {p: p.stat().st_mtime_ns for p in (root / "commits").rglob("*.json")}
    assert after == {p: t for p, t in before.items() if p not in gone}
    assert_complete(extract(root))


def test_all_damage_is_listed_at_once_and_mended_at_once(root: Path) -> None:
    for key in named_files(root):
        (root / key).unlink()
    (root / commit_file(B0, INT8)).write_bytes(b"")
    (root / commit_file(B1, None)).write_bytes(b"{}")
    (root / "columns" / INT8 / "column.json").write_bytes(b"x")
    (root / "shards" / "b-0").unlink()
    found = check(root)
    assert len(found.problems) == 9 + 4
    assert (
        f"{len(named_files(root)) - 8} more of its files are missing or wrong" in found.describe()
    )
    assert_heals(root, found)


def test_a_cache_that_lost_everything_is_still_told_on_a_screen(root: Path) -> None:
    shutil.rmtree(root / "parts")
    found = check(root)
    assert len(found.problems) == 4 * 9
    text = found.describe()
    assert "16 more (--json lists them)" in text
    assert len(text.splitlines()) < 30
    assert_heals(root, found)


# records


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("column", [None, *COLUMNS])
def test_a_damaged_record_is_named_alone(root: Path, column: str | None, damage: str) -> None:
    key = commit_file(A0, column)
    DAMAGES[damage](root / key)
    found = check(root)
    if damage == "remove" and column is not None:
        assert found.problems == ()  # a part without a commit is one that is not there yet
    else:
        assert only(found).where == key
        if damage != "remove":
            assert set(only(found).drops) == expected_drops({column})
    assert_heals(root, found)


def test_a_record_in_the_place_of_another_is_dropped_alone(root: Path) -> None:
    shutil.copy(root / commit_file(B0, INT8), root / commit_file(A0, INT8))
    problem = only(check(root))
    assert problem.drops == (commit_file(A0, INT8),)
    assert "is the record of b-0 view 0" in problem.what
    assert_heals(root, check(root))


def test_columns_of_another_base_record_are_dropped(root: Path) -> None:
    body = unseal((root / A0_BASE).read_bytes(), "")
    (root / A0_BASE).write_bytes(seal({**body, "attempt": body["attempt"], "note": 1}))
    problem = only(check(root))
    assert all(column in problem.what for column in COLUMNS)
    assert set(problem.drops) == {commit_file(A0, column) for column in COLUMNS}
    assert_heals(root, check(root))


def test_a_sealed_file_that_is_no_commit_is_dropped(root: Path) -> None:
    (root / commit_file(A0, INT8)).write_bytes(seal({"kind": "column"}))
    assert "no record of a commit" in only(check(root)).what
    assert_heals(root, check(root))


# identities


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_json_is_set_aside_and_written_anew(root: Path, damage: str) -> None:
    path = root / "cache.json"
    identity = unseal(path.read_bytes(), "")["identity"]
    DAMAGES[damage](path)
    found = verify_at(root)
    assert only(found).where == "cache.json"
    assert "extract-teachers CONFIG" in only(found).what
    assert ("--repair" in only(found).what) == (damage != "remove")
    mended = repair_at(found)
    if damage == "remove":
        assert (mended.removed, len(mended.left)) == ((), 1)
    else:
        assert (mended.removed, mended.left) == (("cache.json",), ())
        assert (root / "cache.json.damaged").exists()
    assert len(verify_at(root).left) == 1  # until extraction has written it
    before = sorted(root.rglob("*.npz"))
    assert_complete(extract(root))
    assert sorted(root.rglob("*.npz")) == before  # nothing was computed twice
    assert unseal(path.read_bytes(), "")["identity"] == identity


def test_a_lost_cache_json_comes_back_although_a_record_is_damaged(root: Path) -> None:
    (root / "cache.json").unlink()
    (root / A0_BASE).write_bytes(b"")
    tiny_cache.make_cache(root)
    assert_heals(root, check(root))


def test_an_empty_cache_that_lost_its_identity_is_made_anew(root: Path) -> None:
    shutil.rmtree(root / "commits")
    (root / "cache.json").write_bytes(b"")
    repair_at(verify_at(root))
    assert_complete(extract(root))


def test_a_cache_json_of_another_cache_is_to_blame_not_the_parts(root: Path) -> None:
    path = root / "cache.json"
    body = unseal(path.read_bytes(), "")
    body["identity"]["views"]["seed"] = 7
    other = Cache(LocalStore(root), body["identity"])
    path.write_bytes(seal({**body, "fingerprint": other.fingerprint}))
    problem = only(check(root))
    assert problem.where == "cache.json"
    assert "is of another cache" in problem.what
    assert not problem.mendable  # nothing sound is removed because of it
    assert len(repair(Cache.open(root), check(root)).left) == 1
    path.unlink()
    assert_complete(extract(root))


def test_a_base_under_another_identity_is_dropped(root: Path) -> None:
    forge(root, A0, None, fingerprint="00" * 32)
    problem = only(check(root))
    assert set(problem.drops) == expected_drops({None})
    assert "another identity" in problem.what
    assert_heals(root, check(root))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_column_json_takes_no_part_along(root: Path, damage: str) -> None:
    path = root / "columns" / INT8 / "column.json"
    DAMAGES[damage](path)
    found = check(root)
    problem = only(found)
    assert problem.where == f"columns/{INT8}/column.json"
    assert problem.drops == (() if damage == "remove" else (problem.where,))
    repair_at(found)
    before = sorted((root / "parts").rglob("*"))
    assert_complete(extract(root))
    assert sorted((root / "parts").rglob("*")) == before


def test_a_column_json_of_another_column_is_noticed(root: Path) -> None:
    folder = root / "columns"
    shutil.copy(folder / COMPACT / "column.json", folder / INT8 / "column.json")
    assert only(check(root)).drops == (f"columns/{INT8}/column.json",)
    assert_heals(root, check(root))


def test_a_column_json_of_other_weights_is_to_blame_not_the_parts(root: Path) -> None:
    path = root / "columns" / INT8 / "column.json"
    sound = path.read_bytes()
    path.unlink()
    add_column(Cache.open(root), INT8, weights="33")
    problem = only(check(root))
    assert not problem.mendable
    assert "cache drop" in problem.what
    path.write_bytes(sound)
    assert check(root).problems == ()


def test_a_part_of_other_weights_is_dropped(root: Path) -> None:
    forge(root, A0, INT8, fingerprint="00" * 32)
    assert only(check(root)).drops == (commit_file(A0, INT8),)
    assert_heals(root, check(root))


# bases of columns


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_basis_takes_its_column_along_and_no_other(root: Path, damage: str) -> None:
    key = basis_key(root)
    DAMAGES[damage](root / key)
    problem = only(check(root))
    assert problem.where == key
    parts = {commit_file(part, COMPACT) for part in PARTS}
    assert set(problem.drops) == parts | (set() if damage == "remove" else {key})
    assert_heals(root, check(root))


def test_a_part_of_another_basis_is_dropped_and_the_basis_stays(root: Path) -> None:
    forge(root, A0, COMPACT, basis_sha256="00" * 32)
    assert only(check(root)).drops == (commit_file(A0, COMPACT),)
    assert_heals(root, check(root))


def test_a_basis_that_no_part_uses_yet_must_be_readable(root: Path) -> None:
    for part in PARTS:
        (root / commit_file(part, COMPACT)).unlink()
    assert check(root).problems == ()
    (root / basis_key(root)).write_bytes(b"PK")
    assert only(check(root)).drops == (basis_key(root),)
    assert_heals(root, check(root))


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


# while others are at work, and interrupted


class Meddled(LocalStore):
    """A folder in which something happens when a file is first read or checked."""

    def __init__(self, root: Path, key: str, then: Callable[[], object]) -> None:
        super().__init__(root)
        self._key, self._then = key, then
        self._lock = threading.Lock()

    def _meddle(self, key: str) -> None:
        with self._lock:
            if key.endswith(self._key):
                self._key = "\0"
                self._then()

    def read(self, key: str) -> bytes:
        self._meddle(key)
        return super().read(key)

    def checksum(self, key: str) -> tuple[int, int]:
        self._meddle(key)
        return super().checksum(key)


def files_that_verify_reads(root: Path) -> list[str]:
    keys = [*named_files(root), *(commit_file(A0, c) for c in (None, *COLUMNS)), "shards/a-0"]
    return [*keys, *(f"columns/{c}/column.json" for c in COLUMNS), basis_key(root)]


def test_a_column_that_is_dropped_and_freed_meanwhile_is_no_damage(pristine: Path, tmp_path: Path):
    def drop_and_free() -> None:
        drop_column(Cache.open(root), INT8)
        shutil.rmtree(attempt_of(root, A0) / "targets.zarr/image")

    for number, key in enumerate(files_that_verify_reads(pristine)[::2]):
        root = Path(shutil.copytree(pristine, tmp_path / str(number)))
        cache = Cache(Meddled(root, key, drop_and_free), Cache.open(root).identity)
        found = verify(cache)
        assert not (root / commit_file(A0, INT8)).exists(), key  # it did happen
        assert found.problems == (), (key, found.describe())
        shutil.rmtree(root)


def test_a_part_that_is_made_anew_meanwhile_is_no_damage(pristine: Path, tmp_path: Path) -> None:
    def make_anew() -> None:
        folder = attempt_of(root, A0)
        for column in (*COLUMNS, None):
            (root / commit_file(A0, column)).unlink()
        shutil.rmtree(folder)
        extract(root)

    for number, key in enumerate(files_that_verify_reads(pristine)[1::4]):
        root = Path(shutil.copytree(pristine, tmp_path / str(number)))
        before = (root / A0_BASE).read_bytes()
        cache = Cache(Meddled(root, key, make_anew), Cache.open(root).identity)
        found = verify(cache)
        assert (root / A0_BASE).read_bytes() != before, key
        assert found.problems == (), (key, found.describe())


def test_repair_leaves_what_was_mended_meanwhile(root: Path) -> None:
    key = next(k for k, owners in named_files(root).items() if owners == {None} and "c." in k)
    (root / key).unlink()
    found = check(root)
    repair(Cache.open(root), found)
    extract(root)
    commits = {p: p.read_bytes() for p in (root / "commits").rglob("*.json")}
    again = repair(Cache.open(root), found)  # by someone who looked earlier
    assert (again.removed, again.left) == ((), ())
    assert {p: p.read_bytes() for p in (root / "commits").rglob("*.json")} == commits


class Failing(LocalStore):
    """A folder in which some files cannot be read."""

    def __init__(self, root: Path, number: int) -> None:
        super().__init__(root)
        self._number = number

    def checksum(self, key: str) -> tuple[int, int]:
        if "pixels/c." in key and "a-0/0" in key:
            raise OSError(self._number, "no")
        return super().checksum(key)


def test_a_file_that_its_disk_cannot_give_back_is_damaged(root: Path) -> None:
    identity = Cache.open(root).identity
    problem = only(verify(Cache(Failing(root, errno.EIO), identity)))
    assert "cannot be read (Input/output error)" in problem.what
    assert set(problem.drops) == expected_drops({None})
    with pytest.raises(OSError, match="no"):  # not allowed to read is not damaged
        verify(Cache(Failing(root, errno.EACCES), identity))


class Dying(LocalStore):
    """A folder whose writer dies at one of its changes."""

    def __init__(self, root: Path, after: int) -> None:
        super().__init__(root)
        self._left = after

    def _change(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt

    def delete(self, keys: Any) -> None:
        for key in keys:
            self._change()
            super().delete([key])

    def write(self, key: str, data: bytes) -> None:
        self._change()
        super().write(key, data)


def test_an_interrupted_repair_leaves_nothing_worse(pristine: Path, tmp_path: Path) -> None:
    for after in itertools.count():
        root = Path(shutil.copytree(pristine, tmp_path / f"{after}"))
        for key in list(named_files(root))[:5]:
            (root / key).unlink()
        (root / basis_key(root)).write_bytes(b"")
        (root / "shards/a-0").unlink()
        found = check(root)
        try:
            repair(Cache(Dying(root, after), Cache.open(root).identity), found)
        except KeyboardInterrupt:
            left = {p.where for p in check(root).problems}
            assert left <= {p.where for p in found.problems}
        else:
            break
        repair(Cache.open(root), check(root))
        if after % 3 == 0:
            assert_complete(extract(root))
    assert after > 6


def test_progress_counts_parts(pristine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import io

    lines = io.StringIO()
    verify(Cache.open(pristine), progress=PlainProgress(lines))
    first, *_, last = lines.getvalue().splitlines()
    assert first.startswith("verify: 0/4 parts")
    assert last.startswith("verify: 4/4 parts (100 %)")
    assert "read " in last


# caches that do not open


def test_another_format_is_refused_with_what_to_do(root: Path) -> None:
    path = root / "cache.json"
    body = unseal(path.read_bytes(), "")
    for number, words in ((2, "use a newer kdhiera"), (0, "use the kdhiera that made it")):
        body["identity"]["format"] = number
        path.write_bytes(seal(body))
        with pytest.raises(MismatchError, match=words):
            verify_at(root)


def test_what_stops_verify_is_never_taken_for_a_damaged_identity(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Cache) -> None:
        raise DamagedError("something else")

    monkeypatch.setattr(Cache, "records", refuse)
    with pytest.raises(DamagedError, match="something else"):
        verify_at(root)


def test_a_folder_without_a_cache_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no cache in"):
        verify_at(tmp_path)


# in a bucket


@pytest.mark.slow
def test_a_cache_in_a_bucket_is_verified_and_mended(s3_url: str, pristine: Path) -> None:
    cache = extract(f"{s3_url}/cache")
    assert verify(cache).problems == ()
    store = cache.store
    keys = [entry.key for entry in store.walk("parts/a-0/0")]
    pixels = next(key for key in keys if "pixels/c." in key)
    scale = next(key for key in keys if "scale/c." in key)
    store.write(pixels, flipped(store.read(pixels)))
    store.delete([scale])
    store.write("shards/b-0", b"")
    found = verify(cache)
    assert [p.where for p in found.problems] == ["shards/b-0", pixels, scale]
    repair(cache, found)
    assert_complete(extract(f"{s3_url}/cache"))
    store.write("cache.json", b"{}")
    found = verify_at(f"{s3_url}/cache")
    assert only(found).where == "cache.json"
    repair_at(found)
    assert_complete(extract(f"{s3_url}/cache"))


def test_dropped_columns_are_gone_and_can_be_made_anew(root: Path) -> None:
    assert drop_column(Cache.open(root), INT8).commits == 4
    opened = Cache.open(root)
    assert all(set(c.columns) == {COMPACT} for c in opened.commits().values())
    assert_complete(extract(root))
