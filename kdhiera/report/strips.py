"""Rows of images with a title each, in blocks side by side: what most pictures are made of.

block 0                   block 1
title                     title
| slot 0 | slot 1 | ...   | slot 0 | slot 1 | ...
title                     title
| slot 0 | slot 1 | ...   | slot 0 | slot 1 | ...
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from kdhiera.report.plots import INK, plain

LEAST_ASPECT = 4 / 3  # width over height of all rows together
OUTLINE = "#E69F00"
SOFT = "#606060"  # of notes: paler would not survive a projector
TOTAL, LARGEST_CELL, LEAST_BLOCK = 13.0, 2.0, 4.0  # widths in inches
GAP, BETWEEN, TOP, EDGE = 0.04, 0.35, 0.55, 0.15
HEADING, NOTE = 0.34, 0.19


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One row: an image for every slot.

    Args:
        title: What is seen, in plain words.
        images: In 0..1, all of one size.
        note: More words, in a line of their own.
        outlined: Cells of every image that get a frame; None outlines nothing.
    """

    title: str
    images: tuple[Float[np.ndarray, "h w 3"], ...]
    note: str = ""
    outlined: Bool[np.ndarray, "slots y x"] | None = None


def split(
    rows: Sequence[Strip], *, aspect: float, beside: Sequence[Strip] = ()
) -> list[Sequence[Strip]]:
    """Rows in as few blocks side by side as make the picture wide.

    Args:
        rows: In order; at least one.
        aspect: Width over height of an image.
        beside: A block of its own that will stand beside them.
    """
    wide = len(rows[0].images) * aspect

    def aspect_of(blocks: int) -> float:
        depth = max(math.ceil(len(rows) / blocks), len(beside))
        return wide * (blocks + bool(beside)) / depth

    blocks = next((b for b in range(1, len(rows)) if aspect_of(b) >= LEAST_ASPECT), len(rows))
    depth = math.ceil(len(rows) / blocks)
    return [rows[i : i + depth] for i in range(0, len(rows), depth)]


def draw_strips(
    title: str, blocks: Sequence[Sequence[Strip]], *, aspect: float, foot: str = ""
) -> Figure:
    """Draw blocks of rows.

    Args:
        title: Of the whole, in plain words.
        blocks: From left to right; every row has as many images.
        aspect: Width over height of an image.
        foot: A line below; empty leaves it out.
    """
    slots = len(blocks[0][0].images)
    cell = min(LARGEST_CELL, TOTAL / (slots * len(blocks)))
    tall = cell / aspect
    heading = HEADING + (NOTE if any(row.note for block in blocks for row in block) else 0)
    block_width = max(slots * cell + (slots - 1) * GAP, min(LEAST_BLOCK, TOTAL / len(blocks)))
    depth = max(map(len, blocks))
    width = 2 * EDGE + len(blocks) * block_width + (len(blocks) - 1) * BETWEEN
    height = TOP + depth * (heading + tall) + (0.4 if foot else EDGE)
    figure = Figure(figsize=(width, height), facecolor="white")

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text(x / width, y / height, plain(text), **style)

    write(EDGE, height - 0.18, title, size=15, weight="bold", va="top", color=INK)
    for number, block in enumerate(blocks):
        left = EDGE + number * (block_width + BETWEEN)
        for place, row in enumerate(block):
            bottom = height - TOP - (place + 1) * (heading + tall)
            above = bottom + tall + 0.07
            write(left, above + (NOTE if row.note else 0), row.title, size=11.5, color=INK)
            write(left, above, row.note, size=9.5, color=SOFT)
            for slot, image in enumerate(row.images):
                x = left + slot * (cell + GAP)
                axes = figure.add_axes((x / width, bottom / height, cell / width, tall / height))
                axes.imshow(image, interpolation="nearest", aspect="auto")
                axes.set_axis_off()
                if row.outlined is not None:
                    for outline in _outlines(row.outlined[slot], image.shape):
                        axes.add_patch(outline)
    if foot:
        write(EDGE, 0.12, foot, size=9, color=SOFT)
    return figure


def _outlines(cells: Bool[np.ndarray, "y x"], shape: tuple[int, ...]) -> list[Rectangle]:
    """A frame just inside every cell that is set."""
    y, x = shape[0] / cells.shape[0], shape[1] / cells.shape[1]
    inset = 0.04
    return [
        Rectangle(
            ((j + inset) * x - 0.5, (i + inset) * y - 0.5),
            (1 - 2 * inset) * x,
            (1 - 2 * inset) * y,
            fill=False,
            edgecolor=OUTLINE,
            linewidth=2.0,
        )
        for i, j in np.argwhere(cells)
    ]
