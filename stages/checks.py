"""Checks with a verdict and advice, a line each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from kdhiera.errors import ExitCode, KdhieraError


class Verdict(StrEnum):
    """What a check came to."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at.

    Args:
        name: In one or two words.
        verdict: What it came to.
        words: What was found and, unless it is well, what to do.
        exit_code: Of a failure, as the command that meets it would end.
    """

    name: str
    verdict: Verdict
    words: str
    exit_code: ExitCode = ExitCode.OK


@dataclass(frozen=True, kw_only=True)
class Checks:
    """Everything that was looked at, in order."""

    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        """Those that failed."""
        return tuple(check for check in self.checks if check.verdict is Verdict.FAIL)

    @property
    def exit_code(self) -> ExitCode:
        """Wrong input before refusal before any other failure."""
        codes = {check.exit_code for check in self.failed}
        order = (ExitCode.USAGE, ExitCode.REFUSED)
        return next((code for code in order if code in codes), max(codes, default=ExitCode.OK))

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "ok": not self.failed,
            "checks": [
                {"name": c.name, "verdict": c.verdict.value, "words": c.words} for c in self.checks
            ],
        }

    def describe(self) -> str:
        """For people."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        width = max((len(check.name) for check in self.checks), default=0)
        for check in self.checks:
            first, *rest = check.words.splitlines() or [""]
            yield f"{check.verdict.value:<4}  {check.name:<{width}}  {first}"
            yield from (f"{'':<{width + 8}}{line}" for line in rest)
        counts = Counter(check.verdict for check in self.checks)
        yield ", ".join(f"{counts[verdict]} {verdict.value}" for verdict in Verdict)


def ok(name: str, words: str) -> Check:
    """All is well."""
    return Check(name=name, verdict=Verdict.OK, words=words)


def warn(name: str, words: str) -> Check:
    """It works, and could be better."""
    return Check(name=name, verdict=Verdict.WARN, words=words)


def fail(name: str, words: str, exit_code: ExitCode = ExitCode.FAILED) -> Check:
    """It does not work."""
    return Check(name=name, verdict=Verdict.FAIL, words=words, exit_code=exit_code)


def attempt(name: str, function: Callable[[], str]) -> Check:
    """What a function says if it does what it should, and what it raises if not.

    Args:
        name: Of the check.
        function: Returns what it found.
    """
    try:
        return ok(name, function())
    except KdhieraError as error:
        return fail(name, str(error), error.exit_code)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return fail(name, f"{error.strerror or error}{where}")
