import numpy as np
import pytest

from kdhiera.report.colours import fit_colours, to_colours


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
