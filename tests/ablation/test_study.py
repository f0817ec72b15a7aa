"""The page of the study."""

import csv
import re
from pathlib import Path

from made_up import record

from kdhiera.ablation.study import StudyPart, write_study
from kdhiera.config.ablation import AblationConfig
from kdhiera.results import Control, Interval


def question(title: str, variant: str) -> dict[str, object]:
    return {
        "title": title,
        "claim": f"{variant} is better.",
        "contrasts": [
            {
                "name": f"{variant} against base",
                "variant": variant,
                "against": "base",
                "metric": {"label": "direction"},
                "primary": True,
            }
        ],
    }


def part(name: str, *variants: str) -> AblationConfig:
    return AblationConfig.model_validate(
        {
            "name": name,
            "run_dir": "runs",
            "base": "base.yaml",
            "variants": {"base": None, **dict.fromkeys(variants)},
            "seeds": [0, 1],
            "questions": [question(f"Is {v} better?", v) for v in variants],
        }
    )


def control(*, holds: bool) -> Control:
    return Control(
        name="first frame",
        accuracy=Interval(value=0.5, low=0.4, high=0.6),
        chance=0.5 if holds else 0.3,
        num_clips=100,
        expected="chance",
    )


BASE = tuple(record("base", seed, share=0.2) for seed in (0, 1))
GOOD = tuple(record("good", seed, share=1.0) for seed in (0, 1))


def write(tmp_path: Path, parts: list[StudyPart], controls: dict[int, list[Control]]) -> str:
    return write_study(
        tmp_path / "docs" / "results.md", tmp_path / "docs" / "results", parts, controls
    ).read_text()


def test_what_was_run_is_answered_and_what_was_not_is_shown_empty(tmp_path: Path) -> None:
    parts = [
        StudyPart(config=part("main", "good", "never"), records=(*BASE, *GOOD), expected=6),
        StudyPart(config=part("more", "late"), records=BASE, expected=4),
    ]
    text = write(tmp_path, parts, {0: [control(holds=True)]})
    assert "- main: 4 of 6 runs done" in text
    assert "- more: 2 of 4 runs done" in text
    assert "Claim: good is better. **Holds here.**" in text
    for variant in ("never", "late"):
        assert f"Claim: {variant} is better. **Not run.**" in text
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {variant} against")]
        assert row.count("|  ") >= 4
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (tmp_path / "docs" / target).is_file(), target


def test_a_run_that_two_parts_share_counts_once(tmp_path: Path) -> None:
    parts = [
        StudyPart(config=part("main", "good"), records=(*BASE, *GOOD), expected=4),
        StudyPart(config=part("more", "late"), records=BASE, expected=4),
    ]
    write(tmp_path, parts, {})
    text = (tmp_path / "docs" / "results" / "results.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert [(r["variant"], r["seed"]) for r in rows] == [
        ("base", "0"), ("base", "1"), ("good", "0"), ("good", "1"),
    ]  # fmt: skip


def test_holm_counts_the_questions_of_all_parts(tmp_path: Path) -> None:
    alone = [StudyPart(config=part("main", "good"), records=(*BASE, *GOOD), expected=4)]
    better = tuple(record("late", seed, share=0.9) for seed in (0, 1))
    both = [
        *alone,
        StudyPart(config=part("more", "late"), records=(*BASE, *better), expected=4),
    ]

    def adjusted(text: str) -> float:
        (row,) = [line for line in text.splitlines() if line.startswith("| good against")]
        return float(row.split("|")[7])

    assert adjusted(write(tmp_path / "both", both, {})) >= adjusted(
        write(tmp_path / "alone", alone, {})
    )


def test_a_control_that_fails_is_bold(tmp_path: Path) -> None:
    parts = [StudyPart(config=part("main", "good"), records=(), expected=4)]
    assert "All hold." in write(tmp_path, parts, {0: [control(holds=True)]})
    text = write(tmp_path, parts, {0: [control(holds=True)], 1: [control(holds=False)]})
    assert "**1 control of 2 not as wanted**" in text
    assert "FAILS" in text
    assert "No run is finished." in text
