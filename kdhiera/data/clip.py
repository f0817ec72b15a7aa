"""What a decoder is asked for and what it gives: requests, limits, clips, failures.

Nothing here decodes; the types cross the border between a process and its decode children.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, TypeAlias

import google_crc32c
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from kdhiera.views import ClipView, RowStatus, ViewPolicy

Frame: TypeAlias = UInt8[np.ndarray[Any, Any], "h w 3"]
Frames: TypeAlias = UInt8[np.ndarray[Any, Any], "t h w 3"]

_MESSAGE_CHARACTERS = 300


def shown(text: str, limit: int = _MESSAGE_CHARACTERS) -> str:
    """Text from a file made safe to print: one line, escapes for what is not printable.

    Args:
        text: Anything, such as a key of a shard or a decoder's words.
        limit: Characters kept, at least 1; a cut is marked by an ellipsis.
    """
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: limit + 1])
    return printable if len(printable) <= limit else printable[: limit - 1] + "…"


class ClipError(Exception):
    """A clip that cannot be had: becomes the status and message of its row.

    Args:
        status: Any status but `ok`.
        message: The reason in words; made printable here.
    """

    def __init__(self, status: RowStatus, message: str) -> None:
        self.status = status
        self.message = shown(message)
        super().__init__(self.message)


@dataclass(frozen=True, kw_only=True)
class DecodeLimits:
    """What one video may cost, and who decodes it.

    Args:
        backend: `auto` (which is PyAV), `pyav`, `decord` or `torchcodec`.
        deadline_seconds: Wall time of one clip, start-up of a child apart.
        max_frame_pixels: Height times width of a frame.
        max_duration_seconds: Of the video, claimed or real.
        max_video_bytes: Of the encoded video.
        max_memory_bytes: Address space of a child (RLIMIT_AS).
        clips_per_child: A child is replaced after so many clips, at least 1.
    """

    backend: str
    deadline_seconds: float
    max_frame_pixels: int
    max_duration_seconds: float
    max_video_bytes: int
    max_memory_bytes: int
    clips_per_child: int


@dataclass(frozen=True, kw_only=True)
class ClipRequest:
    """Which clip of a video: a view to be drawn, or one to be replayed.

    Args:
        uid: Identity of the sample, the same on every machine.
        view: View number, 0 upwards.
        policy: What the view is drawn from; its size is the clip's.
        replay: Exactly this view instead of a drawn one.
        replay_decoder: Exactly this decoder, as recorded with the view.
        salvage: Give those frames of the view that can be had, at least one, instead of failing
            for one that cannot: to look at a bad video, never to train on it.
    """

    uid: str
    view: int
    policy: ViewPolicy
    replay: ClipView | None = None
    replay_decoder: str | None = None
    salvage: bool = False


@dataclass(frozen=True, kw_only=True)
class Clip:
    """The frames of one view.

    Args:
        frames: RGB, cropped, resized and, where the view says so, mirrored; contiguous.
        view: What was decoded; replaying it with the same decoder gives the same bytes.
        num_frames: Frames that the video shows.
        pts_seconds: Time of every sampled frame after the first shown one.
        decoder: Backend that decoded the frames.
        crc32c: Of the bytes of `frames`.
    """

    frames: Frames
    view: ClipView
    num_frames: int
    pts_seconds: tuple[float, ...]
    decoder: str
    crc32c: int


@dataclass(frozen=True, kw_only=True)
class DecodeFailure:
    """Why there is no clip.

    Args:
        status: Any status but `ok`.
        message: The decoder's reason in words, one printable line.
    """

    status: RowStatus
    message: str


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video is, as far as it shows when one frame is decoded.

    Args:
        container: FFmpeg's demuxer.
        codec: FFmpeg's decoder.
        pix_fmt: Pixel format of the decoded frames.
        height: Pixels of the upright frame.
        width: Pixels of the upright frame.
        num_frames: Frames that are shown.
        pts_seconds: Time of every shown frame after the first one.
        start_seconds: Time of the first shown frame on the container's clock.
        upright: Whether frames are stored as they are shown: not turned, not mirrored.
        closed: Whether no frame is decoded after a key frame and shown before it.
        num_packets: Packets of the stream, those of hidden frames included.
        num_key_frames: Packets that are called key frames.
    """

    container: str
    codec: str
    pix_fmt: str
    height: int
    width: int
    num_frames: int
    pts_seconds: tuple[float, ...]
    start_seconds: float
    upright: bool
    closed: bool
    num_packets: int
    num_key_frames: int

    @property
    def seconds(self) -> float:
        """From the first shown frame to the end of the last."""
        last = self.pts_seconds[-1]
        steps = self.num_frames - 1
        return last + (last / steps if steps and last else 1 / 25)

    @property
    def frames_per_second(self) -> float:
        """Mean rate of the shown frames."""
        return self.num_frames / self.seconds


@dataclass(frozen=True, kw_only=True)
class LookRequest:
    """A video to be looked at closely, frame by frame.

    Args:
        indices: Frames to decode, each by itself; None takes some from all over the video.
    """

    indices: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class FrameLook:
    """How one frame decodes by itself.

    Args:
        index: Position among the frames that are shown.
        flaw: Why it cannot be had; empty if it can.
    """

    index: int
    flaw: str


@dataclass(frozen=True, kw_only=True)
class Look:
    """What there is to say of a video.

    Args:
        info: What it is; None if that cannot be told.
        failure: Why not.
        frames: The frames that were asked for.
        said: What FFmpeg warned of, one printable line each.
    """

    info: VideoInfo | None
    failure: DecodeFailure | None
    frames: tuple[FrameLook, ...]
    said: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """How a stored frame becomes upright: one of the eight turns and mirrors of a square.

    Args:
        transpose: Whether rows become columns, first of all.
        mirror: Whether left and right change places then.
        flip: Whether top and bottom change places then.
    """

    transpose: bool = False
    mirror: bool = False
    flip: bool = False

    def apply(self, frame: Frame) -> Frame:
        """The upright frame, contiguous."""
        frame = frame.transpose(1, 0, 2) if self.transpose else frame
        frame = frame[:, ::-1] if self.mirror else frame
        frame = frame[::-1] if self.flip else frame
        return np.ascontiguousarray(frame)


def read_display_matrix(matrix: bytes) -> Turn:
    """What a display matrix asks for (ISO/IEC 14496-12, 8.3.2: 9 numbers, a b u c d v x y w).

    A point `(x, y)` is shown at `(a x + c y, b x + d y)`.

    Raises:
        ClipError: `decode_error` if it is no multiple of a quarter turn.
    """
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix[:36])
    transpose = abs(b) + abs(c) > abs(a) + abs(d)
    along, across = ((c, b), (a, d)) if transpose else ((a, d), (b, c))
    if max(map(abs, across)) > 0.01 * min(map(abs, along)):
        words = "the video is rotated by an angle that is no multiple of 90 degrees"
        raise ClipError(RowStatus.DECODE_ERROR, words)
    return Turn(transpose=transpose, mirror=along[0] < 0, flip=along[1] < 0)


def crop_resize(frame: Frame, view: ClipView, policy: ViewPolicy) -> Frame:
    """One upright frame as the view sees it: crop, resize to the policy's size, mirror.

    Pillow's bilinear filter widens with the scale, so shrinking does not alias. It is
    preferred to the bicubic one because its weights are never negative (no ringing that
    clips at black and white) and because it costs about 0.6 of it.
    """
    y, x, height, width = view.crop
    image = Image.fromarray(frame[y : y + height, x : x + width])
    size = policy.width, policy.height
    image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=None)
    pixels = np.asarray(image)
    return pixels[:, ::-1] if view.flip else pixels


def checksum(frames: Frames) -> int:
    """CRC-32C of the bytes of contiguous frames."""
    return int(google_crc32c.value(frames.tobytes()))
