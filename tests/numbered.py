"""Small real videos whose frames say which frame they are.

A frame is a grid of 6 x 3 squares. The top row is red, green, blue, white, black, grey
(so turns and mirrors show); the twelve squares below are the bits of the frame's number,
bright for 1, lowest bit first.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

COLUMNS, ROWS = 6, 3
LUMA = (0.299, 0.587, 0.114)
TOP = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128))


def picture(number: int, width: int = 96, height: int = 48) -> np.ndarray:
    """The frame that says `number`, `u8[height, width, 3]`."""
    squares = np.zeros((ROWS, COLUMNS, 3), np.uint8)
    squares[0] = TOP
    bits = [(number >> bit) & 1 for bit in range(COLUMNS * (ROWS - 1))]
    squares[1:] = np.array(bits, np.uint8).reshape(ROWS - 1, COLUMNS, 1) * 175 + 40
    rows = np.arange(height) * ROWS // height
    columns = np.arange(width) * COLUMNS // width
    return squares[rows][:, columns]


def centres(frame: np.ndarray) -> np.ndarray:
    """Mean colour in the middle of every square, `[ROWS, COLUMNS, 3]`."""
    height, width = frame.shape[:2]
    h, w = height / ROWS, width / COLUMNS
    return np.array(
        [
            [
                frame[
                    int((y + 0.3) * h) : int((y + 0.7) * h) + 1,
                    int((x + 0.3) * w) : int((x + 0.7) * w) + 1,
                ].mean((0, 1))
                for x in range(COLUMNS)
            ]
            for y in range(ROWS)
        ]
    )


def number(frame: np.ndarray, *, grey: bool = False) -> int:
    """The number that an upright whole frame says; fails where the frame is not one of ours."""
    seen = centres(frame)
    top = np.array(TOP, float)
    if grey:
        top = np.repeat((top @ LUMA)[:, None], 3, 1)
    assert np.abs(seen[0] - top).max() < 60, f"top row {seen[0].round()}"
    bits = seen[1:].mean(-1).reshape(-1)
    assert np.minimum(abs(bits - 40), abs(bits - 215)).max() < 50, f"bits {bits.round()}"
    return int(sum(1 << bit for bit, level in enumerate(bits) if level > 127))


def numbers(frames: np.ndarray) -> list[int]:
    """`number` of every frame."""
    return [number(frame) for frame in frames]


def render(
    count: int,
    *,
    container: str = "mp4",
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    size: tuple[int, int] = (96, 48),
    rate: int = 25,
    gop: int = 12,
    b_frames: int = 0,
    pts: Sequence[int] | None = None,
    rotation: int | None = None,
    audio: bool = False,
    container_options: dict[str, str] | None = None,
    aspect: Fraction | None = None,
    draw: Callable[[int, int, int], np.ndarray] = picture,
) -> bytes:
    """A video of `count` numbered frames; `size` is (width, height)."""
    out = io.BytesIO()
    with av.open(out, "w", format=container, container_options=container_options or {}) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        stream.codec_context.thread_count = 1
        stream.options = dict(options or {})
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation is not None:
            stream.set_display_rotation(rotation)
        sound = (
            file.add_stream("aac" if container == "mp4" else "mp2", rate=48000) if audio else None
        )
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(draw(i, *size), format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[i], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if sound is not None:
            file.mux(silence(sound, seconds=count / rate))
    return out.getvalue()


def silence(stream: av.AudioStream, seconds: float) -> list[av.Packet]:
    """Packets of a silent sound stream."""
    packets = []
    samples = int(48000 * seconds)
    for start in range(0, samples, 1024):
        frame = av.AudioFrame.from_ndarray(
            np.zeros((2, 1024), np.float32), format="fltp", layout="stereo"
        )
        frame.sample_rate, frame.pts, frame.time_base = 48000, start, Fraction(1, 48000)
        packets += stream.encode(frame)
    return packets + stream.encode(None)


def audio_only(container: str = "mp4") -> bytes:
    """One second of silence and no video."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream("aac", rate=48000)
        file.mux(silence(stream, 1.0))
    return out.getvalue()


def cut(data: bytes, first: int, last: int) -> bytes:
    """A stream-copied cut of the frames from `first` to `last`, as `ffmpeg -ss -c copy` makes.

    Packets start at the key frame before `first`, with negative time stamps, which the mp4
    muxer hides behind an edit list.
    """
    out = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(out, "w", format="mp4") as target:
        video = source.streams.video[0]
        packets = [packet for packet in source.demux(video) if packet.size]
        shown = sorted(packet.pts for packet in packets)
        start = max(
            i
            for i, packet in enumerate(packets)
            if packet.is_keyframe and packet.pts <= shown[first]
        )
        stream = target.add_stream_from_template(video)
        for packet in packets[start:]:
            if packet.pts <= shown[last]:
                packet.pts -= shown[first]
                packet.dts -= shown[first]
                packet.stream = stream
                target.mux(packet)
    return out.getvalue()


def join(first: bytes, second: bytes) -> bytes:
    """One transport stream of two, the second a tenth of a second after the first."""
    out = io.BytesIO()
    with (
        av.open(io.BytesIO(first)) as a,
        av.open(io.BytesIO(second)) as b,
        av.open(out, "w", format="mpegts") as target,
    ):
        stream = target.add_stream_from_template(a.streams.video[0])
        shift = end = 0
        for source in (a, b):
            for packet in source.demux(video=0):
                if packet.size:
                    packet.pts += shift
                    packet.dts += shift
                    end = max(end, packet.pts)
                    packet.stream = stream
                    target.mux(packet)
            shift = end + 9000
    return out.getvalue()


def remux(data: bytes, path: Path, *, count: int | None = None, **options: str) -> bytes:
    """The first `count` packets in a new mp4, by way of a file, since faststart reads back."""
    with (
        av.open(io.BytesIO(data)) as source,
        av.open(str(path), "w", container_options=options) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        target.start_encoding()
        packets = [packet for packet in source.demux(video=0) if packet.size]
        for packet in packets[:count]:
            packet.stream = stream
            target.mux(packet)
    return path.read_bytes()


def drop_packet(data: bytes, number: int) -> bytes:
    """The video without one packet, in an mp4."""
    out = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(out, "w", format="mp4") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for i, packet in enumerate(source.demux(video=0)):
            if packet.size and i != number:
                packet.stream = stream
                target.mux(packet)
    return out.getvalue()


def packet_places(data: bytes) -> list[tuple[int, int, bool]]:
    """Offset, size and whether key frame of every packet of the video, in decode order."""
    with av.open(io.BytesIO(data)) as file:
        return [
            (packet.pos, packet.size, packet.is_keyframe)
            for packet in file.demux(video=0)
            if packet.size
        ]


def all_frames(data: bytes) -> list[np.ndarray]:
    """Every frame by plain decoding from the start: the reference."""
    with av.open(io.BytesIO(data)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
