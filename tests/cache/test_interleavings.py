"""Two attempts at one part whose rows differ, in every order of their publications."""

import itertools
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_cache import COLUMNS, Content, assert_holds, begin, content, fill, make_cache, write_part

from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import PartId
from kdhiera.cache.reader import CacheReader
from kdhiera.stores import LocalStore
from kdhiera.views import RowStatus

PART = PartId(shard_id="a-0", view=0)
WHOLE = content(PART, 5)
ORDERS = sorted(set(itertools.permutations("AAABBB")))


def without(what: Content, lost: int) -> Content:
    """The same part where one clip timed out under load."""
    rows = list(what.rows)
    rows[lost] = replace(
        rows[lost],
        status=RowStatus.DECODE_TIMEOUT,
        message="20 s",
        view=None,
        pts_seconds=(),
        clip_crc32c=None,
        decoder="",
    )
    keep = np.arange(len(rows)) != lost
    return replace(
        what,
        rows=rows,
        units=what.units[keep],
        scores=what.scores[keep],
        pixels=what.pixels[keep],
        features={name: values[keep] for name, values in what.features.items()},
        tokens={
            name: values.reshape(len(rows), -1, values.shape[-1])[keep].reshape(
                -1, values.shape[-1]
            )
            for name, values in what.tokens.items()
        },
    )


SHORT = without(WHOLE, 2)


class Turns:
    """Lets two threads go one step at a time, in a given order; the last one goes freely."""

    def __init__(self, order: Sequence[str]) -> None:
        self._order = list(order)
        self._ended: set[str] = set()
        self._changed = threading.Condition()

    def wait(self, name: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._next() in (None, name), timeout=60)

    def done(self) -> None:
        with self._changed:
            if self._order:
                self._order.pop(0)
            self._changed.notify_all()

    def end(self, name: str) -> None:
        with self._changed:
            self._ended.add(name)
            self._changed.notify_all()

    def _next(self) -> str | None:
        while self._order and self._order[0] in self._ended:
            self._order.pop(0)
        return self._order[0] if self._order else None


class SteppedStore(LocalStore):
    """Publishes when it is its turn."""

    def __init__(self, root: Path, name: str, turns: Turns) -> None:
        super().__init__(root)
        self._name, self._turns = name, turns

    def create(self, key: str, data: bytes) -> bool:
        self._turns.wait(self._name)
        try:
            return super().create(key, data)
        finally:
            self._turns.done()


def run(root: Path, name: str, what: Content, turns: Turns, other: Content) -> None:
    """What an actor does: an attempt, and the winner's rows again where they differ."""
    cache = make_cache(root)
    cache.store = SteppedStore(root, name, turns)
    try:
        with begin(cache, PART) as attempt:
            fill(attempt, what)
            result = attempt.commit()
        if result.replay_needed:
            found = cache.part_commits(PART)
            assert found is not None
            write_part(cache, PART, other, cache.missing(PART, COLUMNS).columns, base=found.base)
    finally:
        turns.end(name)


@pytest.mark.parametrize("order", ORDERS, ids="".join)
@pytest.mark.parametrize("second", [SHORT, WHOLE], ids=["other-rows", "same-rows"])
def test_every_order_of_publications_leaves_one_whole_part(
    tmp_path: Path, order: Sequence[str], second: Content
) -> None:
    make_cache(tmp_path)
    turns = Turns(order)
    errors: list[BaseException] = []

    def guarded(name: str, what: Content, other: Content) -> None:
        try:
            run(tmp_path, name, what, turns, other)
        except BaseException as error:  # shown by the assertion below
            errors.append(error)

    threads = [
        threading.Thread(target=guarded, args=("A", WHOLE, second)),
        threading.Thread(target=guarded, args=("B", second, WHOLE)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    cache = Cache.open(tmp_path)
    found = cache.commits()[PART]
    winner = WHOLE if found.base.array_rows == len(WHOLE.units) else second
    assert set(found.columns) == set(COLUMNS)
    cache.check_files(found.base, *found.columns.values(), contents=True)
    reader = CacheReader(cache, num_views=1, columns=COLUMNS)
    assert_holds(reader, {PART: winner})
    for column in COLUMNS:
        assert reader.statistics(column).count == len(winner.tokens[column])
