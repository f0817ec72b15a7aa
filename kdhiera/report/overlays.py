"""What is known of the cells of a frame, drawn over its pixels: scores, and what is hidden."""

from __future__ import annotations

import matplotlib
import numpy as np
from jaxtyping import Bool, Float, UInt8

GREY = np.array([0.299, 0.587, 0.114])  # luma of red, green, blue (ITU-R BT.601)


def dim_hidden(
    frame: UInt8[np.ndarray, "h w 3"], visible: Bool[np.ndarray, "y x"]
) -> Float[np.ndarray, "h w 3"]:
    """The frame in 0..1 with hidden units grey and flat: neither dark nor bright ones stand out."""
    colour = frame / 255.0
    flat = 0.5 + 0.22 * ((colour @ GREY)[..., None] - 0.5)
    return np.where(_stretch(visible, frame.shape)[..., None], colour, flat)


def heat(
    frame: UInt8[np.ndarray, "h w 3"], scores: Float[np.ndarray, "y x"], top: float
) -> Float[np.ndarray, "h w 3"]:
    """The frame in grey, in 0..1, under its scores: the higher, the brighter and denser.

    Args:
        frame: Pixels.
        scores: Shown cell by cell, as they are.
        top: Score of the brightest colour.
    """
    share = np.clip(_stretch(scores, frame.shape) / top, 0.0, 1.0)
    grey = np.broadcast_to((frame / 255.0 @ GREY)[..., None], frame.shape)
    colour = matplotlib.colormaps["inferno"](share)[..., :3]
    weight = 0.45 + 0.35 * share[..., None]
    return np.asarray((1 - weight) * grey * 0.8 + weight * colour)


def _stretch(cells: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Every cell repeated over the pixels it covers."""
    y = np.arange(shape[0]) * cells.shape[0] // shape[0]
    x = np.arange(shape[1]) * cells.shape[1] // shape[1]
    return np.asarray(cells[y[:, None], x[None, :]])


def top_score(scores: Float[np.ndarray, "slots y x"]) -> float:
    """The score to draw brightest: one outlier must not darken all else, even scores no peak."""
    return max(float(np.percentile(scores, 97)), 2 * float(scores.mean()), 1e-30)
