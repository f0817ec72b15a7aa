"""One table of strings, written as Markdown, aligned text or CSV."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from kdhiera.results import Comparison, Interval, PerClass, Result


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as they are shown.

    Args:
        headers: One a column.
        rows: Each as long as the headers.
        numeric: Columns that hold figures, shown flush right.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = frozenset()


def to_markdown(table: Table) -> str:
    """A GitHub table; what Markdown would interpret in a cell is escaped."""
    rules = ["---:" if i in table.numeric else "---" for i in range(len(table.headers))]
    lines = [[escape_markdown(cell) for cell in row] for row in (table.headers, *table.rows)]
    lines.insert(1, rules)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_text(table: Table) -> str:
    """Columns padded to their widest cell, two spaces between them."""
    lines = [[printable(cell) for cell in row] for row in (table.headers, *table.rows)]
    widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = (
        "  ".join(
            " " * (width - _width(cell)) + cell
            if i in table.numeric
            else cell + " " * (width - _width(cell))
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    return "".join(f"{line.rstrip()}\n" for line in padded)


def to_csv(table: Table) -> str:
    """Comma-separated with a header line; one line a row, control characters as escapes."""
    out = io.StringIO()
    lines = ([printable(cell) for cell in row] for row in (table.headers, *table.rows))
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()


def printable(text: str) -> str:
    """The text on one line, control characters shown as escapes."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in _CONTROL else c
        for c in text
    )


_CONTROL = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def escape_markdown(text: str) -> str:
    """The text as Markdown that shows it literally, on one line."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|~" else c for c in printable(text))


def _width(text: str) -> int:
    """Terminal columns: wide letters take two, combining marks none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def percent(interval: Interval, *, signed: bool = False, std: float | None = None) -> str:
    """`62.1 % (55.0 to 69.3)`; differences with their sign and in points.

    Args:
        interval: A share or a difference of shares.
        signed: Whether it is a difference.
        std: Standard deviation over seeds, shown as `62.1 ± 0.8 %`.
    """
    sign, unit = ("+", "points") if signed else ("", "%")
    value, low, high = (100 * x for x in (interval.value, interval.low, interval.high))
    spread = "" if std is None else f" ± {100 * std:.1f}"
    return f"{value:{sign}.1f}{spread} {unit} ({low:{sign}.1f} to {high:{sign}.1f})"


def result_table(results: Sequence[Result]) -> Table:
    """Features and methods down, labels across, chance as the last row.

    Where there are more than five classes a label is followed by its top-5 accuracy; where
    anything was learnt from fewer labels, a column says from how many of each class.

    Args:
        results: In the order in which they are to be shown; at most one for each
            (features, readout, method, labels_per_class, label).
    """
    labels = list(dict.fromkeys(r.label for r in results))
    fewer = any(r.labels_per_class is not None for r in results)
    top5 = {label: any(r.top5 for r in results if r.label == label) for label in labels}
    found: dict[tuple[str, ...], dict[str, Result]] = {}
    for r in results:
        amount = "all" if r.labels_per_class is None else f"{r.labels_per_class} a class"
        name = (r.features, r.readout, r.method, *((amount,) if fewer else ()))
        found.setdefault(name, {})[r.label] = r
    headers = ["features", "readout", "method", *(["labels"] if fewer else [])]
    first = len(headers)
    rows = [list(name) for name in found] + [["chance", *[""] * (first - 1)]]
    for label in labels:
        shown = [of.get(label) for of in found.values()]
        headers.append(label)
        chance = next(r.chance for r in shown if r is not None)
        cells = ["" if r is None else percent(r.accuracy, std=r.std) for r in shown]
        columns = [[*cells, f"{100 * chance:.1f} %"]]
        if top5[label]:
            headers.append("top-5")
            cells = [
                "" if r is None or r.top5 is None else f"{100 * r.top5.value:.1f} %" for r in shown
            ]
            columns.append([*cells, ""])
        for row, *values in zip(rows, *columns, strict=True):
            row += values
    return Table(
        headers=tuple(headers),
        rows=tuple(tuple(row) for row in rows),
        numeric=frozenset(range(first, len(headers))),
    )


def result_tables(results: Sequence[Result], *, width: int) -> list[Table]:
    """`result_table` in as many tables as fit a width as text, each of some labels.

    Args:
        results: As for `result_table`.
        width: Terminal columns; a table of one label may be wider.
    """
    groups: list[list[str]] = []
    for label in dict.fromkeys(r.label for r in results):
        if groups:
            wider = [r for r in results if r.label in (*groups[-1], label)]
            if _width(to_text(result_table(wider)).partition("\n")[0]) <= width:
                groups[-1].append(label)
                continue
        groups.append([label])
    return [result_table([r for r in results if r.label in group]) for group in groups]


def per_class_tables(
    tables: Sequence[PerClass], comparisons: Sequence[Comparison]
) -> list[tuple[str, Table]]:
    """Accuracy class by class of the main measures, all features beside one another.

    Main are the linear probe on slots and fine-tuning, or else the first measure that is
    compared. Of more than `MOST_CLASSES` those that the first features do worst on.

    Args:
        tables: In the order of the results.
        comparisons: In the order of the results.

    Returns:
        A title and a table for each label and main measure.
    """
    whole = [t for t in tables if t.measure.labels_per_class is None]
    groups: dict[tuple[str, str, str], list[PerClass]] = {}
    for table in whole:
        m = table.measure
        groups.setdefault((m.label, m.method, m.readout), []).append(table)
    made = []
    for label in dict.fromkeys(t.measure.label for t in whole):
        compared = [(c.label, c.method, c.readout) for c in comparisons if c.label == label]
        main = [key for key in dict.fromkeys(compared) if key[1:] in _MAIN] or compared[:1]
        made += [_per_class_table(key, groups[key]) for key in main]
    return made


def _per_class_table(key: tuple[str, str, str], tables: Sequence[PerClass]) -> tuple[str, Table]:
    classes = list(tables[0].classes)
    title = ", ".join(key[:2]) + f" ({key[2]}), class by class:"
    if len(classes) > MOST_CLASSES:
        title = f"{title[:-1]}, the worst {MOST_CLASSES} of {len(classes)}:"
        classes = sorted(classes, key=lambda row: row.accuracy)[:MOST_CLASSES]
    by_name = [{row.name: row for row in table.classes} for table in tables]
    rows = [
        (
            row.name,
            str(row.total // tables[0].num_seeds),
            *(f"{100 * of[row.name].accuracy:.1f} %" for of in by_name),
        )
        for row in classes
    ]
    headers = (key[0], "clips", *(table.measure.features for table in tables))
    return title, Table(
        headers=headers, rows=tuple(rows), numeric=frozenset(range(1, len(headers)))
    )


MOST_CLASSES = 20
_MAIN = (("linear probe", "slots"), ("fine-tuning", "mean"))


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """One row for each paired difference, in the order given."""
    fewer = any(c.labels_per_class is not None for c in comparisons)
    rows = []
    for c in comparisons:
        amount = "all" if c.labels_per_class is None else f"{c.labels_per_class} a class"
        named = (c.label, c.features, c.baseline, c.readout, c.method)
        difference = percent(c.difference, signed=True)
        rows.append((*named, *((amount,) if fewer else ()), difference))
    headers = ("label", "features", "against", "readout", "method")
    return Table(
        headers=(*headers, *(("labels",) if fewer else ()), "difference"),
        rows=tuple(rows),
        numeric=frozenset({6 if fewer else 5}),
    )


def long_table(results: Sequence[Result]) -> Table:
    """One row for each result with every field as a plain number: for other programs.

    What there is not (top-5 of few classes, a deviation of one seed, a number of labels where
    all were used) is an empty cell.
    """
    rows = []
    for result in results:
        values = asdict(result)
        for name, prefix in (("accuracy", ""), ("top5", "top5_")):
            interval = values.pop(name) or {}
            values |= {name: interval.get("value")}
            values |= {prefix + bound: interval.get(bound) for bound in ("low", "high")}
        rows.append(tuple("" if values[name] is None else str(values[name]) for name in _LONG))
    return Table(headers=_LONG, rows=tuple(rows))


_LONG = (
    "label", "features", "readout", "method", "accuracy", "low", "high", "chance", "num_clips",
    "labels_per_class", "num_seeds", "std", "top5", "top5_low", "top5_high",
)  # fmt: skip
