"""Figure 8: CPU time of the help of every command."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys

from benchmarks.report import publish

ROUNDS = 7
COMMANDS = ((), ("extract-teachers",), ("distill",), ("evaluate",), ("ablate",), ("cache",))


def run() -> None:
    """Start `kdhiera ... --help` in turn, and count user and system time of the children."""
    seconds: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for command in COMMANDS:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(
                [sys.executable, "-c", "from kdhiera.cli import main; main()", *command, "--help"],
                check=True,
                capture_output=True,
            )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            seconds.setdefault(" ".join(("kdhiera", *command, "--help")), []).append(spent)
    slowest = max(statistics.median(samples) for samples in seconds.values())
    publish("startup", seconds, {"slowest, CPU seconds": slowest})
