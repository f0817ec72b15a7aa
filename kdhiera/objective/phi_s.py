"""PHI-S: features turned and scaled so that every dimension has unit variance.

    target = Q U' (feature - mean) / alpha        alpha^2 = mean eigenvalue of the covariance

U holds the principal components, and Q turns them so that each dimension takes an equal
share of all eigenvalues (arXiv:2410.01680). One scale for all dimensions keeps the map
an isometry up to that scale: an error of the target is the same error of the feature in
every direction, and weak directions are not blown up as by whitening.

Q is a Hadamard matrix where a Sylvester or Paley construction has one of the order (as in
the paper), which spreads the eigenvalues evenly whatever they are. Elsewhere the Hartley
matrix spreads them nearly evenly, and plane rotations make the variances equal.
`docs/decisions/011-phi-s-from-kept-units.md` says what the covariance is taken from.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

VARIANCE_FLOOR = 1e-12
_EQUAL = 1e-12  # variances that differ by less than this share are equal


class Scatter:
    """Mean and covariance of tokens that come in batches, in float64.

    Sums are taken about the mean of the first batch, so that they do not cancel.

    Args:
        width: Channels.
        device: Where the tokens are.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = 0
        self._origin: Tensor | None = None
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        self._products = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update(self, tokens: Float[Tensor, "*n c"]) -> None:
        """Take the tokens of one batch in."""
        flat = tokens.reshape(-1, tokens.shape[-1]).double()
        if self._origin is None:
            self._origin = flat.mean(0)
        shifted = flat - self._origin
        self.count += len(flat)
        self._sum += shifted.sum(0)
        self._products += shifted.T @ shifted

    @property
    def mean(self) -> Float64[np.ndarray, " c"]:
        """Per channel."""
        assert self._origin is not None, "no tokens were taken in"
        mean: Float64[np.ndarray, " c"] = (self._origin + self._sum / self.count).cpu().numpy()
        return mean

    @property
    def covariance(self) -> Float64[np.ndarray, "c c"]:
        """Population form."""
        assert self.count, "no tokens were taken in"
        mean = self._sum / self.count
        covariance = self._products / self.count - torch.outer(mean, mean)
        matrix: Float64[np.ndarray, "c c"] = covariance.cpu().numpy()
        return matrix


def phi_s_matrix(covariance: Float64[np.ndarray, "c c"]) -> Float64[np.ndarray, "c c"]:
    """The map from centred features to PHI-S targets, `target = matrix @ centred`.

    The sign of each component is fixed by its largest entry,
    so that one covariance gives one matrix (components of equal variance excepted).

    Args:
        covariance: Symmetric, of the features.

    Returns:
        A rotation divided by `alpha`: under the covariance every target has variance 1.
    """
    variances, components = np.linalg.eigh((covariance + covariance.T) / 2)
    order = np.argsort(variances)[::-1]
    variances, components = np.maximum(variances[order], 0.0), components[:, order]
    largest = np.abs(components).argmax(0)
    components *= np.sign(components[largest, np.arange(len(components))])
    alpha = math.sqrt(max(float(variances.mean()), VARIANCE_FLOOR))
    matrix: Float64[np.ndarray, "c c"] = equal_shares(variances) @ components.T / alpha
    return matrix


def equal_shares(variances: Float64[np.ndarray, " c"]) -> Float64[np.ndarray, "c c"]:
    """An orthogonal Q for which `Q diag(variances) Q'` has a constant diagonal.

    Args:
        variances: Not negative.
    """
    order = len(variances)
    found = hadamard(order)
    if found is not None:
        return found / math.sqrt(order)
    rotation = _hartley(order)
    turned = (rotation * variances) @ rotation.T
    _rotate_to_equal_diagonal(turned, rotation)
    return rotation


@lru_cache(maxsize=8)
def hadamard(order: int) -> Float64[np.ndarray, "n n"] | None:
    """A matrix of +-1 with orthogonal rows, or None where no construction here gives one.

    Orders 1 and 2, `q + 1` for primes q = 3 mod 4 and `2 q + 2` for primes q = 1 mod 4
    (Paley, 1933), and twice any of these (Sylvester, 1867). That has 192, 320, 384, 512, 640,
    768, 1024, 1152, 1280, 1408, 1536 and 1664; what needs prime powers (52, 100) is left out.

    Args:
        order: At least 1.
    """
    if order <= 2:
        return np.array([[1.0, 1.0], [1.0, -1.0]])[:order, :order]
    if order % 4:
        return None
    half = hadamard(order // 2)
    if half is not None:
        return np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), half)
    if _is_prime(order - 1):
        core = _paley_core(order - 1, corner=-1.0)
        return core + np.eye(order)
    q = order // 2 - 1
    if _is_prime(q) and q % 4 == 1:
        core = _paley_core(q, corner=1.0)
        off, on = np.array([[1.0, 1.0], [1.0, -1.0]]), np.array([[1.0, -1.0], [-1.0, -1.0]])
        return np.kron(core, off) + np.kron(np.eye(q + 1), on)
    return None


def _paley_core(q: int, *, corner: float) -> Float64[np.ndarray, "n n"]:
    """Conference matrix of order q + 1: quadratic residues bordered by ones.

    Skew for `corner` = -1 (q = 3 mod 4), symmetric for 1 (q = 1 mod 4).
    """
    residues = np.full(q, -1.0)
    residues[np.arange(1, q) ** 2 % q] = 1.0
    residues[0] = 0.0
    differences: Int[np.ndarray, "q q"] = (np.arange(q)[:, None] - np.arange(q)) % q
    core = np.zeros((q + 1, q + 1))
    core[0, 1:] = 1.0
    core[1:, 0] = corner
    core[1:, 1:] = residues[differences]
    return core


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))


def _hartley(order: int) -> Float64[np.ndarray, "n n"]:
    """The discrete Hartley transform, orthogonal, no entry above sqrt(2 / order)."""
    angle = 2 * np.pi / order * (np.outer(np.arange(order), np.arange(order)) % order)
    matrix: Float64[np.ndarray, "n n"] = (np.cos(angle) + np.sin(angle)) / math.sqrt(order)
    return matrix


def _rotate_to_equal_diagonal(
    matrix: Float64[np.ndarray, "n n"], rotation: Float64[np.ndarray, "n n"]
) -> None:
    """Turn a symmetric matrix in place until its diagonal is constant; so is `rotation`.

    Every plane rotation brings one entry to the mean, taking the smallest together with
    the largest (Bendel and Mickey, 1978), so `order - 1` of them are enough.
    """
    mean = np.trace(matrix) / len(matrix)
    for _ in range(len(matrix) - 1):
        diagonal = np.diagonal(matrix)
        low, high = int(diagonal.argmin()), int(diagonal.argmax())
        below, above = diagonal[low] - mean, diagonal[high] - mean
        if above - below <= _EQUAL * mean:
            return
        # the root of (cos^2 below + sin^2 above - 2 sin cos shared = 0) nearest to no turn
        shared = matrix[low, high]
        root = math.copysign(math.sqrt(shared**2 - below * above), shared)
        tangent = below / (shared + root)
        cosine = 1 / math.sqrt(1 + tangent**2)
        sine = cosine * tangent
        turn = np.array([[cosine, -sine], [sine, cosine]])
        pair = [low, high]
        matrix[pair] = turn @ matrix[pair]
        matrix[:, pair] = matrix[:, pair] @ turn.T
        rotation[pair] = turn @ rotation[pair]
