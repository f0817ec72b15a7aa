"""Every file of a part, damaged in every way: an error naming it, or the right values."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_cache import COLUMNS, assert_holds, content, folder_of, make_cache, write_part

from kdhiera.cache import layout
from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import PartId, commit_folder
from kdhiera.cache.reader import CacheReader, read_base
from kdhiera.cache.verify import verify
from kdhiera.errors import DamagedError

PART = PartId(shard_id="a-0", view=0)
WHAT = content(PART, 10, bad=(2,))
GROUPS = ("targets.zarr/image/1.int8", "targets.zarr/video/2.int8")
FILES = [
    "rows.parquet",
    "stats.npz",
    "base.zarr/zarr.json",
    "targets.zarr/zarr.json",
    *(f"targets.zarr/{teacher}/zarr.json" for teacher in ("image", "video")),
    *(f"{group}/zarr.json" for group in GROUPS),
    *(
        f"{array}/{name}"
        for array, axes in (
            ("base.zarr/units", 2),
            ("base.zarr/scores", 3),
            ("base.zarr/pixels", 6),
            *((f"{group}/codes", 4) for group in GROUPS),
            *((f"{group}/scale", 3) for group in GROUPS),
        )
        for name in ("zarr.json", *(f"c.{b}" + ".0" * (axes - 1) for b in range(3)))
    ),
    *(f"{group}/status/{name}" for group in GROUPS for name in ("zarr.json", "c.0")),
]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of three files an array: Zarr shards of pixels and codes, blocks of the rest."""
    root = tmp_path_factory.mktemp("pristine") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "ZARR_SHARD_ROWS", 4)
        patch.setattr(layout, "SMALL_ROW_BYTES", 64)
        write_part(make_cache(root), PART, WHAT)
    return root


@pytest.fixture
def cache(pristine: Path, tmp_path: Path) -> Cache:
    return Cache.open(Path(shutil.copytree(pristine, tmp_path / "cache")))


def file_of(cache: Cache, name: str) -> Path:
    return folder_of(cache, cache.commits()[PART].base) / name


def use_everything(cache: Cache) -> None:
    """What training does, and what a replay does; the values must be right."""
    reader = CacheReader(cache, num_views=1, columns=COLUMNS)
    assert_holds(reader, {PART: WHAT})
    assert reader.labels(np.arange(9))[0] == {"category": "bird", "number": 0}
    for column in COLUMNS:
        tokens = WHAT.tokens[column].astype(np.float64)
        np.testing.assert_allclose(reader.statistics(column).mean, tokens.mean(0), atol=1e-9)
    found = read_base(cache, cache.commits()[PART].base)
    assert found.rows == list(WHAT.rows)


def test_the_list_of_files_is_complete(cache: Cache):
    folder = file_of(cache, ".")
    on_disk = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert on_disk == {*FILES, "attempt.json"}
    use_everything(cache)


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("damage", [remove, empty, cut, lengthen])
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_length_is_named(cache: Cache, name: str, damage: Callable[[Path], None]):
    damage(file_of(cache, name))
    with pytest.raises(DamagedError) as found:
        use_everything(cache)
    message = str(found.value)
    assert "a-0 view 0" in message
    assert str(file_of(cache, name)) in message
    assert f"kdhiera cache verify {cache.url} --repair" in message
    assert "kdhiera extract-teachers" in message


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_or_harmless(cache: Cache, name: str):
    path = file_of(cache, name)
    sound = path.read_bytes()
    rng = np.random.default_rng(len(sound))
    found: list[str] = []
    places = rng.choice(len(sound), min(3, len(sound)), replace=False)
    for place in places:
        damaged = bytearray(sound)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            use_everything(cache)
        except DamagedError as error:
            found.append(str(error))
    # records say which rows are bad: statuses are for other readers, and for `verify`
    assert len(found) == (0 if name.endswith("status/c.0") else len(places))
    assert all("a-0 view 0" in message for message in found)


def test_a_chunk_that_vanishes_after_the_first_touch_is_an_error_not_zeros(cache: Cache):
    reader = CacheReader(cache, num_views=1, columns=COLUMNS)
    reader.read(np.array([0]), view=0)
    file_of(cache, "base.zarr/pixels/c.2.0.0.0.0.0").unlink()
    with pytest.raises(DamagedError, match=r"a-0 view 0.*base\.zarr/pixels.*missing"):
        reader.read(np.array([8]), view=0)


def test_a_record_that_changes_after_opening_is_noticed(cache: Cache):
    reader = CacheReader(cache, num_views=1, columns=COLUMNS)
    record = (Path(cache.url) / commit_folder(PART)) / "video.2.int8.json"
    record.write_bytes(record.read_bytes().replace(b'"width":6', b'"width":7'))
    with pytest.raises(DamagedError, match=r"video\.2\.int8\.json has changed since"):
        reader.read(np.array([0]), view=0)
    record.unlink()
    with pytest.raises(DamagedError, match=r"video\.2\.int8\.json is gone"):
        reader.read(np.array([0]), view=0)


def test_a_damaged_status_harms_no_reader_and_is_found_by_verify(tmp_path: Path):
    cache = make_cache(tmp_path)
    broken = {k: v.copy() for k, v in WHAT.features.items()}
    broken["image.1.int8"][0] = np.inf
    write_part(cache, PART, replace(WHAT, features=broken))
    path = file_of(cache, "targets.zarr/image/1.int8/status/c.0")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    reader = CacheReader(cache, num_views=1, columns=COLUMNS)
    assert reader.uids(np.arange(reader.num_samples)) == [row.uid for row in WHAT.good[1:]]
    assert [str(path) in problem.what for problem in verify(cache).problems] == [True]


def test_a_damaged_part_is_made_anew_as_the_message_says(cache: Cache):
    empty(file_of(cache, "base.zarr/units/c.1.0"))
    shutil.rmtree(Path(cache.url) / commit_folder(PART))
    write_part(cache, PART, WHAT)
    use_everything(cache)
