"""A teacher that ends its own process when it sees a white clip: a shard that always kills."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kdhiera.grid import Grid
from kdhiera.teachers.base import TeacherOutput


class Deadly:
    """Mean colours as features, until a clip is white.

    Args:
        grid: The student's grid.
        how: Name of the signal that it sends itself.
    """

    def __init__(self, grid: Grid, how: str) -> None:
        self.identity: Mapping[str, object] = {"kind": "module", "model": "deadly"}
        self.weights_sha256 = "0" * 64
        self.grid = grid
        self._signal = signal.Signals[how]

    def check(self, layers: Sequence[str], score_source: str) -> None:
        """It has any layer."""

    def __call__(
        self, clips: Tensor, layers: Sequence[str], score_source: str | None
    ) -> TeacherOutput:
        """Features of clips, or the end."""
        if clips.float().mean((1, 2, 3, 4)).max() > 250:
            os.kill(os.getpid(), self._signal)
        slots, rows, columns = self.grid.tokens
        means = clips.float().mean((2, 3))[:, :: clips.shape[1] // slots]
        features = means[:, :, None, None, :].expand(-1, -1, rows, columns, -1).contiguous()
        return TeacherOutput(features=dict.fromkeys(layers, features), scores=None)


def build(*, grid: Grid, device: torch.device, dtype: torch.dtype, how: str) -> Deadly:
    """The factory that a config names."""
    return Deadly(grid, how)
