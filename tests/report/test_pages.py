import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from kdhiera.report.pages import (
    CacheFacts,
    Picture,
    ReportData,
    TargetFacts,
    TrainingFacts,
    write_report,
)
from kdhiera.report.pictures import ClipPicture, show_clip
from kdhiera.results import (
    ClassCount,
    Comparison,
    Control,
    Interval,
    Measure,
    PerClass,
    Result,
    results_from_json,
)


def _interval(value, half=0.05):
    return Interval(value=value, low=value - half, high=value + half)


def _comparison(label, value):
    return Comparison(
        label=label,
        features="distilled student",
        baseline="random weights",
        readout="slots",
        method="k-NN",
        difference=_interval(value),
        num_clips=300,
    )


def _data():
    frames = np.random.default_rng(0).integers(0, 256, size=(4, 64, 64, 3), dtype=np.uint8)
    return ReportData(
        name="demo",
        facts={"student": "Hiera nano", "masks": "attention, 80 % hidden"},
        cache=CacheFacts(
            num_samples=1000,
            num_usable=990,
            bad={"decode_error": 7, "too_short": 3},
            num_bytes=99_000_000,
            dense_bytes=792_000_000,
            columns=("image/9 int8", "video/3 int8"),
            seconds=75.0,
        ),
        training=TrainingFacts(
            steps=1500,
            epochs=120,
            seconds=241,
            clips_per_second=398.4,
            data_wait=0.012,
            targets=(
                TargetFacts(target="image/9", loss=(0.5, 0.2), explained=(-0.1, 0.6)),
                TargetFacts(target="video/3", loss=(0.4, 0.2), explained=(0.1, 0.4)),
            ),
        ),
        records=[
            {"step": i, "loss/image/9": 0.5 / i, "explained_variance/image/9": 0.1} for i in (1, 2)
        ],
        results=tuple(
            Result(
                label="direction",
                features=features,
                readout="slots",
                method="k-NN",
                accuracy=_interval(value),
                chance=0.25,
                num_clips=300,
            )
            for features, value in (("distilled student", 0.7), ("random weights", 0.5))
        ),
        comparisons=(
            _comparison("direction", 0.2),
            _comparison("category", 0.01),
            _comparison("colour", -0.2),
        ),
        num_groups={"object": 60, "background": 3},
        controls=(
            Control(
                name="first frame only",
                accuracy=_interval(0.52),
                chance=0.5,
                num_clips=300,
                expected="chance",
            ),
            Control(
                name="frames in order",
                accuracy=_interval(0.9),
                chance=0.5,
                num_clips=300,
                expected="above",
            ),
        ),
        pictures=(
            Picture(
                caption="A test clip: dogs_1",
                figure=show_clip(ClipPicture(title="dogs_1", frames=frames)),
            ),
        ),
    )


def test_says_what_was_found(tmp_path):
    text = write_report(tmp_path, _data()).read_text()
    for phrase in (
        "# demo\n",
        "| student | Hiera nano |",
        "99.0 MB for 990 clip views, pixels included: 8.0 times smaller",
        "In 1,500 steps (4:01) the student's explained variance of the teachers' features went "
        "from 0.00 to 0.50 (mean over 2 targets).",
        "direction, k-NN on slots: distilled student against random weights "
        "+20.0 points (+15.0 to +25.0): better.",
        "+1.0 points (-4.0 to +6.0): not told apart.",
        "-20.0 points (-25.0 to -15.0): worse.",
        "990 usable of 1,000 (99.0 %)",
        "| not usable: decode\\_error | 7 |",
        "| image/9 | 0.5000 | 0.2000 | -0.100 | 0.600 |",
        "398 clips/s, 1.2 % of the time waiting for data",
        "resampled by object (60) and background (3). They rest on few groups (background: 3) and "
        "are narrower than they ought to be.",
        "- The intervals in brackets: they rest on few groups (background: 3)",
        "| first frame only | 52.0 % (47.0 to 57.0) | 50.0 % | 300 | at chance | yes |",
        "| frames in order | 90.0 % (85.0 to 95.0) | 50.0 % | 300 | above chance | yes |",
    ):
        assert phrase in text
    assert "do not hold" not in text


def test_every_link_leads_to_a_file(tmp_path):
    text = write_report(tmp_path, _data()).read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) == 5
    for link in links:
        assert (tmp_path / link).is_file()
        if link.endswith(".png"):
            with Image.open(tmp_path / link) as image:
                image.verify()
    document = json.loads((tmp_path / "report/results.json").read_text())
    assert results_from_json(document["results"]) == _data().results
    assert document["comparisons"][0]["difference"]["value"] == 0.2


def test_a_control_that_does_not_hold_is_said_first(tmp_path):
    data = _data()
    leaking = replace(data.controls[0], accuracy=_interval(0.83))
    text = write_report(tmp_path, replace(data, controls=(leaking,))).read_text()
    summary = text[text.index("## In short") : text.index("## Cache")]
    assert "**Controls that do not hold: first frame only.** Do not trust" in summary
    assert "| at chance | NO |" in text


@pytest.mark.parametrize(
    ("expected", "value", "holds"),
    [("chance", 0.54, True), ("chance", 0.56, False), ("chance", 0.44, False),
     ("above", 0.56, True), ("above", 0.54, False), ("above", 0.4, False)],
)  # fmt: skip
def test_when_a_control_holds(expected, value, holds):
    control = Control(
        name="x", accuracy=_interval(value), chance=0.5, num_clips=1, expected=expected
    )
    assert control.holds is holds


def test_what_did_not_happen_is_left_out_and_a_second_report_replaces_the_first(tmp_path):
    first = write_report(tmp_path, _data())
    second = write_report(tmp_path, ReportData(name="bare", facts={}, num_groups={}))
    assert first == second
    headings = [line for line in second.read_text().splitlines() if line.startswith("#")]
    assert headings == ["# bare"]


def test_classes_and_fewer_labels_are_told(tmp_path):
    data = _data()
    measure = Measure(
        label="category", features="distilled student", readout="slots", method="linear probe",
        labels_per_class=None,
    )  # fmt: skip
    counts = (
        ClassCount(name="cat|s", correct=1, total=4),
        ClassCount(name="dog", correct=3, total=4),
    )
    compared = replace(_comparison("category", 0.2), method="linear probe")
    fewer = replace(_comparison("category", 0.1), labels_per_class=5)
    data = replace(
        data,
        results=(*data.results, replace(data.results[0], labels_per_class=5)),
        comparisons=(compared, fewer),
        per_class=(PerClass(measure=measure, num_seeds=1, classes=counts),),
    )
    text = write_report(tmp_path, data).read_text()
    assert "| cat\\|s | 4 | 25.0 % |" in text
    assert "| 5 a class |" in text
    assert "category, linear probe (slots), class by class:" in text
    short = text.partition("## In short")[2].partition("## ")[0]
    assert "+20.0 points" in short
    assert "+10.0 points" not in short  # the tables tell of fewer labels
