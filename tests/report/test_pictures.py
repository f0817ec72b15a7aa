import numpy as np
import pytest

from kdhiera.errors import UsageError
from kdhiera.report.pictures import (
    ClipPicture,
    FeatureRow,
    dim_hidden,
    fit_colours,
    heat,
    show_clip,
    to_colours,
)
from kdhiera.report.plots import save


def _features(seed, *, grid=(4, 8, 8), width=32):
    """Three strong directions and weak noise."""
    rng = np.random.default_rng(seed)
    hidden = rng.gamma(2.0, size=(*grid, 3)) * [5.0, 3.0, 2.0]
    return hidden @ rng.normal(size=(3, width)) + 0.01 * rng.normal(size=(*grid, width)) + 4


def test_directions_are_the_covariances_eigenvectors():
    features = _features(0)
    basis = fit_colours(features)
    flat = features.reshape(-1, 32)
    _, vectors = np.linalg.eigh(np.cov(flat.T))
    overlap = np.abs((basis.directions * vectors[:, :-4:-1]).sum(0))
    np.testing.assert_allclose(overlap, 1, atol=1e-9)
    np.testing.assert_allclose(basis.mean, flat.mean(0))


def test_colours_fill_their_range_and_do_not_depend_on_sign():
    features = _features(1)
    colours = to_colours(features, fit_colours(features))
    assert colours.shape == (4, 8, 8, 3)
    assert colours.min() == 0
    assert colours.max() == 1
    projected = (features.reshape(-1, 32) - features.reshape(-1, 32).mean(0)) @ fit_colours(
        features
    ).directions
    assert ((projected**3).sum(0) > 0).all()
    again = to_colours(-features, fit_colours(-features))
    np.testing.assert_allclose(np.sort(again, axis=None), np.sort(colours, axis=None), atol=1e-6)


def test_one_outlier_does_not_take_the_whole_range():
    features = _features(2)
    spoilt = features.copy()
    spoilt[0, 0, 0] += 0.3 * features.std() * np.sign(features[0, 0, 0])
    colours = to_colours(spoilt, fit_colours(spoilt))
    assert np.median(np.abs(colours - 0.5)) > 0.1


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_features_of_low_rank_leave_channels_grey(rank):
    rng = np.random.default_rng(3)
    features = rng.normal(size=(2, 4, 4, rank)) @ rng.normal(size=(rank, 16)) + 3
    colours = to_colours(features, fit_colours(features))
    np.testing.assert_array_equal(colours[..., rank:], 0.5)
    assert (colours[..., :rank].std((0, 1, 2)) > 0.1).all()


def test_a_rotated_model_gets_the_first_models_colours():
    features = _features(4)
    rotation = np.linalg.qr(np.random.default_rng(5).normal(size=(32, 32)))[0]
    first = to_colours(features, fit_colours(features))
    turned = -features @ rotation
    matched = to_colours(turned, fit_colours(turned, like=first))
    np.testing.assert_allclose(matched, first, atol=1e-6)


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


def _picture(slots=4, px=64, rows=()):
    rng = np.random.default_rng(7)
    return ClipPicture(
        title="dogs/$5_run\n.mp4",
        frames=rng.integers(0, 256, size=(2 * slots, px, px, 3), dtype=np.uint8),
        scores=rng.random((slots, px // 16, px // 16)),
        visible=rng.random((slots, px // 32, px // 32)) < 0.3,
        feature_rows=tuple(rows),
    )


def _images(figure):
    return [axes.images[0].get_array() for axes in figure.axes]


def test_the_first_frame_of_every_slot_is_shown(tmp_path):
    picture = _picture()
    figure = show_clip(picture)
    shown = _images(figure)
    assert len(shown) == 3 * 4
    for image, frame in zip(shown, picture.frames[::2], strict=False):
        np.testing.assert_allclose(image, frame / 255.0)
    save(figure, tmp_path / "clip.png")


def test_predictions_share_the_colours_of_what_they_predict():
    features = _features(8, grid=(4, 4, 4))
    rows = [
        FeatureRow(title="teacher", features=features),
        FeatureRow(title="student", features=_features(9, grid=(4, 4, 4), width=20)),
        FeatureRow(title="prediction", features=features, colours_of="teacher"),
    ]
    shown = _images(show_clip(_picture(rows=rows)))
    for teacher, prediction in zip(shown[12:16], shown[20:24], strict=True):
        np.testing.assert_array_equal(teacher, prediction)


@pytest.mark.parametrize(
    ("slots", "num_features"), [(1, 0), (2, 3), (4, 0), (4, 1), (4, 3), (8, 3), (16, 1)]
)
def test_pictures_are_wider_than_tall_and_images_do_not_overlap(slots, num_features):
    rows = [
        FeatureRow(title=str(i), features=_features(i, grid=(slots, 4, 4)))
        for i in range(num_features)
    ]
    figure = show_clip(_picture(slots=slots, rows=rows))
    width, height = figure.get_size_inches()
    assert width <= 15
    assert width > height
    boxes = [axes.get_position() for axes in figure.axes]
    assert len(boxes) == slots * (3 + num_features)
    for i, a in enumerate(boxes):
        assert a.x0 >= 0
        assert a.y0 >= 0
        assert a.x1 <= 1
        assert a.y1 <= 1
        for b in boxes[:i]:
            apart = (a.x0 >= b.x1, b.x0 >= a.x1, a.y0 >= b.y1, b.y0 >= a.y1)
            assert any(apart)


@pytest.mark.parametrize("name", ["nobody", "narrow"])
def test_colours_of_a_row_that_cannot_lend_them_are_refused(name):
    rows = [
        FeatureRow(title="teacher", features=_features(0, grid=(4, 4, 4))),
        FeatureRow(title="narrow", features=_features(1, grid=(4, 4, 4), width=8)),
        FeatureRow(title="student", features=_features(2, grid=(4, 4, 4)), colours_of=name),
    ]
    with pytest.raises(
        UsageError, match=rf"'student' \(32 wide\).*{name!r}.*before it are: teacher$"
    ):
        show_clip(_picture(rows=rows))
