"""Which frames a video shows, and that exactly these come out."""

import contextlib
import ctypes
import functools
import http.server
import io
import os
import random
import struct
import threading

import av
import numbered
import numpy as np
import pytest
from av.video.frame import PictureType
from hypothesis import given, settings
from hypothesis import strategies as st

from kdhiera.data.clip import ClipError, DecodeLimits
from kdhiera.data.video import inspect, open_video
from kdhiera.views import RowStatus

X265 = {"x265-params": "log-level=none:pools=none"}
OPEN = {"x264-params": "open-gop=1:keyint=12:bframes=3"}
REFRESH = {"x264-params": "intra-refresh=1:keyint=12"}
FAST = {"deadline": "realtime", "cpu-used": "8"}
UNEVEN = [0, 10, 30, 60, 100, 200, 210, *range(300, 990, 30)]
LIMITS = DecodeLimits(
    backend="pyav",
    deadline_seconds=60.0,
    max_frame_pixels=10**6,
    max_duration_seconds=1000.0,
    max_video_bytes=10**6,
    max_memory_bytes=2**32,
    clips_per_child=1,
)
KINDS = {
    "h264 mp4": {},
    "h264 mp4, B-frames": {"b_frames": 3},
    "h264 mp4, sound": {"b_frames": 2, "audio": True},
    "h264 mp4, fragments": {
        "b_frames": 2,
        "container_options": {"movflags": "frag_keyframe+empty_moov"},
    },
    "h264 mp4, open groups": {"b_frames": 3, "options": OPEN},
    "h264 mp4, uneven times": {"pts": UNEVEN},
    "h264 mp4, 10 bit": {"pix_fmt": "yuv420p10le", "b_frames": 2},
    "h264 mp4, 4:4:4": {"pix_fmt": "yuv444p"},
    "h264 mp4, interlaced": {"options": {"x264-params": "interlaced=1"}},
    "h264 mkv, B-frames": {"container": "matroska", "b_frames": 2},
    "h264 ts, B-frames": {"container": "mpegts", "b_frames": 2},
    "h264 ts, open groups": {"container": "mpegts", "b_frames": 3, "options": OPEN},
    "h264 ts, no key frame but the first": {"container": "mpegts", "options": REFRESH},
    "h264 avi, decode times only": {"container": "avi", "b_frames": 2},
    "hevc mp4, open groups": {"codec": "libx265", "options": X265, "b_frames": 2},
    "vp9 webm": {"container": "webm", "codec": "libvpx-vp9", "options": FAST},
    "vp8 webm": {"container": "webm", "codec": "libvpx"},
    "mpeg2 mpg, B-frames": {"container": "mpeg", "codec": "mpeg2video", "b_frames": 2},
    "mpeg2 mpg": {"container": "mpeg", "codec": "mpeg2video"},
    "mpeg2 ts, interlaced": {
        "container": "mpegts",
        "codec": "mpeg2video",
        "options": {"flags": "+ildct+ilme"},
    },
    "mpeg1 mpg": {"container": "mpeg", "codec": "mpeg1video", "b_frames": 2},
    "mpeg4 avi, B-frames": {"container": "avi", "codec": "mpeg4", "b_frames": 2},
    "mjpeg avi": {"container": "avi", "codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "flv": {"container": "flv", "codec": "flv"},
    "wmv": {"container": "asf", "codec": "wmv2"},
}
COUNT = 30


@functools.cache
def video(kind):
    return numbered.render(COUNT, **KINDS[kind])


def decode(data, indices, limits):
    with open_video(data, limits) as video:
        return dict(video.frames(indices))


def attempt(data, index, limits):
    """A frame and None, or None and the status."""
    try:
        return decode(data, [index], limits)[index], None
    except ClipError as error:
        return None, error.status


def status(data, limits):
    with pytest.raises(ClipError) as caught:
        inspect(data, limits)
    assert caught.value.message.isprintable()
    return caught.value.status, caught.value.message


@pytest.mark.parametrize("kind", KINDS)
def test_any_choice_of_frames_is_that_choice(kind, limits):
    data = video(kind)
    info = inspect(data, limits())
    assert (info.num_frames, info.height, info.width) == (COUNT, 48, 96)
    assert list(info.pts_seconds) == sorted(info.pts_seconds)
    assert info.pts_seconds[0] == 0
    rng = random.Random(kind)
    reference = numbered.all_frames(data)
    assert numbered.numbers(reference) == list(range(COUNT))
    choices = [[i] for i in range(0, COUNT, 3)] + [list(range(COUNT))]
    choices += [sorted(rng.sample(range(COUNT), 5)) for _ in range(6)]
    for chosen in choices:
        found = decode(data, chosen, limits())
        assert sorted(found) == chosen
        for index, frame in found.items():
            assert frame.flags.c_contiguous
            assert numbered.number(frame) == index
            assert (frame == reference[index]).all()


def test_av1(limits):
    data = numbered.render(12, codec="libsvtav1", options={"preset": "10"}, size=(96, 64), gop=6)
    info = inspect(data, limits())
    assert (info.codec, info.num_frames) == ("libdav1d", 12)
    assert {i: numbered.number(f) for i, f in decode(data, [1, 7, 11], limits()).items()} == {
        1: 1,
        7: 7,
        11: 11,
    }


def test_times_are_those_of_the_frames(limits):
    data = video("h264 mp4, uneven times")
    assert inspect(data, limits()).pts_seconds == pytest.approx([t / 1000 for t in UNEVEN])
    late = inspect(video("h264 ts, B-frames"), limits())
    assert late.pts_seconds == pytest.approx([i / 25 for i in range(COUNT)])
    assert late.start_seconds > 0


@pytest.mark.parametrize(("first", "last"), [(129, 299), (60, 200), (1, 1), (50, 52), (0, 299)])
def test_a_stream_copied_cut_shows_what_its_edit_list_says(first, last, limits):
    source = numbered.render(300, b_frames=2, gop=50)
    data = numbered.cut(source, first, last)
    with av.open(io.BytesIO(data)) as file:
        claimed = file.streams.video[0].frames
    info = inspect(data, limits())
    assert info.num_frames == last - first + 1
    assert claimed >= info.num_frames
    assert claimed > info.num_frames or first in (0, 50)
    chosen = sorted({0, info.num_frames // 3, info.num_frames // 2, info.num_frames - 1})
    found = decode(data, chosen, limits())
    assert {i: numbered.number(frame) for i, frame in found.items()} == {
        i: first + i for i in chosen
    }


def test_the_cut_that_hangs_decord_is_an_ordinary_video(hanging_video, limits):
    info = inspect(hanging_video, limits())
    assert info.num_frames == 115  # 404 packets, of which 289 lie before the edit
    reference = numbered.all_frames(hanging_video)
    assert len(reference) == 115
    for index, frame in decode(hanging_video, [0, 10, 11, 60, 114], limits()).items():
        assert (frame == reference[index]).all()


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotated_videos_come_out_upright(container, degrees, limits):
    data = numbered.render(8, container=container, rotation=degrees)
    info = inspect(data, limits())
    size = (48, 96) if degrees == 180 else (96, 48)
    assert ((info.height, info.width), info.upright) == (size, False)
    for index, frame in decode(data, [0, 5], limits()).items():
        assert frame.shape == (*size, 3)
        # The matrix says how far the stored frame is turned counterclockwise for showing.
        assert numbered.number(np.rot90(frame, -degrees // 90)) == index


def test_a_mirrored_video_comes_out_mirrored(limits):
    data = bytearray(numbered.render(4, rotation=180))
    at = bytes(data).index(struct.pack(">9i", -65536, 0, 0, 0, -65536, 0, 0, 0, 1 << 30))
    data[at : at + 36] = struct.pack(">9i", -65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    found = decode(bytes(data), [3], limits())
    assert numbered.number(found[3][:, ::-1]) == 3


def test_only_what_the_frames_need_is_decoded(limits):
    data = numbered.render(120, gop=12, b_frames=2)
    decoded = []
    with open_video(data, limits()) as video:
        outputs = video._outputs
        video._outputs = lambda *args, **how: (decoded.append(args[:2]), outputs(*args, **how))[1]
        assert sorted(index for index, _ in video.frames([40, 41, 110])) == [40, 41, 110]
    assert sum(last - first + 1 for first, last in decoded) <= 2 * 12


def test_frames_that_nothing_refers_to_are_not_even_fed(limits):
    data = numbered.render(60, gop=60, b_frames=3, container="mpegts")
    for source in (data, numbered.render(60, gop=60, b_frames=3)):
        with open_video(source, limits()) as video:
            kinds = [video._is_disposable(packet) for packet in video._packets]
            types = {n: frame.pict_type for n, frame in video._outputs(0, 59)}
        assert 10 < sum(kinds) < 60
        assert {types[n] for n, disposable in enumerate(kinds) if disposable} == {PictureType.B}


@pytest.mark.parametrize("codec", ["mpeg4", "libx265"])
def test_a_packet_that_only_claims_to_be_a_key_frame_is_not_believed(codec, limits):
    data = numbered.render(30, codec=codec, gop=12, options=X265 if codec == "libx265" else None)
    data = data.replace(b"stss", b"free")  # without this table every frame of an mp4 is a key frame
    assert all(key for _, _, key in numbered.packet_places(data))
    found = decode(data, [7, 20, 29], limits())
    assert {i: numbered.number(frame) for i, frame in found.items()} == {7: 7, 20: 20, 29: 29}


def test_videos_that_are_open_at_once_do_not_mix(limits):
    with open_video(video("h264 mp4, B-frames"), limits()) as one:
        with open_video(video("vp9 webm"), limits()) as two:
            both = zip(one.frames([3, 20]), two.frames([5, 28]), strict=True)
            seen = [(i, numbered.number(f), j, numbered.number(g)) for (i, f), (j, g) in both]
        seen += [(i, numbered.number(f)) for i, f in one.frames([7])]
    assert seen == [(3, 3, 5, 5), (20, 20, 28, 28), (7, 7)]


def test_a_lost_packet_is_noticed_until_the_next_key_frame(limits):
    source = numbered.render(40, gop=20, options={"x264-params": "ref=3"})
    data = numbered.drop_packet(source, 7)
    assert inspect(data, limits()).num_frames == 39
    for index in (8, 15, 18):
        with pytest.raises(ClipError, match="Frame num gap") as caught:
            decode(data, [index], limits())
        assert caught.value.status is RowStatus.CORRUPT_FRAMES
    found = decode(data, [3, 6, 19, 30], limits())
    assert {i: numbered.number(frame) for i, frame in found.items()} == {3: 3, 6: 6, 19: 20, 30: 31}


def test_damage_is_a_status_or_does_not_show(limits):
    """Flipped bits in a slice: an error, or frames that are right; before the damage all is."""
    data = numbered.render(40, b_frames=2, gop=20, size=(192, 96))
    clean = numbered.all_frames(data)
    places = numbered.packet_places(data)
    rng = random.Random(0)
    seen = {"status": 0, "right": 0, "wrong": 0}
    for position, size, _ in places[:20]:
        if size < 40:
            continue
        broken = bytearray(data)
        for _ in range(8):
            broken[position + rng.randrange(20, size)] ^= 1 << rng.randrange(8)
        assert all(
            (f == clean[i]).all() for i, f in decode(bytes(broken), [25, 39], limits()).items()
        )
        for index in range(0, 20, 2):
            frame, failure = attempt(bytes(broken), index, limits())
            if failure is None:
                seen["right" if (frame == clean[index]).all() else "wrong"] += 1
            else:
                assert failure in (RowStatus.CORRUPT_FRAMES, RowStatus.DECODE_ERROR)
                seen["status"] += 1
    assert seen["status"] > 20
    assert seen["wrong"] <= 0.05 * sum(seen.values()), seen  # bits that no decoder can tell


def test_a_lost_slice_is_corrupt_frames_and_other_groups_are_untouched(limits):
    data = bytearray(numbered.render(36, gop=12))
    position, size, key = numbered.packet_places(bytes(data))[15]
    assert not key
    data[position + 4 : position + size] = bytes(size - 4)
    with pytest.raises(ClipError, match="frame 20 is damaged") as caught:
        decode(bytes(data), [20], limits())
    assert caught.value.status is RowStatus.CORRUPT_FRAMES
    for index, frame in decode(bytes(data), [3, 11, 13, 24, 35], limits()).items():
        assert numbered.number(frame) == index


def test_a_change_of_size_is_a_status_for_the_frames_after_it(limits):
    small = numbered.render(20, container="mpegts")
    data = numbered.join(small, numbered.render(20, container="mpegts", size=(192, 96)))
    assert inspect(data, limits()).num_frames == 40
    assert {i: numbered.number(f) for i, f in decode(data, [3, 19], limits()).items()} == {
        3: 3,
        19: 19,
    }
    with pytest.raises(ClipError, match="192x96 px, the first frame 96x48 px") as caught:
        decode(data, [3, 30], limits())
    assert caught.value.status is RowStatus.CORRUPT_FRAMES
    with pytest.raises(ClipError, match="max_frame_pixels") as caught:
        decode(data, [30], limits(max_frame_pixels=10_000))
    assert caught.value.status is RowStatus.DECODE_LIMIT


def test_what_holds_no_video_is_a_decode_error_in_words(limits, tmp_path):
    whole = numbered.render(30)
    assert status(numbered.audio_only(), limits()) == (
        RowStatus.DECODE_ERROR,
        "no video stream: the file holds audio",
    )
    assert status(whole[: len(whole) // 2], limits())[1] == "moov atom not found"
    assert "empty" in status(b"", limits())[1]
    assert "no known video container" in status(b"just some words", limits())[1]
    empty = numbered.remux(whole, tmp_path / "empty.mp4", count=0)
    assert status(empty, limits())[0] is RowStatus.DECODE_ERROR
    for data in (b"\0\0\0\x18ftypisom" + bytes(200), b"RIFF\0\0\0\0AVI LIST", b"OggS" + bytes(90)):
        assert status(data, limits())[0] is RowStatus.DECODE_ERROR


def test_a_cut_file_whose_index_is_whole_is_a_decode_error(limits, tmp_path):
    data = numbered.remux(numbered.render(30), tmp_path / "fast.mp4", movflags="faststart")
    assert inspect(data, limits()).num_frames == 30
    kind, words = status(data[:-200], limits())
    assert kind is RowStatus.DECODE_ERROR
    assert "cut short" in words


@pytest.mark.parametrize("kind", ["h264 mkv, B-frames", "mpeg2 mpg", "h264 ts, B-frames"])
@pytest.mark.parametrize("share", [0.5, 0.77])
def test_a_cut_stream_gives_right_frames_of_what_is_left(kind, share, limits):
    whole = numbered.render(60, size=(384, 192), **KINDS[kind])
    data = whole[: int(len(whole) * share)]
    times = inspect(data, limits()).pts_seconds
    assert 10 < len(times) < 60
    right = 0
    for index, seconds in enumerate(times):
        frame, failure = attempt(data, index, limits())
        if failure is None:
            assert numbered.number(frame) == round(seconds * 25)
            right += 1
        else:
            assert failure is RowStatus.CORRUPT_FRAMES
    assert right >= 0.8 * len(times)  # all but those in reach of the cut


def test_limits_hold_for_claims_and_for_facts(limits):
    data = numbered.render(30, size=(640, 480))
    assert status(data, limits(max_frame_pixels=640 * 480 - 1)) == (
        RowStatus.DECODE_LIMIT,
        "the video claims 640x480 px, decode.max_frame_pixels is 307199",
    )
    assert inspect(data, limits(max_frame_pixels=640 * 480)).width == 640
    assert status(data, limits(max_duration_seconds=1.0))[0] is RowStatus.DECODE_LIMIT
    kind, words = status(data, limits(max_video_bytes=len(data) - 1))
    assert (kind, words.split(",")[0]) == (
        RowStatus.DECODE_LIMIT,
        f"the video has {len(data)} bytes",
    )
    hours = numbered.render(3, container="matroska", pts=[0, 40, 5_000_000])
    assert status(hours, limits())[0] is RowStatus.DECODE_LIMIT


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from(["h264 mp4, B-frames", "vp8 webm", "mpeg4 avi, B-frames"]),
)
def test_broken_bytes_anywhere_give_a_status_or_frames(seed, kind):
    rng = random.Random(seed)
    data = bytearray(video(kind))
    for _ in range(rng.randrange(1, 30)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    with contextlib.suppress(ClipError), open_video(bytes(data), LIMITS) as opened:
        for _, frame in opened.frames(range(0, opened.info.num_frames, 7)):
            assert frame.shape == (opened.info.height, opened.info.width, 3)


class _Requests(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.paths.append(self.path)
        self.send_error(404)

    def log_message(self, *_):
        pass


def test_nothing_but_the_bytes_is_ever_opened(limits, tmp_path):
    """Playlists, and an mp4 whose samples lie in another file: no request, no open."""
    other = tmp_path / "other.mp4"
    other.write_bytes(numbered.render(30))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Requests)
    server.paths = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/x.mp4"
    places = (address, str(other), f"file:{other}")
    posing = [
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{place}\n#EXT-X-ENDLIST\n"
        for place in places
    ]
    posing += [f"ffconcat version 1.0\nfile '{place}'\n" for place in places]
    posing += [
        "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nc=IN IP4 127.0.0.1\r\nm=video 5004 RTP/AVP 96\r\n",
        f"<?xml version='1.0'?><MPD><BaseURL>{address}</BaseURL></MPD>",
        str(other),
    ]
    own = numbered.render(30)
    libc = ctypes.CDLL(None)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(watch, os.fsencode(other), 0x21) >= 0  # IN_ACCESS | IN_OPEN
    try:
        for text in posing:
            for data in (text.encode(), b"\0\0\0\x14ftypisom" + text.encode()):
                assert status(data, limits())[0] is RowStatus.DECODE_ERROR
        frames = decode(_refer_to(other, own), [0, 7], limits())  # the reference is ignored
        assert {i: numbered.number(frame) for i, frame in frames.items()} == {0: 0, 7: 7}
        with pytest.raises(BlockingIOError):
            os.read(watch, 4096)
        other.read_bytes()
        assert os.read(watch, 4096)  # so it would have been seen
    finally:
        os.close(watch)
        server.shutdown()
        server.server_close()
    assert server.paths == []


def _refer_to(path, data):
    """An mp4 whose data reference names another file instead of itself."""
    name = str(path).encode() + b"\0"
    own = struct.pack(">I4sI", 12, b"url ", 1)
    other = struct.pack(">I4sI", 12 + len(name), b"url ", 0) + name
    assert data.count(own) == 1
    grown = len(other) - len(own)
    out = bytearray(data.replace(own, other))
    for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        at = out.index(box) - 4
        out[at : at + 4] = (int.from_bytes(out[at : at + 4], "big") + grown).to_bytes(4, "big")
    return bytes(out)
