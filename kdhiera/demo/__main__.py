"""`python -m kdhiera.demo`: prepare the demo's data and teachers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kdhiera.demo.prepare import prepare
from kdhiera.demo.task import TaskSpec
from kdhiera.errors import ExitCode, KdhieraError

_DESCRIPTION = """\
Fetch the demo's assets (520 MB of packages, of which 170 MB are kept), convert its image
teacher and draw its shards. Only what is missing is done, so run it again after an
interruption.

examples:
  python -m kdhiera.demo
  python -m kdhiera.demo --root /data/demo --fold 1
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse, prepare, say what is where.

    Args:
        arguments: As on the command line; None takes those of this process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m kdhiera.demo",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", type=Path, default=Path("demo-data"), help="default: demo-data")
    parser.add_argument(
        "--fold",
        type=int,
        default=0,
        choices=range(4),
        help="which objects and videos are held out",
    )
    parser.add_argument("--processes", type=int, default=2, help="processes that draw")
    options = parser.parse_args(arguments)
    try:
        prepared = prepare(
            options.root,
            spec=TaskSpec(fold=options.fold),
            num_processes=options.processes,
            progress=_say,
        )
    except KdhieraError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except OSError as error:  # a full disk, a folder that may not be written
        sys.stderr.write(f"error: {error}\n")
        return ExitCode.FAILED
    except KeyboardInterrupt:
        sys.stderr.write("stopped; run the same command again to go on\n")
        return ExitCode.INTERRUPTED
    _say(f"ready in {options.root}")
    if not prepared.train:
        _say("the labelled task is missing, because its cut-outs cannot be had here")
    return ExitCode.OK


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
