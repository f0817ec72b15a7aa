"""The student that a config describes."""

from __future__ import annotations

from collections.abc import Sequence

from kdhiera.config import StudentConfig
from kdhiera.errors import UsageError
from kdhiera.grid import Grid
from kdhiera.student import hiera, vit
from kdhiera.student.base import Student
from kdhiera.student.hiera import HieraStudent
from kdhiera.student.vit import VitStudent


def build_student(
    config: StudentConfig,
    grid: Grid,
    taps: Sequence[str] = (),
    *,
    seed: int,
    q_pool: int = 2,
    grad_checkpointing: bool = False,
) -> Student:
    """A freshly initialised student; `student.init` is not loaded.

    Args:
        config: Kind, named size and drop-path rate.
        grid: Clip geometry.
        taps: What its forward returns; none: the last block.
        seed: Decides the weights; the global generators are left as they were.
        q_pool: Of a Hiera, see `hiera_args`; a plain ViT pools no queries and ignores it.
        grad_checkpointing: See `Student`.

    Raises:
        UsageError: If a tap does not exist.
    """
    if config.kind == "vit":
        backbone = vit.build(config, grid, seed=seed)
        return VitStudent(backbone, grid, taps, grad_checkpointing=grad_checkpointing)
    backbone = hiera.build(config, grid, q_pool=q_pool, seed=seed)
    return HieraStudent(backbone, grid, taps, grad_checkpointing=grad_checkpointing)


def taps_of(config: StudentConfig, teacher: str, num_layers: int) -> tuple[str, ...]:
    """Where the heads of a teacher's layers read, one for every layer.

    Args:
        config: The student.
        teacher: Name of the teacher.
        num_layers: Layers of it that train the student, at least 1.

    Raises:
        UsageError: If `student.taps` names another number.
    """
    taps = (config.taps or {}).get(teacher) or default_taps(config, num_layers)
    if len(taps) != num_layers:
        raise UsageError(
            f"student.taps.{teacher} names {len(taps)} taps for {num_layers} layers: name one for "
            "every layer"
        )
    return taps


def default_taps(config: StudentConfig, num_layers: int) -> tuple[str, ...]:
    """Where the heads of a teacher's layers read when `student.taps` does not say.

    Args:
        config: Kind and named size.
        num_layers: Layers of the teacher, at least 1.
    """
    if config.kind == "vit":
        return vit.default_taps(num_layers, vit.SIZES[config.size]["depth"])
    return hiera.default_taps(num_layers, hiera.SIZES[config.size]["stages"])
