"""PHI-S against its definition: unit variances, one scale, invertible."""

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard as scipy_hadamard

from kdhiera.objective.phi_s import Scatter, equal_shares, hadamard, phi_s_matrix
from kdhiera.objective.targets import PhiS, normalise, statistics_from_state

WIDTHS = (64, 100, 101, 256, 333, 384, 768, 999, 1024)
OF_MODELS = (192, 320, 384, 512, 640, 768, 1024, 1152, 1280, 1408, 1536, 1664)


def covariance(width: int, seed: int = 0) -> np.ndarray:
    """Dense, its eigenvalues over seven orders of magnitude."""
    rng = np.random.default_rng([width, seed])
    rotation, _ = np.linalg.qr(rng.standard_normal((width, width)))
    return (rotation * np.logspace(2, -5, width)) @ rotation.T


@pytest.mark.parametrize("width", [*WIDTHS, 2, 3, 12, 65])
def test_every_dimension_has_unit_variance_and_one_scale_for_all(width: int) -> None:
    given = covariance(width)
    matrix = phi_s_matrix(given)
    found = matrix @ given @ matrix.T
    np.testing.assert_allclose(np.diagonal(found), 1.0, rtol=1e-10)
    alpha_squared = np.trace(given) / width
    np.testing.assert_allclose(matrix @ matrix.T * alpha_squared, np.eye(width), atol=1e-10)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_rotation_is_orthogonal_with_a_constant_diagonal(width: int) -> None:
    variances = np.logspace(2, -5, width)
    q = equal_shares(variances)
    np.testing.assert_allclose(q @ q.T, np.eye(width), atol=1e-10)
    np.testing.assert_allclose(np.diagonal((q * variances) @ q.T), variances.mean(), rtol=1e-10)


@pytest.mark.parametrize("width", [100, 101, 333])
def test_without_a_hadamard_matrix_no_dimension_is_one_component(width: int) -> None:
    """Eigenvalues are spread, as a Hadamard matrix would: no entry far above 1 / sqrt(width)."""
    assert hadamard(width) is None
    assert np.abs(equal_shares(np.logspace(2, -5, width))).max() < 2 / np.sqrt(width)


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 44, 60, 64, 148, 200, *OF_MODELS])
def test_hadamard_matrices(order: int) -> None:
    found = hadamard(order)
    assert found is not None
    assert found.shape == (order, order)
    assert set(np.unique(found)) <= {-1.0, 1.0}
    assert np.array_equal(found @ found.T, order * np.eye(order))


def test_powers_of_two_are_scipys() -> None:
    for order in (4, 64, 256):
        assert np.array_equal(hadamard(order), scipy_hadamard(order))


@pytest.mark.parametrize("order", [3, 6, 52, 100, 333])
def test_orders_without_a_construction(order: int) -> None:
    assert hadamard(order) is None


def test_scatter_is_numpys_covariance() -> None:
    """A mean of 1e4 deviations: nothing cancels."""
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((500, 7)) @ rng.standard_normal((7, 7)) + 1e4
    scatter = Scatter(7, torch.device("cpu"))
    for start in range(0, 500, 90):
        scatter.update(torch.from_numpy(tokens[start : start + 90]).view(-1, 2, 5, 7))
    assert scatter.count == 500
    np.testing.assert_allclose(scatter.mean, tokens.mean(0), rtol=1e-12)
    np.testing.assert_allclose(scatter.covariance, np.cov(tokens.T, bias=True), rtol=1e-9)


def phi_s_of(tokens: torch.Tensor) -> PhiS:
    scatter = Scatter(tokens.shape[-1], torch.device("cpu"))
    scatter.update(tokens)
    matrix = torch.from_numpy(phi_s_matrix(scatter.covariance))
    return PhiS(mean=torch.from_numpy(scatter.mean), matrix=matrix, count=scatter.count)


@pytest.mark.parametrize("width", [48, 50])
def test_targets_of_real_numbers(width: int) -> None:
    """float32 features: standardised, distances kept up to one factor, and invertible."""
    generator = torch.Generator().manual_seed(width)
    turn = torch.randn(width, width, generator=generator) * torch.logspace(1, -2, width)
    features = torch.randn(400, width, generator=generator) @ turn.T + 5
    statistics = phi_s_of(features.view(20, 5, 4, width))
    targets = normalise(features.view(20, 5, 4, width), "phi_s", statistics).view(-1, width)
    assert targets.dtype is torch.float32
    torch.testing.assert_close(targets.mean(0), torch.zeros(width), atol=1e-4, rtol=0)
    torch.testing.assert_close(targets.var(0, correction=0), torch.ones(width), atol=0, rtol=1e-4)
    ratio = torch.pdist(features[:50]) / torch.pdist(targets[:50])
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio), atol=0, rtol=1e-4)
    inverse = torch.linalg.inv(statistics.matrix)
    back = targets.double() @ inverse.T + statistics.mean
    torch.testing.assert_close(back.float(), features, atol=1e-4, rtol=1e-5)


def test_a_column_that_does_not_vary_stays_finite() -> None:
    features = torch.full((6, 4), 3.0)
    found = normalise(features, "phi_s", phi_s_of(features))
    assert torch.equal(found, torch.zeros(6, 4))


def test_a_checkpoint_gives_the_same_targets() -> None:
    features = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    statistics = phi_s_of(features)
    again = statistics_from_state(statistics.state_dict(), torch.device("cpu"))
    assert isinstance(again, PhiS)
    assert again.count == 40
    wanted = normalise(features, "phi_s", statistics)
    assert torch.equal(normalise(features, "phi_s", again), wanted)


def test_one_covariance_gives_one_matrix() -> None:
    """The signs of components, which a library is free to choose, do not matter."""
    given = covariance(24)
    order = np.random.default_rng(1).permutation(24)
    shuffled = phi_s_matrix(given[np.ix_(order, order)])
    np.testing.assert_allclose(shuffled, phi_s_matrix(given)[:, order], atol=1e-8)
