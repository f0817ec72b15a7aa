import json
from dataclasses import replace

import numpy as np
import pytest

from kdhiera.errors import DamagedError
from kdhiera.results import (
    ClassCount,
    Comparison,
    Interval,
    Measure,
    Outcomes,
    PerClass,
    Result,
    comparisons_from_json,
    load_outcomes,
    per_class_from_json,
    per_class_to_json,
    results_from_json,
    save_outcomes,
    to_json,
)

RESULT = Result(
    label="direction",
    features="distilled student",
    readout="slots",
    method="linear probe",
    accuracy=Interval(value=0.71, low=0.64, high=0.78),
    chance=0.25,
    num_clips=360,
)
COMPARISON = Comparison(
    label="direction",
    features="distilled student",
    baseline="random student",
    readout="slots",
    method="linear probe",
    difference=Interval(value=0.19, low=0.12, high=0.25),
    num_clips=360,
)


def test_results_survive_json():
    seeds = replace(
        RESULT,
        top5=Interval(value=0.9, low=0.8, high=1.0),
        labels_per_class=5,
        num_seeds=3,
        std=0.01,
    )
    assert results_from_json(json.loads(json.dumps(to_json([RESULT, seeds])))) == (RESULT, seeds)


def test_comparisons_survive_json():
    assert comparisons_from_json(json.loads(json.dumps(to_json([COMPARISON])))) == (COMPARISON,)


def test_something_else_is_named():
    values = to_json([RESULT])
    del values[0]["accuracy"]["low"]
    with pytest.raises(DamagedError, match=r"0\.accuracy\.low"):
        results_from_json(values)


MEASURE = Measure(
    label="direction",
    features="distilled student",
    readout="slots",
    method="linear probe",
    labels_per_class=None,
)


def test_classes_survive_json_with_their_accuracy():
    counts = (
        ClassCount(name="left", correct=3, total=4),
        ClassCount(name="right", correct=0, total=2),
    )
    table = PerClass(measure=MEASURE, num_seeds=2, classes=counts)
    values = json.loads(json.dumps(per_class_to_json([table])))
    assert values[0]["label"] == "direction"
    assert values[0]["classes"][0] == {"name": "left", "correct": 3, "total": 4, "accuracy": 0.75}
    assert per_class_from_json(values) == (table,)
    for damaged in (None, [1], [{"classes": [{}]}]):
        with pytest.raises(DamagedError, match="evaluate again"):
            per_class_from_json(damaged)


@pytest.fixture
def outcomes():
    rng = np.random.default_rng(0)
    measures = [MEASURE, replace(MEASURE, method="k-NN", labels_per_class=5)]
    return Outcomes(
        uids=("shard/0/é", "shard/1024/b|c", "shard/2048/"),
        groups={"object": ("x", "x", "y z"), "background": ("1", "2", "2")},
        known={"direction": np.array([True, False, True])},
        right={m: rng.random((2, 3)) < 0.5 for m in measures},
        validation=dict(zip(measures, (0.25, 1 / 3), strict=True)),
    )


def test_outcomes_survive_their_file(outcomes, tmp_path):
    path = tmp_path / "outcomes.npz"
    save_outcomes(path, outcomes)
    loaded = load_outcomes(path)
    assert (loaded.uids, loaded.groups) == (outcomes.uids, outcomes.groups)
    assert loaded.validation == outcomes.validation
    assert list(loaded.right) == list(outcomes.right)
    for arrays, wanted in ((loaded.right, outcomes.right), (loaded.known, outcomes.known)):
        for key, array in arrays.items():
            assert array.dtype == bool
            assert (array == wanted[key]).all()


def test_damaged_outcomes_are_refused(outcomes, tmp_path):
    path = tmp_path / "outcomes.npz"
    with pytest.raises(DamagedError, match="evaluate again"):
        load_outcomes(path)
    save_outcomes(path, outcomes)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DamagedError, match="evaluate again"):
        load_outcomes(path)
