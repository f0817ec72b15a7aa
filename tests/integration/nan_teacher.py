"""A teacher that gives NaN for clips that are bright on the whole."""

from dataclasses import replace
from typing import Any

import torch

from kdhiera.demo.teachers import transnetv2
from kdhiera.teachers.base import Teacher, TeacherOutput


class NanTeacher:
    def __init__(self, inner: Teacher) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(
        self, clips: torch.Tensor, layers: tuple[str, ...], scores: str | None
    ) -> TeacherOutput:
        out = self._inner(clips, layers, scores)
        bright = clips.float().mean((1, 2, 3, 4)) > 250
        features = {
            name: torch.where(bright[:, None, None, None, None], torch.nan, tokens)
            for name, tokens in out.features.items()
        }
        return replace(out, features=features)


def make(*args: Any, **options: Any) -> NanTeacher:
    return NanTeacher(transnetv2(*args, **options))
