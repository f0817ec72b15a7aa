"""The few errors a user can meet, each with the exit code its command ends with.

Every message says what was wrong, what was found, and what to do about it.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Protocol


class ExitCode(IntEnum):
    """What a command's exit status means; documented in `docs/exit-codes.md`."""

    OK = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3
    TOO_MUCH_BAD_DATA = 4
    INCOMPLETE = 5
    INTERRUPTED = 75


class Result(Protocol):
    """What a command prints as JSON."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        ...


class KdhieraError(Exception):
    """Something a user can mend; the command prints the message and no traceback.

    Args:
        message: What was wrong, what was found, and what to do about it.
        result: What was done nevertheless; a command that was asked for JSON prints it.
    """

    exit_code = ExitCode.FAILED

    def __init__(self, message: str, *, result: Result | None = None) -> None:
        super().__init__(message)
        self.result = result


class UsageError(KdhieraError):
    """A wrong config, argument or input: nothing was started."""

    exit_code = ExitCode.USAGE


class MismatchError(KdhieraError):
    """A cache or run that was made for another configuration; nothing was changed."""

    exit_code = ExitCode.REFUSED


class DamagedError(KdhieraError):
    """Stored bytes that are missing, short or differ from their checksum."""

    exit_code = ExitCode.FAILED


class BadDataError(KdhieraError):
    """More bad samples than `data.max_bad_fraction` allows."""

    exit_code = ExitCode.TOO_MUCH_BAD_DATA


class IncompleteError(KdhieraError):
    """Some work could not be finished although the rest was; running again goes on."""

    exit_code = ExitCode.INCOMPLETE


class StoppedError(KdhieraError):
    """Stopped by SIGTERM or SIGINT at a clean point; running again goes on."""

    exit_code = ExitCode.INTERRUPTED
