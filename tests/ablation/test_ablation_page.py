"""The report of an ablation."""

import dataclasses
import json
import re
from pathlib import Path

from made_up import PROBE, record

from kdhiera.ablation.contrasts import difference, estimate
from kdhiera.ablation.page import shown_measures, write_ablation_report
from kdhiera.config.ablation import AblationConfig

CONTRAST = {"name": "new beats base", "variant": "new", "against": "base"}


def ablation(**changes) -> AblationConfig:
    return AblationConfig.model_validate(
        {
            "name": "layers_1",
            "run_dir": "runs",
            "base": "base.yaml",
            "variants": {
                "base": None,
                "new": {"train.lr": 0.001, "objective": {"layers": {"image": [12]}}},
                "odd": {"train.lr": 100.0},
            },
            "seeds": [0, 1],
            **changes,
        }
    )


def with_label(label: str):
    return dataclasses.replace(PROBE, label=label)


RECORDS = [record(v, s, share=p) for v, p in (("new", 0.8), ("base", 0.5)) for s in (0, 1)]


def test_a_page_says_in_short_what_happened(tmp_path: Path) -> None:
    question = {
        "title": "Does it help?",
        "claim": "It does.",
        "contrasts": [{**CONTRAST, "metric": {"label": "direction"}, "primary": True}],
    }
    failures = {"odd/seed-0": "the loss | is not finite", "odd/seed-1": "killed"}
    config = ablation(questions=[question])
    path = write_ablation_report(tmp_path, config, RECORDS, failures, expected=6)
    text = path.read_text()
    assert path == tmp_path / "report.md"
    assert text.startswith("# layers\\_1\n\n- 4 of 6 runs finished: 3 variants over 2 seeds, 0:50")
    assert "**2 runs failed**" in text
    assert "Best on the validation split: new; on the test split direction" in text
    assert "train.lr=0.001, objective={layers: {image: \\[12\\]}}" in text
    assert "| base (baseline) | nothing |" in text
    assert re.search(r"Claim: It does\. \*\*(Holds|Not shown|Does not hold) here", text)
    assert "| odd/seed-0 | the loss \\| is not finite |" in text
    assert "| odd | not run |" in text
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (tmp_path / target).stat().st_size > 50
    assert len(text.split()) < 600  # two minutes


def test_the_json_holds_estimates_contrasts_and_failures(tmp_path: Path) -> None:
    question = {"title": "q", "contrasts": [{**CONTRAST, "metric": {"label": "direction"}}]}
    config = ablation(questions=[question])
    write_ablation_report(tmp_path, config, RECORDS, {"odd/seed-0": "why"}, expected=6)
    document = json.loads((tmp_path / "table.json").read_text())
    assert document["failures"] == {"odd/seed-0": "why"}
    new = next(row for row in document["variants"] if row["variant"] == "new")
    wanted = estimate(RECORDS[:2], PROBE)
    assert new["value"] == dataclasses.asdict(wanted.value)
    assert (new["std"], new["seeds"], new["method"]) == (wanted.std, [0, 1], "linear probe")
    found, p = difference(RECORDS[:2], PROBE, RECORDS[2:], PROBE)
    (contrast,) = document["contrasts"]
    assert contrast["difference"]["value"] == dataclasses.asdict(found.value)
    assert (contrast["p_value"], contrast["adjusted"]) == (p, None)


def test_nothing_finished_is_a_page_too(tmp_path: Path) -> None:
    text = write_ablation_report(tmp_path, ablation(), [], {"new/seed-0": "x"}, expected=6)
    assert "No run is finished." in text.read_text()
    assert not list((tmp_path / "report").iterdir())


def test_what_untrained_students_and_teachers_reach_stands_beside(tmp_path: Path) -> None:
    others = [
        dataclasses.replace(PROBE, features=name) for name in ("random student", "image teacher")
    ]
    records = [record("base", s, measures=[PROBE, *others]) for s in (0, 1)]
    text = write_ablation_report(tmp_path, ablation(), records, {}, expected=6).read_text()
    wanted = [f"{m.features} {100 * estimate(records, m).value.value:.1f} %" for m in others]
    assert f"Beside it, direction, linear probe: {', '.join(wanted)}." in text


def test_the_chosen_metric_is_first_and_other_labels_follow() -> None:
    names = ("category", "direction", "speed")
    measures = [with_label(name) for name in names]
    records = [record(measures=measures)]
    assert [m.label for m in shown_measures(ablation(), records)] == list(names)
    chosen = ablation(metric={"label": "speed", "method": "linear probe"})
    assert [m.label for m in shown_measures(chosen, records)] == ["speed", "category", "direction"]
    assert shown_measures(ablation(), []) == ()


def test_without_a_linear_probe_what_was_measured_is_shown() -> None:
    knn = dataclasses.replace(PROBE, method="k-NN")
    teacher = dataclasses.replace(knn, features="image teacher")
    records = [record(measures=[teacher, knn])]
    assert shown_measures(ablation(), records) == (knn,)
    assert shown_measures(ablation(), [record(measures=[teacher])]) == (teacher,)


def test_many_labels_do_not_widen_the_table(tmp_path: Path) -> None:
    measures = [with_label(f"label{i}") for i in range(5)]
    records = [record(measures=measures)]
    text = write_ablation_report(tmp_path, ablation(), records, {}, expected=6).read_text()
    assert "Further labels are in [table.csv](table.csv): label3, label4." in text
    (header,) = [line for line in text.splitlines() if line.startswith("| variant | seeds")]
    assert header.count("|") == 2 + 2 * 3 + 3


def test_equal_records_give_equal_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_ablation_report(tmp_path / name, ablation(), RECORDS, {}, expected=6)
    for path in (tmp_path / "one").rglob("*.*"):
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == other.read_bytes()
