from pathlib import Path

import pytest
from tiny_cache import COLUMNS, make_cache, write_part

from kdhiera.cache.expected import expect_shard, expected_shards
from kdhiera.cache.layout import PartId
from kdhiera.cache.reader import CacheReader
from kdhiera.errors import MismatchError


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
