"""Every file of a cache, damaged in every way: an error, or the right values, never others.

Reading is all that training and replays do with a cache; what it gave before the damage is
what it must give, and that is held against what was written first of all.
"""

import contextlib
import itertools
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from tiny_cache import (
    assert_holds,
    begin,
    content,
    fill,
    folder_of,
    make_cache,
    write_part,
)

from kdhiera.cache import layout
from kdhiera.cache.arrays import open_array
from kdhiera.cache.commit import Cache
from kdhiera.cache.encoding import basis_from_npz
from kdhiera.cache.expected import expected_shards
from kdhiera.cache.layout import PartId, column_group, commit_file, commit_folder
from kdhiera.cache.reader import CacheReader, read_base
from kdhiera.cache.records import unseal
from kdhiera.cache.verify import verify_at
from kdhiera.errors import DamagedError, KdhieraError

pytestmark = pytest.mark.usefixtures("unchecked")

A, B = (PartId(shard_id=shard, view=0) for shard in ("a-0", "b-0"))
INT8, FP32, COMPACT = COLUMNS = ("image.1.int8", "image.1.fp32", "video.2.compact")
WHAT = {part: content(part, 6, bad=(2,)) for part in (A, B)}
LOST = {A: 3, B: 1}  # an array row whose features are not finite in one column
SHARDS = ["/data/*.tar"]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parts of files of two rows, each with a bad row and one that a column lost."""
    root = tmp_path_factory.mktemp("pristine") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "ZARR_SHARD_ROWS", 2)
        patch.setattr(layout, "SMALL_ROW_BYTES", 64)
        cache = make_cache(root, COLUMNS)
        for part, what in WHAT.items():
            features = {name: values.copy() for name, values in what.features.items()}
            features[FP32][LOST[part]] = np.inf
            write_part(cache, part, replace(what, features=features), COLUMNS)
    return root


@pytest.fixture
def root(pristine: Path, memory: Path) -> Path:
    return Path(shutil.copytree(pristine, memory / "cache"))


def everything(root: Path) -> list[Any]:
    """All that training and replays read."""
    cache = Cache.open(root)
    shards = expected_shards(cache, SHARDS)
    reader = CacheReader(cache, num_views=1, columns=COLUMNS, shards=shards)
    samples = np.arange(reader.num_samples)
    rows = reader.read(samples, view=0)
    found: list[Any] = [rows.uids, rows.units, rows.scores, rows.pixels, reader.labels(samples)]
    for column in COLUMNS:
        arrays = rows.columns[column]
        found += [(column, name, arrays[name]) for name in sorted(arrays)]
        statistics = reader.statistics(column)
        found += [statistics.count, statistics.mean, statistics.m2]
    found.append(dict(cache.columns.basis(COMPACT) or {}))
    for commits in cache.commits().values():
        base = read_base(cache, commits.base)
        found += [base.rows, base.units, base.scores]
    return found


@pytest.fixture(scope="module")
def expected(pristine: Path) -> list[Any]:
    """What is read of the sound cache; it is what was written."""
    reader = CacheReader(Cache.open(pristine), num_views=1, columns=(INT8, COMPACT))
    assert_holds(reader, WHAT, reader.columns)
    found = everything(pristine)
    assert len(found[0]) == 2 * 4  # of five good rows each one is lost in a column
    assert found[-6][0].uid == WHAT[A].rows[0].uid
    return found


def equal(one: Any, two: Any) -> bool:
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, two))
    if isinstance(one, Mapping):
        return one.keys() == two.keys() and all(equal(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    return bool(one == two)


def refusal(root: Path, expected: list[Any]) -> str:
    """Why reading is refused; empty if it gives what it must."""
    try:
        found = everything(root)
    except KdhieraError as error:
        return str(error)
    assert equal(found, expected), "other values were read without an error"
    return ""


def names(root: Path) -> list[str]:
    """All files that something is read from: garbage and leases are not."""
    found = (p.relative_to(root).as_posix() for p in sorted(root.rglob("*")) if p.is_file())
    return [name for name in found if not name.endswith("attempt.json")]


@contextlib.contextmanager
def instead(path: Path, data: bytes | None) -> Iterator[None]:
    """Other contents in a file's place, or none, for a while."""
    sound = path.read_bytes()
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    yield
    path.write_bytes(sound)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


def test_every_file_is_known_by_what_it_is(pristine: Path, expected: list[Any]):
    kinds = {name.partition("/")[0] for name in names(pristine)}
    assert kinds == {"cache.json", "columns", "commits", "parts", "shards"}
    assert len(names(pristine)) == 1 + 3 + 1 + 2 + 2 * (4 + 43)
    assert refusal(pristine, expected) == ""


LENGTHS: dict[str, Callable[[bytes], bytes | None]] = {
    "gone": lambda data: None,
    "empty": lambda data: b"",
    "one byte": lambda data: data[:1],
    "half": lambda data: data[: len(data) // 2],
    "short": lambda data: data[:-1],
    "long": lambda data: data + b"\0",
}


@pytest.mark.parametrize("damage", LENGTHS)
def test_a_file_of_another_length_is_named(root: Path, expected: list[Any], damage: str):
    for name in names(root):
        with instead(root / name, LENGTHS[damage]((root / name).read_bytes())):
            said = refusal(root, expected)
        assert said, name
        if name.startswith("parts/"):
            shard_id = name.split("/")[1]
            assert f"part {shard_id} view 0 of the cache in {root} is damaged" in said
            assert f"{root}/{name}" in said
            assert f"kdhiera cache verify {root} --repair" in said
            assert "kdhiera extract-teachers CONFIG" in said


def test_a_flipped_bit_anywhere_is_an_error_or_harmless(root: Path, expected: list[Any]):
    """The first, the last and some other bits of every file, through all that reads."""
    rng = np.random.default_rng(0)
    for name in names(root):
        sound = (root / name).read_bytes()
        bits = {0, 8 * len(sound) - 1, *rng.integers(0, 8 * len(sound), 4).tolist()}
        for bit in bits:
            with instead(root / name, flipped(sound, bit)):
                said = refusal(root, expected)
            assert said or holds_unread_rows(name), (name, bit)


def holds_unread_rows(name: str) -> bool:
    """Chunk files with a row that a column lost: training leaves that sample out."""
    blocks = {f"parts/{part.shard_id}/": f"/c.{row // 2}." for part, row in LOST.items()}
    return any(name.startswith(start) and block in name for start, block in blocks.items())


@pytest.mark.parametrize("kind", ["cache.json", "columns", "commits", "shards"])
def test_every_bit_of_sealed_records_is_covered(pristine: Path, kind: str):
    sealed = [n for n in names(pristine) if n.startswith(kind) and not n.endswith(".npz")]
    for name in sealed[:3]:
        sound = (pristine / name).read_bytes()
        for bit in range(8 * len(sound)):
            with pytest.raises(DamagedError):
                unseal(flipped(sound, bit), name)


def test_every_bit_of_a_basis_is_covered(pristine: Path):
    """Also where no commit names its hash yet."""
    (path,) = (pristine / "columns").rglob("basis-*.npz")
    sound = path.read_bytes()
    expected = basis_from_npz(sound)
    for bit in range(8 * len(sound)):
        with contextlib.suppress(ValueError):
            assert equal(basis_from_npz(flipped(sound, bit)), expected), bit


@pytest.mark.parametrize("array", ["base.zarr/units", f"{column_group(INT8)}/scale"])
def test_every_bit_of_a_zarr_shard_is_covered(root: Path, array: str):
    """By the checksums of its chunks and of its index alone, as for any Zarr reader."""
    assert_every_bit_is_covered(root, array, every=1)


@pytest.mark.parametrize("array", ["base.zarr/pixels", f"{column_group(FP32)}/codes"])
def test_bits_of_large_chunks_are_covered(root: Path, array: str):
    assert_every_bit_is_covered(root, array, every=97)


def test_every_bit_of_a_status_is_covered(root: Path):
    assert_every_bit_is_covered(root, f"{column_group(FP32)}/status", every=1)


def assert_every_bit_is_covered(root: Path, array: str, *, every: int) -> None:
    cache = Cache.open(root)
    commits = cache.commits()[A]
    folder = folder_of(cache, commits.base) / array
    kvstore = cache.store.kvstore(f"{cache.folder(commits.base)}/{array}")
    path = sorted(folder.glob("c.*"))[0]
    sound, values = path.read_bytes(), open_array(kvstore).read().result()
    found = 0
    for bit in range(0, 8 * len(sound), every):
        path.write_bytes(flipped(sound, bit))
        try:
            read = open_array(kvstore).read().result()
        except ValueError:
            found += 1
        else:
            assert np.array_equal(read, values), bit
    assert found > 0.99 * len(range(0, 8 * len(sound), every))


def test_crc32c_is_blind_to_what_ends_in_its_own():
    """Why the crc32c of a file of chunks does not tell it from another of the same sizes."""
    rng = np.random.default_rng(0)
    found = set()
    for _ in range(20):
        chunk = rng.bytes(100)
        data = chunk + int(google_crc32c.value(chunk)).to_bytes(4, "little")
        found.add((google_crc32c.value(data), zlib.crc32(data)))
    assert len({crc32c for crc32c, _ in found}) == 1
    assert len({crc32 for _, crc32 in found}) == 20


def test_exchanged_files_are_noticed(root: Path, expected: list[Any]):
    """Of one array in two parts, two blocks of one array, two arrays alike: sizes may be equal."""
    cache = Cache.open(root)
    folders = {p: folder_of(cache, c.base) for p, c in cache.commits().items()}
    inside = [n.relative_to(folders[A]) for n in folders[A].rglob("*") if n.is_file()]
    pairs = [(folders[A] / name, folders[B] / name) for name in inside]
    pairs += [(folders[A] / name, other) for name, other in alike(folders[A], inside)]
    equal_sizes = 0
    for one, two in pairs:
        first, second = one.read_bytes(), two.read_bytes()
        with instead(one, second), instead(two, first):
            said = refusal(root, expected)
            assert said or first == second or one.name == "attempt.json", (one, two)
            assert first == second or one.name == "attempt.json" or problems(root), (one, two)
        equal_sizes += len(first) == len(second) and first != second
    assert equal_sizes > 20


def alike(folder: Path, names: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    chunks = [name for name in names if name.name.startswith("c.")]
    for one, two in itertools.combinations(chunks, 2):
        if one.parent == two.parent:
            yield one, folder / two


def problems(root: Path) -> list[str]:
    return [problem.what for problem in verify_at(root).problems]


def test_a_record_in_the_place_of_any_other_is_refused(root: Path, expected: list[Any]):
    sealed = [n for n in names(root) if not n.startswith("parts/") and not n.endswith(".npz")]
    contents = {name: (root / name).read_bytes() for name in sealed}
    assert len(sealed) == 1 + 3 + 2 * 4 + 2
    for one, two in itertools.permutations(sealed, 2):
        with instead(root / one, contents[two]):
            assert refusal(root, expected), (one, two)


def test_records_and_parts_of_another_cache_are_refused_or_whole(
    root: Path, expected: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Made alike, with other content: a record alone is nothing, a base takes no other column."""
    monkeypatch.setattr(layout, "ZARR_SHARD_ROWS", 2)
    other = make_cache(tmp_path / "other", COLUMNS)
    assert other.fingerprint == Cache.open(root).fingerprint
    write_part(other, A, content(A, 6, bad=(2,), seed=9), COLUMNS)
    for column in (None, *COLUMNS):
        theirs = (tmp_path / "other" / commit_file(A, column)).read_bytes()
        with instead(root / commit_file(A, column), theirs):
            assert refusal(root, expected)
            assert problems(root)
    shutil.copytree(tmp_path / "other" / "parts", root / "parts", dirs_exist_ok=True)
    for column in (None, *COLUMNS):
        theirs = (tmp_path / "other" / commit_file(A, column)).read_bytes()
        with instead(root / commit_file(A, column), theirs):
            assert "another base record" in refusal(root, expected)


def test_an_older_attempt_does_not_come_back(
    root: Path, expected: list[Any], monkeypatch: pytest.MonkeyPatch
):
    """Its files still lie there when the part is made anew with other rows."""
    monkeypatch.setattr(layout, "ZARR_SHARD_ROWS", 2)
    cache = Cache.open(root)
    old = {path: path.read_bytes() for path in (root / commit_folder(A)).iterdir()}
    folder = folder_of(cache, cache.commits()[A].base)
    for path in old:
        path.unlink()
    write_part(cache, A, content(A, 6, bad=(2,), seed=9), COLUMNS)
    now = everything(root)
    made = folder_of(cache, cache.commits()[A].base)
    assert not equal(now, expected)
    for path, record in old.items():
        with instead(path, record):
            assert refusal(root, now), path
    names = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    others = [n for n in names if (folder / n).read_bytes() != (made / n).read_bytes()]
    assert len(others) > 20
    for name in others:
        with instead(made / name, (folder / name).read_bytes()):
            assert refusal(root, now) or name.name == "attempt.json", name


def test_verify_lists_every_file_with_a_flipped_bit(root: Path):
    """A bit in each of some data files at once (of many more in a part it says how many)."""
    rng = np.random.default_rng(1)
    data = np.array([n for n in names(root) if n.startswith("parts/")])
    rng.shuffle(data)
    for group in np.array_split(data, -(-len(data) // 8)):
        with contextlib.ExitStack() as damaged:
            for name in group:
                sound = (root / name).read_bytes()
                bad = flipped(sound, int(rng.integers(0, 8 * len(sound))))
                damaged.enter_context(instead(root / name, bad))
            found = {problem.where for problem in verify_at(root).problems}
        assert found == set(group)


def test_verify_lists_every_flipped_bit_of_records(root: Path):
    rng = np.random.default_rng(2)
    for name in names(root):
        if not name.startswith("parts/"):
            sound = (root / name).read_bytes()
            for bit in rng.integers(0, 8 * len(sound), 3).tolist():
                with instead(root / name, flipped(sound, bit)):
                    assert problems(root), (name, bit)


def test_a_chunk_that_vanishes_after_the_first_touch_is_an_error_not_zeros(root: Path):
    cache = Cache.open(root)
    reader = CacheReader(cache, num_views=1, columns=COLUMNS)
    reader.read(np.array([0]), view=0)
    (folder_of(cache, cache.commits()[A].base) / "base.zarr/pixels/c.2.0.0.0.0.0").unlink()
    with pytest.raises(DamagedError, match=r"a-0 view 0.*base\.zarr/pixels.*missing"):
        reader.read(np.array([3]), view=0)


def test_a_record_that_changes_after_opening_is_noticed(root: Path):
    reader = CacheReader(Cache.open(root), num_views=1, columns=COLUMNS)
    record = root / commit_file(A, COMPACT)
    record.write_bytes(record.read_bytes().replace(b'"width":6', b'"width":7'))
    with pytest.raises(DamagedError, match=r"video\.2\.compact\.json has changed since"):
        reader.read(np.array([0]), view=0)
    record.unlink()
    with pytest.raises(DamagedError, match=r"column video\.2\.compact of part a-0 view 0 was rem"):
        reader.read(np.array([0]), view=0)


def test_an_attempt_does_not_use_a_damaged_basis(root: Path):
    (path,) = (root / "columns").rglob("basis-*.npz")
    path.write_bytes(flipped(path.read_bytes(), 5000))
    third = PartId(shard_id="c-0", view=0)
    with pytest.raises(DamagedError, match="is missing or damaged"):
        write_part(Cache.open(root), third, columns=COLUMNS)
    assert not (root / commit_folder(third)).exists()
    assert not list(root.glob("parts/c-0/0/*"))


def test_a_damaged_status_harms_no_reader_and_is_found_by_verify(
    root: Path, expected: list[Any]
) -> None:
    """Records say which rows are bad: statuses are for other readers, and for `verify`."""
    folder = folder_of(Cache.open(root), Cache.open(root).commits()[A].base)
    path = folder / column_group(FP32) / "status/c.0"
    with instead(path, flipped(path.read_bytes(), 4 * len(path.read_bytes()))):
        assert [str(path) in what for what in problems(root)] == [True]


def test_a_basis_that_is_made_anew_meanwhile_takes_no_column_along(root: Path):
    """Made from other rows while an attempt encodes with the old one: it publishes nothing."""
    third = PartId(shard_id="c-0", view=0)
    cache = Cache.open(root)
    key = cache.columns.basis_key(COMPACT)
    assert key is not None
    with begin(cache, third, COLUMNS) as attempt:
        fill(attempt, content(third), COLUMNS)
        (root / key).unlink()
        cache.store.create(key, b"another")
        with pytest.raises(KdhieraError, match="removed from the cache while"):
            attempt.commit()
    assert not (root / commit_file(third, COMPACT)).exists()
