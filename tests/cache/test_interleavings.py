"""Attempts at one part, in every order of their publications, with a reader in between."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_cache import (
    COLUMNS,
    Content,
    assert_holds,
    begin,
    content,
    fill,
    gc,
    make_cache,
    write_part,
)
from turns import SteppedStore, Turns, run_in_turns

from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import PartId, commit_folder
from kdhiera.cache.reader import CacheReader
from kdhiera.cache.verify import verify
from kdhiera.views import RowStatus

PART = PartId(shard_id="a-0", view=0)
WHOLE = content(PART, 4)


pytestmark = pytest.mark.usefixtures("unchecked")


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
PUBLISH = [("create", commit_folder(PART))]


def orders(steps: str) -> list[tuple[str, ...]]:
    return sorted(set(itertools.permutations(steps)))


def stepped(root: Path, name: str, turns: Turns, steps: Sequence[tuple[str, str]]) -> Cache:
    cache = make_cache(root)
    cache.store = SteppedStore(root, name, turns, steps)
    return cache


def extract(
    cache: Cache, what: Content, columns: Sequence[str], winners: Sequence[Content]
) -> None:
    """What an actor does: an attempt, and the winner's rows again where they differ."""
    with begin(cache, PART, columns) as attempt:
        fill(attempt, what, columns)
        result = attempt.commit()
    if result.replay_needed:
        found = cache.part_commits(PART)
        assert found is not None
        base = found.base
        (rows,) = (w for w in winners if len(w.units) == base.array_rows)
        write_part(cache, PART, rows, cache.missing(PART, columns).columns, base=base)


def reading(root: Path, contents: Sequence[Content]) -> Callable[[], None]:
    """A reader that comes after every publication: what it sees is whole and right."""
    seen: list[list[str]] = [[]]

    def read() -> None:
        cache = Cache.open(root)
        there = cache.store.names(commit_folder(PART))
        if there == seen[-1]:
            return
        seen.append(there)
        found = cache.part_commits(PART)
        if found is not None:
            rows = {len(what.units): what for what in contents}[found.base.array_rows]
            columns = tuple(found.columns)
            reader = CacheReader(cache, num_views=1, columns=columns)
            assert_holds(reader, {PART: rows}, columns)
            for column in columns:
                assert reader.statistics(column).count == len(rows.tokens[column])

    return read


TWO = [(order, SHORT) for order in orders("AAABBB")]
TWO += [(order, WHOLE) for order in orders("AAABBB") if order[0] == "A"]  # B is the same


@pytest.mark.parametrize(
    ("order", "second"), TWO, ids=["".join(o) + ("" if w is WHOLE else "-other") for o, w in TWO]
)
def test_two_attempts_leave_one_whole_part(
    memory: Path, order: Sequence[str], second: Content
) -> None:
    make_cache(memory)
    both = (WHOLE,) if second is WHOLE else (WHOLE, second)
    turns = Turns(order, reading(memory, both))
    failed = run_in_turns(
        turns,
        {
            name: lambda name=name, what=what: extract(
                stepped(memory, name, turns, PUBLISH), what, COLUMNS, both
            )
            for name, what in (("A", WHOLE), ("B", second))
        },
    )
    assert not failed
    assert_whole(memory, both)


@pytest.mark.parametrize("order", orders("AABBCC"), ids="".join)
def test_three_attempts_at_different_columns_leave_one_whole_part(
    memory: Path, order: Sequence[str]
) -> None:
    """Two of the same rows and one of others: all of them win, join or replay in turn."""
    make_cache(memory)
    both = (WHOLE, SHORT)
    turns = Turns(order, reading(memory, both))
    wanted = {"A": (WHOLE, COLUMNS[:1]), "B": (SHORT, COLUMNS[1:]), "C": (WHOLE, COLUMNS[1:])}
    failed = run_in_turns(
        turns,
        {
            name: lambda name=name, what=what, columns=columns: extract(
                stepped(memory, name, turns, PUBLISH), what, columns, both
            )
            for name, (what, columns) in wanted.items()
        },
    )
    assert not failed
    assert_whole(memory, both)


def assert_whole(root: Path, contents: Sequence[Content]) -> None:
    """All columns are committed once and right, and what lost left nothing."""
    cache = Cache.open(root)
    assert set(cache.commits()[PART].columns) == set(COLUMNS)
    assert not gc(cache, later=1e6).garbage
    assert not verify(cache).problems
    reading(root, contents)()
    assert len(list(root.rglob("base.zarr"))) == 1
