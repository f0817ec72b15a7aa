"""Numbers with gaps: what is bad is named by runs, what is good is counted.

A record names the bad rows of a part as runs `[start, stop)`, so that the samples of a cache are
numbered from its records alone and an index costs nothing a good row.

    rows      0 1 2 3 4 5 6 7 8        bad: [2, 4) and [7, 8)
    good      0 1 x x 2 3 4 x 5        `rank` counts up, `nth` goes back
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

Runs = tuple[tuple[int, int], ...]


def runs_of(flags: Bool[np.ndarray, " n"]) -> Runs:
    """Runs of True, ascending."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    return tuple((int(start), int(stop)) for start, stop in edges.reshape(-1, 2))


def numbers_in(runs: Runs) -> Int[np.ndarray, " n"]:
    """All numbers of some runs, ascending."""
    return np.concatenate([np.empty(0, np.int64), *(np.arange(*run) for run in runs)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Gaps:
    """The numbers from 0 upwards that lie in none of some runs.

    Args:
        starts: First number of every run.
        skipped: How many numbers lie in runs before the i-th, and in all at the end.
    """

    starts: Int[np.ndarray, " runs"]
    skipped: Int[np.ndarray, " runs+1"]

    @classmethod
    def of(cls, runs: Runs) -> Gaps:
        """The gaps that ascending runs leave."""
        starts, stops = np.array(runs, np.int32).reshape(-1, 2).T
        skipped = np.concatenate(([0], np.cumsum(stops - starts))).astype(np.int32)
        return cls(starts=np.ascontiguousarray(starts), skipped=skipped)

    @classmethod
    def of_any(cls, many: Iterable[Int[np.ndarray, " _"]]) -> Gaps:
        """The numbers that none of several sets holds."""
        numbers = np.unique(np.concatenate([np.empty(0, np.int64), *many]))
        flags = np.zeros(int(numbers[-1]) + 1 if len(numbers) else 0, bool)
        flags[numbers] = True
        return cls.of(runs_of(flags))

    def __len__(self) -> int:
        """How many numbers lie in runs."""
        return int(self.skipped[-1])

    def nth(self, ranks: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The numbers of these ranks; inverse of `rank`."""
        if not len(self.starts):
            return ranks
        before = np.searchsorted(self.starts - self.skipped[:-1], ranks, side="right")
        numbers: np.ndarray = ranks + self.skipped[before]
        return numbers

    def rank(self, numbers: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """How many numbers stand before each of these, none of which is in a run."""
        if not len(self.starts):
            return numbers
        before = np.searchsorted(self.starts, numbers, side="right")
        ranks: np.ndarray = numbers - self.skipped[before]
        return ranks
