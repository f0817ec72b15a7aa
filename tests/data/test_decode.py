"""One clip: the view is the policy's, the frames are the view's, failures have their status."""

from dataclasses import replace

import av
import numbered
import numpy as np
import pytest

from kdhiera.data.clip import ClipError, checksum
from kdhiera.data.decode import decode_clip
from kdhiera.data.video import inspect
from kdhiera.errors import UsageError
from kdhiera.views import ClipView, CropPolicy, FramePolicy, RowStatus, draw_view


@pytest.mark.parametrize("backend", ["auto", "pyav", "decord"])
@pytest.mark.parametrize("frames", FramePolicy)
def test_a_clip_is_what_its_view_says(backend, frames, limits, request_clip):
    data = numbered.render(60, b_frames=2)
    for view in range(4):
        request = request_clip(view, frames=frames, flip=True)
        clip = decode_clip(data, request, limits(backend=backend))
        assert clip.view == draw_view(
            request.policy, uid=request.uid, view=view, num_frames=60, height=48, width=96
        )
        assert clip.frames.shape == (8, 48, 96, 3)
        assert clip.frames.dtype == np.uint8
        assert clip.frames.flags.c_contiguous
        assert clip.view.flip == bool(view % 2)
        upright = clip.frames[:, :, ::-1] if clip.view.flip else clip.frames
        assert tuple(numbered.numbers(upright)) == clip.view.frame_indices
        assert clip.num_frames == 60
        assert clip.pts_seconds == pytest.approx([i / 25 for i in clip.view.frame_indices])
        assert clip.decoder == ("decord" if backend == "decord" else "pyav")
        assert clip.crc32c == checksum(clip.frames)


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_a_replay_gives_the_same_bytes(backend, limits, request_clip):
    data = numbered.render(60, size=(320, 240))
    policy = {"crop": CropPolicy.RANDOM_RESIZED, "crop_scale": (0.3, 1.0), "flip": True}
    first = decode_clip(data, request_clip(3, **policy), limits(backend=backend))
    assert first.view.crop != (0, 0, 240, 320)
    other = request_clip(77, uid="another", replay=first.view, replay_decoder=first.decoder)
    again = decode_clip(data, other, limits(backend="auto"))
    assert (again.frames == first.frames).all()
    assert replace(again, frames=first.frames) == first


def test_the_crop_is_taken_from_the_upright_frame(limits, request_clip):
    data = numbered.render(9, rotation=90)  # stored 96x48, shown 48x96
    request = request_clip(height=96, width=48)
    clip = decode_clip(data, request, limits())
    assert clip.view.crop == (0, 0, 96, 48)
    assert (
        tuple(numbered.numbers([np.rot90(f, -1) for f in clip.frames])) == clip.view.frame_indices
    )


def test_pyav_and_decord_give_the_same_pixels(limits, request_clip):
    for kind in (
        {"b_frames": 3},
        {"container": "matroska"},
        {"size": (322, 242), "pts": range(0, 2400, 60)},
    ):
        data = numbered.render(40, **kind)
        clips = [decode_clip(data, request_clip(5), limits(backend=b)) for b in ("pyav", "decord")]
        assert (clips[0].frames == clips[1].frames).all()


@pytest.mark.parametrize(
    "kind",
    [
        {
            "codec": "libx265",
            "options": {"x265-params": "log-level=none:pools=none"},
            "b_frames": 2,
        },
        {"options": {"x264-params": "open-gop=1:keyint=12:bframes=3"}, "b_frames": 3},
        {"container": "mpegts"},
        {"rotation": 90},
    ],
)
def test_decord_is_not_asked_for_what_it_gets_wrong(kind, limits, request_clip):
    data = numbered.render(30, **kind)
    with pytest.raises(ClipError, match="decord is not believed") as caught:
        decode_clip(data, request_clip(), limits(backend="decord"))
    assert caught.value.status is RowStatus.DECODE_ERROR


def test_short_videos(limits, request_clip):
    data = numbered.render(5)
    with pytest.raises(ClipError, match="shows 5 frames and a clip needs 8") as caught:
        decode_clip(data, request_clip(), limits())
    assert caught.value.status is RowStatus.TOO_SHORT
    clip = decode_clip(data, request_clip(allow_short=True), limits())
    assert tuple(numbered.numbers(clip.frames)) == clip.view.frame_indices
    assert set(clip.view.frame_indices) <= set(range(5))
    shrunk = decode_clip(
        numbered.render(10), request_clip(frames=FramePolicy.DENSE, frame_stride=4), limits()
    )
    assert np.diff(shrunk.view.frame_indices).tolist() == [1] * 7
    single = decode_clip(numbered.render(1), request_clip(allow_short=True), limits())
    assert numbered.numbers(single.frames) == [0] * 8


def test_frames_that_never_come_are_not_drawn(limits, request_clip):
    """Packets that decode to nothing, without an error, in a container that counts them."""
    whole = numbered.render(32, codec="mpeg4", gop=8)
    data = bytearray(whole)
    hollow = {5, 6, 14, 22, 23, 30, 31}
    for number, (position, size, key) in enumerate(numbered.packet_places(whole)):
        if number in hollow:
            assert not key
            # A VOP of type P (01), no whole second (0), marker, 5 bits of time, marker,
            # vop_coded 0: "as before" (ISO/IEC 14496-2, 6.2.5).
            bits = f"0101{number % 25:05b}10".ljust(16, "1")
            hollowed = b"\0\0\1\xb6" + int(bits, 2).to_bytes(2, "big")
            data[position : position + size] = hollowed.ljust(size, b"\x7f")
    data = bytes(data)
    assert inspect(data, limits()).num_frames == 32
    seen = set()
    for view in range(12):
        clip = decode_clip(data, request_clip(view), limits())
        assert not hollow & set(clip.view.frame_indices)
        replay = request_clip(view, replay=clip.view, replay_decoder=clip.decoder)
        assert decode_clip(data, replay, limits()).crc32c == clip.crc32c
        seen.add(clip.num_frames)
    assert seen <= {25, 32}
    assert 25 in seen
    bad = ClipView(frame_indices=(5,) * 8, crop=(0, 0, 48, 96), flip=False)
    with pytest.raises(ClipError, match=r"frame 5 .* never comes out") as caught:
        decode_clip(data, request_clip(replay=bad), limits())
    assert caught.value.status is RowStatus.CORRUPT_FRAMES


@pytest.mark.parametrize(
    "view",
    [
        ClipView(frame_indices=(0, 30), crop=(0, 0, 48, 96), flip=False),
        ClipView(frame_indices=(0, 1), crop=(1, 0, 48, 96), flip=False),
        ClipView(frame_indices=(0, 1), crop=(0, 0, 0, 96), flip=False),
        ClipView(frame_indices=(0, 1), crop=(0, -1, 48, 96), flip=False),
        ClipView(frame_indices=(-1, 1), crop=(0, 0, 48, 96), flip=False),
    ],
)
def test_a_view_of_another_video_is_refused(view, limits, request_clip):
    with pytest.raises(ClipError, match="does not fit this video") as caught:
        decode_clip(numbered.render(30), request_clip(replay=view), limits())
    assert caught.value.status is RowStatus.DECODE_ERROR


def test_an_unknown_backend_is_the_users_mistake(limits, request_clip):
    with pytest.raises(UsageError, match="'nvdec' is unknown"):
        decode_clip(numbered.render(9), request_clip(), limits(backend="nvdec"))


def test_decoding_leaves_ffmpegs_log_as_it_was(limits, request_clip):
    before = av.logging.get_level(), av.logging.get_skip_repeated()
    decode_clip(numbered.render(9), request_clip(), limits())
    with pytest.raises(ClipError):
        decode_clip(b"no video", request_clip(), limits())
    assert (av.logging.get_level(), av.logging.get_skip_repeated()) == before


def _flip_from(data: bytes, place: int) -> bytes:
    """A video whose packets are damaged from a byte on."""
    return (
        data[:place]
        + bytes(byte ^ 0xFF for byte in data[place : place + 300])
        + data[place + 300 :]
    )


def test_of_a_damaged_video_the_frames_before_the_damage_are_salvaged(limits, request_clip):
    data = numbered.render(40, size=(96, 48))
    places = numbered.packet_places(data)
    damaged = _flip_from(data, places[20][0] + 8)
    request = request_clip(frames=FramePolicy.UNIFORM)
    with pytest.raises(ClipError) as caught:
        decode_clip(damaged, request, limits())
    assert caught.value.status is RowStatus.CORRUPT_FRAMES
    clip = decode_clip(damaged, replace(request, salvage=True), limits())
    assert 0 < len(clip.view.frame_indices) < 8
    assert clip.view.frame_indices == tuple(numbered.numbers(clip.frames))
    whole = decode_clip(data, request, limits())
    assert set(clip.view.frame_indices) < set(whole.view.frame_indices)


def test_of_a_video_that_is_cut_short_its_beginning_is_salvaged(limits, request_clip, tmp_path):
    data = numbered.remux(numbered.render(40), tmp_path / "fast.mp4", movflags="faststart")
    cut = data[: len(data) * 2 // 3]
    request = request_clip(frames=FramePolicy.UNIFORM, allow_short=True)
    with pytest.raises(ClipError, match="cut short"):
        decode_clip(cut, request, limits())
    clip = decode_clip(cut, replace(request, salvage=True), limits())
    assert clip.view.frame_indices == tuple(numbered.numbers(clip.frames))
    assert clip.num_frames < 40


def test_salvage_changes_nothing_of_a_good_video_and_finds_nothing_in_none(limits, request_clip):
    request = request_clip()
    data = numbered.render(40)
    clip = decode_clip(data, replace(request, salvage=True), limits())
    assert clip.crc32c == decode_clip(data, request, limits()).crc32c
    for junk in (b"", b"no video" * 100, numbered.audio_only()):
        with pytest.raises(ClipError):
            decode_clip(junk, replace(request, salvage=True), limits())
