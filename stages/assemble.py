"""From a config to the pieces that several stages need."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from dataclasses import replace
from pathlib import Path

import torch

from kdhiera import __version__
from kdhiera.cache.layout import column_id
from kdhiera.cache.records import SourceInfo, Versions
from kdhiera.config import DecodeConfig, RunConfig
from kdhiera.data.clip import DecodeLimits
from kdhiera.data.shards import ShardIndex
from kdhiera.errors import MismatchError
from kdhiera.featurize import Featurizer
from kdhiera.masking import MaskPlan
from kdhiera.student.base import Student
from kdhiera.student.build import build_student
from kdhiera.student.export import load_exported
from kdhiera.teachers.build import build_teachers, check_teachers

VERSIONED = (
    "torch",
    "timm",
    "transformers",
    "av",
    "decord",
    "torchcodec",
    "pillow",
    "zarr",
    "numcodecs",
)


def decode_limits(config: DecodeConfig) -> DecodeLimits:
    """What a decoding child may use."""
    return DecodeLimits(
        backend=config.backend,
        deadline_seconds=config.deadline_seconds,
        max_frame_pixels=config.max_frame_pixels,
        max_duration_seconds=config.max_duration_seconds,
        max_video_bytes=config.max_video_bytes,
        max_memory_bytes=config.max_memory_bytes,
        clips_per_child=config.clips_per_child,
    )


def columns_of(config: RunConfig) -> dict[str, tuple[str, str]]:
    """Columns that a config's teachers fill: (teacher, layer) by column id."""
    return {
        column_id(name, layer, config.cache.encoding): (name, layer)
        for name, teacher in config.teachers.items()
        for layer in teacher.layers
    }


def featurizer_of(
    config: RunConfig, *, device: torch.device, plan: MaskPlan | None = None, keep_all: bool = False
) -> Featurizer:
    """The run's teachers, scores and mask plan on a device.

    Args:
        config: The run.
        device: Where the teachers run.
        plan: Which units are kept; None takes the config's plan.
        keep_all: Keep every unit, whatever the plan says.

    Raises:
        UsageError: If a teacher cannot be had, or does not give what it should.
    """
    plan = plan or config.mask_plan
    teachers = build_teachers(config, device=device)
    check_teachers(config, teachers, device=device)
    return Featurizer(
        grid=config.clip.grid,
        plan=replace(plan, keep_all=True) if keep_all else plan,
        teachers=teachers,
        score_teacher=config.scores.teacher,
        score_source=config.scores.source,
        device=device,
        batch_size=config.extract.batch_size,
    )


def exported_student(
    config: RunConfig, folder: Path, *, q_pool: int | None = None, drop_path: float | None = None
) -> Student:
    """The run's exported student, if it is the one the config describes.

    Args:
        config: The run.
        folder: Where it was exported to.
        q_pool: See `load_exported`.
        drop_path: See `load_exported`.

    Raises:
        UsageError: If there is none.
        MismatchError: If it was made for other clips or is of another kind or size.
    """
    student = load_exported(folder, q_pool=q_pool, drop_path=drop_path)
    wanted = build_student(config.student, config.clip.grid, seed=0).backbone.state_dict()
    has = student.backbone.state_dict()
    same = {k: v.shape for k, v in has.items()} == {k: v.shape for k, v in wanted.items()}
    if student.grid != config.clip.grid or not same:
        g = student.grid
        raise MismatchError(
            f"the student in {folder} is not the config's: it is a {student.kind} for clips of "
            f"{g.num_frames} x {g.height} x {g.width}; go back to its config (config.yaml beside "
            "it), or train again"
        )
    return student


def unread_source(shard: ShardIndex) -> SourceInfo:
    """The same without the hash, which is known when the shard has been read."""
    return SourceInfo(
        path=shard.path, num_bytes=shard.num_bytes, sha256=None, problems=shard.problems
    )


def versions() -> Versions:
    """Versions of what can change the bytes of a part, as (package, version), sorted."""
    found = {"kdhiera": __version__}
    for package in VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(sorted(found.items()))


def provenance() -> dict[str, object]:
    """What made a part; recorded beside it, never part of an identity."""
    return {
        "versions": dict(versions()),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "process": f"{platform.node()}/{os.getpid()}",
        "time": time.time(),
    }
