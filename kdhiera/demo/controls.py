"""Shows that the direction of the labelled task needs the order of the frames.

Each control asks a linear probe for the sign of the motion, given its axis. Whatever
ignores order must be at chance, one half: the first frame, the frames shuffled, an image
teacher's features pooled over frames. The same probe on the frames in order must be well
above it, or the controls would prove nothing.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from kdhiera.demo.task import DIRECTIONS, SPLITS, Axis
from kdhiera.demo.video import decode
from kdhiera.errors import UsageError
from kdhiera.evaluation.bootstrap import bootstrap_interval
from kdhiera.evaluation.probe import linear_probe
from kdhiera.results import Control
from kdhiera.views import stable_key

CHANCE = 0.5
_THUMBNAIL_PX = 16
_MAX_SHIFT = 3  # thumbnail pixels, either way


@dataclass(frozen=True, kw_only=True)
class Clips:
    """The clips of one split, small.

    Args:
        keys: Keys of the samples.
        thumbnails: Grey frames, 0..1.
        centres: `(y, x)` of the object's centre in every frame, in frame sizes, 0..1.
        vertical: Whether the object moves up or down.
        positive: Whether it moves right or down.
        objects: Name of the object.
        backgrounds: Name of the background.
    """

    keys: tuple[str, ...]
    thumbnails: Float[np.ndarray, "n f y x"]
    centres: Float[np.ndarray, "n f 2"]
    vertical: Bool[np.ndarray, " n"]
    positive: Int[np.ndarray, " n"]
    objects: Shaped[np.ndarray, " n"]
    backgrounds: Shaped[np.ndarray, " n"]


def read_clips(shards: Sequence[Path], *, size_px: int, frame_stride: int = 2) -> Clips:
    """Read labelled shards of the demo, in the order of their samples.

    Args:
        shards: Tar files.
        size_px: Height and width of their clips.
        frame_stride: Frames between the frames that are kept.

    Raises:
        UsageError: If there is no shard.
    """
    if not shards:
        raise UsageError("there are no labelled shards: the demo lacks the package of cut-outs")
    facts, thumbnails = [], []
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                if member.name.endswith(".json"):
                    facts.append((member.name.removesuffix(".json"), json.load(content)))
                else:
                    frames = decode(io.BytesIO(content.read()), _THUMBNAIL_PX)[::frame_stride]
                    thumbnails.append(frames.mean(-1, dtype=np.float32) / 255)
    directions = [fact["labels"]["direction"] for _, fact in facts]
    centres = np.array([fact["centres_yx_px"] for _, fact in facts])[:, ::frame_stride]
    return Clips(
        keys=tuple(key for key, _ in facts),
        thumbnails=np.stack(thumbnails),
        centres=centres / size_px,
        vertical=np.array([d in DIRECTIONS[Axis.VERTICAL] for d in directions]),
        positive=np.array(
            [int(any(d == pair[0] for pair in DIRECTIONS.values())) for d in directions]
        ),
        objects=np.array([fact["labels"]["object"] for _, fact in facts]),
        backgrounds=np.array([fact["labels"]["background"] for _, fact in facts]),
    )


def pooled_features(path: Path, model: str) -> dict[str, Float[np.ndarray, " c"]]:
    """Features of a model, pooled over a clip, by sample key.

    Args:
        path: `features.npz` of an evaluation.
        model: Whose, such as `image teacher`.
    """
    with np.load(path) as stored:
        return {
            uid.rpartition("/")[2]: row
            for name in SPLITS
            for uid, row in zip(stored[f"{name}|uids"], stored[f"{name}|{model}|mean"], strict=True)
        }


def run_controls(
    splits: Mapping[str, Clips],
    *,
    image_features: Mapping[str, Float[np.ndarray, " c"]] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> list[Control]:
    """Every control, learnt on `train`, penalty chosen on `validation`, counted on `test`.

    Args:
        splits: Clips by split.
        image_features: Features of an image teacher pooled over the frames of a clip, by
            sample key; without them that control is left out.
        resamples: Of the bootstrap.
        seed: Of the shuffled frames and of the bootstrap.
    """
    controls: list[tuple[str, bool, Callable[[Clips], Float[np.ndarray, "n c"]]]] = [
        ("position in the first frame", False, lambda c: _ring(c, c.centres[:, :1])),
        ("positions, sorted", False, lambda c: _ring(c, np.sort(c.centres, axis=1))),
        ("pixels of the first frame", False, lambda c: _flat(c.thumbnails[:, 0])),
        ("pixels averaged over frames", False, lambda c: _flat(c.thumbnails.mean(1))),
        ("motion, frames shuffled", False, lambda c: motion(_shuffled(c, seed))),
        ("motion, frames in order", True, lambda c: motion(c.thumbnails)),
        ("positions in order", True, _steps),
    ]
    if image_features is not None:
        pooled = image_features
        controls.insert(
            5,
            ("image teacher, pooled", False, lambda c: np.stack([pooled[key] for key in c.keys])),
        )
    return [
        _control(
            name,
            needs_order,
            {split: features(splits[split]) for split in SPLITS},
            splits,
            resamples=resamples,
            seed=seed,
        )
        for name, needs_order, features in controls
    ]


def _control(
    name: str,
    needs_order: bool,
    features: Mapping[str, Float[np.ndarray, "n c"]],
    splits: Mapping[str, Clips],
    *,
    resamples: int,
    seed: int,
) -> Control:
    test = splits["test"]
    correct = np.zeros(len(test.keys), dtype=bool)
    for vertical in (False, True):  # the axis is given: one probe for each
        rows = {split: clips.vertical == vertical for split, clips in splits.items()}
        result = linear_probe(
            features["train"][rows["train"]],
            splits["train"].positive[rows["train"]],
            features["validation"][rows["validation"]],
            splits["validation"].positive[rows["validation"]],
            features["test"][rows["test"]],
        )
        correct[rows["test"]] = result.predictions == test.positive[rows["test"]]
    return Control(
        name=name,
        chance=CHANCE,
        expected="above" if needs_order else "chance",
        accuracy=bootstrap_interval(
            correct, [test.objects, test.backgrounds], resamples=resamples, seed=seed
        ),
        num_clips=len(correct),
    )


def _flat(values: Float[np.ndarray, "n ..."]) -> Float[np.ndarray, "n c"]:
    return values.reshape(len(values), -1)


def _along(clips: Clips, centres: Float[np.ndarray, "n f 2"]) -> Float[np.ndarray, "n f"]:
    """The coordinate on the axis of motion."""
    return np.where(clips.vertical[:, None], centres[..., 0], centres[..., 1])


def _ring(clips: Clips, centres: Float[np.ndarray, "n f 2"]) -> Float[np.ndarray, "n c"]:
    """Harmonics of the place on the ring, so that a linear probe can bound off any arc."""
    along = _along(clips, centres)
    angles = 2 * np.pi * np.arange(1, 5) * along[..., None]
    return _flat(np.concatenate([np.sin(angles), np.cos(angles), along[..., None]], axis=-1))


def _steps(clips: Clips) -> Float[np.ndarray, "n c"]:
    """Ways from frame to frame, the shorter way round the ring."""
    steps = np.diff(_along(clips, clips.centres), axis=1)
    return np.asarray((steps + 0.5) % 1.0 - 0.5)


def _shuffled(clips: Clips, seed: int) -> Float[np.ndarray, "n f y x"]:
    """Every clip's frames in an order of its own."""
    shuffled = clips.thumbnails.copy()
    for key, frames in zip(clips.keys, shuffled, strict=True):
        np.random.Generator(np.random.Philox(key=stable_key("shuffle", seed, key))).shuffle(frames)
    return shuffled


def motion(thumbnails: Float[np.ndarray, "n f y x"]) -> Float[np.ndarray, "n c"]:
    """How well each frame fits the next one shifted, for shifts up to 3 px either way.

    Frames are differences from the clip's median frame, which takes away a still
    background; frames wrap round as the task's do. Reversing time mirrors the shifts.

    Args:
        thumbnails: Grey frames.

    Returns:
        49 correlations a clip.
    """
    moving = np.abs(thumbnails - np.median(thumbnails, axis=1, keepdims=True))
    moving = moving - moving.mean((2, 3), keepdims=True)
    norm = np.sqrt((moving[:, :-1] ** 2).sum((1, 2, 3)) * (moving[:, 1:] ** 2).sum((1, 2, 3)))
    shifts = range(-_MAX_SHIFT, _MAX_SHIFT + 1)
    fits = [
        (np.roll(moving[:, :-1], (y, x), axis=(2, 3)) * moving[:, 1:]).sum((1, 2, 3))
        for y in shifts
        for x in shifts
    ]
    return np.asarray(np.stack(fits, axis=1) / (norm[:, None] + 1e-9))
