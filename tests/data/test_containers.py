import io

import av
import numbered
import pytest

from kdhiera.data.clip import ClipError
from kdhiera.data.containers import CODECS, sniff
from kdhiera.views import RowStatus


@pytest.mark.parametrize(
    ("container", "codec", "name"),
    [
        ("mp4", "libx264", "mov"),
        ("mov", "libx264", "mov"),
        ("matroska", "libx264", "matroska"),
        ("webm", "libvpx-vp9", "matroska"),
        ("avi", "mpeg4", "avi"),
        ("mpegts", "mpeg2video", "mpegts"),
        ("mpeg", "mpeg1video", "mpeg"),
        ("flv", "flv", "flv"),
        ("asf", "wmv2", "asf"),
    ],
)
def test_a_container_is_known_by_its_first_bytes_and_ffmpeg_agrees(container, codec, name):
    data = numbered.render(12, container=container, codec=codec)
    assert sniff(data) == name
    with av.open(io.BytesIO(data)) as file:
        assert name in file.format.name.split(",")
        assert file.streams.video[0].codec_context.name in CODECS


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 bytes"),
        (b"hello\n", "'hello\\n'"),
        (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/x.ts\n", "#EXTM3U"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "ffconcat"),
        (b"<?xml version='1.0'?><MPD></MPD>", "<?xml"),
        (b"v=0\r\nc=IN IP4 127.0.0.1\r\nm=video 5000 RTP/AVP 96\r\n", "v=0"),
        (b"\x1f\x8b\x08" + b"\0" * 50, "no known video container"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"\x80\x04\x95pickle", "no known video container"),
        (b"\0" * 2000, "no known video container"),
    ],
)
def test_what_is_no_container_is_refused_in_words(data, words):
    with pytest.raises(ClipError) as caught:
        sniff(data)
    assert caught.value.status is RowStatus.DECODE_ERROR
    assert words in caught.value.message
    assert caught.value.message.isprintable()
