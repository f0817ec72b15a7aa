"""A teacher without weights that does as a file tells it: `raise`, `nan`, or nothing special."""

from pathlib import Path

import torch

from kdhiera.teachers.base import TeacherOutput


class Moody:
    identity = {"kind": "module", "model": "moody"}  # noqa: RUF012 - a Protocol's attribute
    weights_sha256 = "0" * 64

    def __init__(self, grid, mood):
        self.grid = grid
        self.mood = Path(mood)

    def check(self, layers, score_source):
        pass

    def __call__(self, clips, layers, score_source):
        t, h, w = self.grid.tokens
        means = clips.float().mean((2, 3))[:, :: clips.shape[1] // t]
        features = means[:, :, None, None, :].expand(-1, -1, h, w, -1).contiguous()
        mood = self.mood.read_text() if self.mood.exists() else ""
        if mood == "nan":
            features[0] = torch.nan
        if mood and mood.startswith("raise") and clips.shape[0] == int(mood.split()[1]):
            raise RuntimeError("not in the mood")
        return TeacherOutput(features=dict.fromkeys(layers, features), scores=None)


def build(*, grid, device, dtype, mood):
    return Moody(grid, mood)
