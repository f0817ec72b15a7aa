"""What a record keeps, it gives back; what is none is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import PROBE, record

from kdhiera.ablation.records import (
    curve_of,
    load_record,
    mean_explained,
    record_path,
    save_record,
)
from kdhiera.errors import DamagedError
from kdhiera.results import Outcomes


def test_a_record_comes_back(tmp_path: Path) -> None:
    few = dataclasses.replace(PROBE, labels_per_class=5, method="k-NN")
    saved = record(measures=[PROBE, few])
    save_record(tmp_path / "new" / "folder", saved)
    found = load_record(record_path(tmp_path / "new" / "folder", "base", 0))
    assert dataclasses.replace(found, outcomes=saved.outcomes) == saved
    ours, theirs = found.outcomes, saved.outcomes
    assert (ours.uids, ours.groups, ours.validation) == (
        theirs.uids,
        theirs.groups,
        theirs.validation,
    )
    assert list(ours.right) == [PROBE, few]
    for measure in ours.right:
        np.testing.assert_array_equal(ours.right[measure], theirs.right[measure])
    np.testing.assert_array_equal(ours.known["direction"], theirs.known["direction"])
    assert not ours.known["direction"].all()


@given(
    st.integers(1, 3).flatmap(
        lambda seeds: st.lists(
            st.lists(st.booleans(), min_size=seeds + 1, max_size=seeds + 1), min_size=1, max_size=40
        )
    )
)
def test_bits_of_any_number_of_clips_come_back(tmp_path_factory, rows: list[list[bool]]) -> None:
    bits = np.array(rows).T
    known, right = bits[0], bits[1:]
    made = record()
    outcomes = Outcomes(
        uids=tuple(map(str, range(len(known)))),
        groups={},
        known={"direction": known},
        right={PROBE: right},
        validation={PROBE: 0.25},
    )
    folder = tmp_path_factory.mktemp("bits")
    save_record(folder, dataclasses.replace(made, outcomes=outcomes))
    found = load_record(record_path(folder, "base", 0)).outcomes
    np.testing.assert_array_equal(found.known["direction"], known)
    np.testing.assert_array_equal(found.right[PROBE], right)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "curve"}),
        lambda text: text.replace('"direction": "', '"direction": "!'),
        lambda text: json.dumps({**json.loads(text), "uids": ["only one"]}),
        lambda text: json.dumps({**json.loads(text), "known": {"direction": "AA=="}}),
        lambda text: json.dumps({**json.loads(text), "groups": []}),
        lambda text: json.dumps({**json.loads(text), "measures": [{"right": []}]}),
    ],
)
def test_what_is_no_record_says_so(tmp_path: Path, damage) -> None:
    save_record(tmp_path, record())
    path = record_path(tmp_path, "base", 0)
    path.write_text(damage(path.read_text()))
    with pytest.raises(DamagedError, match=r"base\.seed-0\.json is no record of a run .*remove it"):
        load_record(path)


def test_bytes_that_are_no_text_are_no_record(tmp_path: Path) -> None:
    path = record_path(tmp_path, "base", 0)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DamagedError):
        load_record(path)


@pytest.mark.parametrize("count", [1, 2, 3, 39, 40, 41, 500, 12_345])
def test_a_curve_is_thin_and_keeps_its_ends(count: int) -> None:
    lines = [
        {"step": s, "loss": 1 / s, "explained_variance/a/1": 0.5, "explained_variance/b/2": 0.1}
        for s in range(1, count + 1)
    ]
    curve = curve_of(lines)
    steps = [p.step for p in curve]
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (1, count)
    assert len(steps) <= 61
    assert {p.loss for p in curve} <= {line["loss"] for line in lines}
    assert mean_explained(lines[0]) == pytest.approx(0.3)
