"""How far the student agrees with its teachers, layer by layer: bars and heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from kdhiera.report.overlays import GREY
from kdhiera.report.plots import COLOURS, INK, clean, plain

COLOURMAP = "cividis"  # rises evenly in brightness, for colour-blind eyes too
SOFT = "#606060"
WIDTH, EDGE = 13.5, 0.15  # inches


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How well a head predicts one teacher layer.

    Args:
        target: `teacher/layer`.
        explained_variance: 1 - loss / loss of the mean.
        cosine: Mean cosine of prediction and target.
        constant_cosine: What the mean alone reaches.
    """

    target: str
    explained_variance: float
    cosine: float
    constant_cosine: float


@dataclass(frozen=True, kw_only=True)
class AgreementPicture:
    """All that `show_agreement` draws.

    Args:
        title: Which run, in plain words.
        foot: What was measured on, in plain words.
        fits: By target, in config order; empty leaves the bars out.
        blocks: Names of the student's blocks, the first first.
        layers: Names of the teacher layers.
        before: Linear CKA of the student as it began.
        after: The same of the trained student.
        read: For every layer, the number (from 0) of the block that its head reads; None
            where that is no single one.
    """

    title: str
    foot: str
    fits: tuple[Fit, ...]
    blocks: tuple[str, ...]
    layers: tuple[str, ...]
    before: Float[np.ndarray, "blocks layers"]
    after: Float[np.ndarray, "blocks layers"]
    read: tuple[int | None, ...]


def show_agreement(picture: AgreementPicture) -> Figure:
    """Bars of what the heads predict; heat maps of CKA before and after training.

    Args:
        picture: What to draw.
    """
    height = max(5.8, 1.9 + 0.3 * len(picture.blocks), 2.6 + 0.56 * len(picture.fits))
    # Title and foot keep their room from the engine that places all else.
    room = ConstrainedLayoutEngine(rect=(0.005, 0.35 / height, 0.99, 1 - 0.9 / height))
    figure = Figure(figsize=(WIDTH, height), facecolor="white", layout=room)
    left = EDGE / WIDTH
    title, foot = plain(picture.title), plain(picture.foot)
    figure.text(left, 1 - 0.18 / height, title, size=15, weight="bold", va="top", color=INK)
    figure.text(left, 0.14 / height, foot, size=9.5, color=SOFT)
    widths = ([1.0] if picture.fits else []) + [1.2, 0.93]  # the first map has the row names
    panels = figure.subfigures(1, len(widths), width_ratios=widths, wspace=0.03, squeeze=False)
    *bars, before, after = panels[0]
    for panel in bars:
        _bars(panel.subplots(2, 1), picture.fits)
    top = max(float(np.nanmax([picture.before, picture.after])), 1e-9)
    first, second = before.subplots(), after.subplots()
    _heat_map(first, picture, picture.before, top=top, title="Linear CKA before training")
    _heat_map(second, picture, picture.after, top=top, title="Linear CKA after training")
    first.set_yticks(range(len(picture.blocks)), [plain(name) for name in picture.blocks])
    second.set_yticks([])
    return figure


def _bars(panels: Sequence[Axes], fits: Sequence[Fit]) -> None:
    names = [_short(fit.target) for fit in fits]
    where = np.arange(len(fits))
    explained, cosines = panels
    values = [fit.explained_variance for fit in fits]
    _bar_panel(explained, names, values, COLOURS[0])
    explained.set_title("Explained variance of the heads", loc="left", fontsize=11.5, color=INK)
    explained.set_xlabel("0: no better than the mean; 1: perfect", color=SOFT)
    explained.set_xlim(min(0.0, *values), 1.14)
    explained.axvline(0, color=INK, lw=0.8)
    _bar_panel(cosines, names, [fit.cosine for fit in fits], COLOURS[4])
    cosines.plot(
        [fit.constant_cosine for fit in fits], where, ls="", marker="|", ms=17, mew=2.6,
        color=COLOURS[1],
    )  # fmt: skip
    cosines.set_title("Cosine of prediction and target", loc="left", fontsize=11.5, color=INK)
    cosines.set_xlabel("orange mark: what the mean alone reaches", color=SOFT)
    lowest = min(0.0, *(min(fit.cosine, fit.constant_cosine) for fit in fits))
    cosines.set_xlim(lowest, 1.14)


def _bar_panel(axes: Axes, names: Sequence[str], values: Sequence[float], colour: str) -> None:
    axes.barh(np.arange(len(names)), values, 0.66, color=colour)
    for place, value in enumerate(values):
        axes.annotate(
            f"{value:.2f}", (max(value, 0.0), place), (5, 0), textcoords="offset points",
            va="center", fontsize=9.5, color=INK,
        )  # fmt: skip
    clean(axes, grid="x")
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def _heat_map(
    axes: Axes,
    picture: AgreementPicture,
    cka: Float[np.ndarray, "blocks layers"],
    *,
    top: float,
    title: str,
) -> None:
    colours = matplotlib.colormaps[COLOURMAP].with_extremes(bad="#dddddd")
    axes.imshow(cka, cmap=colours, vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    size = 9.5 if len(picture.blocks) <= 16 and len(picture.layers) <= 6 else 7
    for (i, j), value in np.ndenumerate(cka):
        dark = float(np.dot(colours(value / top)[:3], GREY)) < 0.5
        text = "none" if np.isnan(value) else f"{value:.2f}"
        axes.text(
            j, i, text, ha="center", va="center", fontsize=size, color="white" if dark else INK
        )
    for j, block in enumerate(picture.read):
        if block is not None:
            axes.add_patch(
                Rectangle((j - 0.46, block - 0.44), 0.92, 0.88, fill=False, ec=COLOURS[1], lw=2.4)
            )
    axes.set_xticks(range(len(picture.layers)), [_short(name) for name in picture.layers])
    axes.tick_params(length=0, labelsize=9.5 if size > 7 else 8, colors=INK)
    if max(len(_short(name)) for name in picture.layers) * len(picture.layers) > 45:
        axes.tick_params(axis="x", rotation=90)
    axes.set_xlabel("teacher/layer", color=SOFT)
    axes.set_title(title, loc="left", fontsize=11.5, color=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _short(name: str) -> str:
    """The end of a long name: layers are told apart there."""
    return plain(name if len(name) <= 16 else f"…{name[-15:]}")
