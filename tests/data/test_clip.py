import struct

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kdhiera.data.clip import ClipError, Turn, checksum, crop_resize, read_display_matrix, shown
from kdhiera.views import ClipView, RowStatus

ONE = 1 << 16


def matrix(a, b, c, d):
    """A display matrix without translation."""
    return struct.pack("=9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)


@pytest.mark.parametrize(
    ("a", "b", "c", "d"),
    [
        (1, 0, 0, 1),
        (0, 1, -1, 0),
        (-1, 0, 0, -1),
        (0, -1, 1, 0),
        (-1, 0, 0, 1),
        (1, 0, 0, -1),
        (0, 1, 1, 0),
        (0, -1, -1, 0),
    ],
)
def test_a_display_matrix_moves_every_pixel_where_the_standard_says(a, b, c, d):
    height, width = 3, 5
    frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    places = {}  # ISO/IEC 14496-12: (x, y) is shown at (a x + c y, b x + d y), then shifted
    for y in range(height):
        for x in range(width):
            places[a * x + c * y, b * x + d * y] = frame[y, x]
    left, top = min(p for p, _ in places), min(q for _, q in places)
    turned = read_display_matrix(matrix(a * ONE, b * ONE, c * ONE, d * ONE)).apply(frame)
    assert turned.flags.c_contiguous
    assert turned.shape == ((width, height, 3) if a == 0 else (height, width, 3))
    for (p, q), pixel in places.items():
        assert (turned[q - top, p - left] == pixel).all()


def test_an_oblique_display_matrix_is_refused():
    with pytest.raises(ClipError, match="no multiple of 90") as caught:
        read_display_matrix(matrix(46341, 46341, -46341, 46341))
    assert caught.value.status is RowStatus.DECODE_ERROR


def test_upright_is_the_default_turn():
    assert read_display_matrix(matrix(ONE, 0, 0, ONE)) == Turn()


def view(crop, flip=False):
    return ClipView(frame_indices=(0,), crop=crop, flip=flip)


def test_a_crop_of_the_clip_size_is_the_pixels_themselves(request_clip):
    frame = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    policy = request_clip().policy
    crop = (7, 11, policy.height, policy.width)
    expected = frame[7 : 7 + policy.height, 11 : 11 + policy.width]
    assert (crop_resize(frame, view(crop), policy) == expected).all()
    assert (crop_resize(frame, view(crop, flip=True), policy) == expected[:, ::-1]).all()


def test_shrinking_averages_and_sees_nothing_outside_the_crop(request_clip):
    policy = request_clip(height=32, width=32).policy
    frame = np.full((400, 400, 3), 255, np.uint8)
    frame[50:306, 60:316] = np.indices((256, 256)).sum(0)[..., None] % 2 * 200  # checkerboard
    small = crop_resize(frame, view((50, 60, 256, 256)), policy)
    assert small.shape == (32, 32, 3)
    assert np.abs(small.astype(int) - 100).max() <= 1


def test_the_resize_is_pillows_bilinear(request_clip):
    frame = np.random.default_rng(1).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    policy = request_clip(height=32, width=64).policy
    expected = Image.fromarray(frame[5:65, 8:88]).resize((64, 32), Image.Resampling.BILINEAR)
    assert (crop_resize(frame, view((5, 8, 60, 80)), policy) == np.asarray(expected)).all()


def test_checksum_is_that_of_the_bytes():
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), dtype=np.uint8)
    assert checksum(frames) == google_crc32c.value(frames.tobytes())


@given(st.text(), st.integers(1, 40))
def test_shown_text_is_one_printable_line_of_bounded_length(text, limit):
    printed = shown(text, limit)
    assert printed.isprintable()
    assert len(printed) <= limit
    if text.isprintable() and len(text) <= limit:
        assert printed == text


def test_shown_keeps_what_it_escapes_readable():
    assert shown("a\nb\x1b[31m\0é") == "a\\nb\\x1b[31m\\x00é"
    assert ClipError(RowStatus.DECODE_ERROR, "x\ny").message == "x\\ny"
