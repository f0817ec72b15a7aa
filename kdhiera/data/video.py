"""A demuxed video: which frames it shows, and the pictures of those that are asked for.

A video is demuxed once, without decoding: which packets are shown, in which order, and
whether the limits hold. Then only the packets that the sampled frames need are decoded:

    packets   I P B B P B B | I P B B P ...      decode order
    sampled             ^             ^
    fed       I P B B P B .   I P B B P          from the key frame up to the frame, then drained

Every output is matched to its packet, so a frame is the one that was asked for, or there
is none. All of it is PyAV; a second decoder (`kdhiera.data.decode`) borrows the frame table.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction

import av
import av.logging
from av.error import FFmpegError
from av.logging import Capture
from av.packet import Packet
from av.sidedata.sidedata import SideData
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from kdhiera.data.clip import (
    ClipError,
    DecodeLimits,
    Frame,
    Turn,
    VideoInfo,
    read_display_matrix,
)
from kdhiera.data.containers import sniff
from kdhiera.data.demux import open_file, order_by_time, over, read_packets, video_stream
from kdhiera.data.h264 import is_disposable, length_bytes
from kdhiera.views import RowStatus

# A strict decoder raises on damage. libavcodec's for h264 then also refuses whole videos for a
# wrong label, and tells damage as well in its log (as many of the flipped bits were noticed).
_NOT_STRICT = ("h264",)
_DAMAGE = ("concealing", "Frame num gap")  # to FFmpeg, information for debugging
_HARMLESS = ("A non-intra slice in an IDR NAL unit",)
# What h264's decoder says of a stream that was cut out of a longer one and begins with a picture
# that needs nothing before it: a number is not the expected one, what to forget is not known.
_AT_A_CUT, _AFTER_A_CUT = "Frame num gap", "mmco: unref short failure"
_MOST_LINES = 1000
_MISS_REFERENCES = ("h264", "hevc")  # their decoders say so where a reference is not there
_TOO_LARGE = re.compile(r"exceeds specified max pixel|Picture size \d{4,}x\d{4,} is invalid")


@dataclass(frozen=True, slots=True)
class _Mark:
    """A packet's number, as an object of its own: PyAV keeps what packets carry by `id()`."""

    number: int


class Video:
    """A demuxed video, open for decoding; made by `open_video`.

    Args:
        data: The whole encoded video.
        limits: Bounds on what it may be.
        salvage: Take a file that is cut short for what is left of it.
        said: Takes FFmpeg's warnings while decoding.

    Raises:
        ClipError: `decode_error` or `decode_limit`.
        av.error.FFmpegError: If FFmpeg cannot read the file.
    """

    def __init__(
        self, data: bytes, limits: DecodeLimits, *, salvage: bool, said: list[str]
    ) -> None:
        self.data = data
        self._limits = limits
        self._said = said
        self._errors: list[str] = []
        self._file = open_file(data, limits)
        try:
            stream = video_stream(self._file)
            self.stream_index = stream.index
            self._codec = stream.codec_context
            self._packets = read_packets(self._file, stream, limits, whole=not salvage)
            self._prepare(stream, sniff(data))
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Free what FFmpeg holds."""
        self._file.close()

    def _prepare(self, stream: VideoStream, container: str) -> None:
        """Find order, time stamps, size and rotation."""
        codec, limits = self._codec, self._limits
        if not self._packets:
            raise ClipError(RowStatus.DECODE_ERROR, "the video stream holds no frame")
        for number, packet in enumerate(self._packets):
            packet.opaque = _Mark(number)
        codec.copy_opaque = True  # so that a frame names the packet that it came from
        codec.thread_type = "NONE"
        codec.options = {"max_pixels": str(limits.max_frame_pixels)}
        if codec.name not in _NOT_STRICT:
            codec.options |= {"err_detect": "explode"}
        self._length_bytes = length_bytes(codec.extradata)
        self._keys = [i for i, packet in enumerate(self._packets) if packet.is_keyframe]
        self._rank: dict[int, int] = {}
        order = order_by_time(self._packets, codec.name, reorders=codec.has_b_frames)
        self._order = self._order_by_decoding() if order is None else order
        self._rank = {packet: index for index, packet in enumerate(self._order)}
        self._in_decode_order = self._order == sorted(self._order)
        first = self._first_frame()
        self._size = first.width, first.height
        matrix = first.side_data.get("DISPLAYMATRIX")
        self._turn = Turn()
        if isinstance(matrix, SideData):
            self._turn = read_display_matrix(bytes(matrix))
        width, height = self._size[::-1] if self._turn.transpose else self._size
        start, seconds = self._seconds(stream)
        if seconds and seconds[-1] > limits.max_duration_seconds:
            raise over(f"the video lasts {seconds[-1]:.0f} s", "max_duration_seconds", limits)
        self.info = VideoInfo(
            container=container,
            codec=codec.name,
            pix_fmt=first.format.name,
            height=height,
            width=width,
            num_frames=len(self._order),
            pts_seconds=seconds,
            start_seconds=start,
            upright=self._turn == Turn(),
            closed=all(self._entry(packet) == self._key(packet) for packet in self._order),
            num_packets=len(self._packets),
            num_key_frames=len(self._keys),
        )

    def _seconds(self, stream: VideoStream) -> tuple[float, tuple[float, ...]]:
        """Start and time of the shown frames; by the frame rate where no time is given."""
        packets = [self._packets[packet] for packet in self._order]
        stamps = sorted(packet.pts for packet in packets if packet.pts is not None)
        tick = stream.time_base
        if tick is not None and stamps and len(stamps) == len(packets):
            return float(stamps[0] * tick), tuple(float((pts - stamps[0]) * tick) for pts in stamps)
        rate = stream.guessed_rate or Fraction(25)
        return 0.0, tuple(float(index / rate) for index in range(len(packets)))

    def _order_by_decoding(self) -> list[int]:
        """Packets of the frames as they come out: the only way where time stamps are wrong."""
        outputs = self._outputs(0, len(self._packets) - 1, leading=True)
        return list(dict.fromkeys(number for number, _ in outputs))

    def _first_frame(self) -> VideoFrame:
        """The first frame that decodes at all; what a stream says of itself may be wrong."""
        for key in self._keys:
            for _, frame in self._outputs(key, key):
                return frame
        for _, frame in self._outputs(0, len(self._packets) - 1, leading=True):
            return frame
        reason = self._errors[0] if self._errors else "the decoder gives none"
        raise ClipError(RowStatus.DECODE_ERROR, f"no frame can be decoded: {reason}")

    def _outputs(
        self, first: int, last: int, asked: set[int] | None = None, *, leading: bool = False
    ) -> Iterator[tuple[int, VideoFrame]]:
        """Decode the packets `first` to `last`, drain, and give (packet number, frame).

        Frames that no other is predicted from are left out unless they are in `asked`;
        without `asked` all are decoded. Frames that are shown before the first one are left
        out unless `leading`: they may be predicted from what is not decoded. Errors are
        collected in `self._errors`.
        """
        codec = self._codec
        codec.flush_buffers()
        self._errors.clear()
        last_out: VideoFrame | None = None
        shown_from = -1 if leading else self._rank.get(first, -1)
        begins = self._packets[first].is_keyframe
        sure = begins or codec.name in _MISS_REFERENCES
        harmless: tuple[str, ...] = _HARMLESS
        for number in range(first, last + 2):
            packet = self._packets[number] if number <= last else None  # None drains
            if self._rank.get(number, shown_from) < shown_from:
                continue
            if packet is not None and packet.is_corrupt:
                self._errors.append("its packet is cut short")
            skippable = asked is not None and number not in asked
            if packet is not None and skippable and self._is_disposable(packet):
                continue
            with Capture() as log:
                try:
                    frames = codec.decode(packet)
                except av.error.MemoryError:
                    raise
                except FFmpegError as error:
                    frames = []
                    self._errors.append(_words(error, log))
            if _is_too_large(log):
                raise over("a frame has more pixels", "max_frame_pixels", self._limits)
            _note(self._said, log)
            lines = [line for line in _lines(log) if not line.startswith(harmless)]
            if (
                number == 0
                and begins
                and lines
                and all(line.startswith(_AT_A_CUT) for line in lines)
            ):
                lines, harmless = [], (*_HARMLESS, _AFTER_A_CUT)
            self._errors += lines
            for frame in frames:
                if packet is None and last_out is not None and _same_picture(frame, last_out):
                    continue  # MPEG-4's decoder repeats its last picture when it is drained
                last_out = frame
                sure = sure or frame.key_frame  # else predicted from what the decoder last saw
                if sure and isinstance(frame.opaque, _Mark):
                    yield frame.opaque.number, frame

    def _is_disposable(self, packet: Packet[VideoStream]) -> bool:
        """Whether no other packet is known to need this one."""
        return self._codec.name == "h264" and is_disposable(bytes(packet), self._length_bytes)

    def decodable(self) -> list[int]:
        """Indices of the shown frames that come out when everything is decoded."""
        there = set(self._order_by_decoding())
        return [index for index, packet in enumerate(self._order) if packet in there]

    def frames(self, indices: Sequence[int]) -> Iterator[tuple[int, Frame]]:
        """The upright frames with these indices, each once, as far as they come out.

        Args:
            indices: Positions among the shown frames.

        Yields:
            Index and pixels, in the order of decoding.

        Raises:
            ClipError: `corrupt_frames` if a frame, or one that it is predicted from, is damaged.
        """
        missing = {self._order[index] for index in indices}
        groups: dict[int, list[int]] = {}
        for packet in sorted(missing):
            groups.setdefault(self._entry(packet), []).append(packet)
        for entry, packets in groups.items():
            for start, leading in self._starts(entry):
                left = [packet for packet in packets if packet in missing]
                for packet, frame in self._search(start, left, leading=leading):
                    missing.discard(packet)
                    yield self._rank[packet], self._pixels(frame)

    def _entry(self, packet: int) -> int:
        """The key frame that decoding must start from: decoded no later and shown no later."""
        at = bisect_right(self._keys, packet) - 1
        while at > 0 and self._rank.get(self._keys[at], -1) > self._rank[packet]:
            at -= 1
        return self._keys[at] if at > 0 else 0

    def _key(self, packet: int) -> int:
        """The last key frame that is decoded no later."""
        at = bisect_right(self._keys, packet) - 1
        return self._keys[at] if at > 0 else 0

    def _starts(self, entry: int) -> list[tuple[int, bool]]:
        """Where to try decoding from, and whether with the frames that are shown before that.

        Not every packet that is called a key frame is one, and a file may begin with frames
        that are predicted from what was cut off before them.
        """
        at = bisect_right(self._keys, entry) - 1
        before = self._keys[at - 1] if at > 0 else 0
        starts = [(start, False) for start in sorted({entry, before, 0}, reverse=True)]
        return [*starts, (0, True)] if self._rank.get(0, 0) else [*starts[:-1], (0, True)]

    def _search(
        self, start: int, packets: list[int], *, leading: bool
    ) -> Iterator[tuple[int, VideoFrame]]:
        """Decode from `start` on for the frames of `packets`, which are in decode order.

        An error is the video's only when decoding began at its very beginning; before that the
        search just ends.
        """
        if not packets:
            return
        asked, rank, trusted = set(packets), -1, start == 0
        for number, frame in self._outputs(start, packets[-1], set(packets), leading=leading):
            trusted = trusted or (number == start and frame.key_frame)
            if not trusted or (not leading and (self._errors or frame.is_corrupt)):
                return
            last, rank = rank, self._rank.get(number, rank)
            if rank < last and self._in_decode_order:
                words = "time stamps contradict the order of the decoded frames"
                raise ClipError(RowStatus.DECODE_ERROR, words)
            if number in asked:
                self._check(frame, rank)
                asked.discard(number)
                yield number, frame
        if asked and self._errors and leading:
            raise damaged(self._rank[min(asked)], self._errors[0])

    def _check(self, frame: VideoFrame, index: int) -> None:
        """Refuse a frame that is damaged, refers to damage, or is not of the video's size."""
        if self._errors:
            raise damaged(index, self._errors[0])
        if frame.is_corrupt:
            raise damaged(index, "the decoder marks it as corrupt")
        if (frame.width, frame.height) != self._size:
            width, height = self._size
            words = f"it has {frame.width}x{frame.height} px, the first frame {width}x{height} px"
            raise damaged(index, words)

    def _pixels(self, frame: VideoFrame) -> Frame:
        """RGB and upright. One thread: PyAV's default of one a core is slower for one frame."""
        return self._turn.apply(frame.to_ndarray(format="rgb24", threads=1))


@contextmanager
def open_video(
    data: bytes, limits: DecodeLimits, *, salvage: bool = False, said: list[str] | None = None
) -> Iterator[Video]:
    """A demuxed video to decode from; what FFmpeg raises meanwhile is put in words.

    Args:
        data: The whole encoded video.
        limits: Bounds on what it may be.
        salvage: Take a file that is cut short for what is left of it.
        said: Takes FFmpeg's warnings.

    Yields:
        The video, open until the block ends.

    Raises:
        ClipError: `decode_error` or `decode_limit`; in the block also `corrupt_frames`.
    """
    level, skip_repeated = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.DEBUG)
    av.logging.set_skip_repeated(False)
    said = [] if said is None else said
    try:
        with (
            Capture() as log,
            closing(Video(data, limits, salvage=salvage, said=said)) as video,
        ):
            yield video
    except ClipError as error:
        if error.status is RowStatus.DECODE_ERROR and _is_too_large(log):  # and so not opened
            raise over("a frame has more pixels", "max_frame_pixels", limits) from error
        raise
    except MemoryError as error:  # FFmpeg's is one too
        words = f"decoding needs more than decode.max_memory_bytes ({limits.max_memory_bytes})"
        raise ClipError(RowStatus.DECODE_LIMIT, words) from error
    except FFmpegError as error:
        raise ClipError(RowStatus.DECODE_ERROR, _words(error, log)) from error
    finally:
        _note(said, log)
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skip_repeated)


def inspect(data: bytes, limits: DecodeLimits) -> VideoInfo:
    """Look at a video: demux it and decode one frame.

    Args:
        data: The whole encoded video.
        limits: Bounds on what it may be.

    Raises:
        ClipError: `decode_error` or `decode_limit`.
    """
    with open_video(data, limits) as video:
        return video.info


def _same_picture(one: VideoFrame, other: VideoFrame) -> bool:
    """Whether two frames that are both still held share their pixels."""
    return one.planes[0].buffer_ptr == other.planes[0].buffer_ptr


def _note(said: list[str], log: Sequence[tuple[int, str, str]]) -> None:
    """Keep what FFmpeg warned of, as far as it can be read by people."""
    lines = (
        f"{name}: {message.strip()}"
        for level, name, message in log
        if level <= av.logging.WARNING or message.startswith(_DAMAGE)
    )
    said += itertools.islice(lines, _MOST_LINES - len(said)) if len(said) < _MOST_LINES else ()


def _lines(log: Sequence[tuple[int, str, str]]) -> list[str]:
    """What a decoder's log says of damage: errors, concealment, lost frames."""
    return [
        message.strip()
        for level, _, message in log
        if level <= av.logging.ERROR or message.startswith(_DAMAGE)
    ]


def _is_too_large(log: Sequence[tuple[int, str, str]]) -> bool:
    """Whether a decoder refused a frame for its size."""
    return any(_TOO_LARGE.search(message) for _, _, message in log)


def _words(error: FFmpegError, log: Sequence[tuple[int, str, str]]) -> str:
    """The most telling words there are for an error."""
    return next(iter(_lines(log)), error.strerror or str(error))


def damaged(index: int, reason: str) -> ClipError:
    """The `corrupt_frames` error of the frame with this index."""
    return ClipError(RowStatus.CORRUPT_FRAMES, f"frame {index} is damaged: {reason}")
