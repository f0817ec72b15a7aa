import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kdhiera.cache.gaps import Gaps, numbers_in, runs_of

flags = st.lists(st.booleans(), max_size=60).map(lambda found: np.array(found, bool))


@settings(deadline=None)
@given(flags)
def test_runs_name_exactly_what_is_flagged(bad: np.ndarray):
    runs = runs_of(bad)
    assert numbers_in(runs).tolist() == [i for i, flag in enumerate(bad) if flag]
    assert all(start < stop for start, stop in runs)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(runs))  # none touches the next


@settings(deadline=None)
@given(flags, st.integers(0, 20))
def test_ranks_and_numbers_are_those_of_the_list_of_good_ones(bad: np.ndarray, more: int):
    good = np.array([i for i in range(len(bad) + more) if i >= len(bad) or not bad[i]], np.int64)
    gaps = Gaps.of(runs_of(bad))
    assert len(gaps) == bad.sum()
    assert np.array_equal(gaps.nth(np.arange(len(good))), good)
    assert np.array_equal(gaps.rank(good), np.arange(len(good)))


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), max_size=8), max_size=4))
def test_sets_are_joined(many: list[list[int]]):
    union = sorted({number for numbers in many for number in numbers})
    gaps = Gaps.of_any(np.array(sorted(numbers), np.int64) for numbers in many)
    assert len(gaps) == len(union)
    good = [i for i in range(60) if i not in union]
    assert gaps.nth(np.arange(len(good))).tolist() == good
