"""What shards hold, and the numbers of a config that follow from it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from kdhiera.data.clip import VideoInfo
from kdhiera.grid import UNIT_PX
from kdhiera.progress import counted
from kdhiera.stages.packing.order import REST, WHOLE

CLIP_SECONDS = 2.0  # K400: 16 frames, 4 apart, at 30 a second
_SHARE_LONG_ENOUGH = 0.9
_LONG_SECONDS = 20.0
_MOST_DISTINCT = 0.9  # values over labelled samples: with more they are names, not classes
_T = TypeVar("_T")


class Teachers(StrEnum):
    """Which teachers a config is written for."""

    DEMO = "demo"
    BASE = "base"


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the shards hold, as far as it was looked at.

    Args:
        num_samples: In all shards.
        num_learnt: In those that training reads.
        num_shards: Of them.
        looks: Videos that can be read.
        failures: Why others cannot, in words.
        labels: Values by label, by split or for all, of up to 500 samples of each.
        extensions: Of videos that are read only if the config says so.
    """

    num_samples: int
    num_learnt: int
    num_shards: int
    looks: tuple[VideoInfo, ...]
    failures: tuple[str, ...]
    labels: Mapping[str, Mapping[str, Sequence[str]]]
    extensions: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Labels that tell groups of videos apart, and the same ones in every split."""
        learnt = learnt_of(self.labels)
        others = [labels for use, labels in self.labels.items() if use not in (REST, WHOLE)]
        return tuple(
            sorted(
                label
                for label, values in learnt.items()
                if 2 <= len(set(values)) <= max(2, _MOST_DISTINCT * len(values))
                and all({*values} & {*labels.get(label, ())} for labels in others)
            )
        )


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Numbers of a config that follow from the videos.

    Args:
        num_frames: Of a clip.
        size: Height and width of a clip, in px.
        frame_stride: Frames between those of a clip.
        num_views: Of every video.
        allow_short: Whether frames repeat in videos that are too short for a clip.
        span_seconds: What a clip covers at the usual frame rate.
        share_long_enough: Of the videos, at this stride.
        batch_size: Clips of a training step.
        epochs: Of training.
    """

    num_frames: int
    size: int
    frame_stride: int
    num_views: int
    allow_short: bool
    span_seconds: float
    share_long_enough: float
    batch_size: int
    epochs: int


def learnt_of(by_use: Mapping[str, _T]) -> _T:
    """What training reads: all that is, where there are no splits."""
    return by_use[REST] if REST in by_use else by_use[WHOLE]


def fit_to(seen: Seen, teachers: Teachers) -> Fit:
    """Clip, stride and the rest from sizes, rates and lengths."""
    small = teachers is Teachers.DEMO
    short_side = statistics.median(min(look.height, look.width) for look in seen.looks)
    size = max(2 * UNIT_PX, min(128 if small else 224, int(short_side) // UNIT_PX * UNIT_PX))
    lengths = sorted(look.num_frames for look in seen.looks)
    usual = lengths[int((1 - _SHARE_LONG_ENOUGH) * len(lengths))]  # nine of ten have as many
    num_frames = 8 if small or usual < 16 else 16
    rate = statistics.median(look.frames_per_second for look in seen.looks)
    room = (usual - 1) // (num_frames - 1)
    stride = max(1, min(round(CLIP_SECONDS * rate / num_frames), room))
    seconds = statistics.median(look.seconds for look in seen.looks)
    long_enough = sum(length > (num_frames - 1) * stride for length in lengths)
    batch_size = 32 if small else 256
    while batch_size > 1 and batch_size > seen.num_learnt // 2:
        batch_size //= 2
    return Fit(
        num_frames=num_frames,
        size=size,
        frame_stride=stride,
        num_views=4 if seconds > _LONG_SECONDS else 2,
        allow_short=lengths[0] < num_frames,
        span_seconds=((num_frames - 1) * stride + 1) / rate,
        share_long_enough=long_enough / len(lengths),
        batch_size=batch_size,
        epochs=40 if small else 400,
    )


def describe_videos(seen: Seen) -> Iterator[str]:
    """Sizes, rates, lengths and what cannot be read, a line each."""
    sizes = Counter(f"{look.width} x {look.height}" for look in seen.looks)
    usual = ", ".join(f"{size} ({n})" for size, n in sizes.most_common(3))
    yield f"{counted(len(seen.looks), 'video')} looked at: {usual}{', ...' * (len(sizes) > 3)} px"
    rates = sorted(look.frames_per_second for look in seen.looks)
    seconds = sorted(look.seconds for look in seen.looks)
    frames = sorted(look.num_frames for look in seen.looks)
    yield (
        f"{_span(rates, '.3g')} frames a second, {_span(seconds, '.3g')} s, "
        f"{_span(frames, 'd')} frames (median and range)"
    )
    if seen.failures:
        yield f"{len(seen.failures)} more cannot be read: {seen.failures[0]}"


def _span(values: Sequence[float], form: str) -> str:
    middle = values[len(values) // 2]
    return f"{middle:{form}} ({values[0]:{form}} to {values[-1]:{form}})"
