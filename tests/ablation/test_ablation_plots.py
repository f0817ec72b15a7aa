"""Bars and curves show what the records hold."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from made_up import PROBE, record
from matplotlib.image import imread

from kdhiera.ablation.contrasts import estimate
from kdhiera.ablation.plots import bars, curves
from kdhiera.ablation.records import CurvePoint
from kdhiera.report.plots import COLOURS, save

KNN = dataclasses.replace(PROBE, method="k-NN")
RUNS = {
    "new": tuple(record("new", s, share=0.8, measures=[PROBE, KNN]) for s in (0, 1)),
    "base": (record("base"),),
    "none": (),
}


def test_bars_are_the_accuracies_with_their_intervals() -> None:
    first, second = bars(RUNS, [PROBE, KNN], "base").axes
    assert [t.get_text() for t in first.get_yticklabels()] == ["new", "base"]
    widths = [patch.get_width() for patch in first.patches]
    found = [estimate(RUNS[name], PROBE).value for name in ("new", "base")]
    assert widths == pytest.approx([100 * e.value for e in found])
    whiskers = [c.get_segments() for c in first.collections]
    for (segment,), e in zip([[s] for group in whiskers for s in group], found, strict=True):
        assert segment[:, 0] == pytest.approx([100 * e.low, 100 * e.high])
    assert first.get_xlim()[1] > max(100 * e.high for e in found)
    assert len(second.patches) == 1  # the base has no k-NN
    seeds = [line for line in first.lines if line.get_marker() == "."]
    assert [len(line.get_xdata()) for line in seeds] == [2, 1]


def test_the_baseline_has_its_own_colour_and_line() -> None:
    axes = bars(RUNS, [PROBE], "base").axes[0]
    assert axes.patches[0].get_facecolor() != axes.patches[1].get_facecolor()
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    (line,) = dashed
    assert line.get_xdata()[0] == pytest.approx(axes.patches[1].get_width())


def test_curves_are_means_over_seeds() -> None:
    other = record("new", 1)
    longer = dataclasses.replace(
        other, curve=(*(dataclasses.replace(p, loss=p.loss + 1) for p in other.curve),
                      CurvePoint(step=16, loss=9.0, explained=0.9)),
    )  # fmt: skip
    figure = curves({"new": (record("new"), longer), "none": (), "base": (record(),)})
    losses, explained = figure.axes
    assert [line.get_label() for line in losses.lines] == ["new", "base"]
    x, y = losses.lines[0].get_data()
    assert list(x) == [1, 2, 4, 8]
    np.testing.assert_allclose(y, [2 / s + 0.5 for s in x])
    np.testing.assert_allclose(explained.lines[0].get_ydata(), [1 - 2 / s for s in x])


def test_curves_over_multiply_adds() -> None:
    losses, _ = curves({"base": (record(),)}, per_macs=True).axes
    assert list(losses.lines[0].get_xdata()) == [2.0, 4.0, 8.0, 16.0]
    assert "GMACs" in losses.get_xlabel()


@pytest.mark.parametrize("end", [-1.2, 0.7])
def test_the_end_of_a_curve_is_always_in_sight(end: float) -> None:
    points = ((1, -8.0), (2, -3.0), (3, end), (4, end))
    curve = tuple(CurvePoint(step=s, loss=1.0, explained=e) for s, e in points)
    axes = curves({"base": (dataclasses.replace(record(), curve=curve),)}).axes[1]
    low, high = axes.get_ylim()
    assert low < end < high
    assert low > -3


def test_many_variants_are_told_apart_and_names_are_no_formulas(tmp_path: Path) -> None:
    runs = {f"{i}$_{i}$": (record(),) for i in range(2 * len(COLOURS))}
    lines = curves(runs).axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(runs)
    for figure in (curves(runs), bars(runs, [PROBE], "0$_0$")):
        save(figure, tmp_path / "figure.png")
        assert imread(tmp_path / "figure.png").std() > 0.01
