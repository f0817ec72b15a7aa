"""How far a long command has come: bars on a terminal, plain lines elsewhere.

Both say the same: `extract: 120/600 clips (20 %), 41 clips/s, ETA 0:12`. They write to
stderr, so that results on stdout stay clean for scripts.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TextIO, runtime_checkable

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

RATE_WINDOW_SECONDS = 30.0
BYTES = "bytes"  # the unit whose counts are shown as kB, MB, ...


@runtime_checkable
class Progress(Protocol):
    """Where a long piece of work reports to; safe to call from several threads."""

    def start(self, description: str, total: int | None, unit: str) -> int:
        """Announce a task.

        Args:
            description: One or two words, such as `extract`.
            total: Units of work ahead; None if unknown.
            unit: Plural noun of what is counted; `bytes` is shown as kB, MB, ...

        Returns:
            The number that `advance` and `finish` ask for.
        """
        ...

    def advance(self, task: int, n: int = 1, **fields: object) -> None:
        """Report `n` more units done.

        Args:
            task: From `start`.
            n: Units done since the last call; 0 only updates the fields.
            **fields: Shown at the end of the line as `name value` until replaced.
        """
        ...

    def finish(self, task: int) -> None:
        """End a task, done or not; ending it twice is harmless."""
        ...


def human_bytes(num_bytes: float) -> str:
    """A size in decimal units with three digits, such as `1.50 MB`."""
    if abs(num_bytes) < 1000:
        return f"{num_bytes:.0f} B"
    value = float(num_bytes)
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        value /= 1000
        if abs(value) < 999.5 or unit == "PB":
            break
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def counted(n: int, noun: str) -> str:
    """A count with its noun, such as `1 part`, `2,000 parts` or `3 processes`."""
    ending = "" if n == 1 else "es" if noun.endswith("s") else "s"
    return f"{n:,} {noun}{ending}"


def human_seconds(seconds: float) -> str:
    """A duration as `m:ss` or `h:mm:ss`, rounded to whole seconds."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def make_progress(stream: TextIO | None = None) -> Iterator[Progress]:
    """Progress for the length of a `with` block; tasks still open at its end are ended.

    Args:
        stream: Where to write; None means stderr. Bars are drawn if it is a terminal
            that can move its cursor.
    """
    out = sys.stderr if stream is None else stream
    if out.isatty() and os.environ.get("TERM") != "dumb":
        with _bars(out) as bars:
            yield RichProgress(bars)
        return
    plain = PlainProgress(out)
    try:
        yield plain
    finally:
        plain.close()


@dataclass(kw_only=True)
class _Task:
    description: str
    total: int | None
    unit: str
    started: float
    done: int = 0
    written: float = 0.0
    fields: dict[str, object] = field(default_factory=dict)
    history: deque[tuple[float, int]] = field(default_factory=deque)

    def advance(self, n: int, fields: dict[str, object], now: float) -> None:
        self.done += n
        self.fields.update(fields)
        # One entry a second at most, and always one that is at least the window old.
        if not self.history or now - self.history[-1][0] >= 1.0:
            self.history.append((now, self.done))
            while len(self.history) > 1 and now - self.history[1][0] >= RATE_WINDOW_SECONDS:
                self.history.popleft()

    def rate(self, now: float) -> float:
        """Units a second over the last half minute: start-up soon stops to count."""
        then, done = (self.started, 0)
        if self.history and now - self.history[0][0] >= RATE_WINDOW_SECONDS:
            then, done = self.history[0]
        return (self.done - done) / (now - then) if now > then else 0.0

    def detail(self, now: float, *, ended: bool = False) -> str:
        """`120/600 clips (20 %), 41 clips/s, ETA 0:12, bad 3`."""
        count = human_bytes if self.unit == BYTES else "{:,}".format
        noun = "" if self.unit == BYTES else f" {self.unit}"
        if self.total is None:
            parts = [f"{count(self.done)}{noun}"]
        else:
            share = f" ({100 * self.done // self.total} %)" if self.total else ""
            parts = [f"{count(self.done)}/{count(self.total)}{noun}{share}"]
        elapsed = now - self.started
        rate = self.done / elapsed if ended and elapsed > 0 else self.rate(now)
        if rate > 0:
            parts.append(_rate(rate, self.unit))
        if ended:
            whole = self.total is None or self.done >= self.total
            parts.append(f"{'took' if whole else 'stopped after'} {human_seconds(elapsed)}")
        elif rate > 0 and self.total is not None and self.done < self.total:
            parts.append(f"ETA {human_seconds((self.total - self.done) / rate)}")
        parts += [f"{name} {value}" for name, value in self.fields.items()]
        return ", ".join(parts)


def _rate(rate: float, unit: str) -> str:
    if unit == BYTES:
        return f"{human_bytes(rate)}/s"
    if rate < 0.1:
        return f"{60 * rate:.2g} {unit}/min"
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s"


class PlainProgress:
    """One line when a task starts, one when it ends, and at most one an interval between.

    Args:
        stream: Where the lines go.
        interval_seconds: Least time between two lines of a task.
        clock: Seconds from any origin.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        interval_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._interval = interval_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._tasks: dict[int, _Task] = {}
        self._next = 0

    def start(self, description: str, total: int | None, unit: str) -> int:
        """See `Progress.start`."""
        with self._lock:
            now = self._clock()
            task = _Task(description=description, total=total, unit=unit, started=now, written=now)
            number, self._next = self._next, self._next + 1
            self._tasks[number] = task
            self._write(task, task.detail(now))
            return number

    def advance(self, task: int, n: int = 1, **fields: object) -> None:
        """See `Progress.advance`."""
        with self._lock:
            now = self._clock()
            state = self._tasks[task]
            state.advance(n, fields, now)
            if now - state.written >= self._interval:
                state.written = now
                self._write(state, state.detail(now))

    def finish(self, task: int) -> None:
        """See `Progress.finish`."""
        with self._lock:
            state = self._tasks.pop(task, None)
            if state is not None:
                self._write(state, state.detail(self._clock(), ended=True))

    def close(self) -> None:
        """End every task that is still open."""
        for task in list(self._tasks):
            self.finish(task)

    def _write(self, task: _Task, detail: str) -> None:
        self._stream.write(f"{task.description}: {detail}\n")
        self._stream.flush()


def _bars(stream: TextIO) -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[detail]}", markup=False),
        TimeElapsedColumn(),  # ticks while nothing is reported yet
        console=Console(file=stream),
        redirect_stdout=False,  # results stay on stdout
    )


class RichProgress:
    """Live bars of rich.

    Args:
        bars: Started and stopped by the caller.
    """

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._lock = threading.Lock()
        self._tasks: dict[int, _Task] = {}

    def start(self, description: str, total: int | None, unit: str) -> int:
        """See `Progress.start`."""
        with self._lock:
            now = time.monotonic()
            task = _Task(description=description, total=total, unit=unit, started=now)
            number = self._bars.add_task(description, total=total, detail=task.detail(now))
            self._tasks[number] = task
            return int(number)

    def advance(self, task: int, n: int = 1, **fields: object) -> None:
        """See `Progress.advance`."""
        with self._lock:
            now = time.monotonic()
            state = self._tasks[task]
            state.advance(n, fields, now)
            self._show(task, state.done, state.detail(now))

    def finish(self, task: int) -> None:
        """See `Progress.finish`."""
        with self._lock:
            state = self._tasks.pop(task, None)
            if state is not None:
                self._show(task, state.done, state.detail(time.monotonic(), ended=True))
                self._stop(task)

    def _show(self, task: int, done: int, detail: str) -> None:
        from rich.progress import TaskID

        self._bars.update(TaskID(task), completed=done, detail=detail)

    def _stop(self, task: int) -> None:
        from rich.progress import TaskID

        self._bars.stop_task(TaskID(task))
