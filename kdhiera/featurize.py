"""From decoded clips to what the cache stores: one home for every user of it.

Extraction, live training and the pooled-teacher baselines all call this, so that they
cannot differ:

    clips u8 [b,T,H,W,3] -> teachers -> {layer: [b,t,h,w,c]}, scores [b,slots,units]
                         -> kept units (mask plan) -> pixels, features of those units
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int16, UInt8
from torch import Tensor

from kdhiera.cache.stats import ChannelStatistics, channel_statistics
from kdhiera.grid import Grid
from kdhiera.masking import MaskPlan
from kdhiera.teachers.base import Teacher, TeacherOutput
from kdhiera.teachers.contract import check_scores

logger = logging.getLogger(__name__)

Layers: TypeAlias = Mapping[str, Sequence[str]]  # layer names by teacher
TargetKey: TypeAlias = tuple[str, str]  # (teacher, layer)


@dataclass(frozen=True, kw_only=True)
class Featurized:
    """What the teachers say of `b` clips, at the kept units.

    Args:
        units: Kept unit numbers, ascending, -1 pads at the end.
        scores: Scores of all units.
        pixels: RGB of the kept units (zeros where padded).
        features: Raw features of the kept units' 2 x 2 tokens (zeros where padded), on the
            teachers' device.
        finite: Whether all of a row's features (kept or not) and its scores are finite.
        statistics: Over all tokens of the finite rows.
    """

    units: Int16[np.ndarray, "b k"]
    scores: Float32[np.ndarray, "b slots s"]
    pixels: UInt8[np.ndarray, "b k 2 32 32 3"]
    features: Mapping[TargetKey, Float32[Tensor, "b k 4 c"]]
    finite: Mapping[TargetKey, Bool[np.ndarray, " b"]]
    statistics: Mapping[TargetKey, ChannelStatistics]


@dataclass(kw_only=True)
class Featurizer:
    """Teachers, scores and mask plan, bound to a device.

    Args:
        grid: Shape of the clips.
        plan: What is kept.
        teachers: Running teachers by name.
        score_teacher: Name of the teacher whose attention gives the scores.
        score_source: `uniform` asks no teacher.
        device: Where the teachers run.
        batch_size: Clips in one teacher pass; halves for good when memory runs out.
    """

    grid: Grid
    plan: MaskPlan
    teachers: Mapping[str, Teacher]
    score_teacher: str
    score_source: str
    device: torch.device
    batch_size: int
    _limit: int = field(init=False, default=1 << 30)

    def __call__(
        self,
        clips: UInt8[np.ndarray, "b f y x 3"],
        *,
        uids: Sequence[str],
        view: int,
        layers: Layers,
        units: Int16[np.ndarray, "b k"] | None = None,
        rescore: bool = False,
    ) -> Featurized:
        """Run the teachers and keep what the plan asks for.

        Args:
            clips: RGB clips.
            uids: Identities of the samples.
            view: View number.
            layers: Layers wanted, by teacher.
            units: Kept units decided before (a replay); None draws them from the scores.
            rescore: Compute scores in a replay as well, where they decide nothing; otherwise
                they are zeros there.

        Raises:
            UsageError: If scores are negative or no shares of their slot.
        """
        slots, per_slot = self.grid.slots, self.grid.units_per_slot
        outputs = [
            self.teach(part, layers=layers, with_scores=units is None or rescore)
            for part in np.array_split(clips, -(-len(clips) // min(self.batch_size, self._limit)))
        ]
        scored = np.ones(len(clips), bool)
        if units is None:
            scores = self._scores(outputs, len(clips))
            scored = np.isfinite(scores).all((1, 2))
            scores[~scored] = 1.0 / per_slot  # such rows never train: no column is good
            units = self._kept(scores, uids, view)
        elif rescore:
            scores = self._scores(outputs, len(clips))
        else:
            scores = np.zeros((len(clips), slots, per_slot), np.float32)
        index = torch.from_numpy(np.maximum(units, 0).astype(np.int64)).to(self.device)
        padding = torch.from_numpy(units < 0).to(self.device)
        features, finite, statistics = {}, {}, {}
        for teacher, names in layers.items():
            for name in names:
                tokens = torch.cat([o[teacher].features[name] for o in outputs]).float()
                good = torch.isfinite(tokens).flatten(1).all(1)
                good &= torch.from_numpy(scored).to(good.device)
                key = (teacher, name)
                features[key] = self._gather(self.grid.tokens_to_units(tokens), index, padding)
                finite[key] = good.cpu().numpy()
                statistics[key] = channel_statistics(tokens[good])
        return Featurized(
            units=units,
            scores=scores,
            pixels=self._pixels(clips, units),
            features=features,
            finite=finite,
            statistics=statistics,
        )

    def teach(
        self, clips: UInt8[np.ndarray, "b f y x 3"], *, layers: Layers, with_scores: bool
    ) -> dict[str, TeacherOutput]:
        """One teacher pass, in halves if the device runs out of memory.

        Args:
            clips: RGB clips, at most `batch_size` of them.
            layers: Layers wanted, by teacher.
            with_scores: Whether the score teacher is asked for scores as well.
        """
        scoring = self.score_teacher if with_scores and self.score_source != "uniform" else None
        wanted = {name: tuple(chosen) for name, chosen in layers.items() if chosen}
        if scoring is not None:
            wanted.setdefault(scoring, ())
        try:
            batch = torch.from_numpy(np.ascontiguousarray(clips)).to(self.device)
            return {
                name: self.teachers[name](
                    batch, chosen, self.score_source if name == scoring else None
                )
                for name, chosen in wanted.items()
            }
        except torch.OutOfMemoryError:
            if len(clips) == 1:
                raise
            self._limit = len(clips) // 2
            logger.warning("out of memory: teacher batches go on with %d clips", self._limit)
        halves = [
            self.teach(half, layers=layers, with_scores=with_scores)
            for half in (clips[: self._limit], clips[self._limit :])
        ]
        return {name: _concatenated([h[name] for h in halves]) for name in halves[0]}

    def widths(self, layers: Layers) -> dict[TargetKey, int]:
        """Channels of every layer, seen on one black clip."""
        shape = (1, self.grid.num_frames, self.grid.height, self.grid.width, 3)
        outputs = self.teach(np.zeros(shape, np.uint8), layers=layers, with_scores=False)
        return {
            (teacher, name): outputs[teacher].features[name].shape[-1]
            for teacher, names in layers.items()
            for name in names
        }

    def _scores(
        self, outputs: Sequence[Mapping[str, TeacherOutput]], count: int
    ) -> Float32[np.ndarray, "b slots s"]:
        slots, per_slot = self.grid.slots, self.grid.units_per_slot
        if self.score_source == "uniform":
            return np.full((count, slots, per_slot), 1.0 / per_slot, np.float32)
        maps = [o[self.score_teacher].scores for o in outputs]
        tokens = torch.cat([m for m in maps if m is not None]).float()
        check_scores(tokens, who=f"teacher {self.score_teacher}")
        return np.asarray(self.grid.pool_scores(tokens).cpu().numpy(), np.float32)

    def _kept(
        self, scores: Float32[np.ndarray, "b slots s"], uids: Sequence[str], view: int
    ) -> Int16[np.ndarray, "b k"]:
        bound = self.plan.max_kept(self.grid.slots, self.grid.units_per_slot)
        units = np.full((len(uids), bound), -1, np.int16)
        for row, uid, score in zip(units, uids, scores, strict=True):
            kept = self.plan.kept_units(score, uid=uid, view=view)
            row[: len(kept)] = kept
        return units

    def _pixels(
        self, clips: UInt8[np.ndarray, "b f y x 3"], units: Int16[np.ndarray, "b k"]
    ) -> UInt8[np.ndarray, "b k 2 32 32 3"]:
        cubes = self.grid.frames_to_units(clips)
        rows = np.arange(len(units))[:, None]
        pixels: np.ndarray = cubes[rows, np.maximum(units, 0)]
        pixels[units < 0] = 0
        return pixels

    @staticmethod
    def _gather(units: Tensor, index: Tensor, padding: Tensor) -> Tensor:
        where = index[:, :, None, None].expand(-1, -1, *units.shape[2:])
        return units.gather(1, where).masked_fill(padding[:, :, None, None], 0.0)


def _concatenated(outputs: Sequence[TeacherOutput]) -> TeacherOutput:
    names = outputs[0].features
    scores = [o.scores for o in outputs if o.scores is not None]
    return TeacherOutput(
        features={name: torch.cat([o.features[name] for o in outputs]) for name in names},
        scores=torch.cat(scores) if scores else None,
    )
