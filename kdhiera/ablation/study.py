"""`docs/results.md`: claims, what was found of them, and how far to trust it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdhiera.ablation.contrasts import answer
from kdhiera.ablation.page import question_blocks, shown_measures
from kdhiera.ablation.plots import bars, curves
from kdhiera.ablation.records import RunRecord
from kdhiera.ablation.tables import by_variant, everything, variant_table
from kdhiera.config.ablation import AblationConfig
from kdhiera.progress import counted, human_seconds
from kdhiera.report.plots import save
from kdhiera.report.tables import Table, escape_markdown, percent, to_csv, to_markdown
from kdhiera.results import Control
from kdhiera.storage import write_atomic

PREFACE = """\
Written by `make study` from the records in `docs/results/records` (which test clips every run got
right); do not edit it by hand. What is not run yet is shown empty; the same command goes on with
it, and `python -m kdhiera.pipelines.study --page` only writes this page again.

**What this is.** The demo's labelled task: cut-outs of six categories move in four directions over
real videos; 8 frames of 128 x 128 px, a nano Hiera, minutes of training a run. Objects and
background videos of the test split are in no training clip, labelled or not. A seed is also one
of four folds: other objects and videos are held out. **What it is not.** The image teacher is a
ViT-S/14 of the DINOv2 architecture tuned for saliency, the video teacher a small 3-D CNN trained
on shot transitions: neither is the self-supervised teacher of the paper. K400, SSv2 and AVA are
untested.

**How to read it.** Settings were chosen on fold 0's training and validation splits (decision 027),
which show objects and videos that other folds test; the demo had shown fold 0's test split under
two lengths of training before. A probe's penalty is chosen on the validation split. Differences
are paired over clips and seeds; intervals are 95 % bootstrap intervals resampled by object,
background and seed. One primary contrast a question is decided on, its p-value corrected by
Holm's procedure over all questions, those not run yet included; the others are uncorrected. A
claim whose difference cannot be shown is reported as not shown here.
"""


@dataclass(frozen=True, kw_only=True)
class StudyPart:
    """One ablation of the study.

    Args:
        config: The ablation.
        records: Of its finished runs.
        expected: Runs of the whole.
    """

    config: AblationConfig
    records: tuple[RunRecord, ...]
    expected: int


def write_study(
    page: Path, folder: Path, parts: Sequence[StudyPart], controls: Mapping[int, Sequence[Control]]
) -> Path:
    """Write the page, its pictures and `results.csv`.

    Args:
        page: The Markdown file.
        folder: Gets pictures and numbers; beside the page.
        parts: The ablations, the first one's variants in the main table.
        controls: Of the task.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = _distinct(parts)
    questions = [question for part in parts for question in part.config.questions]
    contrasts = answer(questions, records)
    variants = tuple(dict.fromkeys(name for part in parts for name in part.config.changes))
    write_atomic(folder / "results.csv", to_csv(everything(variants, records)).encode())
    blocks = ["# Results", PREFACE, *_state(parts, records)]
    blocks += ["## Claims", *question_blocks(questions, contrasts)]
    blocks += _variants(parts[0], folder)
    blocks += _controls(controls)
    where = folder.relative_to(page.parent)
    blocks.append(f"Every number of every run: [{where}/results.csv]({where}/results.csv).")
    write_atomic(page, ("\n\n".join(b.rstrip("\n") for b in blocks) + "\n").encode())
    return page


def _distinct(parts: Sequence[StudyPart]) -> list[RunRecord]:
    """Records of all parts; those that several share once."""
    found = {(r.variant, r.seed): r for part in parts for r in part.records}
    return list(found.values())


def _state(parts: Sequence[StudyPart], records: Sequence[RunRecord]) -> list[str]:
    lines = [
        f"- {part.config.name}: {len(part.records)} of {counted(part.expected, 'run')} done"
        for part in parts
    ]
    seconds = human_seconds(sum(r.seconds for r in records))
    return ["\n".join([*lines, f"- {seconds} of training in all"])]


def _variants(part: StudyPart, folder: Path) -> list[str]:
    config, records = part.config, part.records
    measures = shown_measures(config, records)
    names = tuple(config.changes)
    blocks = ["## Variants"]
    if not measures:
        return [*blocks, "No run is finished."]
    runs = by_variant(names, records)
    save(bars(runs, measures, config.baseline_name), folder / "accuracy.png", dpi=110)
    save(curves(runs, per_macs=True), folder / "curves.png", dpi=110)
    table = variant_table(names, config.baseline_name, records, measures)
    return [
        *blocks,
        "![Accuracy of every variant](results/accuracy.png)",
        to_markdown(table),
        "Mean over seeds ± standard deviation over seeds, with its interval.",
        "![Loss and explained variance against compute](results/curves.png)",
    ]


def _controls(controls: Mapping[int, Sequence[Control]]) -> list[str]:
    if not controls:
        return []
    folds = sorted(controls)
    cells = {
        (one.name, fold): percent(one.accuracy) + ("" if one.holds else " FAILS")
        for fold, of in controls.items()
        for one in of
    }
    known = [one for fold in folds for one in controls[fold]]
    wanted = {one.name: "above chance" if one.expected == "above" else "at chance" for one in known}
    rows = tuple(
        (name, want, *(cells.get((name, fold), "") for fold in folds))
        for name, want in wanted.items()
    )
    headers = ("given to the classifier", "wanted", *(f"fold {fold}" for fold in folds))
    failed = sum(not one.holds for one in known)
    note = (
        "All hold."
        if not failed
        else f"**{counted(failed, 'control')} of {len(known)} not as wanted**: of so many 95 % "
        "intervals about one in twenty misses chance by chance."
    )
    return [
        "## Controls of the task",
        "A linear probe for the sign of the motion, given its axis (chance 50 %): what ignores the "
        f"order of the frames must be at chance. {escape_markdown(note) if not failed else note}",
        to_markdown(Table(headers=headers, rows=rows)),
    ]
