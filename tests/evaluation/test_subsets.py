import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdhiera.errors import UsageError
from kdhiera.evaluation.subsets import labelled_subset

NAMES = ("cat", "dog", "fish")
CLASSES = np.array([0, 1, 2, 0, 0, 1, 1, 2, 2, 2, 0, 1])
UIDS = [f"shard/{i}/clip" for i in range(len(CLASSES))]


def subset(per_class, *, seed=0, uids=UIDS, classes=CLASSES, label="animal"):
    return labelled_subset(uids, classes, per_class=per_class, names=NAMES, label=label, seed=seed)


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 4))
def test_balanced_and_nested(seed, few, many):
    few, many = sorted((few, many))
    chosen = subset(many, seed=seed)
    assert (np.bincount(CLASSES[chosen]) == many).all()
    assert (np.diff(chosen) > 0).all()
    assert set(subset(few, seed=seed)) <= set(chosen)


def test_the_order_of_the_clips_does_not_matter_and_the_seed_does():
    order = np.random.default_rng(0).permutation(len(UIDS))
    shuffled = subset(2, uids=[UIDS[i] for i in order], classes=CLASSES[order])
    assert {UIDS[order[i]] for i in shuffled} == {UIDS[i] for i in subset(2)}
    draws = {tuple(subset(2, seed=seed)) for seed in range(20)}
    assert len(draws) > 10
    assert tuple(subset(2, label="other")) != tuple(subset(2))


def test_too_many_are_refused_with_the_class_that_lacks_them():
    with pytest.raises(UsageError, match=r"asks for 5 clips of every class, but `cat` .* has 4"):
        subset(5)
