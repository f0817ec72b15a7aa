import numpy as np

from kdhiera.report.overlays import dim_hidden, heat, top_score


def test_hidden_units_are_grey_and_visible_ones_untouched():
    rng = np.random.default_rng(6)
    frame = rng.integers(0, 256, size=(64, 96, 3), dtype=np.uint8)
    visible = np.array([[True, False, False], [False, False, True]])
    image = dim_hidden(frame, visible)
    for y in range(2):
        for x in range(3):
            unit = (slice(32 * y, 32 * y + 32), slice(32 * x, 32 * x + 32))
            if visible[y, x]:
                np.testing.assert_array_equal(image[unit], frame[unit] / 255.0)
            else:
                assert np.ptp(image[unit], axis=-1).max() == 0
                assert image[unit].min() >= 0.38
                assert image[unit].max() <= 0.62


def test_higher_scores_are_brighter_cell_by_cell():
    frame = np.full((64, 64, 3), 128, dtype=np.uint8)
    image = heat(frame, np.array([[0.0, 0.25], [0.5, 1.0]]), 1.0)
    brightness = image.reshape(2, 32, 2, 32, 3).mean((1, 3, 4))
    assert brightness[0, 0] < brightness[0, 1] < brightness[1, 0] < brightness[1, 1]
    assert image.min() >= 0
    assert image.max() <= 1


def test_neither_an_outlier_nor_even_scores_spoil_the_range():
    scores = np.ones((2, 8, 8))
    assert top_score(scores) == 2  # nothing is a peak where all are alike
    scores[0, 0, 0] = 1e6
    assert top_score(scores) < 1e5
