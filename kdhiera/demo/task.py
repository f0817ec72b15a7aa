"""The labelled task: what a cut-out shows, and where it moves. Plan only; render.py draws.

Two traps shape it. *The direction must need the order of the frames.* An object that
starts near the middle betrays its direction by where it stands in the first frame. So
the frame is a ring: what leaves on one side comes in on the other, and with a uniform
start every frame's position is uniform whatever the direction,

    |      [ ] ->      |   later   |ct]           [obje|

and every trajectory is drawn twice over the same stretch of background: once as it is
and once with its positions in reverse order. Whatever ignores the order of all frames sees
the same positions twice. (With every second frame read, the two sets are one step
apart; on a ring that says nothing either.)

*Objects and backgrounds must be disjoint.* Splits share neither a cut-out (nor two of
one name, such as `pig` and `pig_golden`) nor a source video (nor two of one scene).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import numpy as np

from kdhiera.errors import UsageError
from kdhiera.views import stable_key

_T = TypeVar("_T")

SPLITS = ("train", "validation", "test")


class Axis(StrEnum):
    """Along which axis an object moves."""

    HORIZONTAL = "horizontal"
    VERTICAL = "vertical"


# The direction of a trajectory as planned, and of the same with its positions reversed.
DIRECTIONS: Mapping[Axis, tuple[str, str]] = {
    Axis.HORIZONTAL: ("right", "left"),
    Axis.VERTICAL: ("down", "up"),
}

# Videos of one scene stay in one split. Folds rotate this list.
_SCENES = (
    ("box", "cup"),
    ("city",),
    ("carphone",),
    ("vtest",),
    ("bikes",),
    ("tree",),
    ("bunny",),
    ("traffic",),
)
_TEST_SCENES, _VALIDATION_SCENES = 2, 1
_TEST_SHARE, _VALIDATION_SHARE = 0.25, 0.15


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """Everything that decides what is drawn.

    Args:
        seed: Any integer.
        fold: Which objects and scenes are held out, 0..3.
        size_px: Height and width of a clip.
        num_frames: Frames of a clip.
        frames_per_second: Written into the files; nothing depends on it.
        train: Labelled training clips, even; every trajectory makes two.
        validation: Validation clips, even.
        test: Test clips, even.
        object_scale: Range of an object's size, the root of its area, in frame sizes.
        travel: Range of the way from first to last frame, in frame sizes.
        window_frames: Frames of an unlabelled clip.
        window_px: Short side of an unlabelled clip; smaller videos stay as they are.
        clips_per_shard: Clips of a tar shard, even.
    """

    seed: int = 0
    fold: int = 0
    size_px: int = 160
    num_frames: int = 16
    frames_per_second: int = 12
    train: int = 840
    validation: int = 240
    test: int = 384
    object_scale: tuple[float, float] = (0.5, 0.62)
    travel: tuple[float, float] = (0.4, 0.65)
    window_frames: int = 32
    window_px: int = 240
    clips_per_shard: int = 120

    def num_clips(self, split: str) -> int:
        """Clips of a split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]


@dataclass(frozen=True, kw_only=True)
class Split:
    """What one split may show.

    Args:
        objects: Cut-outs by category.
        backgrounds: Names of videos.
    """

    objects: Mapping[str, tuple[Path, ...]]
    backgrounds: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One object on its way over one background; drawn forward and reversed.

    Args:
        number: Number in its split.
        category: What the object is.
        stamp: Its cut-out.
        mirrored: Whether the cut-out is mirrored.
        scale: Root of the object's area, in frame sizes.
        background: Name of the video behind.
        background_start: First frame of it, as a share of the frames there are to choose.
        background_crop: `(y, x, size)` of the square crop: offsets as shares of the room,
            size as a share of the short side.
        axis: Axis of the motion.
        start: Place in the first frame, in frame sizes, 0..1.
        travel: Way to the last frame, in frame sizes.
        across: Place on the other axis, as a share of the room.
    """

    number: int
    category: str
    stamp: Path
    mirrored: bool
    scale: float
    background: str
    background_start: float
    background_crop: tuple[float, float, float]
    axis: Axis
    start: float
    travel: float
    across: float

    def offsets(self, num_frames: int, size_px: int, height: int, width: int) -> np.ndarray:
        """Top left corner of the object in every frame, `[frames, 2]` as `(y, x)`.

        Along the axis of motion it lies in 0..size_px-1 and the object goes on at the
        other side of the frame; on the other axis the object is inside.

        Args:
            num_frames: Frames of the clip.
            size_px: Height and width of the clip.
            height: Pixels of the drawn object.
            width: Pixels of the drawn object.
        """
        way = np.linspace(0.0, self.travel, num_frames)
        along = np.floor((self.start + way) % 1.0 * size_px).astype(int)
        room = size_px - (height if self.axis is Axis.HORIZONTAL else width)
        across = np.full(num_frames, round(self.across * room))
        order = (across, along) if self.axis is Axis.HORIZONTAL else (along, across)
        return np.stack(order, axis=1)


def split_assets(
    spec: TaskSpec, stamps: Mapping[str, Sequence[Path]], videos: Iterable[str]
) -> dict[str, Split]:
    """Divide objects and backgrounds into train, validation and test, disjoint in both.

    Args:
        spec: Seed and fold.
        stamps: Cut-outs by category.
        videos: Names of the videos there are.

    Returns:
        A split by its name.

    Raises:
        UsageError: If there are too few scenes to give every split one.
    """
    present = set(videos)
    scenes = [s for scene in _SCENES if (s := tuple(v for v in scene if v in present))]
    if len(scenes) <= _TEST_SCENES + _VALIDATION_SCENES:
        raise UsageError(
            f"the labelled task needs {_TEST_SCENES + _VALIDATION_SCENES + 1} scenes or more, got "
            f"videos {sorted(present)}: fetch the missing assets"
        )
    scenes = _rotated(scenes, spec.fold * _TEST_SCENES)
    held_out = _TEST_SCENES + _VALIDATION_SCENES
    parts = {
        "test": scenes[:_TEST_SCENES],
        "validation": scenes[_TEST_SCENES:held_out],
        "train": scenes[held_out:],
    }
    backgrounds = {name: tuple(v for scene in part for v in scene) for name, part in parts.items()}
    objects: dict[str, dict[str, tuple[Path, ...]]] = {name: {} for name in SPLITS}
    for category, paths in sorted(stamps.items()):
        for name, chosen in _split_objects(spec, category, paths).items():
            objects[name][category] = chosen
    return {name: Split(objects=objects[name], backgrounds=backgrounds[name]) for name in SPLITS}


def family(stamp: Path) -> str:
    """First word of a cut-out's name; cut-outs that share it stay in one split."""
    return re.split(r"[-_]", stamp.stem.lower())[0]


def _split_objects(
    spec: TaskSpec, category: str, paths: Sequence[Path]
) -> dict[str, tuple[Path, ...]]:
    families: dict[str, list[Path]] = {}
    for path in sorted(paths):
        families.setdefault(family(path), []).append(path)
    names = sorted(families)
    np.random.Generator(np.random.Philox(key=stable_key("objects", spec.seed, category))).shuffle(
        names
    )
    names = _rotated(names, round(spec.fold * _TEST_SHARE * len(names)))
    chosen: dict[str, list[Path]] = {name: [] for name in SPLITS}
    for name in names:
        if len(chosen["test"]) < _TEST_SHARE * len(paths):
            split = "test"
        elif len(chosen["validation"]) < _VALIDATION_SHARE * len(paths):
            split = "validation"
        else:
            split = "train"
        chosen[split] += families[name]
    return {name: tuple(picked) for name, picked in chosen.items()}


def _rotated(values: list[_T], by: int) -> list[_T]:
    by %= len(values)
    return values[by:] + values[:by]


def plan_trajectories(spec: TaskSpec, name: str, split: Split) -> tuple[Trajectory, ...]:
    """All trajectories of a split: half as many as it has clips.

    Categories, axes and backgrounds take turns, so each is equally frequent in every
    split; objects of a category take turns too. The rest is drawn from a generator of
    the trajectory's own, keyed by seed, fold, split and number.

    Args:
        spec: Seed and ranges.
        name: Name of the split.
        split: What it may show.
    """
    categories = sorted(split.objects)
    trajectories = []
    for number in range(spec.num_clips(name) // 2):
        round_, turn = divmod(number, len(categories))
        category = categories[turn]
        rng = np.random.Generator(
            np.random.Philox(key=stable_key("trajectory", spec.seed, spec.fold, name, number))
        )
        objects = split.objects[category]
        visit, place = divmod(round_, len(objects))
        trajectories.append(
            Trajectory(
                number=number,
                category=category,
                stamp=objects[place],
                mirrored=bool(rng.random() < 0.5),
                scale=rng.uniform(*spec.object_scale),
                background=split.backgrounds[int(rng.integers(len(split.backgrounds)))],
                background_start=rng.random(),
                background_crop=(rng.random(), rng.random(), rng.uniform(0.6, 1.0)),
                axis=tuple(Axis)[(visit + place + turn) % 2],
                start=rng.random(),
                travel=rng.uniform(*spec.travel),
                across=rng.random(),
            )
        )
    return tuple(trajectories)
