"""What a clip, its scores, its mask and its features look like, as one picture.

A column for each slot (two frames; the first is shown), a row for each thing to see:

    the clip        | slot 0 | slot 1 | ...
    the scores      |
    what is shown   |
    features        |  the three strongest directions of variation as red, green, blue
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import matplotlib
import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib.figure import Figure

from kdhiera.errors import UsageError
from kdhiera.grid import TUBELET_FRAMES
from kdhiera.report.plots import plain

FAINT = "#777777"
COLOUR_NOTE = "Feature colours: the three strongest directions of variation as red, green and blue."
GREY = np.array([0.299, 0.587, 0.114])  # luma of red, green, blue (ITU-R BT.601)
LEAST_ASPECT = 4 / 3  # width over height of all rows together


@dataclass(frozen=True, kw_only=True)
class FeatureRow:
    """Features of one model for every slot.

    Args:
        title: Whose features, in plain words.
        features: On any grid; only its proportions are shown.
        colours_of: Title of an earlier row of equal width whose directions are used, for
            features that predict that row's; None finds directions of their own.
    """

    title: str
    features: Float[np.ndarray, "slots y x c"]
    colours_of: str | None = None


@dataclass(frozen=True, kw_only=True)
class ClipPicture:
    """All that `show_clip` draws of one clip.

    Args:
        title: Which clip, in plain words.
        frames: The clip as the teachers see it; two frames a slot.
        scores: Larger was more likely to be shown; on units or tokens. None leaves it out.
        scores_title: Where the scores come from, in plain words.
        visible: True where the student sees the unit. None leaves the mask out.
        feature_rows: Drawn below in this order.
    """

    title: str
    frames: UInt8[np.ndarray, "f h w 3"]
    scores: Float[np.ndarray, "slots y x"] | None = None
    scores_title: str = "Where the image teacher looks (brighter: more)"
    visible: Bool[np.ndarray, "slots y x"] | None = None
    feature_rows: tuple[FeatureRow, ...] = ()


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


@dataclass(frozen=True, kw_only=True)
class _Row:
    title: str
    images: tuple[Float[np.ndarray, "h w 3"], ...]


def show_clip(picture: ClipPicture) -> Figure:
    """Draw a clip; wide enough for a slide.

    Args:
        picture: What to draw.

    Raises:
        UsageError: If a row's `colours_of` names no earlier row of equal width.
    """
    rows = _rows(picture)
    slots, (height, width) = len(rows[0].images), picture.frames.shape[1:3]
    blocks = _num_blocks(len(rows), slots * width / height)
    depth = math.ceil(len(rows) / blocks)
    # In inches: images, then what stands around them.
    cell = min(2.0, 13.0 / (slots * blocks))
    tall = cell * height / width
    gap, between, heading, top, edge = 0.04, 0.35, 0.34, 0.55, 0.15
    foot = 0.4 if picture.feature_rows else edge
    block = slots * cell + (slots - 1) * gap
    size = (
        2 * edge + blocks * block + (blocks - 1) * between,
        top + depth * (heading + tall) + foot,
    )
    figure = Figure(figsize=size, facecolor="white")
    figure.text(
        edge / size[0], 1 - 0.18 / size[1], plain(picture.title), size=15, weight="bold", va="top"
    )
    for number, row in enumerate(rows):
        left = edge + number // depth * (block + between)
        bottom = size[1] - top - (number % depth + 1) * (heading + tall)
        figure.text(
            left / size[0],
            (bottom + tall + 0.07) / size[1],
            plain(row.title),
            size=11.5,
            va="bottom",
        )
        for slot, image in enumerate(row.images):
            axes = figure.add_axes(
                (
                    (left + slot * (cell + gap)) / size[0],
                    bottom / size[1],
                    cell / size[0],
                    tall / size[1],
                )
            )
            axes.imshow(image, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
    if picture.feature_rows:
        figure.text(edge / size[0], 0.1 / size[1], COLOUR_NOTE, size=8.5, color=FAINT)
    return figure


def _num_blocks(num_rows: int, row_aspect: float) -> int:
    """The fewest blocks of rows side by side that make the picture wide."""
    return next(
        (b for b in range(1, num_rows) if row_aspect * b / math.ceil(num_rows / b) >= LEAST_ASPECT),
        num_rows,
    )


def _rows(picture: ClipPicture) -> list[_Row]:
    frames = picture.frames[::TUBELET_FRAMES]
    rows = [_Row(title="What the clip shows", images=tuple(f / 255.0 for f in frames))]
    if picture.scores is not None:
        # One outlier must not darken all else, and even scores are no peak.
        top = max(float(np.percentile(picture.scores, 97)), 2 * float(picture.scores.mean()), 1e-30)
        images = tuple(heat(f, s, top) for f, s in zip(frames, picture.scores, strict=True))
        rows.append(_Row(title=picture.scores_title, images=images))
    if picture.visible is not None:
        images = tuple(dim_hidden(f, v) for f, v in zip(frames, picture.visible, strict=True))
        seen, of = int(picture.visible.sum()), picture.visible.size
        rows.append(_Row(title=f"What the student is shown: {seen} of {of} units", images=images))
    bases: dict[str, tuple[ColourBasis, int]] = {}
    first: np.ndarray | None = None
    for row in picture.feature_rows:
        width = row.features.shape[-1]
        if row.colours_of is not None:
            basis, wanted = bases.get(row.colours_of, (None, 0))
            if basis is None or wanted != width:
                raise UsageError(
                    f"the row {row.title!r} ({width} wide) takes its colours from "
                    f"{row.colours_of!r}, but the rows of that width before it are: "
                    f"{', '.join(t for t, (_, w) in bases.items() if w == width) or 'none'}"
                )
        else:
            like = (
                first
                if first is not None and first.shape == (*row.features.shape[:-1], 3)
                else None
            )
            basis = fit_colours(row.features, like)
        bases[row.title] = basis, width
        colours = to_colours(row.features, basis)
        first = colours if first is None else first
        rows.append(_Row(title=row.title, images=tuple(colours)))
    return rows
