"""Rate against distortion: what bits buy, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from kdhiera.report.plots import COLOURS, FAINT, INK, clean, plain

_FLOOR = 1e-8  # where errors below it, and none, are drawn, as arrow heads
_COLUMNS = 3

RatePoint = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class RatePanel:
    """One layer; points are (bits a value, error as a share of the energy).

    Args:
        title: Shown above.
        curve: An encoding at several errors.
        bound: What no encoding of that transform gets below, were its values Gaussian.
        points: Encodings by name.
    """

    title: str
    curve: Sequence[RatePoint]
    bound: Sequence[RatePoint]
    points: Mapping[str, RatePoint]


def rate_distortion(panels: Sequence[RatePanel]) -> Figure:
    """Error over stored bits, a panel a layer, both logarithmic.

    Args:
        panels: At least one.
    """
    columns = 2 if len(panels) == 4 else min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(0.6 + 3.7 * columns, 0.7 + 3.0 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw(axes, panel)
    for axes in grid[:, 0]:
        axes.set_ylabel("error, share of the energy", color=FAINT)
    for column in range(columns):
        shown = grid[(len(panels) - 1 - column) // columns, column]
        shown.set_xlabel("stored bits a value", color=FAINT)
        shown.tick_params(labelbottom=True)
    handles, names = grid.flat[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9
    )
    return figure


def _draw(axes: Axes, panel: RatePanel) -> None:
    bound = np.array(panel.bound)
    axes.plot(*bound.T, color=FAINT, ls="--", lw=1.3, label="Gaussian bound of the transform")
    curve = np.array(panel.curve)
    axes.plot(*curve.T, color=COLOURS[0], lw=1.6, marker=".", label="compact at other errors")
    for i, (name, (bits, error)) in enumerate(panel.points.items()):
        axes.plot(
            bits, max(error, _FLOOR), "o" if error >= _FLOOR else "v", ms=7, ls="", clip_on=False,
            color=COLOURS[(i + 1) % len(COLOURS)], zorder=3, label=plain(name),
        )  # fmt: skip
        axes.annotate(
            f"{bits:.1f}", (bits, max(error, _FLOOR)), (-7 if i % 2 else 7, 5),
            textcoords="offset points", ha="right" if i % 2 else "left", fontsize=8, color=INK,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=_FLOOR)
    clean(axes, grid="both")
    axes.set_title(plain(panel.title), loc="left", fontsize=11, color=INK)
