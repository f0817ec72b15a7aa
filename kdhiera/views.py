"""Views: one replayable choice of frames, crop and flip of a video.

A view is drawn from a policy, a seed and the sample's identity alone, and holds only
integers, so that the same clip can be decoded again bit by bit: by another teacher,
by a check, on another machine.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np


class TooShortError(Exception):
    """The video has fewer frames than the policy asks for and may not repeat any."""


class FramePolicy(StrEnum):
    """How the frames of a clip are chosen."""

    DENSE = "dense"  # num_frames frames, frame_stride apart, from a random start (K400-like)
    DENSE_CENTER = "dense_center"  # the same from the middle of the video (evaluation)
    UNIFORM = "uniform"  # one frame from each of num_frames equal segments (SSv2-like)
    UNIFORM_CENTER = "uniform_center"  # the same from the middle of each segment (evaluation)


class CropPolicy(StrEnum):
    """How the crop of a clip is chosen."""

    RANDOM_RESIZED = "random_resized"
    CENTER = "center"  # the largest centred crop of the clip's aspect ratio


@dataclass(frozen=True, kw_only=True)
class ViewPolicy:
    """Everything that decides which view is drawn from a video.

    Args:
        num_frames: Frames of a clip.
        height: Pixels of the clip.
        width: Pixels of the clip.
        frames: Frame policy.
        frame_stride: Frames between sampled frames (dense policy).
        crop: Crop policy.
        crop_scale: Range of the crop's share of the frame's area.
        crop_ratio: Range of the crop's aspect ratio relative to the clip's.
        flip: Whether every second view is mirrored.
        allow_short: Whether frames may repeat in a video shorter than the clip.
        seed: Any integer.
        clips: Clips that `dense_center` spreads over the video, in the middles of as many
            equal parts of its room; `uniform_center` over every segment likewise.
        crops: Crops that `center` spreads along the longer side, from edge to edge: 1 or 3.
            View v shows clip `v // crops` through crop `v % crops`.
    """

    num_frames: int
    height: int
    width: int
    frames: FramePolicy
    frame_stride: int
    crop: CropPolicy
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: bool
    allow_short: bool
    seed: int
    clips: int = 1
    crops: int = 1

    @property
    def num_spread(self) -> int:
        """Views that show all clips through all crops."""
        return self.clips * self.crops


@dataclass(frozen=True, kw_only=True)
class ClipView:
    """One view of one video: integers only, replayable.

    Args:
        frame_indices: Presentation-order indices of the sampled frames.
        crop: `(y, x, height, width)` in pixels of the upright source frame.
        flip: Whether the crop is mirrored left to right after cropping.
    """

    frame_indices: tuple[int, ...]
    crop: tuple[int, int, int, int]
    flip: bool


def stable_key(*parts: object) -> int:
    """A 128-bit number that depends on the values only: no machine, process or version.

    Args:
        parts: Integers and strings; their `repr` is what counts.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


def stable_uniforms(count: int, *parts: object) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """`count` numbers in (0, 1) from a counter-based generator keyed by `parts`.

    u = (h + 0.5) / 2**52 with h the upper 52 bits of Philox words: exact in float64,
    never 0 or 1, the same on every platform.
    """
    words = np.random.Philox(key=stable_key(*parts)).random_raw(count)
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52


def draw_view(
    policy: ViewPolicy, *, uid: str, view: int, num_frames: int, height: int, width: int
) -> ClipView:
    """Draw view number `view` of a video.

    Args:
        policy: What to draw from.
        uid: Identity of the sample, the same on every machine.
        view: View number, 0 upwards.
        num_frames: Frames that the video shows.
        height: Pixels of the upright frame.
        width: Pixels of the upright frame.

    Raises:
        TooShortError: If the video is too short and `allow_short` is off.
    """
    noise = stable_uniforms(policy.num_frames + 24, "view", policy.seed, uid, view)
    return ClipView(
        frame_indices=_frame_indices(policy, view, num_frames, noise[: policy.num_frames]),
        crop=_crop(policy, view, height, width, noise[policy.num_frames :]),
        flip=policy.flip and view % 2 == 1,
    )


def _frame_indices(
    policy: ViewPolicy,
    view: int,
    num_frames: int,
    noise: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> tuple[int, ...]:
    """Dense: the stride shrinks before frames repeat. Uniform: a random frame a segment."""
    wanted = policy.num_frames
    clip = view // policy.crops % policy.clips
    if num_frames < wanted and not policy.allow_short:
        raise TooShortError(
            f"the video shows {num_frames} frames and a clip needs {wanted}; "
            "set views.allow_short to repeat frames"
        )
    if num_frames < 1:
        raise TooShortError("the video shows no frame")
    if policy.frames is FramePolicy.UNIFORM_CENTER:
        noise = np.full_like(noise, (2 * clip + 1) / (2 * policy.clips))
    uniform = (FramePolicy.UNIFORM, FramePolicy.UNIFORM_CENTER)
    if policy.frames in uniform or num_frames < wanted:
        edges = [i * num_frames / wanted for i in range(wanted + 1)]
        picked = (e + u * (f - e) for e, f, u in zip(edges, edges[1:], noise, strict=False))
        indices = [min(int(p), num_frames - 1) for p in picked]
        if num_frames >= wanted:  # segments of at least one frame: make them distinct
            for i in range(1, wanted):
                indices[i] = max(indices[i], indices[i - 1] + 1)
            indices[-1] = min(indices[-1], num_frames - 1)
            for i in range(wanted - 2, -1, -1):
                indices[i] = min(indices[i], indices[i + 1] - 1)
        return tuple(indices)
    stride = max(1, min(policy.frame_stride, (num_frames - 1) // max(1, wanted - 1)))
    room = num_frames - (wanted - 1) * stride
    start = int(noise[0] * room)
    if policy.frames is FramePolicy.DENSE_CENTER:
        start = (2 * clip + 1) * room // (2 * policy.clips)
    return tuple(start + i * stride for i in range(wanted))


def _crop(
    policy: ViewPolicy,
    view: int,
    height: int,
    width: int,
    noise: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> tuple[int, int, int, int]:
    """RandomResizedCrop with ten tries, then the centred crop (as torchvision does)."""
    aspect = policy.width / policy.height
    if policy.crop is CropPolicy.RANDOM_RESIZED:
        low, high = (math.log(r) for r in policy.crop_ratio)
        for i in range(10):
            area = height * width * _between(policy.crop_scale, noise[2 * i])
            ratio = aspect * math.exp(low + (high - low) * noise[2 * i + 1])
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                y = int(noise[20] * (height - h + 1))
                x = int(noise[21] * (width - w + 1))
                return y, x, h, w
    w = min(width, round(height * aspect))
    h = min(height, round(width / aspect))
    y, x = height - h, width - w
    if policy.crop is CropPolicy.CENTER and policy.crops == 3:
        place = view % policy.crops
        return y * place // 2, x * place // 2, max(h, 1), max(w, 1)
    return y // 2, x // 2, max(h, 1), max(w, 1)


def _between(bounds: tuple[float, float], u: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * u


class RowStatus(StrEnum):
    """What became of a sample in one view."""

    OK = "ok"
    MISSING_MEMBER = "missing_member"
    DECODE_ERROR = "decode_error"
    DECODE_TIMEOUT = "decode_timeout"
    DECODE_LIMIT = "decode_limit"
    TOO_SHORT = "too_short"
    CORRUPT_FRAMES = "corrupt_frames"
