"""What many runs came to, as tables: variants, contrasts, everything as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kdhiera.ablation.contrasts import Contrast, Estimate, difference, estimate
from kdhiera.ablation.records import RunRecord
from kdhiera.progress import counted, human_seconds
from kdhiera.report.tables import Table, percent
from kdhiera.results import Measure

NOT_RUN = "not run"


def by_variant(
    variants: Sequence[str], records: Sequence[RunRecord]
) -> dict[str, tuple[RunRecord, ...]]:
    """Records of every variant, in the order of the variants."""
    return {name: tuple(r for r in records if r.variant == name) for name in variants}


def measures_of(records: Sequence[RunRecord]) -> tuple[Measure, ...]:
    """All that was measured, in order of appearance."""
    return tuple(dict.fromkeys(m for record in records for m in record.outcomes.right))


def ranked(
    variants: Sequence[str], records: Sequence[RunRecord], measure: Measure | None
) -> tuple[str, ...]:
    """Variants by their validation accuracy, best first; those without one last.

    The validation split ranks, so that the test split chooses nothing.
    """
    runs = by_variant(variants, records)

    def key(name: str) -> float:
        found = None if measure is None else estimate(runs[name], measure, of_validation=True)
        return float("inf") if found is None else -found.value.value

    return tuple(sorted(variants, key=key))


def variant_table(
    variants: Sequence[str],
    baseline: str,
    records: Sequence[RunRecord],
    measures: Sequence[Measure],
) -> Table:
    """A row a variant: accuracy over seeds, and the paired difference to the baseline.

    Args:
        variants: In the order to show.
        baseline: The one that the others are compared with.
        records: Of all that were run.
        measures: Two columns each.
    """
    runs = by_variant(variants, records)
    rows = []
    for name in variants:
        cells = []
        for measure in measures:
            found = estimate(runs[name], measure)
            cells.append(accuracy_cell(found))
            cells.append(_against(runs, name, baseline, measure))
        steps = {r.steps for r in runs[name]}
        rows.append(
            (
                name,
                str(len(runs[name])) if runs[name] else NOT_RUN,
                *cells,
                _span([f"{s:,}" for s in sorted(steps)]),
                human_seconds(sum(r.seconds for r in runs[name]) / len(runs[name]))
                if runs[name]
                else "",
            )
        )
    headers = ["variant", "seeds"]
    for measure in measures:
        headers += [_title(measure), f"against {baseline}"]
    return Table(
        headers=(*headers, "steps", "time a run"),
        rows=tuple(rows),
        numeric=frozenset(range(1, len(headers) + 2)),
    )


def accuracy_cell(found: Estimate | None) -> str:
    """`62.1 ± 1.3 % (55.0 to 69.3)`; empty where nothing was run."""
    if found is None:
        return ""
    spread = "" if found.std is None else f" ± {100 * found.std:.1f}"
    low, high = 100 * found.value.low, 100 * found.value.high
    return f"{100 * found.value.value:.1f}{spread} % ({low:.1f} to {high:.1f})"


def contrast_table(contrasts: Sequence[Contrast]) -> Table:
    """A row a contrast, primary ones marked; empty where a side was not run."""
    rows = []
    for c in contrasts:
        p = "" if c.p_value is None else f"{c.p_value:.3f}"
        adjusted = "" if c.adjusted is None else f"{c.adjusted:.3f}"
        margin = c.asked.margin
        rows.append(
            (
                c.asked.name + (" (primary)" if c.asked.primary else ""),
                f"{c.asked.metric.label}, {c.asked.metric.method}",
                "" if c.difference is None else percent(c.difference.value, signed=True),
                "" if margin is None else f"-{100 * margin:.1f} points",
                "" if c.difference is None else counted(len(c.difference.seeds), "seed"),
                p,
                adjusted,
                c.verdict.value,
            )
        )
    headers = ("contrast", "measured by", "difference", "margin", "over", "p", "Holm", "verdict")
    return Table(headers=headers, rows=tuple(rows), numeric=frozenset({2, 3, 5, 6}))


def everything(variants: Sequence[str], records: Sequence[RunRecord]) -> Table:
    """One row a run and measure, plain numbers: for other programs."""
    rows = []
    for name, runs in by_variant(variants, records).items():
        for record in runs:
            o = record.outcomes
            for m, right in o.right.items():
                known = o.known[m.label]
                rows.append(
                    (
                        name,
                        str(record.seed),
                        m.label,
                        m.features,
                        m.readout,
                        m.method,
                        "all" if m.labels_per_class is None else str(m.labels_per_class),
                        f"{o.validation[m]:.4f}",
                        f"{right[:, known].mean():.4f}",
                        str(int(known.sum())),
                        str(record.steps),
                        f"{record.seconds:.1f}",
                    )
                )
    headers = (
        "variant", "seed", "label", "features", "readout", "method", "labels_per_class",
        "validation_accuracy", "test_accuracy", "num_clips", "steps", "seconds",
    )  # fmt: skip
    return Table(headers=headers, rows=tuple(rows))


def _against(
    runs: Mapping[str, Sequence[RunRecord]], name: str, baseline: str, measure: Measure
) -> str:
    if name == baseline:
        return "-"
    found = difference(runs[name], measure, runs[baseline], measure)
    return "" if found is None else percent(found[0].value, signed=True)


def _title(measure: Measure) -> str:
    words = [measure.label, measure.method]
    if measure.labels_per_class is not None:
        words.append(f"{measure.labels_per_class} labels a class")
    return ", ".join(words)


def _span(values: Sequence[str]) -> str:
    return values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}" if values else ""
