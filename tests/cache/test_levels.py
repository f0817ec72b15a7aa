"""Levels are what their formula says, and the nearest one is found."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdhiera.cache.compact import LEVELS as COMPACT
from kdhiera.cache.encoding import INT8_LEVELS as INT8
from kdhiera.cache.levels import Levels

BOTH = [COMPACT, INT8]


def formula(levels: Levels) -> np.ndarray:
    """Level of every code by its definition, in float64."""
    codes = np.arange(levels.top + 1, dtype=np.float64)
    return codes + levels.curve * np.maximum(0, codes - levels.linear) ** 2


@pytest.mark.parametrize("levels", BOTH)
def test_levels_follow_their_formula_exactly(levels: Levels):
    codes = torch.arange(levels.top + 1).float()
    expected = formula(levels)
    np.testing.assert_array_equal(levels.level(codes).double().numpy(), expected)
    assert levels.largest == expected[-1]
    both = torch.cat((-codes, codes))
    np.testing.assert_array_equal(levels.signed(both).numpy(), np.r_[-expected, expected])
    assert codes[-1] == levels.top  # the argument is left alone


@pytest.mark.parametrize("levels", BOTH)
def test_every_level_is_nearest_to_itself(levels: Levels):
    codes = torch.arange(levels.top + 1).float()
    for up_from in (0.5, 0.58):
        assert torch.equal(levels.nearest(levels.level(codes), up_from=up_from), codes)


@given(st.sampled_from(BOTH), st.integers(0, 2**32 - 1), st.sampled_from([1.0, 80.0, 1e3, 1e5]))
def test_no_code_stands_much_nearer(levels: Levels, seed: int, size: float):
    values = np.random.default_rng(seed).random(200).astype(np.float32) * size
    found = levels.nearest(torch.from_numpy(values))
    stored = formula(levels)
    apart = np.abs(stored[:, None] - values)
    lost = np.abs(stored[found.long().numpy()] - values)
    assert (lost <= apart.min(0) + 0.5 * levels.curve + 1e-3).all()


def test_the_even_part_rounds_up_from_where_it_is_told():
    values = torch.tensor([0.0, 0.57, 0.59, 1.57, 1.59, 62.57, 62.59])
    found = COMPACT.nearest(values, up_from=0.58)
    assert found.tolist() == [0, 0, 1, 1, 2, 62, 63]
