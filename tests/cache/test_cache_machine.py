"""A state machine: whatever the order of events, readers see what was committed."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tiny_cache import (
    COLUMNS,
    Content,
    assert_close,
    begin,
    content,
    decoded,
    fill,
    make_cache,
    write_part,
)

from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import PartId
from kdhiera.cache.reader import CacheReader
from kdhiera.cache.writer import Attempt

SHARDS = {"a-0": (), "b-0": (0, 2)}  # with bad rows
PARTS = st.builds(
    lambda shard, view: PartId(shard_id=shard, view=view), st.sampled_from([*SHARDS]), st.just(0)
)
COLUMN_SETS = st.sets(st.sampled_from(COLUMNS)).map(lambda s: tuple(sorted(s)))


def of(part: PartId, seed: int) -> Content:
    return content(part, 4, bad=SHARDS[part.shard_id], seed=seed)


class CacheMachine(RuleBasedStateMachine):
    """Attempts begin, fill, commit in any order, die or give up; caches are reopened."""

    @initialize()
    def create(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.cache = make_cache(self.root / "cache")
        self.rows: dict[PartId, int] = {}  # seed of the rows that are committed
        self.columns: dict[PartId, set[str]] = {}
        self.running: list[tuple[Attempt, PartId, int, tuple[str, ...]]] = []

    @rule(part=PARTS, seed=st.integers(0, 1), columns=COLUMN_SETS)
    def begin_attempt(self, part: PartId, seed: int, columns: tuple[str, ...]) -> None:
        if len(self.running) < 3:
            attempt = begin(self.cache, part, columns)
            fill(attempt, of(part, seed), columns)
            self.running.append((attempt, part, seed, columns))

    @rule(which=st.integers(0, 2))
    def commit(self, which: int) -> None:
        if which >= len(self.running):
            return
        attempt, part, seed, columns = self.running.pop(which)
        result = attempt.commit()
        won = part not in self.rows
        assert result.won_base == won
        winner = self.rows.setdefault(part, seed)
        known = self.columns.setdefault(part, set())
        assert result.adopted == (not won and winner == seed)
        new = set(columns) - known if winner == seed else set()
        assert set(result.published) == new
        assert result.replay_needed == (winner != seed and bool(columns))
        known |= new

    @rule(part=PARTS, columns=COLUMN_SETS)
    def add_columns(self, part: PartId, columns: tuple[str, ...]) -> None:
        commits = self.cache.part_commits(part)
        assert (commits is None) == (part not in self.rows)
        if commits is not None:
            what = of(part, self.rows[part])
            result = write_part(self.cache, part, what, columns, base=commits.base)
            assert set(result.published) == set(columns) - self.columns[part]
            self.columns[part] |= set(columns)

    @rule(dies=st.booleans())
    def end_attempts(self, dies: bool) -> None:
        for attempt, *_ in self.running:
            if not dies:
                attempt.abandon()
        self.running.clear()

    @rule()
    def reopen(self) -> None:
        self.cache = Cache.open(self.cache.url)

    @invariant()
    def readers_see_what_was_committed(self) -> None:
        found = self.cache.commits()
        assert {p: set(c.columns) for p, c in found.items()} == self.columns
        for part, columns in self.columns.items():
            asked = tuple(sorted(columns))
            reader = CacheReader(self.cache, num_views=1, columns=asked, shards=[part.shard_id])
            what = of(part, self.rows[part])
            rows = reader.read(np.arange(reader.num_samples), view=0)
            assert rows.uids == tuple(row.uid for row in what.good)
            np.testing.assert_array_equal(rows.pixels, what.pixels)
            for column in asked:
                assert_close(column, decoded(reader, rows, column), what.features[column])

    def teardown(self) -> None:
        shutil.rmtree(self.root)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
