"""Labelled clips of an evaluation: which there are, what they show, and in which views."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from kdhiera.config import EvaluateConfig, RunConfig
from kdhiera.data.shards import ShardIndex
from kdhiera.errors import UsageError
from kdhiera.evaluation.kept import from_text_array, text_array
from kdhiera.stages.clips import Place
from kdhiera.views import CropPolicy, FramePolicy, ViewPolicy

SPLITS = ("train", "validation", "test")
Shards = Mapping[str, Sequence[ShardIndex]]
UNKNOWN = -1


@dataclass(frozen=True, kw_only=True)
class Split:
    """Clips of a split that decode.

    Args:
        places: Where they are.
        uids: Their identities.
        labels: What their samples say.
    """

    places: Sequence[Place]
    uids: Sequence[str]
    labels: Sequence[Mapping[str, Any]]


Splits = Mapping[str, Split]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One label to predict.

    Args:
        label: Its name.
        classes: Values that training shows, sorted; class numbers count these.
        truth: By split, the class number of every clip, `UNKNOWN` where it has no value or
            one that training does not show.
    """

    label: str
    classes: Sequence[str]
    truth: Mapping[str, Int[np.ndarray, " n"]]

    def rows(self, split: str) -> Int[np.ndarray, " k"]:
        """Clips whose class is known."""
        return np.flatnonzero(self.truth[split] != UNKNOWN)

    def known_truth(self, split: str) -> Int[np.ndarray, " k"]:
        """Class numbers of these."""
        known: np.ndarray = self.truth[split][self.rows(split)]
        return known


def evaluation_policy(config: RunConfig, split: str = "test") -> ViewPolicy:
    """Views without randomness: the middle of a video, test clips in all their views."""
    settings = settings_of(config)
    many = split == "test"
    return ViewPolicy(
        num_frames=config.clip.num_frames,
        height=config.clip.height,
        width=config.clip.width,
        frames=_middle(config),
        frame_stride=settings.frame_stride,
        crop=CropPolicy.CENTER,
        crop_scale=(1.0, 1.0),
        crop_ratio=(1.0, 1.0),
        flip=False,
        allow_short=config.views.allow_short,
        seed=0,
        clips=settings.test_clips if many else 1,
        crops=settings.test_crops if many else 1,
    )


def _middle(config: RunConfig) -> FramePolicy:
    """Frames as they were chosen in pre-training, unless the evaluation says otherwise."""
    frames = settings_of(config).frames or config.views.frames
    uniform = frames in (FramePolicy.UNIFORM, FramePolicy.UNIFORM_CENTER)
    return FramePolicy.UNIFORM_CENTER if uniform else FramePolicy.DENSE_CENTER


def settings_of(config: RunConfig) -> EvaluateConfig:
    """The config's evaluate section.

    Raises:
        UsageError: If it has none.
    """
    if config.evaluate is None:
        raise UsageError("the config has no `evaluate` section: name labelled shards there")
    return config.evaluate


def clips_identity(config: RunConfig, shards: Shards) -> dict[str, object]:
    """Of all that decides which clips there are and what they show."""
    settings = settings_of(config)
    return {
        "what": "clips",
        "shards": {split: [shard.shard_id for shard in shards[split]] for split in SPLITS},
        "clip": config.clip.model_dump(mode="json"),
        "allow_short": config.views.allow_short,
        "frames": str(_middle(config)),
        "frame_stride": settings.frame_stride,
        "test_views": [settings.test_clips, settings.test_crops],
        "decode": config.decode.model_dump(mode="json"),
        "extensions": list(config.data.video_extensions),
    }


def splits_to_arrays(splits: Splits) -> dict[str, np.ndarray]:
    """Splits as arrays for `Kept`; `splits_from_arrays` reads them back."""
    return {
        name: text_array(
            [
                [shard.shard_id, ordinal, uid, dict(labels)]
                for (shard, ordinal), uid, labels in zip(
                    split.places, split.uids, split.labels, strict=True
                )
            ]
        )
        for name, split in splits.items()
    }


def splits_from_arrays(arrays: Mapping[str, np.ndarray], shards: Shards) -> Splits:
    """Splits from what `splits_to_arrays` gave of the same shards."""
    splits = {}
    for name in SPLITS:
        by_id = {shard.shard_id: shard for shard in shards[name]}
        rows: Any = from_text_array(arrays[name])
        splits[name] = Split(
            places=[(by_id[shard], ordinal) for shard, ordinal, _, _ in rows],
            uids=[uid for _, _, uid, _ in rows],
            labels=[labels for *_, labels in rows],
        )
    return splits


def splits_digest(splits: Splits) -> str:
    """Hash of the clips and their labels: equal where features and truths belong together."""
    facts = [
        (n, list(splits[n].uids), [sorted(r.items()) for r in splits[n].labels]) for n in SPLITS
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def tasks(settings: EvaluateConfig, splits: Splits) -> list[Task]:
    """The labels that are predicted.

    Raises:
        UsageError: If training has none, lacks one that is named, or none of its values is in
            the other splits.
    """
    found = {name for row in splits["train"].labels for name in row}
    wanted = settings.labels or tuple(sorted(found - set(settings.groups)))
    missing = [name for name in (*wanted, *settings.groups) if name not in found]
    if missing or not wanted:
        raise UsageError(
            f"the clips of evaluate.train have no label {', '.join(missing) or 'at all'}; they "
            f"have: {', '.join(sorted(found)) or 'none'}"
        )
    return [_task(label, splits) for label in wanted]


def _task(label: str, splits: Splits) -> Task:
    classes = sorted({str(row[label]) for row in splits["train"].labels if label in row})
    numbers = {name: i for i, name in enumerate(classes)}
    truth = {
        name: np.array(
            [
                numbers.get(str(row[label]), UNKNOWN) if label in row else UNKNOWN
                for row in splits[name].labels
            ]
        )
        for name in SPLITS
    }
    task = Task(label=label, classes=classes, truth=truth)
    if not len(task.rows("test")) or not len(task.rows("validation")):
        raise UsageError(f"no test or validation clip has a value of `{label}` seen in training")
    if len(classes) < 2:
        raise UsageError(
            f"label `{label}` has the single value {classes[0]!r} in training: there is nothing to "
            "tell apart; name other labels in evaluate.labels"
        )
    return task
