"""A video file, opened and read without decoding: its stream, its packets, their order.

Only bytes are read, with the demuxer that `containers.sniff` chose; whatever else a file
asks to be opened is refused.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import av
from av.bitstream import BitStreamFilterContext
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from kdhiera.data.clip import ClipError, DecodeLimits, shown
from kdhiera.data.containers import CODECS, sniff
from kdhiera.views import RowStatus

_NOT_MOVING = Disposition.attached_pic | Disposition.timed_thumbnails
_PICTURES = ("mjpeg",)  # beside a stream of another codec a cover, whatever the file calls it
_VP8_SHOWN_BIT = 0x10  # RFC 6386, 9.1: show_frame in the first byte of a frame
_IO_BYTES = 2**18  # one call into Python a quarter megabyte


def open_file(data: bytes, limits: DecodeLimits) -> InputContainer:
    """Open a video from memory; close the result.

    Args:
        data: The whole encoded video.
        limits: Bounds on what it may be.

    Raises:
        ClipError: `decode_error` or `decode_limit`.
        av.error.FFmpegError: If FFmpeg cannot read the headers.
    """
    if len(data) > limits.max_video_bytes:
        raise over(f"the video has {len(data)} bytes", "max_video_bytes", limits)
    return av.open(
        io.BytesIO(data),
        "r",
        format=sniff(data),
        options={"max_pixels": str(limits.max_frame_pixels)},
        metadata_errors="replace",
        buffer_size=_IO_BYTES,
        io_open=_refuse,
    )


def video_stream(file: InputContainer) -> VideoStream:
    """The first stream of moving pictures that can be decoded; a cover is none.

    Raises:
        ClipError: `decode_error` if there is none, or none that may be decoded.
    """
    streams = [s for s in file.streams.video if not s.disposition & _NOT_MOVING]
    if not streams:
        kinds = ", ".join(sorted({s.type for s in file.streams})) or "nothing"
        raise ClipError(RowStatus.DECODE_ERROR, f"no video stream: the file holds {kinds}")
    decoded = [stream for stream in streams if _codec(stream) in CODECS]
    if not decoded:
        words = f"videos of codec {_codec(streams[0])} are not decoded"
        raise ClipError(RowStatus.DECODE_ERROR, words)
    return min(decoded, key=lambda stream: _codec(stream) in _PICTURES)  # of equals the first


def _codec(stream: VideoStream) -> str:
    """FFmpeg's name of the decoder of a stream."""
    context: VideoCodecContext | None = stream.codec_context  # None where FFmpeg knows no decoder
    return "unknown" if context is None else context.name


def read_packets(
    file: InputContainer, stream: VideoStream, limits: DecodeLimits, *, whole: bool = True
) -> list[Packet[VideoStream]]:
    """All packets of a stream that hold something, in decode order.

    Args:
        file: The opened file.
        stream: One of its streams.
        limits: Bounds on what it may claim.
        whole: Whether a file that is cut short is refused.

    Raises:
        ClipError: `decode_limit` if the headers claim too much, `decode_error` if they
            promise packets beyond the end of the file, or if these are encrypted.
    """
    _check_claims(file, stream, limits)
    packets: list[Packet[VideoStream]] = []
    with suppress(IndexError):  # PyAV's flush at the end, if streams came up on the way
        packets += (packet for packet in file.demux(stream) if packet.size)
    if any(packet.has_sidedata("encryption_info") for packet in packets):
        raise ClipError(RowStatus.DECODE_ERROR, "the video is encrypted")
    if _codec(stream) == "mpeg4":
        packets = _unpack(packets, stream)
    if whole:
        _check_whole(stream, file.size)
    return packets


def _unpack(
    packets: Sequence[Packet[VideoStream]], stream: VideoStream
) -> list[Packet[VideoStream]]:
    """One packet a frame where DivX put two into one, and an empty one after it."""
    split = BitStreamFilterContext("mpeg4_unpack_bframes", stream)
    return [frame for packet in [*packets, None] for frame in split.filter(packet) if frame.size]


def _check_claims(file: InputContainer, stream: VideoStream, limits: DecodeLimits) -> None:
    """Hold what the headers claim against the limits, before anything is decoded."""
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > limits.max_frame_pixels:
        raise over(f"the video claims {width}x{height} px", "max_frame_pixels", limits)
    seconds = (file.duration or 0) / av.time_base
    if file.format.name.startswith("matroska"):  # there it is the time of the end
        seconds -= max(file.start_time or 0, 0) / av.time_base
    if stream.duration is not None and stream.time_base is not None:
        seconds = max(seconds, float(stream.duration * stream.time_base))
    if seconds > limits.max_duration_seconds:
        raise over(f"the video claims {seconds:.0f} s", "max_duration_seconds", limits)


def _check_whole(stream: VideoStream, num_bytes: int) -> None:
    """Refuse a file whose index points beyond its end."""
    beyond = sum(entry.pos + entry.size > num_bytes for entry in stream.index_entries)
    if beyond:
        words = f"the file is cut short: {beyond} of its frames lie beyond its end"
        raise ClipError(RowStatus.DECODE_ERROR, words)


def order_by_time(
    packets: Sequence[Packet[VideoStream]], codec: str, *, reorders: bool
) -> list[int] | None:
    """Packets of the shown frames in the order of their time stamps, None if these are no help.

    Time stamps that are missing or double say nothing, and those that rise with the decode
    order although the decoder reorders may be decode times in disguise.

    Args:
        packets: In decode order.
        codec: FFmpeg's decoder.
        reorders: Whether the decoder may give frames in another order.

    Returns:
        Packet numbers.
    """
    seen = [
        number
        for number, packet in enumerate(packets)
        if not packet.is_discard
        and not (codec == "vp8" and not memoryview(packet)[0] & _VP8_SHOWN_BIT)
    ]
    stamps = {number: pts for number in seen if (pts := packets[number].pts) is not None}
    if len(set(stamps.values())) < len(seen):
        return None
    order = sorted(seen, key=stamps.__getitem__)
    return None if reorders and order == seen else order


def over(found: str, limit: str, limits: DecodeLimits) -> ClipError:
    """The `decode_limit` error of something found beyond a limit."""
    return ClipError(RowStatus.DECODE_LIMIT, f"{found}, decode.{limit} is {getattr(limits, limit)}")


def _refuse(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    """A demuxer wants to open something else: never."""
    raise PermissionError(f"a video may not open {shown(url)}")
