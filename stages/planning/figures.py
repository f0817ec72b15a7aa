"""What a plan says: bytes, seconds and room, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kdhiera.stages.extraction.plan import ExtractPlan
from kdhiera.stages.planning.text import screen


@dataclass(frozen=True, kw_only=True)
class PlannedBytes:
    """One array of rows, or one column.

    Args:
        name: `rows`, `units`, `scores`, `pixels`, or a column id.
        clip_bytes: Of a clip.
        whole_bytes: Of all clips and views of the config.
        missing_bytes: Of what is not in the cache yet.
    """

    name: str
    clip_bytes: float
    whole_bytes: float
    missing_bytes: float


@dataclass(frozen=True, kw_only=True)
class PlannedTeacher:
    """One teacher, with all its layers, and scores if they are its.

    Args:
        name: In the config.
        seconds: Of a clip, with all workers at it.
        macs: Multiply-accumulates of a clip.
    """

    name: str
    seconds: float
    macs: int


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """The making of what is missing.

    Args:
        device: What a worker computes on.
        workers: How many work.
        start_seconds: To load the teachers, in the command and in its workers.
        seconds: All of it, start included; 0 if nothing is missing.
        view_seconds: One more view of all clips.
        decode_seconds: To read and decode a clip, with all workers at it.
        store_seconds: To encode, compress, write and read back a clip, with all workers at it.
        teachers: What each of them takes.
        cpu_share: Share of the workers' CPU time that was to be had while the teachers were
            timed; times are by the clock, and shorter where nothing else runs.
    """

    device: str
    workers: int
    start_seconds: float
    seconds: float
    view_seconds: float
    decode_seconds: float
    store_seconds: float
    teachers: tuple[PlannedTeacher, ...]
    cpu_share: float


@dataclass(frozen=True, kw_only=True)
class Training:
    """Training from the cache, and with live teachers.

    Args:
        device: What it computes on.
        steps: Optimiser steps of the run.
        step_seconds: Of one from the cache, by mask ratio.
        seconds: All steps from the cache.
        epochs: Of the run; a fraction where `train.max_steps` ends it.
        cached_epoch_seconds: An epoch from the cache.
        live_epoch_seconds: An epoch that decodes and teaches every clip again.
        clip_macs: Multiply-accumulates of the student's forward pass, by mask ratio.
        break_even_epochs: Epochs after which extracting what is missing and training from the
            cache have taken no longer than live teachers; 0 if nothing is missing.
    """

    device: str
    steps: int
    step_seconds: Mapping[float, float]
    seconds: float
    epochs: float
    cached_epoch_seconds: float
    live_epoch_seconds: float
    clip_macs: Mapping[float, int]
    break_even_epochs: int


@dataclass(frozen=True, kw_only=True)
class Space:
    """Room where the cache is made.

    Args:
        folder: On the disk that is looked at.
        free_bytes: What it has left.
        needed_bytes: What extraction puts there at once.
    """

    folder: str
    free_bytes: int
    needed_bytes: float

    @property
    def fits(self) -> bool:
        """Whether there is room."""
        return self.needed_bytes <= self.free_bytes


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another way to store the same clips.

    Args:
        encoding: One of the encodings.
        keep: `plan` or `all` units.
        clip_bytes: Of a clip in one view.
        whole_bytes: Of all clips and views of the config.
    """

    encoding: str
    keep: str
    clip_bytes: float
    whole_bytes: float


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run will take.

    Args:
        name: Of the run.
        extract: What extraction has to do.
        encoding: `cache.encoding`.
        keep: `plan` or `all` units, of the cache if there is one.
        num_shards: Shards that can be read.
        num_samples: Samples in them.
        num_views: Views of each that are cached.
        tried: Clips of the trial.
        good: Those of them that decode; as large a share is counted on everywhere.
        there_bytes: What the cache holds of the config already.
        bytes: What is stored, by array and column.
        extraction: What the missing takes.
        space: Room for it.
        training: What training takes.
        alternatives: Other encodings, and what is kept.
        problems: What is wrong with shards, in words.
    """

    name: str
    extract: ExtractPlan
    encoding: str
    keep: str
    num_shards: int
    num_samples: int
    num_views: int
    tried: int
    good: int
    there_bytes: int
    bytes: tuple[PlannedBytes, ...]
    extraction: Extraction
    space: Space
    training: Training
    alternatives: tuple[Alternative, ...]
    problems: tuple[str, ...]

    @property
    def whole_bytes(self) -> float:
        """Everything that the config asks for."""
        return sum(part.whole_bytes for part in self.bytes)

    @property
    def missing_bytes(self) -> float:
        """What is to be written."""
        return sum(part.missing_bytes for part in self.bytes)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            **asdict(self),
            "extract": self.extract.to_json(),
            "whole_bytes": self.whole_bytes,
            "missing_bytes": self.missing_bytes,
        }

    def describe(self) -> str:
        """For people."""
        return screen(self)
