import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdhiera.errors import UsageError
from kdhiera.grid import Grid

grids = st.builds(
    lambda t, y, x: Grid(num_frames=2 * t, height=32 * y, width=32 * x),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
)


@given(grids)
def test_tokens_to_units_and_back_is_the_identity(grid: Grid) -> None:
    t, h, w = grid.tokens
    tokens = torch.arange(2 * t * h * w * 3).view(2, t, h, w, 3)
    units = grid.tokens_to_units(tokens)
    assert units.shape == (2, grid.num_units, 4, 3)
    assert torch.equal(grid.units_to_tokens(units), tokens)


@given(grids)
def test_frames_to_units_and_back_is_the_identity(grid: Grid) -> None:
    shape = (1, grid.num_frames, grid.height, grid.width, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    units = grid.frames_to_units(frames)
    assert units.shape == (1, grid.num_units, 2, 32, 32, 3)
    assert np.array_equal(grid.units_to_frames(units), frames)


@given(grids, st.data())
def test_an_impulse_lands_where_raster_order_says(grid: Grid, data: st.DataObject) -> None:
    slots, rows, columns = grid.units
    slot = data.draw(st.integers(0, slots - 1))
    y, x = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    f, py, px = data.draw(st.tuples(st.integers(0, 1), st.integers(0, 31), st.integers(0, 31)))
    frames = np.zeros((1, grid.num_frames, grid.height, grid.width, 3), np.uint8)
    frames[0, 2 * slot + f, 32 * y + py, 32 * x + px, 1] = 1
    unit = (slot * rows + y) * columns + x
    assert np.argwhere(grid.frames_to_units(frames)).tolist() == [[0, unit, f, py, px, 1]]

    tokens = torch.zeros(1, *grid.tokens, 1)
    tokens[0, slot, 2 * y + py // 16, 2 * x + px // 16, 0] = 1
    token = 2 * (py // 16) + px // 16
    assert grid.tokens_to_units(tokens).nonzero().tolist() == [[0, unit, token, 0]]


def test_unit_scores_are_means_over_their_four_tokens() -> None:
    grid = Grid(num_frames=4, height=64, width=96)
    scores = torch.rand(3, *grid.tokens)
    pooled = grid.pool_scores(scores)
    by_hand = scores[1, 1, 2:4, 4:6].mean()  # slot 1, unit (1, 2)
    assert pooled.shape == (3, 2, 6)
    assert torch.allclose(pooled[1, 1, 5], by_hand)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((7, 64, 64), "even"),
        ((0, 64, 64), "even"),
        ((8, 100, 64), "multiple of 32 px .*got 100: use 96 or 128"),
        ((8, 64, 31), "clip.width"),
    ],
)
def test_impossible_geometry_is_one_sentence(sizes: tuple[int, int, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Grid(num_frames=sizes[0], height=sizes[1], width=sizes[2])
