"""The student of a run as its newest checkpoint has it, heads and all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from kdhiera.config import RunConfig
from kdhiera.devices import resolve_device
from kdhiera.objective.targets import TargetSpec
from kdhiera.stages.distill import identity_of, student_of
from kdhiera.stages.distillation.source import Opened
from kdhiera.student.base import Student
from kdhiera.training.checkpoint import load_latest
from kdhiera.training.loop import CHECKPOINTS, check_identity
from kdhiera.training.step import Predictor, with_statistics

DECISIVE = ("clip", "student", "objective", "source")  # what weights and targets mean


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A student in the middle of its training, or at the end of it; ready to be asked.

    Args:
        student: With the checkpoint's weights, on the training device.
        heads: What predicts from it, likewise.
        targets: With the statistics that it was trained under.
        means: Of all targets that the run has seen, by target name.
        steps: Optimiser steps done.
    """

    student: Student
    heads: Predictor
    targets: Sequence[TargetSpec]
    means: Mapping[str, Float[Tensor, " c"]]
    steps: int


def newest_checkpoint(config: RunConfig) -> dict[str, Any] | None:
    """What the newest sound checkpoint of the run holds, or None if there is none."""
    return load_latest(Path(config.run_dir) / CHECKPOINTS)


def trained_of(config: RunConfig, opened: Opened, state: Mapping[str, Any]) -> Trained:
    """Student and heads with the weights of a checkpoint.

    Args:
        config: The run.
        opened: What it trains from.
        state: From `newest_checkpoint`.

    Raises:
        MismatchError: If it is of a run with another student, objective or source; how
            that was optimised does not matter here.
    """
    wanted, found = identity_of(config, opened), state["identity"]
    check_identity(
        {key: wanted[key] for key in DECISIVE},
        {key: found.get(key) for key in DECISIVE},
        Path(config.run_dir),
    )
    device = resolve_device(config.train.device)
    student, heads, specs = student_of(config, opened)
    learner = state["learner"]
    student.load_state_dict(learner["student"])
    heads.load_state_dict(learner["heads"])
    return Trained(
        student=student.to(device).eval(),
        heads=heads.to(device).eval(),
        targets=with_statistics(specs, learner["statistics"], device),
        means={name: mean["mean"].to(device) for name, mean in learner["means"].items()},
        steps=state["step"],
    )


def fresh_of(config: RunConfig, opened: Opened) -> Student:
    """The student as the run began with it."""
    student, _, _ = student_of(config, opened)
    return student.to(resolve_device(config.train.device)).eval()


def with_all_blocks(student: Student) -> Student:
    """The same student, read after every block as well as at its taps."""
    blocks = [f"block:{i + 1}" for i in range(student.num_blocks)]
    whole = type(student)(student.backbone, student.grid, [*student.taps, *blocks])
    return whole.to(next(student.parameters()).device).eval()
