import numpy as np
import pytest

from kdhiera.errors import UsageError
from kdhiera.report.pictures import ClipPicture, FeatureRow, show_clip
from kdhiera.report.plots import save


def _features(seed, *, grid=(4, 8, 8), width=32):
    """Three strong directions and weak noise."""
    rng = np.random.default_rng(seed)
    hidden = rng.gamma(2.0, size=(*grid, 3)) * [5.0, 3.0, 2.0]
    return hidden @ rng.normal(size=(3, width)) + 0.01 * rng.normal(size=(*grid, width)) + 4


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
