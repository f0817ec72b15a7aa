"""The installed command as a process, and what can be done to it and to those below it."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

COMMAND = str(Path(sys.executable).with_name("kdhiera"))
WAIT_SECONDS = 300.0


def start(said: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """The command in a process group of its own.

    Args:
        said: File that gets what it says on stderr.
        arguments: Subcommand, config, overrides.
    """
    with said.open("wb") as errors:
        return subprocess.Popen(
            [COMMAND, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )


def children(pid: int) -> list[int]:
    """All processes below one."""
    below: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        below.setdefault(parent, []).append(int(stat.parent.name))
    found, waiting = [], [pid]
    while waiting:
        mine = below.get(waiting.pop(), [])
        found += mine
        waiting += mine
    return found


def actors(pid: int) -> list[int]:
    """Ray actors of a driver."""
    found = []
    for child in children(pid):
        try:
            command = Path(f"/proc/{child}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if command.startswith(b"ray::_Actor"):
            found.append(child)
    return found


def send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """SIGKILL takes the whole group; other signals go to the driver alone."""
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)


def pause(seconds: float, process: subprocess.Popen[bytes]) -> None:
    """Sleep, but not beyond the end of a process."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.01)


def _out_of_memory(pid: int) -> None:
    """Let a process have no more memory than it has."""
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (size, size))


STRIKES: dict[str, Callable[[int], None]] = {
    "actor SIGKILL": lambda pid: os.kill(pid, signal.SIGKILL),
    "actor SIGSEGV": lambda pid: os.kill(pid, signal.SIGSEGV),
    "actor out of memory": _out_of_memory,
    "actor hangs (SIGSTOP)": lambda pid: os.kill(pid, signal.SIGSTOP),
}
