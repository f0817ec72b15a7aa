"""Bytes of a video and a request in, the frames of one view out.

Runs in a decode child (`kdhiera.data.sandbox`): native decoders hang and crash.
"""

from __future__ import annotations

import io
import os
import re
import sys
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
from kdhiera.data.wire import memory_file
from kdhiera.errors import UsageError
from kdhiera.views import ClipView, RowStatus, TooShortError, ViewPolicy, draw_view

_LOOKED_AT = 16  # frames of a video that is looked at
_NEVER = "it never comes out of the decoder"
_PLAIN_CONTAINERS = ("mov", "matroska")
_ALL_KEYS = ("mjpeg", "prores", "dnxhd", "dvvideo", "rawvideo", "huffyuv", "ffvhuff")
_SOUNDS_DAMAGED = re.compile(
    r"conceal|error|invalid|corrupt|missing|gap|fail|illegal|could not|no frame|truncat|overread",
    re.IGNORECASE,
)


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


def preload(backend: str) -> None:
    """Import what a decoder needs, before memory is limited.

    Raises:
        SystemExit: If it cannot be imported, with the reason.
    """
    if backend != "torchcodec":
        return
    os.environ["TORCHCODEC_FFMPEG_LOG_LEVEL"] = "DEBUG"  # where it tells of lost frames
    try:
        from torchcodec.decoders import VideoDecoder

        VideoDecoder(b"no video")  # FFmpeg is looked for only now
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, ImportError | OSError) or "libtorchcodec" in str(error):
            sys.exit(
                "decode.backend torchcodec finds no FFmpeg: install its shared libraries (apt "
                "install ffmpeg), or use auto"
            )


def decode_decord(video: Video, indices: Sequence[int]) -> Iterator[tuple[int, Frame]]:
    """Frames from decord, asked by time stamp: it also counts frames that edit lists hide.

    It conceals damage, so what FFmpeg says of it meanwhile is listened to; ordinary stream-copied
    cuts make it hang.
    """
    import decord  # optional, and not there on every platform

    info = video.info
    _refuse_odd(info, "decord")
    decord.logging.set_level(decord.logging.DEBUG)
    asked = sorted(set(indices))
    with _Listener() as listener:
        try:
            reader = decord.VideoReader(io.BytesIO(video.data), num_threads=1)
            starts = reader.get_frame_timestamp(range(len(reader)))[:, 0]
            batch = reader.get_batch(_positions(starts, info, asked)).asnumpy()
            del reader  # its threads have said all they will
            if len(starts) != info.num_frames:
                words = "decord finds other frames in videos of which an edit list hides some"
                raise ClipError(RowStatus.DECODE_ERROR, words)
        except (decord.DECORDError, RuntimeError, AssertionError, IndexError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ClipError(RowStatus.DECODE_ERROR, f"decord: {lines[-1]}") from error
    if listener.damage:
        raise damaged(asked[0], f"or one after it: {listener.damage}")
    if batch.shape[1:3] != (info.height, info.width):
        raise ClipError(RowStatus.DECODE_ERROR, f"decord gives frames of {batch.shape[1:3]} px")
    yield from zip(asked, batch, strict=True)


def decode_torchcodec(video: Video, indices: Sequence[int]) -> Iterator[tuple[int, Frame]]:
    """Frames from torchcodec, asked by number and held against the time stamps.

    It conceals damage; what FFmpeg says of it meanwhile is listened to.
    """
    from torchcodec.decoders import VideoDecoder  # an extra, and slow to import

    info = video.info
    _refuse_odd(info, "torchcodec")
    asked = sorted(set(indices))
    with _Listener() as listener:
        try:
            decoder = VideoDecoder(
                video.data,
                stream_index=video.stream_index,
                dimension_order="NHWC",
                num_ffmpeg_threads=1,
                seek_mode="exact",
            )
            batch = decoder.get_frames_at(asked)
        except (RuntimeError, ValueError, IndexError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ClipError(RowStatus.DECODE_ERROR, f"torchcodec: {lines[0]}") from error
    if listener.damage:
        raise damaged(asked[0], f"or one after it: {listener.damage}")
    times = batch.pts_seconds.numpy()
    wanted = np.array([info.start_seconds + info.pts_seconds[index] for index in asked])
    if not np.allclose(times, wanted, rtol=1e-6, atol=1e-3):
        words = "torchcodec's time stamps do not name the frames that are shown"
        raise ClipError(RowStatus.DECODE_ERROR, words)
    frames = batch.data.numpy()
    if frames.shape[1:3] != (info.height, info.width):
        raise ClipError(
            RowStatus.DECODE_ERROR, f"torchcodec gives frames of {frames.shape[1:3]} px"
        )
    yield from zip(asked, frames, strict=True)


class _Listener:
    """What FFmpeg writes to this process's stderr while it decodes; a context manager."""

    damage: str = ""

    def __enter__(self) -> _Listener:
        self._kept = os.dup(2)
        self._words = memory_file()
        os.dup2(self._words, 2)
        return self

    def __exit__(self, *_: object) -> None:
        os.dup2(self._kept, 2)
        os.close(self._kept)
        size = min(os.fstat(self._words).st_size, 2**20)
        lines = os.pread(self._words, size, 0).decode(errors="replace").splitlines()
        os.close(self._words)
        self.damage = next((line for line in lines if _SOUNDS_DAMAGED.search(line)), "")


BACKENDS: dict[str, Decoder] = {
    "auto": decode_pyav,
    "pyav": decode_pyav,
    "decord": decode_decord,
    "torchcodec": decode_torchcodec,
}
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


def _refuse_odd(info: VideoInfo, decoder: str) -> None:
    """Leave to PyAV what other decoders are known to get wrong, or open by their own probing."""
    every_key = info.num_key_frames == info.num_packets > 1 and info.codec not in _ALL_KEYS
    if info.container not in _PLAIN_CONTAINERS or not (info.upright and info.closed) or every_key:
        raise ClipError(
            RowStatus.DECODE_ERROR,
            f"{decoder} is not believed with rotated videos, open groups of pictures, key frames "
            f"alone and containers other than {' and '.join(_PLAIN_CONTAINERS)}: use "
            "decode.backend auto",
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
            wanted = request.indices
            indices = _spread(info.num_frames) if wanted is None else wanted
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
    """Decord's numbers of the frames that start when ours do (its times are float32).

    All shown frames must be among its frames, asked for or not: where its clock starts
    elsewhere, some of them would still be found, and be others.
    """
    order = np.argsort(starts, kind="stable")
    ascending = starts[order]
    times = info.start_seconds + np.array(info.pts_seconds)
    after = np.clip(np.searchsorted(ascending, times), 1, max(len(starts) - 1, 1))
    nearest = np.minimum(after, len(starts) - 1)
    before = np.maximum(nearest - 1, 0)
    closer = np.abs(ascending[before] - times) <= np.abs(ascending[nearest] - times)
    nearest = np.where(closer, before, nearest)
    close = np.abs(ascending[nearest] - times) <= 1e-3 + 1e-6 * np.abs(times)
    if not close.all() or len(set(nearest.tolist())) < len(times):
        words = "decord's time stamps do not name the frames that are shown"
        raise ClipError(RowStatus.DECODE_ERROR, words)
    return [int(order[nearest[index]]) for index in asked]
