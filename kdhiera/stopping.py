"""Stopping at a clean point when the system asks for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from kdhiera.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, for the length of the block.

    Only the main thread may handle signals; in another one the event stays unset.
    """
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()

    with _handled(handle):
        yield stop


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """End the block with an error on SIGTERM and SIGINT, where it is harmless to stop anywhere.

    Blocks of `stop_on_signals` within are for what is not.

    Raises:
        StoppedError: When such a signal comes.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        raise _SignalledError

    try:
        with _handled(handle):
            yield
    except _SignalledError:
        raise StoppedError("stopped: run the same command again to go on") from None


def ignore_signals() -> None:
    """From here on SIGTERM and SIGINT do nothing: the process is ending."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class _SignalledError(BaseException):
    """No `Exception`: libraries swallow these while they are imported."""


@contextmanager
def _handled(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, handle) for s in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
