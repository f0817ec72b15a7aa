"""The learning rate of every step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then a half cosine.

    Args:
        peak: Learning rate at the end of the warm-up.
        final: Learning rate of the last step.
        warmup_steps: The first of them runs at `peak / warmup_steps`.
        num_steps: Steps of the whole run.
    """

    peak: float
    final: float
    warmup_steps: int
    num_steps: int

    def lr(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.num_steps - 1 - self.warmup_steps)
        return self.final + (self.peak - self.final) * (1 + math.cos(math.pi * done)) / 2
