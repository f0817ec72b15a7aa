"""Odd, broken and hostile videos, and what must become of each.

Every video is made here. What a good one shows is told by the numbers painted into its frames
(`numbered`); what a bad one becomes is a status and words of the message.
"""

from __future__ import annotations

import io
import random
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.packet import Packet
from av.stream import Disposition
from numbered import audio_only, cut, drop_packet, join, packet_places, remux, render, silence

Packets = list[Packet]
COUNT = 30
FAST = {"deadline": "realtime", "cpu-used": "8"}
HIDDEN = {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "4"}
X265 = "log-level=none:pools=none"
PQ = f"{X265}:colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc:hdr10=1"
OPEN = {"x264-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0"}
AV1 = {"codec": "libsvtav1", "options": {"preset": "10"}, "size": (96, 64)}
UNEVEN = [0, 10, 30, 60, 100, 200, 210, *range(300, 990, 30)]


@dataclass(frozen=True, kw_only=True)
class Odd:
    """A video and what becomes of it.

    Args:
        make: Gives its bytes.
        shows: Numbers of the frames that are shown, in their order; empty for a bad one.
        never: Positions among the frames that the file promises and that cannot be decoded.
        turned: Quarter turns counterclockwise that its frames are to be shown with.
        grey: Whether it has no colours.
        status: What its row becomes.
        words: What the message says, where it is bad.
    """

    make: Callable[[], bytes]
    shows: Sequence[int] = ()
    never: Sequence[int] = ()
    turned: int = 0
    grey: bool = False
    status: str = "ok"
    words: str = ""


def good(make: Callable[[], bytes], shows: Sequence[int] = range(COUNT), **how: object) -> Odd:
    return Odd(make=make, shows=shows, **how)


def made(**settings: object) -> Odd:
    """A good video of 30 frames."""
    return good(lambda: render(COUNT, **settings))


def bad(make: Callable[[], bytes], words: str, status: str = "decode_error") -> Odd:
    return Odd(make=make, status=status, words=words)


def mux(
    *sources: bytes,
    container: str = "mp4",
    edit: Callable[[Packets], Packets] = lambda packets: packets,
    options: dict[str, str] | None = None,
    cover: int | None = None,
    source_format: str | None = None,
) -> bytes:
    """The first streams of some files in a new one; `edit` changes the packets of the first.

    Args:
        sources: The files.
        container: Of the new file.
        edit: Changes packets.
        options: Of the muxer.
        cover: Number of the stream that is called a cover.
        source_format: FFmpeg's demuxer of the sources, where it cannot tell.
    """
    out = io.BytesIO()
    with av.open(out, "w", format=container, container_options=options or {}) as target:
        files = [av.open(io.BytesIO(source), format=source_format) for source in sources]
        streams = [target.add_stream_from_template(file.streams[0]) for file in files]
        if cover is not None:
            streams[cover].disposition = Disposition.attached_pic
        for number, (file, stream) in enumerate(zip(files, streams, strict=True)):
            packets = [packet for packet in file.demux(file.streams[0]) if packet.size]
            for packet in edit(packets) if number == 0 else packets:
                packet.stream = stream
                target.mux(packet)
    return out.getvalue()


def shifted(ticks: int) -> Callable[[Packets], Packets]:
    """All time stamps later, by ticks of the stream's clock."""

    def edit(packets: Packets) -> Packets:
        for packet in packets:
            packet.pts += ticks
            packet.dts += ticks
        return packets

    return edit


def from_second_key(packets: Packets) -> Packets:
    """What a recording that began in the middle holds."""
    keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
    return packets[keys[1] :]


def patched(data: bytes, tag: bytes, at: int, layout: str, *values: object) -> bytes:
    """The file with other values, counted from the end of the last `tag`."""
    out = bytearray(data)
    struct.pack_into(layout, out, data.rindex(tag) + len(tag) + at, *values)
    return bytes(out)


def picture_file(kind: str) -> bytes:
    """A single picture, as a file of its own."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(out, format=kind)
    return out.getvalue()


def cover_track() -> bytes:
    """A video of one JPEG."""
    return render(1, container="matroska", codec="mjpeg", pix_fmt="yuvj420p", size=(192, 192))


def divx_packed() -> bytes:
    """An AVI as DivX made them: two frames in one packet, and an empty one after it."""
    plain = render(
        31, container="avi", codec="mpeg4", b_frames=1, gop=12,
        options={"b_strategy": "0", "sc_threshold": "1000000000"},
    )  # fmt: skip
    out = io.BytesIO()
    with av.open(io.BytesIO(plain)) as file, av.open(out, "w", format="avi") as target:
        stream = target.add_stream_from_template(file.streams.video[0])
        packets = [packet for packet in file.demux(video=0) if packet.size]
        kinds = [_vop_kind(bytes(packet)) for packet in packets]
        pieces: list[tuple[bytes, bool]] = []
        for number, packet in enumerate(packets):
            if kinds[number] == "B":
                pieces[-1] = (pieces[-1][0] + bytes(packet), pieces[-1][1])
                # A VOP of type P that is not coded (ISO/IEC 14496-2, 6.2.5).
                pieces.append((b"\0\0\1\xb6\x50\x40", False))
            else:
                mark = b"\0\0\1\xb2DivX503b1393p" if packet.is_keyframe else b""
                pieces.append((mark + bytes(packet), packet.is_keyframe))
        for number, (piece, is_key) in enumerate(pieces):
            packet = Packet(piece)
            packet.pts = packet.dts = number
            packet.time_base, packet.is_keyframe = Fraction(1, 25), is_key
            packet.stream = stream
            target.mux(packet)
    return out.getvalue()


def _vop_kind(packet: bytes) -> str:
    return "IPBS"[packet[packet.rindex(b"\0\0\1\xb6") + 4] >> 6]


def sound_only(container: str, codec: str) -> bytes:
    """A second of silence."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(codec, rate=48000)
        file.mux(silence(stream, 1.0))
    return out.getvalue()


def subtitles_only(container: str) -> bytes:
    """Two lines of text."""
    lines = b"1\n00:00:00,000 --> 00:00:01,000\nHello\n\n2\n00:00:01,000 --> 00:00:02,000\nyou\n"
    return mux(lines, container=container, source_format="srt")


def noise(num_bytes: int) -> bytes:
    return random.Random(0).randbytes(num_bytes)


def zeroed(data: bytes, packet: int) -> bytes:
    """An mp4 in which one packet is overwritten by zeros, but for its length."""
    place, size, _ = packet_places(data)[packet]
    return data[: place + 4] + bytes(size - 4) + data[place + size :]


def without_moov(data: bytes) -> bytes:
    return data[: data.rindex(b"moov") - 4]


def cut_inside_moov(data: bytes) -> bytes:
    return data[: data.rindex(b"moov") + 60]


def index_first(data: bytes) -> bytes:
    """The mp4 with its index before its frames."""
    with tempfile.TemporaryDirectory() as folder:
        return remux(data, Path(folder) / "fast.mp4", movflags="faststart")


def texts(address: str = "http://127.0.0.1:9/x.ts") -> dict[str, bytes]:
    """Files that ask a reader to open something else, by name."""
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{address}\n#EXT-X-ENDLIST\n"
    sdp = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nc=IN IP4 127.0.0.1\r\nm=video 5004 RTP/AVP 96\r\n"
    mpd = f"<?xml version='1.0'?><MPD profiles='dash:profile'><BaseURL>{address}</BaseURL></MPD>"
    return {
        "a playlist (HLS)": hls.encode(),
        "a playlist (ffconcat)": f"ffconcat version 1.0\nfile '{address}'\n".encode(),
        "a session description (SDP)": sdp.encode(),
        "a manifest (DASH)": mpd.encode(),
        "an address": address.encode(),
    }


def _hanging() -> bytes:
    return (Path(__file__).parent / "data" / "decord_hang.mp4").read_bytes()


def _base(**settings: object) -> bytes:
    return render(COUNT, b_frames=2, **settings)


def _cut_stream(**settings: object) -> Callable[[], bytes]:
    """A recording of a stream that begins at an open group of pictures."""
    container = str(settings.get("container", "mp4"))
    return lambda: mux(
        render(COUNT, b_frames=3, **settings), container=container, edit=from_second_key
    )


def _drop_first(packets: Packets) -> Packets:
    return packets[1:]


ODD: dict[str, Odd] = {
    # What cameras, editors and sites make
    "a stream-copied cut, its first frames hidden by an edit list": good(
        lambda: cut(render(60, b_frames=2, gop=50), 20, 49), range(20, 50)
    ),
    "an edit list that begins with nothing": good(
        lambda: mux(_base(), edit=shifted(6400)), range(COUNT)
    ),
    "the cut that hangs decord": good(_hanging, ()),
    "variable frame rate": made(pts=UNEVEN),
    "turned by 90 degrees": good(lambda: render(COUNT, rotation=90), turned=1),
    "turned by 180 degrees": good(lambda: render(COUNT, rotation=180), turned=2),
    "turned by 270 degrees": good(lambda: render(COUNT, rotation=270), turned=3),
    "turned by 45 degrees": bad(lambda: render(8, rotation=45), "no multiple of 90 degrees"),
    "pixels that are not square": made(aspect=Fraction(4, 3)),
    "odd sizes (VP9, 101 x 51)": made(
        container="webm", codec="libvpx-vp9", size=(101, 51), options=FAST
    ),
    "odd sizes (MPEG-4, 97 x 49)": made(container="avi", codec="mpeg4", size=(97, 49)),
    "interlaced (H.264)": made(options={"x264-params": "interlaced=1"}),
    "interlaced (MPEG-2)": made(
        container="mpegts", codec="mpeg2video", options={"flags": "+ildct+ilme"}
    ),
    # Pixel formats and codecs
    "10 bit (H.264)": made(pix_fmt="yuv420p10le", b_frames=2),
    "10 bit, BT.2020 and PQ (HEVC)": made(
        codec="libx265", pix_fmt="yuv420p10le", options={"x265-params": PQ}
    ),
    "12 bit (HEVC)": made(codec="libx265", pix_fmt="yuv420p12le", options={"x265-params": X265}),
    "no colours (H.264, 4:0:0)": good(lambda: render(COUNT, pix_fmt="gray"), grey=True),
    "full range (H.264)": made(pix_fmt="yuvj420p"),
    "4:4:4 (H.264)": made(pix_fmt="yuv444p"),
    "AV1": made(**AV1),
    "AV1, 10 bit, webm": made(**AV1, container="webm", pix_fmt="yuv420p10le"),
    "VP9 with hidden frames": made(container="webm", codec="libvpx-vp9", options=HIDDEN),
    "VP9 with transparency": made(
        container="webm", codec="libvpx-vp9", pix_fmt="yuva420p",
        options={**FAST, "auto-alt-ref": "0"},
    ),
    "VP8 with hidden frames": made(container="webm", codec="libvpx", options=HIDDEN),
    "ProRes": made(container="mov", codec="prores_ks", pix_fmt="yuv422p10le"),
    "Motion JPEG": made(container="avi", codec="mjpeg", pix_fmt="yuvj420p"),
    "H.263 (3gp)": made(container="3gp", codec="h263", size=(176, 144)),
    "two frames in one packet (DivX)": good(divx_packed, range(31)),
    "a codec that is not decoded (QuickTime animation)": bad(
        lambda: render(8, container="mov", codec="qtrle", pix_fmt="rgb24"),
        "videos of codec qtrle are not decoded",
    ),
    # Order and time
    "B-frames": made(b_frames=3),
    "B-frames, open groups of pictures": made(b_frames=3, options=OPEN),
    "a recording that begins at an open group (mp4)": good(
        _cut_stream(options=OPEN), range(12, COUNT)
    ),
    "a recording that begins at an open group (MPEG-TS)": good(
        _cut_stream(container="mpegts", options=OPEN), range(9, COUNT), never=range(3)
    ),
    "a recording that begins at an open group (HEVC, mkv)": good(
        _cut_stream(
            container="matroska", codec="libx265",
            options={"x265-params": f"{X265}:open-gop=1:keyint=12:bframes=2:b-adapt=0"},
        ),
        range(10, COUNT), never=range(2),
    ),
    "times below zero": good(
        lambda: mux(
            _base(), container="matroska", edit=shifted(-6400),
            options={"avoid_negative_ts": "disabled"},
        )
    ),
    "times that begin hours late": good(
        lambda: mux(_base(), container="matroska", edit=shifted(12800 * 3600 * 5))
    ),
    "a transport stream whose clock wraps": good(
        lambda: mux(
            _base(container="mpegts"), container="mpegts", edit=shifted(2**33 - 135_000),
            options={"avoid_negative_ts": "disabled"},
        )
    ),
    # Containers
    "MPEG-TS": made(container="mpegts", b_frames=2),
    "M2TS": made(container="mpegts", b_frames=2, container_options={"mpegts_m2ts_mode": "1"}),
    "MPEG-PS": made(container="mpeg", codec="mpeg2video", b_frames=2),
    "FLV": made(container="flv", b_frames=2),
    "WMV": made(container="asf", codec="wmv2"),
    "Ogg": made(container="ogg", codec="libvpx"),
    "fragmented mp4": made(
        b_frames=2, container_options={"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    ),
    "no index (mkv, live)": made(container="matroska", container_options={"live": "1"}),
    "no index (AVI)": good(
        lambda: (d := render(COUNT, container="avi", codec="mpeg4"))[: d.rindex(b"idx1")]
    ),
    "a cover as the first stream (mp4)": good(lambda: mux(cover_track(), _base(), cover=0)),
    "a cover as the first track (mkv)": good(
        lambda: mux(cover_track(), _base(), container="matroska")
    ),
    "two videos": good(lambda: mux(_base(), render(COUNT, size=(64, 64)))),
    "sound beside it": made(audio=True, b_frames=2),
    # Claims
    "a wrong size in the header": good(
        lambda: patched(_base(), b"avc1", 24, ">HH", 65535, 65535)
    ),
    "a wrong number of frames (AVI)": good(
        lambda: patched(
            render(COUNT, container="avi", codec="mpeg4"), b"strh", 4 + 32, "<I", 5000
        )
    ),
    "a wrong number of frames (mp4)": good(
        lambda: patched(render(COUNT), b"stts", 8, ">I", 3000)
    ),
    "every frame called a key frame": good(
        lambda: render(COUNT, codec="mpeg4").replace(b"stss", b"free")
    ),
    "hours in the header of a short mp4": good(
        lambda: patched(_base(), b"mvhd", 16, ">I", 1000 * 3600 * 30)
    ),
    "hours in the header (mkv)": bad(
        lambda: patched(
            render(8, container="matroska"), b"\x44\x89", 1, ">d", 1000.0 * 3600 * 30
        ),
        "claims 108000 s", "decode_limit",
    ),
    "hours between the frames": bad(
        lambda: render(3, container="matroska", pts=[0, 40, 36_000_000]),
        "max_duration_seconds", "decode_limit",
    ),
    "8192 x 8192 px": bad(
        lambda: render(2, size=(8192, 8192), options={"preset": "ultrafast"}),
        "claims 8192x8192 px", "decode_limit",
    ),
    "a claim of 16000 x 16000 px": bad(
        lambda: patched(
            render(8, container="avi", codec="ffv1"),
            b"strf", 8, "<ii", 16_000, 16_000,
        ),
        "a frame has more pixels", "decode_limit",
    ),
    "a claim of 65535 x 65535 px": bad(
        lambda: patched(
            render(8, container="avi", codec="ffv1"), b"strf", 8, "<ii", 65535, 65535
        ),
        "a frame has more pixels", "decode_limit",
    ),
    # Too little
    "one frame": bad(lambda: render(1), "1 frames and a clip needs 8", "too_short"),
    "three frames": bad(lambda: render(3), "3 frames and a clip needs 8", "too_short"),
    # No video
    "nothing (0 bytes)": bad(lambda: b"", "the video is empty (0 bytes)"),
    "text": bad(lambda: b"this is not a video\n" * 50, "no known video container"),
    "noise": bad(lambda: noise(5000), "no known video container"),
    **{
        name: bad(lambda text=text: text, "no known video container")
        for name, text in texts().items()
    },
    "a picture (JPEG)": bad(lambda: picture_file("jpeg"), "no known video container"),
    "a picture (PNG)": bad(lambda: picture_file("png"), "no known video container"),
    "an animation (GIF)": bad(
        lambda: render(8, container="gif", codec="gif", pix_fmt="rgb8"), "no known video container"
    ),
    "a bare stream (H.264)": bad(
        lambda: render(8, container="h264"), "no known video container"
    ),
    "sound only (mp4)": bad(audio_only, "no video stream: the file holds audio"),
    "sound only (wav)": bad(lambda: sound_only("wav", "pcm_s16le"), "no known video container"),
    "sound with a cover (m4a)": bad(
        lambda: mux(audio_only(), cover_track(), cover=1),
        "no video stream: the file holds audio, video",
    ),
    "subtitles only (mkv)": bad(
        lambda: subtitles_only("matroska"), "no video stream: the file holds subtitle"
    ),
    "encrypted (CENC)": bad(
        lambda: _base(
            container_options={
                "encryption_scheme": "cenc-aes-ctr",
                "encryption_key": "00112233445566778899aabbccddeeff",
                "encryption_kid": "11" * 16,
            }
        ),
        "the video is encrypted",
    ),
    # Damage
    "no moov": bad(lambda: without_moov(_base()), "moov atom not found"),
    "cut inside moov": bad(lambda: cut_inside_moov(_base()), "the file holds nothing"),
    "only a header": bad(lambda: b"\0\0\0\x18ftypisom" + bytes(400), "moov atom not found"),
    "index first, cut in the middle": bad(
        lambda: (d := index_first(render(COUNT)))[: len(d) - 400], "cut short"
    ),
    "lost slices": bad(
        lambda: zeroed(render(COUNT, gop=COUNT), 2), "is damaged", "corrupt_frames"
    ),
    "a lost packet": bad(
        lambda: drop_packet(render(COUNT, gop=COUNT), 2), "Frame num gap", "corrupt_frames"
    ),
    "no first key frame (H.264)": bad(
        lambda: mux(render(COUNT, gop=COUNT), edit=_drop_first), "Frame num gap", "corrupt_frames"
    ),
    "no first key frame (WMV)": bad(
        lambda: mux(
            render(COUNT, container="asf", codec="wmv2", gop=COUNT),
            container="asf", edit=_drop_first,
        ),
        "no frame can be decoded",
    ),
    "no first key frame, another later (FLV)": good(
        lambda: mux(
            render(COUNT, container="flv", codec="flv", gop=12), container="flv", edit=_drop_first
        ),
        range(1, COUNT), never=range(11),
    ),
    "another size from the middle on": bad(
        lambda: join(
            render(5, container="mpegts"), render(20, container="mpegts", size=(192, 96))
        ),
        "192x96 px, the first frame 96x48 px", "corrupt_frames",
    ),
}  # fmt: skip
"""By the words of the table in docs/decoding.md."""


def outcome(odd: Odd) -> str:
    """What the table in docs/decoding.md says of a video."""
    if odd.status != "ok":
        return f"`{odd.status}`: {odd.words}" if odd.words else f"`{odd.status}`"
    if odd.never:
        return f"right frames; the {len(odd.never)} that cannot be decoded are not drawn"
    return "right frames, upright" if odd.turned else "right frames"


def table() -> list[str]:
    """Rows of the table, one a video."""
    return [f"| {name} | {outcome(odd)} |" for name, odd in ODD.items()]
