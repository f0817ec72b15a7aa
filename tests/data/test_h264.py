import io

import av
import numbered
import pytest

from kdhiera.data.h264 import is_disposable, length_bytes


def test_units_with_lengths_and_with_start_codes_read_alike():
    reference, other, info = b"\x65abcd", b"\x01\x99\x88", b"\x06xyz"
    for length in (1, 2, 4):
        joined = b"".join(len(unit).to_bytes(length, "big") + unit for unit in (info, other, other))
        assert is_disposable(joined, length)
        joined += len(reference).to_bytes(length, "big") + reference
        assert not is_disposable(joined, length)
    assert is_disposable(b"\0\0\0\1" + info + b"\0\0\1" + other, 0)
    assert not is_disposable(b"\0\0\1" + other + b"\0\0\1" + reference, 0)


@pytest.mark.parametrize(
    "packet", [b"", b"\0", b"\0\0\1", b"\0\0\0\4", b"\xff\xff\xff\xff\xff", b"\0" * 40]
)
@pytest.mark.parametrize("length", [0, 1, 2, 4])
def test_what_holds_no_slice_is_kept_so_that_the_decoder_complains(packet, length):
    assert not is_disposable(packet, length)


@pytest.mark.parametrize(("container", "length"), [("mp4", 4), ("mpegts", 0)])
def test_the_length_size_is_read_from_the_stream(container, length):
    with av.open(io.BytesIO(numbered.render(12, container=container))) as file:
        assert length_bytes(file.streams.video[0].codec_context.extradata) == length
    assert length_bytes(None) == 0
