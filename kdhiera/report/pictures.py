"""What a clip, its scores, its mask and its features look like, as one picture.

A column for each slot (two frames; the first is shown), a row for each thing to see:

    the clip        | slot 0 | slot 1 | ...
    the scores      |
    what is shown   |
    features        |  the three strongest directions of variation as red, green, blue
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib.figure import Figure

from kdhiera.errors import UsageError
from kdhiera.grid import TUBELET_FRAMES
from kdhiera.report.colours import ColourBasis, fit_colours, to_colours
from kdhiera.report.overlays import dim_hidden, heat, top_score
from kdhiera.report.strips import Strip, draw_strips, split

COLOUR_NOTE = "Feature colours: the three strongest directions of variation as red, green and blue."


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


def show_clip(picture: ClipPicture) -> Figure:
    """Draw a clip; wide enough for a slide.

    Args:
        picture: What to draw.

    Raises:
        UsageError: If a row's `colours_of` names no earlier row of equal width.
    """
    rows = _rows(picture)
    height, width = picture.frames.shape[1:3]
    return draw_strips(
        picture.title,
        split(rows, aspect=width / height),
        aspect=width / height,
        foot=COLOUR_NOTE if picture.feature_rows else "",
    )


def _rows(picture: ClipPicture) -> list[Strip]:
    frames = picture.frames[::TUBELET_FRAMES]
    rows = [Strip(title="What the clip shows", images=tuple(f / 255.0 for f in frames))]
    if picture.scores is not None:
        top = top_score(picture.scores)
        images = tuple(heat(f, s, top) for f, s in zip(frames, picture.scores, strict=True))
        rows.append(Strip(title=picture.scores_title, images=images))
    if picture.visible is not None:
        images = tuple(dim_hidden(f, v) for f, v in zip(frames, picture.visible, strict=True))
        seen, of = int(picture.visible.sum()), picture.visible.size
        rows.append(Strip(title=f"What the student is shown: {seen} of {of} units", images=images))
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
        rows.append(Strip(title=row.title, images=tuple(colours)))
    return rows
