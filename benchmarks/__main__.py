"""Run benchmarks by name, or all: `python -m benchmarks extraction training_step`."""

from __future__ import annotations

import argparse
import subprocess
import sys

from benchmarks import (
    cache_size,
    extraction,
    faults,
    growth,
    integrity,
    live,
    memory,
    read,
    reference_step,
    scale,
    soak,
    startup,
    students,
    teachers,
    training_step,
)

BENCHMARKS = {
    "extraction": extraction.run,
    "training_step": training_step.run,
    "live": live.run,
    "memory": memory.run,
    "startup": startup.run,
    "reference_step": reference_step.run,
    "cache_size": cache_size.run,
    "read": read.run,
    "scale": scale.run,
    "growth": growth.run,
    "integrity": integrity.run,
    "teachers": teachers.run,
    "students": students.run,
    "faults": faults.run,
    "soak": soak.run,
}
ON_REQUEST = (
    "faults",  # three quarters of an hour
    "soak",  # more than an hour
    "reference_step",  # needs a package that this project does not install
)


def main() -> None:
    """Parse, run, print a table each and write `benchmarks/results/NAME.json`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="examples:\n  python -m benchmarks\n  python -m benchmarks extraction\n\n"
        "Needs the demo's data, and `training_step` its cache: make pipeline.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    names = parser.parse_args().names or [n for n in BENCHMARKS if n not in ON_REQUEST]
    for name in names:
        if name not in BENCHMARKS:
            parser.error(f"no benchmark is named {name}: there are {', '.join(BENCHMARKS)}")
    if len(names) == 1:
        BENCHMARKS[names[0]]()
        return
    for name in names:  # some of them keep their process to one core
        subprocess.run([sys.executable, "-m", "benchmarks", name], check=True)


if __name__ == "__main__":
    main()
