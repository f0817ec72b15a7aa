"""Variants as bars with intervals, and as curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple

import numpy as np
from matplotlib.figure import Figure

from kdhiera.ablation.contrasts import estimate
from kdhiera.ablation.records import RunRecord
from kdhiera.report.plots import COLOURS, FAINT, INK, clean, plain
from kdhiera.results import Measure

STYLES = ("-", "--", ":", "-.")


def bars(
    runs: Mapping[str, Sequence[RunRecord]], measures: Sequence[Measure], baseline: str
) -> Figure:
    """Accuracy of every variant with its interval, a panel a measure; a dot a seed.

    Args:
        runs: Records by variant, top down; at least one record in all.
        measures: One panel each; at least one.
        baseline: Drawn in another colour, with a line at its accuracy.
    """
    shown = [name for name, records in runs.items() if records]
    figure = Figure(
        figsize=(2.6 + 4.2 * len(measures), 1.4 + 0.36 * len(shown)), layout="constrained"
    )
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        furthest = 1.0
        for y, name in enumerate(shown):
            found = estimate(runs[name], measure)
            if found is None:
                continue
            value, low, high = (100 * x for x in astuple(found.value))
            colour = COLOURS[1] if name == baseline else COLOURS[0]
            furthest = max(furthest, value, high)
            whiskers = [[max(value - low, 0)], [max(high - value, 0)]]
            axes.barh(
                y, value, 0.68, color=colour, alpha=0.8, xerr=whiskers,
                error_kw={"ecolor": INK, "elinewidth": 1.0, "capsize": 2},
            )  # fmt: skip
            each = [_accuracy(r, measure) for r in runs[name] if measure in r.outcomes.right]
            axes.plot(each, [y] * len(each), ".", color=INK, ms=4, alpha=0.7)
            axes.annotate(
                f"{value:.1f}", (max(value, high), y), (5, 0), textcoords="offset points",
                va="center", fontsize=8.5, color=INK,
            )  # fmt: skip
            if name == baseline:
                axes.axvline(value, color=COLOURS[1], lw=1.0, ls="--", alpha=0.7)
        clean(axes, grid="x")
        axes.set_xlim(0, 1.13 * furthest)  # room for the figures behind the whiskers
        axes.set_title(
            plain(f"{measure.label}: {measure.method}"), loc="left", fontsize=11, color=INK
        )
        axes.set_xlabel("test accuracy, % (95 % interval; a dot a seed)", color=FAINT)
        axes.set_yticks(range(len(shown)), [plain(name) for name in shown])
        axes.tick_params(axis="y", length=0)
    panels[0].set_ylim(len(shown) - 0.4, -0.6)
    return figure


def curves(runs: Mapping[str, Sequence[RunRecord]], *, per_macs: bool = False) -> Figure:
    """Loss and explained variance, mean over the seeds of a variant.

    Losses of variants with other targets are on other scales; the explained variance
    is 1 - loss / loss of the best constant, and 0 means the same everywhere.

    Args:
        runs: Records by variant; variants without any are left out.
        per_macs: Over multiply-adds of the student's forward passes instead of steps.
    """
    shown = {name: records for name, records in runs.items() if records}
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    losses, explained = figure.subplots(1, 2)
    for i, (name, records) in enumerate(shown.items()):
        style = {
            "color": COLOURS[i % len(COLOURS)],
            "ls": STYLES[i // len(COLOURS) % len(STYLES)],
            "lw": 1.6,
            "label": plain(name),
        }
        length = min(len(r.curve) for r in records)
        steps = np.array([p.step for p in records[0].curve[:length]], dtype=np.float64)
        x = steps * records[0].clip_macs / 1e9 if per_macs else steps
        for axes, values in (
            (losses, [[p.loss for p in r.curve[:length]] for r in records]),
            (explained, [[p.explained for p in r.curve[:length]] for r in records]),
        ):
            axes.plot(x, np.mean(values, axis=0), **style)
    for axes, title in ((losses, "Loss"), (explained, "Explained variance (mean over targets)")):
        clean(axes, grid="y")
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        axes.set_xlabel("GMACs of forward passes, per clip of a batch" if per_macs else "step")
    explained.axhline(0, color=FAINT, lw=0.8)
    # Runs begin far below 0; that would flatten what follows.
    late = [p.explained for rs in shown.values() for r in rs for p in r.curve[len(r.curve) // 2 :]]
    explained.set_ylim(bottom=max(min(-0.1, 1.1 * min(late)), explained.get_ylim()[0]))
    figure.legend(
        *losses.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9
    )
    return figure


def _accuracy(record: RunRecord, measure: Measure) -> float:
    known = record.outcomes.known[measure.label]
    return 100 * float(record.outcomes.right[measure][:, known].mean())
