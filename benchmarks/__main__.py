"""Run benchmarks by name, or all: `python -m benchmarks extraction training_step`."""

from __future__ import annotations

import argparse

from benchmarks import extraction, integrity, teachers, training_step

BENCHMARKS = {
    "extraction": extraction.run,
    "integrity": integrity.run,
    "teachers": teachers.run,
    "training_step": training_step.run,
}


def main() -> None:
    """Parse, run, print a table each and write `benchmarks/results/NAME.json`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="examples:\n  python -m benchmarks\n  python -m benchmarks extraction\n\n"
        "Needs the demo's data and cache: make pipeline.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    for name in parser.parse_args().names or BENCHMARKS:
        if name not in BENCHMARKS:
            parser.error(f"no benchmark is named {name}: there are {', '.join(BENCHMARKS)}")
        BENCHMARKS[name]()


if __name__ == "__main__":
    main()
