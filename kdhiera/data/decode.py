"""Bytes of a video and a request in, the frames of one view out.

Runs in a decode child (`kdhiera.data.sandbox`): native decoders hang and crash.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from kdhiera.data.clip import (
    Clip,
    ClipError,
    ClipRequest,
    DecodeFailure,
    DecodeLimits,
    Frame,
    FrameLook,
    Frames,
    Look,
    LookRequest,
    VideoInfo,
    checksum,
    crop_resize,
    shown,
)
from kdhiera.data.video import Video, damaged, open_video
from kdhiera.errors import UsageError
from kdhiera.views import ClipView, RowStatus, TooShortError, ViewPolicy, draw_view

_LOOKED_AT = 16  # frames of a video that is looked at
_NEVER = "it never comes out of the decoder"
_DECORD_CONTAINERS = ("mov", "matroska")


@runtime_checkable
class Decoder(Protocol):
    """A backend that gives the frames of a demuxed video."""

    def __call__(self, video: Video, indices: Sequence[int]) -> Iterator[tuple[int, Frame]]:
        """The upright frames with these indices, each once; those that never come are left out.

        Raises:
            ClipError: If a frame is damaged or the decoder is not to be believed.
        """
        ...


def decode_pyav(video: Video, indices: Sequence[int]) -> Iterator[tuple[int, Frame]]:
    """PyAV's FFmpeg, strict: a damaged slice is an error and never concealed."""
    return video.frames(indices)


def decode_decord(video: Video, indices: Sequence[int]) -> Iterator[tuple[int, Frame]]:
    """Frames from decord, asked by time stamp: it also counts frames that edit lists hide.

    It conceals damaged slices without a word, and ordinary stream-copied cuts make it hang.
    """
    import decord  # optional, and not there on every platform

    info = video.info
    if info.container not in _DECORD_CONTAINERS or not (info.upright and info.closed):
        raise ClipError(
            RowStatus.DECODE_ERROR,
            "decord gives wrong frames of rotated videos, open groups of pictures and containers "
            f"other than {' and '.join(_DECORD_CONTAINERS)}: use decode.backend auto",
        )
    decord.logging.set_level(decord.logging.QUIET)
    asked = sorted(set(indices))
    try:
        reader = decord.VideoReader(io.BytesIO(video.data), num_threads=1)
        starts = reader.get_frame_timestamp(range(len(reader)))[:, 0]
        batch = reader.get_batch(_positions(starts, info, asked)).asnumpy()
    except (decord.DECORDError, RuntimeError, AssertionError, IndexError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ClipError(RowStatus.DECODE_ERROR, f"decord: {lines[-1]}") from error
    if batch.shape[1:3] != (info.height, info.width):
        raise ClipError(RowStatus.DECODE_ERROR, f"decord gives frames of {batch.shape[1:3]} px")
    yield from zip(asked, batch, strict=True)


BACKENDS: dict[str, Decoder] = {"auto": decode_pyav, "pyav": decode_pyav, "decord": decode_decord}
"""Decoders by name.

`auto` is PyAV: on the real videos tried it gave the same pixels as decord in 0.6 to 0.8 of the
processor time, and decord passes damage that it conceals on as good frames.
"""


def decode_clip(data: bytes, request: ClipRequest, limits: DecodeLimits) -> Clip:
    """Draw or replay a view of a video and decode it.

    Where a container promises frames that never come out of the decoder, the view is drawn
    again from those that do; frame indices keep counting what the container promises, so a
    replay needs no second look.

    Args:
        data: The whole encoded video.
        request: Which view.
        limits: Bounds, and the backend of drawn views.

    Raises:
        ClipError: With the status of the row.
        UsageError: If the backend is unknown.
    """
    backend = request.replay_decoder or limits.backend
    if backend not in BACKENDS:
        raise UsageError(f"decode.backend {backend!r} is unknown: use one of {[*BACKENDS]}")
    decode = BACKENDS[backend]
    with open_video(data, limits, salvage=request.salvage) as video:
        there: Sequence[int] = range(video.info.num_frames)
        view = request.replay or _draw(video.info, request, there)
        _check_replay(view, video.info)
        if request.salvage:
            view = _decodable(decode, video, view)
        frames, missing = _fill(decode, video, view, request.policy)
        if missing and request.replay is None:
            there = video.decodable()
            view = _draw(video.info, request, there)
            frames, missing = _fill(decode, video, view, request.policy)
        if missing:
            raise damaged(min(missing), _NEVER)
        return Clip(
            frames=frames,
            view=view,
            num_frames=len(there),
            pts_seconds=tuple(video.info.pts_seconds[i] for i in view.frame_indices),
            decoder="pyav" if backend == "auto" else backend,
            crc32c=checksum(frames),
        )


def look(data: bytes, request: LookRequest, limits: DecodeLimits) -> Look:
    """Say what a video is, how some of its frames decode, and what FFmpeg warns of meanwhile.

    Args:
        data: The whole encoded video.
        request: Which frames.
        limits: Bounds; the backend is PyAV whatever they say.
    """
    said: list[str] = []
    info: VideoInfo | None = None
    failure: DecodeFailure | None = None
    frames: list[FrameLook] = []
    try:
        with open_video(data, limits, said=said) as video:
            info = video.info
            indices = request.indices or _spread(info.num_frames)
            frames += [FrameLook(index=i, flaw=_flaw(video, i)) for i in indices]
    except ClipError as error:
        failure = DecodeFailure(status=error.status, message=error.message)
    lines = tuple(shown(line) for line in said)
    return Look(info=info, failure=failure, frames=tuple(frames), said=lines)


def _spread(num_frames: int) -> list[int]:
    """Some frames from the first to the last."""
    count = min(_LOOKED_AT, num_frames)
    return [i * (num_frames - 1) // max(count - 1, 1) for i in range(count)]


def _flaw(video: Video, index: int) -> str:
    """Why a frame cannot be had by itself; empty if it can."""
    try:
        found = [number for number, _ in video.frames([index])]
    except ClipError as error:
        return error.message
    return "" if found else damaged(index, _NEVER).message


def _draw(info: VideoInfo, request: ClipRequest, there: Sequence[int]) -> ClipView:
    """The view of a video of which the frames `there` can be had."""
    try:
        view = draw_view(
            request.policy,
            uid=request.uid,
            view=request.view,
            num_frames=len(there),
            height=info.height,
            width=info.width,
        )
    except TooShortError as error:
        raise ClipError(RowStatus.TOO_SHORT, str(error)) from error
    return replace(view, frame_indices=tuple(there[i] for i in view.frame_indices))


def _check_replay(view: ClipView, info: VideoInfo) -> None:
    y, x, height, width = view.crop
    inside = 0 <= y < y + height <= info.height and 0 <= x < x + width <= info.width
    if not inside or any(not 0 <= index < info.num_frames for index in view.frame_indices):
        raise ClipError(
            RowStatus.DECODE_ERROR,
            f"the view (crop {view.crop}, frames {view.frame_indices}) does not fit this video "
            f"({info.height}x{info.width} px, {info.num_frames} frames)",
        )


def _decodable(decode: Decoder, video: Video, view: ClipView) -> ClipView:
    """The view with only those frames that come out, each decoded by itself."""
    there: list[int] = []
    flaw: ClipError | None = None
    for index in view.frame_indices:
        try:
            there += [found for found, _ in decode(video, [index])]
        except ClipError as error:
            flaw = flaw or error
    if not there:
        raise flaw or damaged(view.frame_indices[0], _NEVER)
    return replace(view, frame_indices=tuple(there))


def _fill(
    decode: Decoder, video: Video, view: ClipView, policy: ViewPolicy
) -> tuple[Frames, set[int]]:
    """The clip of a view, and the indices of frames that did not come out."""
    clip = np.empty((len(view.frame_indices), policy.height, policy.width, 3), np.uint8)
    places: dict[int, list[int]] = {}
    for place, index in enumerate(view.frame_indices):
        places.setdefault(index, []).append(place)
    missing = set(places)
    for index, frame in decode(video, view.frame_indices):
        clip[places[index]] = crop_resize(frame, view, policy)
        missing.discard(index)
    return clip, missing


def _positions(
    starts: np.ndarray[Any, np.dtype[np.float64]], info: VideoInfo, asked: Sequence[int]
) -> list[int]:
    """Decord's numbers of the frames that start when ours do (its times are float32)."""
    times = np.array([info.start_seconds + info.pts_seconds[index] for index in asked])
    distance = np.abs(starts[None] - times[:, None])
    nearest = distance.argmin(1)
    close = distance.min(1) <= 1e-3 + 1e-6 * np.abs(times)
    if not close.all() or len(set(nearest.tolist())) < len(asked):
        words = "decord's time stamps do not name the frames that are shown"
        raise ClipError(RowStatus.DECODE_ERROR, words)
    return [int(position) for position in nearest]
