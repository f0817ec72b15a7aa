"""From a teacher's config to a running teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from kdhiera.config import RunConfig, TeacherConfig
from kdhiera.devices import resolve_precision
from kdhiera.errors import UsageError
from kdhiera.grid import Grid
from kdhiera.teachers.base import Teacher
from kdhiera.teachers.lowlevel import build_lowlevel_teacher
from kdhiera.teachers.module import build_module_teacher
from kdhiera.teachers.scores import ScoreChoice
from kdhiera.teachers.timm_image import build_timm_teacher
from kdhiera.teachers.transformers_load import build_transformers_teacher

BUILDERS: Mapping[str, Callable[..., Teacher]] = {
    "timm": build_timm_teacher,
    "transformers": build_transformers_teacher,
    "pixels": build_lowlevel_teacher,
    "hog": build_lowlevel_teacher,
    "module": build_module_teacher,
}


def build_teacher(
    config: TeacherConfig,
    *,
    grid: Grid,
    device: torch.device,
    choice: ScoreChoice | None = None,
) -> Teacher:
    """Build one teacher on `device` and check that the layers asked for exist.

    Args:
        config: The teacher.
        grid: The student's grid.
        device: Where it runs.
        choice: What its scores are read from; None takes the defaults.

    Raises:
        UsageError: If its weights are not to be had or do not fit, or a layer does not exist.
    """
    dtype = resolve_precision(config.precision, device)
    with torch.random.fork_rng(devices=[]):  # libraries draw weights before they load them
        teacher = BUILDERS[config.kind](
            config, grid=grid, device=device, dtype=dtype, choice=choice or ScoreChoice()
        )
    teacher.check(config.layers, None)
    return teacher


def build_teachers(config: RunConfig, *, device: torch.device) -> dict[str, Teacher]:
    """All teachers of a run by name; the score teacher's source is checked too.

    Raises:
        UsageError: See `build_teacher`.
    """
    scores = config.scores
    scoring = scores.teacher if scores.source != "uniform" else None
    choice = ScoreChoice(layer=scores.layer, heads=scores.heads)
    teachers = {}
    for name, teacher in config.teachers.items():
        try:
            teachers[name] = build_teacher(
                teacher,
                grid=config.clip.grid,
                device=device,
                choice=choice if name == scoring else None,
            )
        except UsageError as error:  # builders do not know what the run calls a teacher
            raise UsageError(str(error).replace("<name>", name)) from error
    if scoring is not None:
        teachers[scoring].check((), scores.source)
    return teachers
