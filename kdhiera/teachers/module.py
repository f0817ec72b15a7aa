"""Teachers of the user's own: any importable factory that returns a `Teacher`."""

from __future__ import annotations

import importlib

import torch

from kdhiera.config import TeacherConfig
from kdhiera.errors import UsageError
from kdhiera.grid import Grid
from kdhiera.teachers.base import Teacher


def build_module_teacher(
    config: TeacherConfig, *, grid: Grid, device: torch.device, dtype: torch.dtype
) -> Teacher:
    """Call `factory(grid=, device=, dtype=, weights=, **options)`.

    Args:
        config: With `factory` as `package.module:function`; `weights` is passed on when set.
        grid: The student's grid.
        device: Where the teacher runs.
        dtype: float32, or bfloat16 for autocast.

    Raises:
        UsageError: If the factory cannot be imported or refuses its options.
    """
    reference = str(config.factory)
    module_name, found, function = reference.partition(":")
    if not found:
        raise UsageError(f"teacher factory {reference!r} must read package.module:function")
    try:
        factory = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"teacher factory {reference!r} cannot be imported: {error}") from error
    options = dict(config.options)
    if config.weights is not None:
        options["weights"] = config.weights
    try:
        teacher: Teacher = factory(grid=grid, device=device, dtype=dtype, **options)
    except TypeError as error:
        raise UsageError(f"teacher factory {reference!r} refuses its options: {error}") from error
    return teacher
