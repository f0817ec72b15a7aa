"""Features as colours: their three strongest directions of variation as red, green and blue."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True, kw_only=True)
class ColourBasis:
    """Three directions in feature space and the range that colours span along each.

    Args:
        mean: Subtracted first.
        directions: Orthonormal columns; zero where the features vary in fewer than three.
        low: Projection shown as 0.
        high: Projection shown as 1.
    """

    mean: Float[np.ndarray, " c"]
    directions: Float[np.ndarray, "c 3"]
    low: Float[np.ndarray, " 3"]
    high: Float[np.ndarray, " 3"]


def fit_colours(
    features: Float[np.ndarray, "*grid c"], like: Float[np.ndarray, "*grid 3"] | None = None
) -> ColourBasis:
    """Principal directions of the features, made definite, with robust ranges.

    The sign of a principal direction means nothing: each points where the projections
    are skewed to, or, given `like`, so that signs and order match its colours best.

    Args:
        features: Centred here; at least one token.
        like: Colours of another model on the same grid to come close to.

    Returns:
        Directions of the three largest singular values; ranges from the 2nd to the 98th
        percentile.
    """
    flat = features.reshape(-1, features.shape[-1]).astype(np.float64)
    mean = flat.mean(0)
    _, singular, rows = np.linalg.svd(flat - mean, full_matrices=False)
    # Directions without variation would colour rounding errors.
    rows = rows[:3][singular[:3] > 1e-6 * max(singular[0], np.abs(flat).max(), 1e-30)]
    directions = np.zeros((flat.shape[1], 3))
    directions[:, : len(rows)] = rows.T
    projected = (flat - mean) @ directions
    if like is None:
        signs = np.where((projected**3).sum(0) < 0, -1.0, 1.0)
        directions = directions * signs
    else:
        directions = directions @ _match(projected, like.reshape(-1, 3))
    low, high = np.percentile((flat - mean) @ directions, [2, 98], axis=0)
    return ColourBasis(mean=mean, directions=directions, low=low, high=high)


def _match(
    projected: Float[np.ndarray, "n 3"], like: Float[np.ndarray, "n 3"]
) -> Float[np.ndarray, "3 3"]:
    """Signed permutation of columns that correlates most with `like`, greedily."""
    a, b = projected - projected.mean(0), like - like.mean(0)
    scale = np.linalg.norm(a, axis=0)[:, None] * np.linalg.norm(b, axis=0)[None, :]
    correlation = (a.T @ b) / np.maximum(scale, 1e-30)
    left = np.abs(correlation)
    matrix = np.zeros((3, 3))
    for _ in range(3):
        i, j = np.unravel_index(int(np.argmax(left)), left.shape)
        matrix[i, j] = -1.0 if correlation[i, j] < 0 else 1.0
        left[i, :], left[:, j] = -1.0, -1.0
    return matrix


def to_colours(
    features: Float[np.ndarray, "*grid c"], basis: ColourBasis
) -> Float[np.ndarray, "*grid 3"]:
    """Red, green and blue in 0..1 of every token; mid-grey where a direction is empty."""
    projected = (features - basis.mean) @ basis.directions
    span = basis.high - basis.low
    scaled = (projected - basis.low) / np.where(span > 0, span, 1.0)
    return np.asarray(np.clip(np.where(span > 0, scaled, 0.5), 0.0, 1.0))
