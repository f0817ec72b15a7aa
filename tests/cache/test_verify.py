"""Every injected damage is listed by verify, and repair lets extraction mend it."""

from pathlib import Path

import pytest
from tiny_cache import COLUMNS, assert_holds, catch_up, content, make_cache, write_part

from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import PartId
from kdhiera.cache.reader import CacheReader
from kdhiera.cache.verify import drop_column, repair, verify
from kdhiera.errors import UsageError

PARTS = tuple(PartId(shard_id=shard, view=0) for shard in ("a-0", "b-0"))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    made = make_cache(tmp_path / "cache")
    for part in PARTS:
        write_part(made, part)
    return made


def files(cache: Cache) -> list[Path]:
    """Files that readers depend on: columns, records and what records name."""
    keys = [f"columns/{column}/column.json" for column in cache.columns.names()]
    for part, commits in cache.commits().items():
        keys += cache.records()[part]
        for commit in (commits.base, *commits.columns.values()):
            names = cache.read_record(commit)["files"]
            keys += [f"{cache.folder(commit)}/{name}" for name in names]
    return [Path(cache.url) / key for key in dict.fromkeys(keys)]


def test_a_sound_cache_is_sound(cache: Cache):
    found = verify(cache)
    assert found.problems == ()
    assert (found.parts, found.commits) == (2, 6)


@pytest.mark.parametrize("damage", ["remove", "empty", "cut", "flip"])
def test_any_damage_is_listed_and_repaired(cache: Cache, damage: str):
    for number in range(len(files(cache))):
        path = files(Cache.open(cache.url))[number]
        data = path.read_bytes()
        if damage == "remove" and path.name in ("base.json", "column.json"):
            continue  # below: then other records speak of it
        if damage == "remove" and "commits" in path.parts:
            continue  # a part without a commit is a part that is not there yet
        if damage == "remove":
            path.unlink()
        else:
            middle = len(data) * (number % 7) // 7
            flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
            path.write_bytes({"empty": b"", "cut": data[:-1], "flip": flipped}[damage])
        opened = Cache.open(cache.url)
        found = verify(opened)
        assert found.problems, path
        repair(opened, found)
        mended = make_cache(Path(cache.url))
        for part in PARTS:
            catch_up(mended, part)
        assert not verify(mended).problems, path
        reader = CacheReader(mended, num_views=1, columns=COLUMNS)
        assert_holds(reader, {part: content(part) for part in PARTS})


def test_a_base_that_is_gone_takes_its_columns_along(cache: Cache):
    (Path(cache.url) / "commits/a-0/0/base.json").unlink()
    found = verify(cache)
    assert len(found.problems) == len(COLUMNS)
    repair(cache, found)
    assert set(Cache.open(cache.url).commits()) == {PARTS[1]}


def test_a_dropped_column_is_gone_and_can_be_made_anew(cache: Cache):
    assert drop_column(cache, COLUMNS[0]) == 2
    opened = Cache.open(cache.url)
    assert all(set(c.columns) == {COLUMNS[1]} for c in opened.commits().values())
    with pytest.raises(UsageError, match="it has: video"):
        drop_column(opened, COLUMNS[0])
    again = make_cache(Path(cache.url))
    for part in PARTS:
        catch_up(again, part)
    reader = CacheReader(again, num_views=1, columns=COLUMNS)
    assert_holds(reader, {part: content(part) for part in PARTS})
