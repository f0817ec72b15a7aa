"""Every injected damage is listed by verify, it alone, and repair lets extraction mend it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_cache
from forging import forge
from tiny_cache import add_column
from verified_cache import (
    A0,
    A0_BASE,
    B0,
    B1,
    COLUMNS,
    COMPACT,
    DAMAGES,
    INT8,
    PARTS,
    assert_complete,
    assert_heals,
    basis_key,
    check,
    expected_drops,
    extract,
    named_files,
    only,
    widths,
)

from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import commit_file
from kdhiera.cache.records import seal, unseal
from kdhiera.cache.repair import repair, repair_at
from kdhiera.cache.verify import verify_at
from kdhiera.errors import DamagedError, MismatchError, UsageError
from kdhiera.stores import LocalStore


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with widths():
        yield Path(extract(tmp_path_factory.mktemp("pristine") / "cache").url)


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "cache"))


# files


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
