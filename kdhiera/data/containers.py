"""Which container some bytes are, and which containers and codecs may be opened at all.

FFmpeg's own probing would open playlists, and playlists open files and addresses. So the
demuxer is chosen here, from the first bytes, and only among formats that hold everything in
themselves.
"""

from __future__ import annotations

from kdhiera.data.clip import ClipError, shown
from kdhiera.views import RowStatus

_MOV_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"moof"})
_ASF_GUID = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")

# fmt: off
CODECS = frozenset({
    "av1", "libdav1d", "vp6f", "vp8", "vp9", "libvpx", "libvpx-vp9", "theora", "h261", "h263",
    "h264", "hevc", "vvc", "mpeg1video", "mpeg2video", "mpeg4", "msmpeg4", "msmpeg4v1",
    "msmpeg4v2", "msmpeg4v3", "wmv1", "wmv2", "wmv3", "vc1", "cinepak", "svq1", "svq3", "flv",
    "flv1", "mjpeg", "dvvideo", "prores", "dnxhd", "ffv1", "ffvhuff", "huffyuv", "rawvideo",
})
# fmt: on
"""Decoders that may run, by FFmpeg's names."""


def sniff(data: bytes) -> str:
    """FFmpeg's name of the demuxer for a video, from its first bytes.

    Args:
        data: The whole video.

    Raises:
        ClipError: `decode_error` if the bytes are no known container.
    """
    head = data[:1024]
    if head[4:8] in _MOV_BOXES:
        return "mov"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if head.startswith(b"RIFF") and head[8:11] == b"AVI":
        return "avi"
    if head.startswith(b"\x00\x00\x01\xba"):
        return "mpeg"
    if _is_transport_stream(head):
        return "mpegts"
    if head.startswith(b"FLV\x01"):
        return "flv"
    if head.startswith(b"OggS"):
        return "ogg"
    if head.startswith(_ASF_GUID):
        return "asf"
    if not data:
        raise ClipError(RowStatus.DECODE_ERROR, "the video is empty (0 bytes)")
    start = shown(head[:24].decode("latin-1"))
    raise ClipError(
        RowStatus.DECODE_ERROR,
        f"no known video container starts with '{start}' "
        "(known: mp4/mov, matroska/webm, avi, mpeg, mpeg-ts, flv, ogg, asf)",
    )


def _is_transport_stream(head: bytes) -> bool:
    """Packets of 188 bytes that start with 0x47, or of 192 with a time code before it."""
    return any(
        len(head) > first + 2 * size and all(head[first + i * size] == 0x47 for i in range(3))
        for first, size in ((0, 188), (4, 192))
    )
