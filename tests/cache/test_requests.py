"""What a cache in a bucket asks of it, and that it reads there as it does on a disk."""

import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from s3_server import Server
from tiny_cache import COLUMNS, assert_holds, config, content, make_cache, write_part

from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import PartId
from kdhiera.cache.reader import CacheReader
from kdhiera.data.shards import ShardIndex
from kdhiera.stages.extraction.plan import make_plan
from kdhiera.stores import FileVersion

PARTS = [PartId(shard_id=shard, view=view) for shard in ("a-0", "b-0", "c-0") for view in (0, 1)]
RECORDS = len(PARTS) * (1 + len(COLUMNS))


@pytest.fixture
def cache(s3_url: str) -> Cache:
    made = make_cache(s3_url)
    for part in PARTS:
        write_part(made, part, content(part, 4, bad=(1,) if part.shard_id == "b-0" else ()))
    return Cache.open(s3_url)


def requests(server: Server, already: int) -> Counter[str]:
    """Requests since there were `already`, by what they ask for."""
    kinds: Counter[str] = Counter()
    for request in server.requests[already:]:
        method, path = request.method, request.path
        name = path.rpartition("/")[2]
        if "/commits/" in path:
            kinds["record"] += 1
        elif name in ("column.json", "cache.json"):
            kinds["identity"] += 1
        else:
            kinds[f"{method} {'listing' if '/parts/' not in path else 'data'}"] += 1
    return kinds


def test_opening_lists_once_and_reads_every_record_once(cache: Cache, s3: Server):
    already = len(s3.requests)
    reader = CacheReader(cache, num_views=2, columns=COLUMNS)
    seen = requests(s3, already)
    assert reader.num_samples == 11
    assert seen["record"] == RECORDS
    assert seen["GET listing"] <= 1 + len(COLUMNS)  # pages, and whether columns have bases
    assert not any("data" in kind for kind in seen), "bad rows are named by records"
    assert seen["identity"] <= len(COLUMNS) * 8  # every reading thread may look once


def test_planning_asks_for_no_more_than_opening(cache: Cache, s3: Server):
    shards = [
        ShardIndex(
            path=f"{name}.tar",
            shard_id=name,
            version=FileVersion(num_bytes=0),
            samples=(),
            problems=(),
        )
        for name in ("a-0", "c-0", "new-0")
    ]
    run = config(
        views__num=2,
        teachers__image__layers=[1],
        cache__dir=cache.url,
        cache__encoding="int8",
    )
    already = len(s3.requests)
    plan = make_plan(run, cache, shards)
    seen = requests(s3, already)
    assert [(task.part.shard_id, task.view, task.base) for task in plan.parts] == [
        ("new-0", 0, True),
        ("new-0", 1, True),
    ]
    assert seen["record"] == RECORDS * 2 // 3, "records of other shards are not read"
    assert seen["GET listing"] == 2, "commits, and parts that were given up"


def test_a_reader_in_a_bucket_reads_alike_here_and_in_a_spawned_process(cache: Cache):
    reader = CacheReader(cache, num_views=2, columns=COLUMNS, shards={"a-0", "c-0"})
    assert_holds(reader, {p: content(p, 4) for p in PARTS if p.shard_id != "b-0"})
    samples = np.array([3, 0, 7])
    here = reader.read(samples, view=1)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        there = pool.submit(reader.read, samples, view=1).result()
    assert there.uids == here.uids
    for name in ("units", "scores", "pixels"):
        assert np.array_equal(getattr(there, name), getattr(here, name))
