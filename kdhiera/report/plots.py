"""Curves and bars. Figures are made object by object: no pyplot, no global settings."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdhiera.report.tables import printable
from kdhiera.results import Result
from kdhiera.storage import write_atomic

# Okabe and Ito's colours, told apart by nearly everyone; black and yellow left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
INK = "#222222"
FAINT = "#8a8a8a"


def plain(text: str) -> str:
    """The text for matplotlib, which would read what stands between dollars as a formula."""
    return printable(text).replace("$", r"\$")


def save(figure: Figure, path: Path, *, dpi: int = 150) -> None:
    """Write a PNG that is whole or absent; equal figures give equal bytes.

    Args:
        figure: What to draw.
        path: Ends in `.png`; its folder must exist.
        dpi: Pixels per inch of the figure's size.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def training_curves(
    records: Sequence[Mapping[str, Any]],
    *,
    loss_prefix: str = "loss/",
    explained_prefix: str = "explained_variance/",
) -> Figure:
    """Loss and explained variance of every target over the steps, side by side.

    Args:
        records: Lines of `metrics.jsonl` with a `step`; lines without the keys plotted
            here are passed over.
        loss_prefix: Keys that start so hold the loss of one target.
        explained_prefix: Keys that start so hold the explained variance of one target.
    """
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    losses, explained = figure.subplots(1, 2)
    names = _series_names(records, loss_prefix) | _series_names(records, explained_prefix)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    styles = {name: ("-", "--", ":")[i // len(COLOURS) % 3] for i, name in enumerate(names)}
    for axes, prefix, title in (
        (losses, loss_prefix, "Loss"),
        (explained, explained_prefix, "Explained variance"),
    ):
        for name in names:
            points = [(r["step"], r[prefix + name]) for r in records if prefix + name in r]
            if points:
                steps, values = np.asarray(points, dtype=np.float64).T
                axes.plot(
                    steps, values, color=colours[name], ls=styles[name], lw=1.6, label=plain(name)
                )
        clean(axes, grid="y")
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        axes.set_xlabel("step", color=FAINT)
    explained.axhline(0, color=FAINT, lw=0.8)
    explained.set_ylim(top=min(1.0, explained.get_ylim()[1]))
    if names:
        figure.legend(
            *losses.get_legend_handles_labels(),
            loc="outside right upper",
            frameon=False,
            fontsize=9,
            title="teacher/layer",
            title_fontsize=9,
        )
    return figure


def result_bars(results: Sequence[Result]) -> Figure:
    """Accuracy with its interval, a panel for each label, dashed at chance.

    Args:
        results: In the order in which they are to be shown, top down; at least one.
    """
    labels = list(dict.fromkeys(r.label for r in results))
    methods = list(dict.fromkeys((r.method, r.readout) for r in results))
    features = list(dict.fromkeys(r.features for r in results))
    height = 0.8 / len(methods)
    figure = Figure(
        figsize=(2.2 + 4.2 * len(labels), 1.3 + 0.27 * len(features) * (len(methods) + 0.6)),
        layout="constrained",
    )
    panels = figure.subplots(1, len(labels), sharey=True, squeeze=False)[0]
    for axes, label in zip(panels, labels, strict=True):
        shown = [r for r in results if r.label == label]
        for i, method in enumerate(methods):
            group = [r for r in shown if (r.method, r.readout) == method]
            where = [features.index(r.features) - 0.4 + (i + 0.5) * height for r in group]
            values = np.array([100 * r.accuracy.value for r in group])
            lows = np.array([100 * r.accuracy.low for r in group])
            highs = np.array([100 * r.accuracy.high for r in group])
            axes.barh(
                where,
                values,
                height * 0.9,
                color=COLOURS[i % len(COLOURS)],
                alpha=0.85,
                label=plain(", ".join(method)),
                # The percentile interval need not hold the estimate: no negative whisker.
                xerr=np.maximum([values - lows, highs - values], 0),
                error_kw={"ecolor": INK, "elinewidth": 1.0, "capsize": 2},
            )
            for y, value, high in zip(where, values, highs, strict=True):
                axes.annotate(
                    f"{value:.0f}", (max(value, high), y), (4, 0), textcoords="offset points",
                    va="center", fontsize=8, color=INK,
                )  # fmt: skip
        chance = 100 * shown[0].chance
        axes.axvline(chance, color=INK, lw=1.0, ls="--", alpha=0.7)
        axes.annotate(
            "chance", (chance, 1.0), (0, 2), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="center", fontsize=8, color=FAINT,
        )  # fmt: skip
        clean(axes, grid="x")
        axes.set_xlim(0, 108)
        axes.set_xticks(range(0, 101, 25))
        axes.set_title(plain(label), loc="left", fontsize=11, color=INK, pad=14)
        axes.set_xlabel("test accuracy, %", color=FAINT)
        axes.set_yticks(range(len(features)), [plain(name) for name in features])
        axes.tick_params(axis="y", length=0)
    panels[0].set_ylim(len(features) - 0.45, -0.55)  # the first at the top
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9
    )
    return figure


def _series_names(records: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, None]:
    """Names after the prefix, in order of appearance."""
    return {key.removeprefix(prefix): None for r in records for key in r if key.startswith(prefix)}


def clean(axes: Axes, *, grid: Literal["x", "y", "both"]) -> None:
    """Axes with as little ink as will do."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis=grid, color="#e4e4e4", lw=0.8)
    axes.set_axisbelow(True)
