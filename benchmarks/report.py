"""How every benchmark ends: a table on stdout, JSON beside it."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


Table = Mapping[str, Mapping[str, float]]


def publish(
    name: str,
    seconds: Mapping[str, Sequence[float]],
    figures: Mapping[str, float],
    tables: Mapping[str, Table] | None = None,
) -> None:
    """Print medians and figures, and write them with all samples.

    Args:
        name: Of the benchmark.
        seconds: Samples by what was timed.
        figures: Ratios made of the medians.
        tables: Values by row and column, by the table's name.
    """
    print(f"\n{name}")
    for what, samples in seconds.items():
        low, high = min(samples), max(samples)
        middle = statistics.median(samples)
        print(f"  {what:<56} {middle:9.4f} s   [{low:.4f}, {high:.4f}], {len(samples)} runs")
    for what, value in figures.items():
        print(f"  {what:<56} {value:12.5g}")
    for title, table in (tables or {}).items():
        _print_table(title, table)
    RESULTS.mkdir(exist_ok=True)
    content = {
        "command": f"python -m benchmarks {name}",
        "machine": {"processor": _processor(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "seconds": {k: list(v) for k, v in seconds.items()},
        "figures": dict(figures),
        **({"tables": tables} if tables else {}),
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def _print_table(title: str, table: Table) -> None:
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    first = max(len(name) for name in (title, *table))
    widths = [max(len(column), 9) for column in columns]
    head = "  ".join(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True))
    print(f"\n  {title:<{first}}  {head}")
    for name, row in table.items():
        cells = "  ".join(
            f"{row[c]:>{w}.4g}" if c in row else " " * w
            for c, w in zip(columns, widths, strict=True)
        )
        print(f"  {name:<{first}}  {cells}".rstrip())


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()
