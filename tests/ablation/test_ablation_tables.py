"""Tables say what the records say."""

import csv
import dataclasses
import io

import pytest
from made_up import PROBE, record

from kdhiera.ablation.contrasts import answer, difference, estimate
from kdhiera.ablation.tables import (
    accuracy_cell,
    contrast_table,
    everything,
    measures_of,
    ranked,
    variant_table,
)
from kdhiera.config.ablation import AblationConfig
from kdhiera.report.tables import percent, to_csv

RANDOM = dataclasses.replace(PROBE, features="random student")


def test_the_validation_split_ranks_and_unfinished_ones_are_last() -> None:
    records = [
        record("a", share=0.9, validation=0.1),
        record("b", share=0.1, validation=0.9),
        record("c", share=0.5, validation=0.5),
    ]
    assert ranked(("none", "a", "b", "c"), records, PROBE) == ("b", "c", "a", "none")
    assert ranked(("none", "a", "b"), records, None) == ("none", "a", "b")


def test_a_row_is_mean_spread_interval_and_the_paired_difference() -> None:
    new, base = [record("new", s) for s in (0, 1)], [record("base", s) for s in (0, 1)]
    table = variant_table(("new", "base", "later"), "base", [*new, *base], [PROBE])
    assert table.headers == (
        "variant", "seeds", "direction, linear probe", "against base", "steps", "time a run",
    )  # fmt: skip
    found = estimate(new, PROBE)
    wanted, _ = difference(new, PROBE, base, PROBE)
    assert table.rows[0] == (
        "new", "2", accuracy_cell(found), percent(wanted.value, signed=True), "8", "0:12",
    )  # fmt: skip
    value, std = 100 * found.value.value, 100 * found.std
    assert accuracy_cell(found).startswith(f"{value:.1f} ± {std:.1f} % (")
    assert table.rows[1][3] == "-"
    assert table.rows[2] == ("later", "not run", "", "", "", "")
    assert "±" not in accuracy_cell(estimate(new[:1], PROBE))


def test_seeds_of_other_lengths_are_a_span() -> None:
    records = [record(), dataclasses.replace(record(seed=1), steps=2000)]
    assert variant_table(("base",), "base", records, []).rows == (
        ("base", "2", "8 to 2,000", "0:12"),
    )


def test_everything_is_one_plain_row_a_run_and_measure() -> None:
    records = [record("new", s, measures=[PROBE, RANDOM]) for s in (0, 1)]
    assert measures_of(records) == (PROBE, RANDOM)
    rows = list(csv.DictReader(io.StringIO(to_csv(everything(("new", "none"), records)))))
    assert len(rows) == 4
    for row in rows:
        made = records[int(row["seed"])].outcomes
        measure = next(m for m in made.right if m.features == row["features"])
        known = made.known["direction"]
        wanted = made.right[measure][:, known].mean()
        assert float(row["test_accuracy"]) == pytest.approx(wanted, abs=1e-4)
        assert (row["num_clips"], row["labels_per_class"]) == ("27", "all")


def test_contrasts_with_margins_p_values_and_what_is_missing() -> None:
    one = {"variant": "new", "against": "base", "metric": {"label": "direction"}}
    config = AblationConfig.model_validate(
        {
            "name": "n",
            "run_dir": "runs",
            "base": "b.yaml",
            "variants": {"base": {}, "new": {}, "later": {}},
            "questions": [
                {
                    "title": "q",
                    "contrasts": [
                        {"name": "first", "primary": True, **one},
                        {"name": "margin", "margin": 0.025, **one},
                        {"name": "gone", **one, "variant": "later"},
                    ],
                }
            ],
        }
    )
    found = answer(config.questions, [record("new"), record("base")])
    first, margin, gone = contrast_table(found).rows
    assert first[0] == "first (primary)"
    assert first[5:7] == (f"{found[0].p_value:.3f}", f"{found[0].adjusted:.3f}")
    assert (margin[3], margin[6]) == ("-2.5 points", "")
    assert gone == ("gone", "direction, linear probe", "", "", "", "", "", "not run")
