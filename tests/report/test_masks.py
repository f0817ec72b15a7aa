import itertools

import numpy as np
import pytest
from texts import assert_words_are_apart

from kdhiera.grid import Grid
from kdhiera.masking import MaskSpec, Scope, Strategy, draw_mask, num_visible
from kdhiera.report.masks import RATIOS, WORDS, MaskPicture, draw_masks, show_masks

GRID = Grid(num_frames=8, height=128, width=128)
SPEC = MaskSpec(strategy=Strategy.ATTENTION, scope=Scope.SLOT, ratio=0.75, seed=3)


def _scores(grid: Grid, seed: int = 0) -> np.ndarray:
    scores = np.random.default_rng(seed).gamma(0.5, size=(grid.slots, grid.units_per_slot))
    return (scores / scores.sum(1, keepdims=True)).astype(np.float32)


def _picture(grid: Grid, spec: MaskSpec = SPEC) -> MaskPicture:
    scores = _scores(grid)
    strategies, ratios = draw_masks(spec, scores, grid, uid="shard/0/clip")
    frames = np.random.default_rng(1).integers(
        0, 256, (grid.num_frames, grid.height, grid.width, 3), dtype=np.uint8
    )
    return MaskPicture(
        title="clip", frames=frames, scores=scores.reshape(grid.units),
        scores_note="where the image teacher looks (brighter: more)", strategies=strategies,
        ratios=ratios,
    )  # fmt: skip


@pytest.mark.parametrize("scope", Scope)
def test_every_strategy_shows_as_many_units_and_is_what_training_draws(scope):
    spec = MaskSpec(strategy=Strategy.TUBE, scope=scope, ratio=0.8, seed=3)
    strategies, _ = draw_masks(spec, _scores(GRID), GRID, uid="shard/0/clip")
    assert [mask.spec.strategy for mask in strategies] == [*Strategy]
    for mask in strategies:
        assert mask.visible.sum() == GRID.slots * num_visible(0.8, GRID.units_per_slot) == 12
        units = draw_mask(mask.spec, _scores(GRID), uid="shard/0/clip", view=0, draw=0)
        np.testing.assert_array_equal(np.flatnonzero(mask.visible), units)
        assert mask.count == "12 of 64 units"
    for mask in strategies:
        tubes = (mask.visible == mask.visible[:1]).all()
        assert tubes == mask.spec.strategy.is_tube or scope is Scope.CLIP
    assert WORDS.keys() == {*Strategy}


@pytest.mark.parametrize("strategy", Strategy)
def test_a_higher_ratio_shows_a_subset(strategy):
    spec = MaskSpec(strategy=strategy, scope=Scope.SLOT, ratio=0.75, seed=3)
    _, ratios = draw_masks(spec, _scores(GRID), GRID, uid="shard/0/clip")
    assert [mask.spec.ratio for mask in ratios] == sorted({*RATIOS, 0.75})
    for wide, narrow in itertools.pairwise(ratios):
        assert (narrow.visible <= wide.visible).all()
        assert narrow.visible.sum() < wide.visible.sum()


def test_the_picture_has_a_row_for_every_strategy_and_ratio():
    picture = _picture(GRID)
    figure = show_masks(picture)
    assert len(figure.axes) == GRID.slots * (2 + len(Strategy) + len(RATIOS) + 1)
    words = "\n".join(text.get_text() for text in figure.texts)
    assert all(strategy in words for strategy in Strategy)
    assert "75 % hidden: 16 of 64 units\n" in f"{words}\n"
    assert words.count("of 64 units") == len(Strategy) + len(RATIOS) + 1
    assert words.count("as this run") == 1
    framed = [sum(len(axes.patches) for axes in figure.axes[i::4]) for i in range(4)]
    assert sum(framed) == sum(mask.visible.sum() for mask in picture.ratios[1:])


@pytest.mark.parametrize("size", [(4, 64, 64), (8, 64, 128), (16, 224, 224)])
def test_pictures_are_wide_and_their_words_apart(size):
    figure = show_masks(_picture(Grid(num_frames=size[0], height=size[1], width=size[2])))
    width, height = figure.get_size_inches()
    assert width <= 15
    assert width > height
    assert_words_are_apart(figure)
