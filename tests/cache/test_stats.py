import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdhiera.cache.stats import channel_statistics, merge


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_merged_pieces_equal_the_whole(sizes: list[int], seed: int):
    values = np.random.default_rng(seed).normal(1000.0, 0.1, size=(sum(sizes), 3))
    pieces = np.split(values, np.cumsum(sizes)[:-1])
    merged = merge((channel_statistics(torch.from_numpy(p)) for p in pieces), width=3)
    assert merged.count == len(values)
    if len(values):
        np.testing.assert_allclose(merged.mean, values.mean(0), rtol=1e-13)
        np.testing.assert_allclose(merged.std, values.std(0), rtol=1e-8, atol=1e-12)


def test_all_leading_axes_are_tokens():
    tokens = torch.randn(2, 3, 4, 5, dtype=torch.float32)
    found = channel_statistics(tokens)
    assert found.count == 24
    np.testing.assert_allclose(found.mean, tokens.reshape(24, 5).double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        found.std, tokens.reshape(24, 5).double().std(0, correction=0), rtol=1e-12
    )


def test_nothing_has_statistics_too():
    empty = merge((), width=4)
    assert empty.count == 0
    assert empty.std == pytest.approx(np.zeros(4))


@given(
    offset=st.sampled_from([0.0, 1.0, 1e3, 1e6]),
    cuts=st.lists(st.integers(0, 2000), max_size=8),
    seed=st.integers(0, 2**32 - 1),
)
def test_order_and_grouping_change_nothing_to_ten_digits(offset: float, cuts: list[int], seed: int):
    """Against two passes in extended precision, up to a mean of a million deviations."""
    rng = np.random.default_rng(seed)
    values = rng.normal(offset, 1.0, size=(2000, 3))
    wide = values.astype(np.longdouble)
    mean = wide.mean(0)
    std = np.sqrt(((wide - mean) ** 2).mean(0))
    pieces = [channel_statistics(torch.from_numpy(p)) for p in np.split(values, sorted(cuts))]
    rng.shuffle(pieces)
    half = len(pieces) // 2
    grouped = [merge(pieces[:half], width=3), merge(pieces[half:], width=3)]
    for found in (merge(pieces, width=3), merge(grouped, width=3)):
        assert found.count == 2000
        scale = np.maximum(np.abs(mean), std)
        assert np.all(np.abs(found.mean - mean) <= 1e-10 * scale)
        np.testing.assert_allclose(found.std, std.astype(float), rtol=1e-10)
