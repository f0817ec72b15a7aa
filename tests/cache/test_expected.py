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
