"""`report.md` of an ablation: what a person reads in two minutes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import yaml

from kdhiera.ablation.contrasts import Contrast, Verdict, answer, estimate, resolve
from kdhiera.ablation.plots import bars, curves
from kdhiera.ablation.records import RunRecord
from kdhiera.ablation.tables import (
    accuracy_cell,
    by_variant,
    contrast_table,
    everything,
    measures_of,
    ranked,
    variant_table,
)
from kdhiera.config.ablation import AblationConfig, Changes, MetricConfig, QuestionConfig
from kdhiera.progress import counted, human_seconds
from kdhiera.report.plots import save
from kdhiera.report.tables import Table, escape_markdown, to_csv, to_markdown
from kdhiera.results import Measure
from kdhiera.storage import write_atomic

CHANGES_SHOWN = 120  # characters
LABELS_SHOWN = 3  # in table and bars: more do not fit a page


def write_ablation_report(
    folder: Path,
    config: AblationConfig,
    records: Sequence[RunRecord],
    failures: Mapping[str, str],
    *,
    expected: int,
) -> Path:
    """Write `report.md`, `table.md`, `table.csv`, `table.json` and the plots under `report/`.

    Args:
        folder: Of the ablation; created.
        config: The ablation.
        records: Of the runs that are finished.
        failures: Why the others failed, by `VARIANT/seed-N`.
        expected: Runs of the whole ablation.

    Returns:
        The path of `report.md`, written last.
    """
    beside = folder / "report"
    beside.mkdir(parents=True, exist_ok=True)
    names = tuple(config.changes)
    every = shown_measures(config, records)
    measures = every[:LABELS_SHOWN]
    order = ranked(names, records, measures[0] if measures else None)
    table = variant_table(order, config.baseline_name, records, measures)
    contrasts = answer(config.questions, records)
    write_atomic(folder / "table.md", to_markdown(table).encode())
    write_atomic(folder / "table.csv", to_csv(everything(names, records)).encode())
    write_atomic(folder / "table.json", _document(config, records, every, contrasts, failures))
    blocks = [
        f"# {escape_markdown(config.name)}",
        *_in_short(config, records, failures, measures, order, contrasts, expected),
        "## Variants",
        to_markdown(_changes(config)),
        "## Results",
    ]
    if records and measures:
        runs = by_variant(order, records)
        save(bars(runs, measures, config.baseline_name), beside / "accuracy.png")
        save(curves(runs), beside / "curves.png")
        blocks += [
            "![Accuracy of every variant](report/accuracy.png)",
            to_markdown(table),
            "Mean over seeds ± standard deviation over seeds; in brackets 95 % bootstrap "
            "intervals, resampled by what test clips share and by seed. Ranked by the validation "
            "split, never by the test split.",
            *_left_out(every[LABELS_SHOWN:]),
            *_questions(config, contrasts),
            "## Curves",
            "![Loss and explained variance](report/curves.png)",
            "Losses of variants with other targets, losses or normalisations are on other scales.",
        ]
    elif records:
        blocks.append("No finished run holds the chosen metric: [table.csv](table.csv) has all.")
    else:
        blocks.append("No run is finished.")
    if failures:
        rows = tuple(failures.items())
        blocks += ["## Failed", to_markdown(Table(headers=("run", "why"), rows=rows))]
    files = ", ".join(f"[{name}]({name})" for name in ("table.csv", "table.json", "table.md"))
    blocks.append(f"As data: {files}.")
    path = folder / "report.md"
    write_atomic(path, ("\n\n".join(block.rstrip("\n") for block in blocks) + "\n").encode())
    return path


def _left_out(measures: Sequence[Measure]) -> list[str]:
    names = escape_markdown(", ".join(m.label for m in measures))
    return [f"Further labels are in [table.csv](table.csv): {names}."] if names else []


def question_blocks(
    questions: Sequence[QuestionConfig], contrasts: Sequence[Contrast]
) -> Iterator[str]:
    """Every question with its claim and its contrasts, as Markdown."""
    for question in questions:
        own = [c for c in contrasts if c.question == question.title]
        yield f"### {escape_markdown(question.title)}"
        if question.claim:
            yield f"Claim: {escape_markdown(question.claim)} **{_holds(own)}**"
        yield to_markdown(contrast_table(own))


def _holds(contrasts: Sequence[Contrast]) -> str:
    """Of a claim, by its primary contrast."""
    primary = next((c for c in contrasts if c.asked.primary), contrasts[0])
    return {
        Verdict.BETTER: "Holds here.",
        Verdict.NOT_WORSE: "Holds here.",
        Verdict.WORSE: "Does not hold here: the opposite was found.",
        Verdict.OPEN: "Not shown here: these runs do not decide it.",
        Verdict.NOT_RUN: "Not run.",
    }[primary.verdict]


def _questions(config: AblationConfig, contrasts: Sequence[Contrast]) -> list[str]:
    if not config.questions:
        return []
    return [
        "## Questions",
        "One primary contrast a question, its p-value corrected by Holm's procedure over all "
        "questions; other contrasts are uncorrected.",
        *question_blocks(config.questions, contrasts),
    ]


def shown_measures(config: AblationConfig, records: Sequence[RunRecord]) -> tuple[Measure, ...]:
    """The chosen metric first, then the same of the other labels."""
    found = measures_of(records)
    labels = list(dict.fromkeys(m.label for m in found))
    if not labels:
        return ()
    metric = config.metric or _first_metric(found)
    order = [metric.label, *(label for label in labels if label != metric.label)]
    chosen = (resolve(metric.model_copy(update={"label": label}), records) for label in order)
    return tuple(measure for measure in chosen if measure is not None)


def _first_metric(found: Sequence[Measure]) -> MetricConfig:
    """The linear probe of the first label, or else the student's first measure."""
    usual = MetricConfig(label=found[0].label)
    own = [m for m in found if m.features == usual.features and m.labels_per_class is None]
    first = next((m for m in own if m.method == usual.method), (own or found)[0])
    return MetricConfig.model_validate(
        {"label": first.label, "method": first.method, "features": first.features}
    )


def _in_short(
    config: AblationConfig,
    records: Sequence[RunRecord],
    failures: Mapping[str, str],
    measures: Sequence[Measure],
    order: Sequence[str],
    contrasts: Sequence[Contrast],
    expected: int,
) -> list[str]:
    seconds = human_seconds(sum(r.seconds for r in records))
    lines = [
        f"{len(records)} of {counted(expected, 'run')} finished: "
        f"{counted(len(config.changes), 'variant')} over {counted(len(config.seeds), 'seed')}, "
        f"{seconds} of training."
    ]
    if failures:
        lines.append(f"**{counted(len(failures), 'run')} failed**; the same command tries again.")
    runs = by_variant(order, records)
    if measures and runs[order[0]]:
        best = escape_markdown(order[0])
        cells = (
            f"{escape_markdown(m.label)} {accuracy_cell(estimate(runs[order[0]], m))}"
            for m in measures
        )
        lines.append(
            f"Best on the validation split: {best}; on the test split " + ", ".join(cells) + "."
        )
        lines += _beside(runs[order[0]], measures[0])
    for c in contrasts:
        if c.asked.primary:
            question, claim = escape_markdown(c.question), _holds([c])
            lines.append(f"{question}: {escape_markdown(c.asked.name)}: {c.verdict.value}. {claim}")
    return ["\n".join(f"- {line}" for line in lines)]


def _beside(runs: Sequence[RunRecord], measure: Measure) -> list[str]:
    """What untrained students and teachers reach, so that a number means something."""
    others = [m for m in measures_of(runs) if replace(m, features=measure.features) == measure != m]
    found = ((m.features, estimate(runs, m)) for m in others)
    words = [
        f"{escape_markdown(name)} {100 * e.value.value:.1f} %" for name, e in found if e is not None
    ]
    what = escape_markdown(f"{measure.label}, {measure.method}")
    return [f"Beside it, {what}: {', '.join(words)}."] if words else []


def _changes(config: AblationConfig) -> Table:
    rows = []
    for name, changes in config.changes.items():
        text = _words(changes) or "nothing"
        mark = " (baseline)" if name == config.baseline_name else ""
        short = text if len(text) <= CHANGES_SHOWN else text[:CHANGES_SHOWN] + " ..."
        rows.append((name + mark, short))
    common = f"changes, to {config.base}" + (
        f" with {_words(config.overrides)}" if config.overrides else ""
    )
    return Table(headers=("variant", common), rows=tuple(rows))


def _words(changes: Changes) -> str:
    """As overrides on a command line have it."""
    return ", ".join(f"{key}={_flow(value)}" for key, value in changes.items())


def _flow(value: object) -> str:
    text = yaml.safe_dump(_plain_values(value), default_flow_style=True, width=float("inf"))
    return text.removesuffix("...\n").rstrip("\n")


def _plain_values(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain_values(v) for key, v in value.items()}
    return [_plain_values(v) for v in value] if isinstance(value, list | tuple) else value


def _document(
    config: AblationConfig,
    records: Sequence[RunRecord],
    measures: Sequence[Measure],
    contrasts: Sequence[Contrast],
    failures: Mapping[str, str],
) -> bytes:
    """The chosen metric of every label with intervals, and all contrasts, as JSON."""
    variants = []
    for name, runs in by_variant(tuple(config.changes), records).items():
        for measure in measures:
            found = estimate(runs, measure)
            if found is None:
                continue
            variants.append({"variant": name, **asdict(measure), **asdict(found)})
    answers = [
        {
            "question": c.question,
            "contrast": c.asked.model_dump(mode="json"),
            "difference": None if c.difference is None else asdict(c.difference),
            "p_value": c.p_value,
            "adjusted": c.adjusted,
            "verdict": c.verdict.value,
        }
        for c in contrasts
    ]
    document = {"variants": variants, "contrasts": answers, "failures": dict(failures)}
    return (json.dumps(document, indent=1) + "\n").encode()
