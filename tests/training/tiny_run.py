import io
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kdhiera.cache.encoding import make_codec
from kdhiera.cache.rows import KeptRows
from kdhiera.config import ObjectiveConfig, StudentConfig, TrainConfig
from kdhiera.grid import Grid
from kdhiera.masking import MaskSchedule, MaskSpec, Scope, Strategy, draw_mask
from kdhiera.objective.targets import TargetSpec
from kdhiera.progress import PlainProgress, Progress
from kdhiera.student.base import Student
from kdhiera.student.build import build_student, default_taps
from kdhiera.student.heads import HeadSpec, build_heads
from kdhiera.training.batches import ClipSource
from kdhiera.training.loop import TrainSummary, train
from kdhiera.training.ranks import ALONE, Ranks

GRID = Grid(num_frames=4, height=64, width=64)
WIDTH = 24
MASKS = MaskSpec(strategy=Strategy.ATTENTION, scope=Scope.SLOT, ratio=0.5, seed=0)
SCHEDULE = MaskSchedule(phases=(MASKS,), draws=2, predicts_hidden=False)


class MemorySource:
    """Random clips with random features, kept as a cache keeps them: under masks, or all units."""

    def __init__(
        self, num_samples: int = 18, num_views: int = 2, seed: int = 0, keep_all: bool = False
    ) -> None:
        rng = np.random.default_rng(seed)
        self.num_samples = num_samples
        self.keep_all = keep_all
        shape = (num_views, num_samples)
        frames = (GRID.num_frames, GRID.height, GRID.width, 3)
        self.clips = rng.integers(0, 256, (*shape, *frames), dtype=np.uint8)
        self.scores = rng.random((*shape, GRID.slots, GRID.units_per_slot), dtype=np.float32)
        self.features = rng.standard_normal((*shape, GRID.num_units, 4, WIDTH)).astype(np.float32)

    def read(self, samples: np.ndarray, *, view: int) -> KeptRows:
        bound = GRID.num_units
        b = len(samples)
        units = np.full((b, bound), -1, np.int16)
        pixels = np.zeros((b, bound, 2, 32, 32, 3), np.uint8)
        codes = np.zeros((b, bound, 4, WIDTH), np.float32)
        for row, sample in enumerate(samples):
            uid = f"clip-{sample}"
            kept = (
                np.arange(bound)
                if self.keep_all
                else kept_units(self.scores[view, sample], uid=uid, view=view)
            )
            units[row, : len(kept)] = kept
            cubes = GRID.frames_to_units(self.clips[view, sample][None])[0]
            pixels[row, : len(kept)] = cubes[kept]
            codes[row, : len(kept)] = self.features[view, sample][kept]
        return KeptRows(
            uids=tuple(f"clip-{sample}" for sample in samples),
            units=units,
            scores=self.scores[view][samples],
            pixels=pixels,
            columns={"image-9": {"codes": codes}, "video-3": {"codes": 2 * codes[..., :16]}},
        )


def kept_units(scores: np.ndarray, *, uid: str, view: int) -> np.ndarray:
    """What two draws show, ascending."""
    draws = [draw_mask(MASKS, scores, uid=uid, view=view, draw=draw) for draw in range(2)]
    return np.unique(np.concatenate(draws))


@dataclass(kw_only=True)
class Setup:
    """A tiny run: `run` builds everything from seeds and trains."""

    run_dir: Path
    identity: dict[str, Any] = field(default_factory=lambda: {"cache": "abc", "lr": 0.01})
    masks: MaskSchedule = SCHEDULE
    kind: Literal["hiera", "vit"] = "hiera"

    @property
    def student_config(self) -> StudentConfig:
        return StudentConfig(kind=self.kind, size="nano", drop_path=0.2)

    def config(self, **changes: Any) -> TrainConfig:
        values = {
            "epochs": 8, "batch_size": 4, "lr": 0.2, "warmup_epochs": 1.0, "precision": "fp32",
            "device": "cpu", "log_every": 3, "save_every": 2,
            "num_threads": 1,
        }  # fmt: skip
        return TrainConfig(**(values | changes))

    def targets(self) -> list[TargetSpec]:
        earlier, last = default_taps(self.student_config, 2)
        return [
            TargetSpec(
                teacher="image", layer="9", tap=earlier, column="image-9", width=WIDTH,
                weight=1.0, decode=make_codec("fp32", width=WIDTH).decode,
            ),
            TargetSpec(
                teacher="video", layer="3", tap=last, column="video-3", width=16,
                weight=0.5, decode=make_codec("fp32", width=16).decode,
            ),
        ]  # fmt: skip

    def student(self) -> Student:
        taps = [spec.tap for spec in self.targets()]
        return build_student(self.student_config, GRID, taps, seed=0)

    def run(
        self,
        source: ClipSource,
        *,
        student: Student | None = None,
        progress: Progress | None = None,
        targets: list[TargetSpec] | None = None,
        objective: ObjectiveConfig | None = None,
        num_views: int = 2,
        ranks: Ranks = ALONE,
        stop: threading.Event | None = None,
        **changes: Any,
    ) -> TrainSummary:
        student = student or self.student()
        targets = targets or self.targets()
        specs = {
            spec.name: HeadSpec(
                tap=spec.tap, tokens=4, width_in=student.tap_shape(spec.tap)[1],
                width_out=spec.width,
            )
            for spec in targets
        }  # fmt: skip
        return train(
            student=student,
            heads=build_heads(specs, seed=1),
            targets=targets,
            source=source,
            masks=self.masks,
            num_views=num_views,
            objective=objective or ObjectiveConfig(),
            config=self.config(**changes),
            run_dir=self.run_dir,
            identity=self.identity,
            progress=progress or PlainProgress(io.StringIO()),
            ranks=ranks,
            stop=stop,
        )
