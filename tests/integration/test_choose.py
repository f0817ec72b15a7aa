"""Rows that stand for all are spread over shards and views."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from kdhiera.cache.layout import PartId
from kdhiera.stages.replaying.choose import spread


def parts(shards: int, views: int, rows: int) -> dict[PartId, int]:
    return {
        PartId(shard_id=f"s{shard:03d}", view=view): rows
        for shard in range(shards)
        for view in range(views)
    }


@given(
    st.dictionaries(
        st.builds(PartId, shard_id=st.sampled_from("abcdef"), view=st.integers(0, 3)),
        st.integers(0, 5),
        max_size=20,
    ),
    st.integers(1, 60),
)
def test_as_many_rows_as_there_are_and_none_twice(available: dict[PartId, int], count: int):
    chosen = spread(available, count)
    assert sum(map(len, chosen.values())) == min(count, sum(available.values()))
    for part, rows in chosen.items():
        assert rows == sorted(set(rows))
        assert all(0 <= row < available[part] for row in rows)
    assert chosen == spread(dict(reversed(available.items())), count)


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 40))
def test_shards_and_views_are_used_alike(shards: int, views: int, count: int):
    chosen = spread(parts(shards, views, 100), count)
    by_shard: Counter[str] = Counter()
    by_view: Counter[int] = Counter()
    for part, rows in chosen.items():
        by_shard[part.shard_id] += len(rows)
        by_view[part.view] += len(rows)
    for counts, things in ((by_shard, shards), (by_view, views)):
        assert len(counts) == min(things, count)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_rows_of_a_part_are_spread_too():
    ((rows,),) = [list(spread(parts(1, 1, 100), 4).values())]
    assert rows == [12, 37, 62, 87]
