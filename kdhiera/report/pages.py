"""`report.md` of a run: what was done, what came out, how far to trust it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from kdhiera.progress import human_bytes, human_seconds
from kdhiera.report.claim import claim_blocks, claims
from kdhiera.report.plots import result_bars, save, training_curves
from kdhiera.report.tables import (
    Table,
    comparison_table,
    escape_markdown,
    long_table,
    per_class_tables,
    percent,
    result_table,
    to_csv,
    to_markdown,
)
from kdhiera.results import Comparison, Control, PerClass, Result, to_json
from kdhiera.storage import write_atomic

FEW_GROUPS = 10


@dataclass(frozen=True, kw_only=True)
class CacheFacts:
    """What extraction left.

    Args:
        num_samples: Samples times views that were asked for.
        num_usable: Of these, rows that training can use.
        bad: Rows that it cannot, by status.
        num_bytes: On disk, pixels included.
        dense_bytes: The same clips' features of the same layers, all tokens, in fp16.
        columns: `teacher/layer` with its encoding, such as `image/9 int8`.
        seconds: Time spent extracting; None if it was all there before.
    """

    num_samples: int
    num_usable: int
    bad: Mapping[str, int]
    num_bytes: int
    dense_bytes: int
    columns: tuple[str, ...]
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class TargetFacts:
    """How one target was learnt.

    Args:
        target: `teacher/layer`.
        loss: First and last value logged.
        explained: First and last explained variance logged.
    """

    target: str
    loss: tuple[float, float]
    explained: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What distillation did.

    Args:
        steps: Optimiser steps.
        epochs: Passes over the samples.
        seconds: Wall time.
        clips_per_second: Over the run.
        data_wait: Share of the time spent waiting for data, 0..1.
        targets: In config order.
    """

    steps: int
    epochs: float
    seconds: float
    clips_per_second: float
    data_wait: float
    targets: tuple[TargetFacts, ...]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure for the report.

    Args:
        caption: One line in plain words.
        figure: What to draw.
    """

    caption: str
    figure: Figure


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """All that a report says; what is empty or None is left out.

    Args:
        name: Of the run.
        facts: What was run: a few names and values (student, teachers, masks, device, ...).
        cache: What extraction left.
        training: What distillation did.
        records: Lines of `metrics.jsonl`, for the curves.
        results: Of the evaluation, in the order to show.
        comparisons: Paired differences, in the order to show.
        per_class: Accuracy class by class, in the order of the results.
        num_groups: What the intervals were resampled over, such as `{"object": 40}`; empty
            if clip by clip.
        controls: Checks of the labelled task.
        pictures: From `show_clip` and elsewhere.
    """

    name: str
    facts: Mapping[str, str]
    cache: CacheFacts | None = None
    training: TrainingFacts | None = None
    records: Sequence[Mapping[str, Any]] = ()
    results: tuple[Result, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    per_class: tuple[PerClass, ...] = ()
    num_groups: Mapping[str, int]
    controls: tuple[Control, ...] = ()
    pictures: tuple[Picture, ...] = ()


def write_report(folder: Path, data: ReportData) -> Path:
    """Write `report.md` and, under `report/`, its pictures, `results.json` and `results.csv`.

    Every file is whole or absent; `report.md` comes last and replaces an older one.

    Args:
        folder: The run's folder; must exist.
        data: What to say.

    Returns:
        The path of `report.md`.
    """
    beside = folder / "report"
    beside.mkdir(exist_ok=True)
    sections = [
        [f"# {escape_markdown(data.name)}", to_markdown(_pairs(data.facts))],
        _in_short(data),
        _cache(data.cache),
        _training(data, beside),
        claim_blocks(claims(data.results, data.comparisons)),
        _evaluation(data, beside),
        _controls(data.controls),
        _pictures(data.pictures, beside),
    ]
    blocks = [block.rstrip("\n") for section in sections for block in section]
    path = folder / "report.md"
    write_atomic(path, ("\n\n".join(blocks) + "\n").encode())
    return path


def _pairs(facts: Mapping[str, str]) -> Table:
    return Table(headers=("what", "value"), rows=tuple(facts.items()))


def _in_short(data: ReportData) -> list[str]:
    lines = list(_summary(data))
    return ["## In short", "\n".join(f"- {line}" for line in lines)] if lines else []


def _summary(data: ReportData) -> Iterator[str]:
    if data.cache is not None:
        cache = data.cache
        yield (
            f"The cache takes {human_bytes(cache.num_bytes)} for {cache.num_usable:,} clip views, "
            f"pixels included: {cache.dense_bytes / max(cache.num_bytes, 1):.1f} times smaller "
            "than all tokens of the same layers in fp16."
        )
    if data.training is not None and data.training.targets:
        first, last = (
            sum(t.explained[i] for t in data.training.targets) / len(data.training.targets)
            for i in (0, 1)
        )
        yield (
            f"In {data.training.steps:,} steps ({human_seconds(data.training.seconds)}) the "
            f"student's explained variance of the teachers' features went from {first:.2f} to "
            f"{last:.2f} (mean over {len(data.training.targets)} targets)."
        )
    for c in data.comparisons:
        if c.labels_per_class is not None:
            continue  # the tables tell
        if c.difference.low > 0:
            verdict = "better"
        elif c.difference.high < 0:
            verdict = "worse"
        else:
            verdict = "not told apart"
        words = (c.label, c.method, c.readout, c.features, c.baseline)
        label, method, readout, features, baseline = (escape_markdown(word) for word in words)
        yield (
            f"{label}, {method} on {readout}: {features} against {baseline} "
            f"{percent(c.difference, signed=True)}: {verdict}."
        )
    if data.comparisons and (caution := _caution(data.num_groups)):
        yield f"The intervals in brackets: {caution[0].lower()}{caution[1:]}"
    failed = [control for control in data.controls if not control.holds]
    if failed:
        names = ", ".join(escape_markdown(control.name) for control in failed)
        yield f"**Controls that do not hold: {names}.** Do not trust the accuracies before they do."


def _cache(cache: CacheFacts | None) -> list[str]:
    if cache is None:
        return []
    share = 100 * cache.num_usable / max(cache.num_samples, 1)
    facts = {
        "clip views": f"{cache.num_usable:,} usable of {cache.num_samples:,} ({share:.1f} %)",
        **{f"not usable: {status}": f"{count:,}" for status, count in sorted(cache.bad.items())},
        "on disk": human_bytes(cache.num_bytes),
        "a clip view": human_bytes(cache.num_bytes / max(cache.num_usable, 1)),
        "all tokens in fp16": human_bytes(cache.dense_bytes),
        "columns": ", ".join(cache.columns),
        "extraction": "nothing was missing"
        if cache.seconds is None
        else f"{human_seconds(cache.seconds)} (minutes:seconds)",
    }
    return ["## Cache", to_markdown(_pairs(facts))]


def _training(data: ReportData, beside: Path) -> list[str]:
    training = data.training
    if training is None:
        return []
    rows = tuple(
        (t.target, *(f"{x:.4f}" for x in t.loss), *(f"{x:.3f}" for x in t.explained))
        for t in training.targets
    )
    blocks = [
        "## Training",
        f"{training.steps:,} steps, {training.epochs:g} epochs, "
        f"{human_seconds(training.seconds)} (minutes:seconds), "
        f"{training.clips_per_second:,.0f} clips/s, "
        f"{100 * training.data_wait:.1f} % of the time waiting for data.",
        to_markdown(
            Table(
                headers=("target", "loss: first", "last", "explained variance: first", "last"),
                rows=rows,
                numeric=frozenset({1, 2, 3, 4}),
            )
        ),
        "Explained variance is 1 - loss / loss of the best constant prediction: 0 means no better "
        "than a constant, 1 perfect.",
    ]
    if data.records:
        save(training_curves(data.records), beside / "training.png")
        blocks.append("![Loss and explained variance over the steps](report/training.png)")
    return blocks


def _evaluation(data: ReportData, beside: Path) -> list[str]:
    if not data.results:
        return []
    whole = [r for r in data.results if r.labels_per_class is None]
    save(result_bars(whole), beside / "results.png")
    document = {"results": to_json(data.results), "comparisons": to_json(data.comparisons)}
    write_atomic(beside / "results.json", (json.dumps(document, indent=1) + "\n").encode())
    write_atomic(beside / "results.csv", to_csv(long_table(data.results)).encode())
    blocks = [
        "## Evaluation",
        f"{max(r.num_clips for r in data.results):,} test clips.",
        "![Test accuracy with intervals](report/results.png)",
        to_markdown(result_table(data.results)),
    ]
    if data.comparisons:
        blocks += [
            "Differences on the same test clips, paired:",
            to_markdown(comparison_table(data.comparisons)),
        ]
    for title, table in per_class_tables(data.per_class, data.comparisons):
        blocks += [escape_markdown(title), to_markdown(table)]
    blocks += [
        _interval_note(data.num_groups),
        "As data: [results.json](report/results.json), [results.csv](report/results.csv).",
    ]
    return blocks


def _interval_note(num_groups: Mapping[str, int]) -> str:
    counts = [f"{escape_markdown(name)} ({n:,})" for name, n in num_groups.items()]
    groups = " and ".join(counts) or "clip"
    return f"In brackets: 95 % bootstrap intervals, resampled by {groups}. {_caution(num_groups)}"


def _caution(num_groups: Mapping[str, int]) -> str:
    """What few groups mean; empty where there are enough."""
    few = [f"{escape_markdown(name)}: {n}" for name, n in num_groups.items() if n < FEW_GROUPS]
    if not few:
        return ""
    return f"They rest on few groups ({', '.join(few)}) and are narrower than they ought to be."


def _controls(controls: Sequence[Control]) -> list[str]:
    if not controls:
        return []
    rows = tuple(
        (
            c.name,
            percent(c.accuracy),
            f"{100 * c.chance:.1f} %",
            f"{c.num_clips:,}",
            "at chance" if c.expected == "chance" else "above chance",
            "yes" if c.holds else "NO",
        )
        for c in controls
    )
    headers = ("given to the classifier", "accuracy", "chance", "clips", "wanted", "holds")
    return [
        "## Controls of the labelled task",
        to_markdown(Table(headers=headers, rows=rows, numeric=frozenset({1, 2, 3}))),
    ]


def _pictures(pictures: Sequence[Picture], beside: Path) -> list[str]:
    blocks = ["## Pictures"] if pictures else []
    for number, picture in enumerate(pictures):
        stem = re.sub(r"[^a-z0-9]+", "-", picture.caption.lower()).strip("-")[:40]
        name = f"picture-{number:02}-{stem}.png" if stem else f"picture-{number:02}.png"
        save(picture.figure, beside / name)
        caption = escape_markdown(picture.caption)
        blocks += [f"{caption}:", f"![{caption}](report/{name})"]
    return blocks
