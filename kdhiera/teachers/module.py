"""Teachers of the user's own: any importable factory that returns a `Teacher`."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator

import torch

from kdhiera.config import TeacherConfig
from kdhiera.errors import KdhieraError, UsageError
from kdhiera.grid import Grid
from kdhiera.teachers.base import Teacher
from kdhiera.teachers.scores import ScoreChoice

_MEMBERS = ("identity", "weights_sha256", "check", "__call__")


def build_module_teacher(
    config: TeacherConfig,
    *,
    grid: Grid,
    device: torch.device,
    dtype: torch.dtype,
    choice: ScoreChoice,
) -> Teacher:
    """Call `factory(grid=, device=, dtype=, weights=, score_layer=, score_heads=, **options)`.

    Args:
        config: With `factory` as `package.module:function`; `weights` is passed on when set.
        grid: The student's grid.
        device: Where the teacher runs.
        dtype: float32, or bfloat16 for autocast.
        choice: What scores are read from, passed on where the run's `scores` sets it.

    Raises:
        UsageError: If the factory cannot be imported, refuses its options or gives no
            `Teacher`.
    """
    reference = str(config.factory)
    module_name, found, function = reference.partition(":")
    if not found:
        raise UsageError(f"teacher factory {reference!r} must read package.module:function")
    try:
        with _working_folder_on_path():
            factory = getattr(importlib.import_module(module_name), function)
    except Exception as error:  # a module of the user's may raise anything
        raise UsageError(
            f"teacher factory {reference!r} cannot be imported ({type(error).__name__}: {error}): "
            "install its package, or put the module where you run"
        ) from error
    options = {**config.options, **choice.as_options()}
    if config.weights is not None:
        options["weights"] = config.weights
    try:
        teacher = factory(grid=grid, device=device, dtype=dtype, **options)
    except KdhieraError:
        raise
    except Exception as error:
        raise UsageError(
            f"teacher factory {reference!r} failed with its options "
            f"({type(error).__name__}: {error}): correct `options` or the factory"
        ) from error
    if not isinstance(teacher, Teacher):
        lacks = [name for name in _MEMBERS if not hasattr(teacher, name)]
        raise UsageError(
            f"teacher <name>: the factory {reference!r} returned {type(teacher).__name__}, which "
            f"lacks {', '.join(lacks)}: return a teacher (kdhiera.teachers.base.Teacher)"
        )
    return teacher


@contextlib.contextmanager
def _working_folder_on_path() -> Iterator[None]:
    """Let a module beside where the command runs be imported, as `python -m` does."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
