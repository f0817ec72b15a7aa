from pathlib import Path

import pytest
from tiny_cache import COLUMNS, make_cache, write_part

from kdhiera.cache.expected import (
    expect_shard,
    expect_shards,
    expected_shards,
    shard_records,
)
from kdhiera.cache.layout import PartId
from kdhiera.cache.reader import CacheReader
from kdhiera.errors import DamagedError, MismatchError


def test_a_shard_that_was_never_reached_refuses_training(tmp_path: Path):
    cache = make_cache(tmp_path)
    anywhere = ["/data/*"]
    assert expected_shards(cache, anywhere) == frozenset()
    for shard in ("a-0", "b-0", "a-0"):
        expect_shard(cache, shard, path=f"/data/{shard}.tar")
    assert expected_shards(cache, anywhere) == {"a-0", "b-0"}
    write_part(cache, PartId(shard_id="a-0", view=0))
    CacheReader(cache, num_views=1, columns=COLUMNS)  # what is there is whole
    shards = expected_shards(cache, anywhere)
    with pytest.raises(MismatchError, match="b-0 view 0 lacks base"):
        CacheReader(cache, num_views=1, columns=COLUMNS, shards=shards)


def test_a_lost_or_exchanged_record_refuses_training_and_extraction_writes_it_anew(tmp_path: Path):
    cache = make_cache(tmp_path)
    paths = {shard: f"/data/{shard}.tar" for shard in ("a-0", "b-0")}
    for shard in paths:
        write_part(cache, PartId(shard_id=shard, view=0))
    expect_shards(cache, paths)
    before = shard_records(cache)
    expect_shards(cache, paths)
    assert shard_records(cache) == before  # no news
    first, second = (tmp_path / "shards" / shard for shard in paths)
    sound = first.read_bytes()
    for data in (None, b"", sound[:-1], second.read_bytes()):
        first.unlink()
        if data is not None:
            first.write_bytes(data)
        with pytest.raises(DamagedError, match=r"shards/a-0 is .*kdhiera extract-teachers"):
            expected_shards(cache, ["/data/*"])
        expect_shards(cache, paths)
        assert expected_shards(cache, ["/data/a-0.tar"]) == {"a-0"}


def test_a_file_that_comes_back_under_its_path_is_news(tmp_path: Path):
    cache = make_cache(tmp_path)
    for shard in ("old", "new", "old"):
        expect_shards(cache, {shard: "/data/x.tar"})
        assert expected_shards(cache, ["/data/x.tar"]) == {shard}
    expect_shards(cache, {"old": "/moved/x.tar"})
    assert expected_shards(cache, ["/moved/*"]) == {"old"}
    assert expected_shards(cache, ["/data/*"]) == {"new"}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("s3://bucket/a/x-0.tar", ["a/x-0"]),
        ("s3://bucket/a/x-?.tar", ["a/x-0", "a/x-1"]),
        ("s3://bucket/*/x-0.tar", ["a/x-0", "b/x-0"]),
        ("s3://bucket/**/*.tar", ["a/x-0", "a/x-1", "b/x-0", "b/c/x-2"]),
        ("s3://bucket/b/*.tar", ["b/x-0"]),
        ("file:///data/c%20d.tar", ["/data/c d"]),
        ("/data/*.tar", ["/data/c d"]),
    ],
)
def test_the_shards_of_a_pattern_are_those_that_extraction_took_by_it(
    tmp_path: Path, pattern: str, names: list[str]
):
    cache = make_cache(tmp_path)
    ids = {}
    for i, name in enumerate(["a/x-0", "a/x-1", "b/x-0", "b/c/x-2", "/data/c d"]):
        path = f"{name}.tar" if name.startswith("/") else f"s3://bucket/{name}.tar"
        ids[name] = f"shard-{i}"
        expect_shard(cache, ids[name], path=path)
    assert expected_shards(cache, [pattern]) == {ids[name] for name in names}
