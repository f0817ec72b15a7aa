import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdhiera.evaluation.agreement import HeadFit, linear_cka, unit_tokens
from kdhiera.grid import Grid
from kdhiera.objective.losses import RunningMean, cosine


def _features(seed: int, tokens: int = 60, width: int = 7) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(tokens, width)) @ rng.normal(size=(width, width)) + rng.normal(
        size=width
    )
    return torch.from_numpy(mixed).float()


def _slow_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with Gram matrices, as the paper has it."""
    n = len(x)
    centring = np.eye(n) - np.ones((n, n)) / n
    k, l = (f.double().numpy() @ f.double().numpy().T for f in (x, y))  # noqa: E741

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.trace(a @ centring @ b @ centring)) / (n - 1) ** 2

    return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


def test_cka_is_the_papers_formula_on_gram_matrices():
    xs = [_features(i, width=w) for i, w in enumerate((3, 7, 90))]
    ys = [_features(10 + i, width=w) for i, w in enumerate((5, 7))]
    wanted = [[_slow_cka(x, y) for y in ys] for x in xs]
    np.testing.assert_allclose(linear_cka(xs, ys), wanted, rtol=1e-9)


@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 100), shift=st.floats(-10, 10))
def test_cka_is_one_with_itself_turned_scaled_and_shifted(seed, scale, shift):
    x = _features(seed)
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(7, 7)))[0]
    same = scale * x.double() @ torch.from_numpy(turn) + shift
    np.testing.assert_allclose(linear_cka([x], [x, same]), 1, rtol=1e-5)


def test_cka_lies_between_nought_and_one_and_is_symmetric():
    xs, ys = [_features(1), _features(2, width=4)], [_features(3), _features(1) + _features(2)]
    cka = linear_cka(xs, ys)
    assert ((cka > 0) & (cka < 1)).all()
    np.testing.assert_allclose(linear_cka(ys, xs), cka.T, rtol=1e-12)


def test_independent_features_of_many_tokens_have_little_cka():
    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(rng.normal(size=(20_000, 8))) for _ in range(2))
    assert linear_cka([x], [y])[0, 0] < 0.01


def test_a_layer_that_says_the_same_of_every_token_has_no_cka():
    same = torch.full((60, 4), 0.1)
    cka = linear_cka([same, _features(0)], [_features(1)])
    assert np.isnan(cka[0, 0])
    assert np.isfinite(cka[1, 0])


@pytest.mark.parametrize("n", [4, 16, 64])
def test_tokens_of_a_unit_are_averaged_by_quarters(n):
    side = int(n**0.5)
    grid = torch.randn(2, 3, side, side, 5)
    pooled = unit_tokens(grid.reshape(2, 3, n, 5))
    half = side // 2
    for i, (y, x) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        part = grid[:, :, half * y : half * (y + 1), half * x : half * (x + 1)]
        torch.testing.assert_close(pooled[:, :, i], part.mean((2, 3)))
    assert Grid(num_frames=2, height=32, width=32).num_units * 4 == pooled.shape[2]


@pytest.mark.parametrize("kind", ["smooth_l1", "mse", "cosine", "cosine_smooth_l1"])
def test_fits_of_batches_are_the_fit_of_all(kind):
    predicted, target = torch.randn(10, 3, 4, 6), torch.randn(10, 3, 4, 6) + 1
    mean = RunningMean(6, torch.device("cpu"))
    mean.update(target)
    fit = HeadFit(kind=kind, beta=0.5)
    for part in (slice(0, 7), slice(7, 10)):
        fit.add(predicted[part], target[part], mean.mean)
    wanted = mean.explained_variance(predicted, target, kind, beta=0.5)
    assert fit.explained_variance == pytest.approx(float(wanted), rel=1e-5)
    assert fit.cosine == pytest.approx(float(cosine(predicted, target)), rel=1e-5)
    constant = cosine(mean.mean.expand_as(target), target)
    assert fit.constant_cosine == pytest.approx(float(constant), rel=1e-5)
    assert fit.tokens == 120


def test_a_perfect_head_explains_all_and_the_mean_nothing():
    target = torch.randn(8, 2, 4, 6) + 2
    mean = target.mean((0, 1, 2))
    perfect, constant = HeadFit(kind="mse", beta=1.0), HeadFit(kind="mse", beta=1.0)
    perfect.add(target, target, mean)
    constant.add(mean.expand_as(target), target, mean)
    assert perfect.explained_variance == 1
    assert perfect.cosine == pytest.approx(1, abs=1e-6)
    assert constant.explained_variance == 0
    assert constant.cosine == constant.constant_cosine > 0.5
