"""Draws a trajectory: its cut-out over its stretch of background."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from kdhiera.demo.task import Axis, TaskSpec, Trajectory
from kdhiera.demo.video import Frames

_MAX_SIDE = 0.85  # of the frame: long objects are drawn smaller than their scale


def draw_object(
    trajectory: Trajectory, size_px: int
) -> tuple[Float[np.ndarray, "h w 3"], Float[np.ndarray, "h w 1"]]:
    """Colour times opacity (0..255) and opacity (0..1) of a trajectory's object.

    Args:
        trajectory: Which cut-out, how large, mirrored or not.
        size_px: Height and width of the clip.
    """
    with Image.open(trajectory.stamp) as file:
        image = file.convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    if trajectory.mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    factor = trajectory.scale * size_px / (image.width * image.height) ** 0.5
    factor = min(factor, _MAX_SIDE * size_px / max(image.size))
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    # Premultiplied ("RGBa"), or the colour of clear pixels would bleed into the edges.
    drawn = np.asarray(image.convert("RGBa").resize(size, Image.Resampling.LANCZOS), np.float32)
    opacity = drawn[..., 3:]
    return np.minimum(drawn[..., :3], opacity), opacity / 255  # the filter overshoots at edges


def draw_clips(spec: TaskSpec, trajectory: Trajectory, video: Frames) -> tuple[Frames, Frames]:
    """A trajectory's two clips: as planned, and with its positions in reverse order.

    The background runs forward in both.

    Args:
        spec: Size and number of frames.
        trajectory: What to draw.
        video: Frames of its background.
    """
    background = _background_clip(spec, trajectory, video)
    colour, opacity = draw_object(trajectory, spec.size_px)
    offsets = trajectory.offsets(spec.num_frames, spec.size_px, *opacity.shape[:2])

    # The frame is a ring: what leaves on one side comes in on the other.
    again = (0, spec.size_px) if trajectory.axis is Axis.HORIZONTAL else (spec.size_px, 0)

    def paste(order: np.ndarray) -> Frames:
        frames = background.copy()
        for frame, corner in zip(frames, order, strict=True):
            for y, x in (corner, corner - again):
                _blend(frame, colour, opacity, int(y), int(x))
        return frames

    return paste(offsets), paste(offsets[::-1])


def _background_clip(spec: TaskSpec, trajectory: Trajectory, video: Frames) -> Frames:
    start = int(trajectory.background_start * (len(video) - spec.num_frames + 1))
    window = video[start : start + spec.num_frames]
    height, width = window.shape[1:3]
    top, left, share = trajectory.background_crop
    side = round(share * min(height, width))
    y, x = int(top * (height - side + 1)), int(left * (width - side + 1))
    size = (spec.size_px, spec.size_px)
    return np.stack(
        [
            np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))
            for frame in window[:, y : y + side, x : x + side]
        ]
    )


def _blend(
    frame: UInt8[np.ndarray, "y x 3"],
    colour: Float[np.ndarray, "h w 3"],
    opacity: Float[np.ndarray, "h w 1"],
    y: int,
    x: int,
) -> None:
    """Paint an object over a frame, in place; what lies outside is cut off."""
    height, width = opacity.shape[:2]
    y0, y1 = max(0, y), min(frame.shape[0], y + height)
    x0, x1 = max(0, x), min(frame.shape[1], x + width)
    if y0 < y1 and x0 < x1:
        inside = np.s_[y0 - y : y1 - y, x0 - x : x1 - x]
        under = frame[y0:y1, x0:x1] * (1 - opacity[inside])
        frame[y0:y1, x0:x1] = np.clip(np.rint(under + colour[inside]), 0, 255).astype(np.uint8)
