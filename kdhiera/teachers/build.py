"""From a teacher's config to a running teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from kdhiera.config import RunConfig, TeacherConfig
from kdhiera.devices import resolve_precision
from kdhiera.grid import Grid
from kdhiera.teachers.base import Teacher
from kdhiera.teachers.module import build_module_teacher
from kdhiera.teachers.timm_image import build_timm_teacher

BUILDERS: Mapping[str, Callable[..., Teacher]] = {
    "timm": build_timm_teacher,
    "module": build_module_teacher,
}


def build_teacher(config: TeacherConfig, *, grid: Grid, device: torch.device) -> Teacher:
    """Build one teacher on `device` and check that the layers asked for exist.

    Raises:
        UsageError: If its weights are not to be had or do not fit, or a layer does not exist.
    """
    dtype = resolve_precision(config.precision, device)
    teacher = BUILDERS[config.kind](config, grid=grid, device=device, dtype=dtype)
    teacher.check(config.layers, None)
    return teacher


def build_teachers(config: RunConfig, *, device: torch.device) -> dict[str, Teacher]:
    """All teachers of a run by name; the score teacher's source is checked too.

    Raises:
        UsageError: See `build_teacher`.
    """
    teachers = {
        name: build_teacher(teacher, grid=config.clip.grid, device=device)
        for name, teacher in config.teachers.items()
    }
    if config.scores.source != "uniform":
        teachers[config.scores.teacher].check((), config.scores.source)
    return teachers
