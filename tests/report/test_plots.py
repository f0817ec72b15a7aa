import json

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from kdhiera.report.plots import COLOURS, result_bars, save, training_curves
from kdhiera.results import Interval, Result

RECORDS = [
    {"step": 10, "loss": 0.9, "loss/image/9": 0.5, "explained_variance/image/9": -0.3, "lr": 1e-3},
    {"step": 15, "event": "checkpoint"},
    {"step": 20, "loss": 0.7, "loss/image/9": 0.3, "explained_variance/image/9": 0.2,
     "loss/video/3": 0.4, "explained_variance/video/3": 0.1},
]  # fmt: skip


def _results():
    return [
        Result(
            label=label,
            features=features,
            readout="mean",
            method=method,
            accuracy=Interval(value=value, low=value - 0.1, high=value + 0.05),
            chance=chance,
            num_clips=100,
        )
        for label, chance in (("category", 1 / 6), ("direction", 0.25))
        for features, value in (("student $a_1$", 0.6), ("random $", 0.3))
        for method in ("k-NN", "linear probe")
    ]


def test_curves_hold_the_records_values():
    records = json.loads(json.dumps(RECORDS))
    losses, explained = training_curves(records).axes
    assert [line.get_label() for line in losses.lines] == ["image/9", "video/3"]
    np.testing.assert_array_equal(losses.lines[0].get_xydata(), [[10, 0.5], [20, 0.3]])
    np.testing.assert_array_equal(explained.lines[0].get_xydata(), [[10, -0.3], [20, 0.2]])
    np.testing.assert_array_equal(losses.lines[1].get_xydata(), [[20, 0.4]])
    assert losses.lines[0].get_color() == explained.lines[0].get_color() == COLOURS[0]


def test_bars_hold_the_results_values():
    results = _results()
    panel = result_bars(results).axes[0]
    lengths = [patch.get_width() for container in panel.containers[1::2] for patch in container]
    assert lengths == pytest.approx([60, 30, 60, 30])
    bars = panel.containers[1]
    segments = bars.errorbar.lines[2][0].get_segments()
    np.testing.assert_allclose(segments[0][:, 0], [50, 65])
    assert panel.lines[-1].get_xdata()[0] == pytest.approx(100 / 6)
    assert to_hex(bars[0].get_facecolor()) == COLOURS[0].lower()


def test_saving_is_whole_repeatable_and_leaves_global_settings_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    for name in ("a.png", "b.png"):
        save(training_curves(RECORDS), tmp_path / name)
    save(result_bars(_results()), tmp_path / "bars.png", dpi=100)
    assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png", "bars.png"]
    with Image.open(tmp_path / "bars.png") as image:
        assert image.size[0] == 1060
        assert np.asarray(image.convert("L")).std() > 10


def test_a_run_without_records_still_draws(tmp_path):
    save(training_curves([]), tmp_path / "empty.png")
    save(training_curves([{"step": 1, "loss/a/1": 0.5}]), tmp_path / "one.png")
