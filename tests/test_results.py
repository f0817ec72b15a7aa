import json

import pytest

from kdhiera.errors import DamagedError
from kdhiera.results import (
    Comparison,
    Interval,
    Result,
    comparisons_from_json,
    results_from_json,
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
    assert results_from_json(json.loads(json.dumps(to_json([RESULT, RESULT])))) == (RESULT, RESULT)


def test_comparisons_survive_json():
    assert comparisons_from_json(json.loads(json.dumps(to_json([COMPARISON])))) == (COMPARISON,)


def test_something_else_is_named():
    values = to_json([RESULT])
    del values[0]["accuracy"]["low"]
    with pytest.raises(DamagedError, match=r"0\.accuracy\.low"):
        results_from_json(values)
