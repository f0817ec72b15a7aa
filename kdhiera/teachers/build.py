"""From a teacher's config to a running teacher."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch

from kdhiera.config import RunConfig, TeacherConfig
from kdhiera.devices import resolve_precision
from kdhiera.errors import KdhieraError, UsageError
from kdhiera.grid import Grid
from kdhiera.teachers.base import Teacher
from kdhiera.teachers.contract import check_output
from kdhiera.teachers.lowlevel import build_lowlevel_teacher
from kdhiera.teachers.module import build_module_teacher
from kdhiera.teachers.scores import ScoreChoice
from kdhiera.teachers.timm_image import build_timm_teacher
from kdhiera.teachers.transformers_load import build_transformers_teacher

logger = logging.getLogger(__name__)

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
    return {name: build_named_teacher(config, name, device=device) for name in config.teachers}


def build_named_teacher(config: RunConfig, name: str, *, device: torch.device) -> Teacher:
    """One teacher of a run; see `build_teachers`."""
    scores, scoring = config.scores, name == _scoring(config)
    choice = ScoreChoice(layer=scores.layer, heads=scores.heads) if scoring else None
    try:
        teacher = build_teacher(
            config.teachers[name], grid=config.clip.grid, device=device, choice=choice
        )
    except UsageError as error:  # builders do not know what the run calls a teacher
        raise UsageError(str(error).replace("<name>", name)) from error
    if scoring:
        teacher.check((), scores.source)
    return teacher


def check_teachers(
    config: RunConfig,
    teachers: Mapping[str, Teacher],
    *,
    device: torch.device,
    must_run: bool = True,
) -> None:
    """Show black clips to the teachers of the user's own and check what they give.

    The other kinds need none of it: the tests hold their code to the same contract.

    Args:
        config: The run.
        teachers: Its teachers, running.
        device: Where they run.
        must_run: Whether this is where they will run; elsewhere a teacher may fail, for its
            kernels may want another device.

    Raises:
        UsageError: If one fails, or does not give what `Teacher` promises.
    """
    grid = config.clip.grid
    shape = (min(2, config.extract.batch_size), grid.num_frames, grid.height, grid.width, 3)
    for name, settings in config.teachers.items():
        if settings.kind != "module":
            continue
        who = f"teacher {name} ({settings.factory})"
        source = config.scores.source if name == _scoring(config) else None
        clips = torch.zeros(shape, dtype=torch.uint8, device=device)
        try:
            output = teachers[name](clips, settings.layers, source)
        except Exception as error:  # code of the user's may raise anything
            if not must_run:
                logger.debug("%s cannot be tried on %s: %s", who, device, error)
                continue
            if isinstance(error, KdhieraError | torch.OutOfMemoryError):
                raise
            raise UsageError(
                f"{who} fails on black clips ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]}): correct the factory"
            ) from error
        check_output(
            output,
            who=who,
            clips=clips,
            grid=grid,
            layers=settings.layers,
            scored=source is not None,
        )


def warn_of_scores(config: RunConfig, teachers: Mapping[str, Teacher]) -> None:
    """Say so if scores come from a class token that nothing was asked of in training."""
    scores = config.scores
    if scores.source == "cls_attention" and _is_mae(teachers[scores.teacher].identity):
        logger.warning(
            "teacher %s: scores.source=cls_attention reads MAE's class token, which no objective "
            "trains; scores.source=received_attention is the one for MAE",
            scores.teacher,
        )


def _is_mae(identity: Mapping[str, object]) -> bool:
    is_timms = identity.get("kind") == "timm" and str(identity["model"]).endswith(".mae")
    return is_timms or identity.get("architecture") == "vit_mae"


def _scoring(config: RunConfig) -> str | None:
    """The teacher that gives scores, if one does."""
    return config.scores.teacher if config.scores.source != "uniform" else None
