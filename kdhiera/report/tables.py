"""One table of strings, written as Markdown, aligned text or CSV."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from kdhiera.results import Comparison, Interval, Result


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


def percent(interval: Interval, *, signed: bool = False) -> str:
    """`62.1 % (55.0 to 69.3)`; differences with their sign and in points."""
    sign, unit = ("+", "points") if signed else ("", "%")
    value, low, high = (100 * x for x in (interval.value, interval.low, interval.high))
    return f"{value:{sign}.1f} {unit} ({low:{sign}.1f} to {high:{sign}.1f})"


def result_table(results: Sequence[Result]) -> Table:
    """Features and methods down, labels across, chance as the last row.

    Args:
        results: In the order in which they are to be shown; at most one for each
            (features, readout, method, label).
    """
    labels = list(dict.fromkeys(r.label for r in results))
    cells = {(r.features, r.readout, r.method, r.label): percent(r.accuracy) for r in results}
    chance = {r.label: f"{100 * r.chance:.1f} %" for r in results}
    names = dict.fromkeys((r.features, r.readout, r.method) for r in results)
    rows = [(*name, *(cells.get((*name, label), "") for label in labels)) for name in names]
    rows.append(("chance", "", "", *(chance[label] for label in labels)))
    return Table(
        headers=("features", "readout", "method", *labels),
        rows=tuple(rows),
        numeric=frozenset(range(3, 3 + len(labels))),
    )


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """One row for each paired difference, in the order given."""
    return Table(
        headers=("label", "features", "against", "readout", "method", "difference"),
        rows=tuple(
            (
                c.label,
                c.features,
                c.baseline,
                c.readout,
                c.method,
                percent(c.difference, signed=True),
            )
            for c in comparisons
        ),
        numeric=frozenset({5}),
    )


def long_table(results: Sequence[Result]) -> Table:
    """One row for each result with every field as a plain number: for other programs."""
    rows = []
    for result in results:
        values = asdict(result)
        interval = values.pop("accuracy")
        values |= {"accuracy": interval["value"], "low": interval["low"], "high": interval["high"]}
        rows.append(values)
    headers = tuple(_LONG)
    return Table(
        headers=headers, rows=tuple(tuple(str(row[name]) for name in headers) for row in rows)
    )


_LONG = (
    "label", "features", "readout", "method", "accuracy", "low", "high", "chance", "num_clips",
)  # fmt: skip
