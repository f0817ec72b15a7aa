import contextlib
import json
import os
import socket
import threading

import numbered
import pytest

from kdhiera.data import wire
from kdhiera.data.clip import ClipRequest
from kdhiera.data.decode import decode_clip
from kdhiera.views import ClipView


@pytest.fixture
def link():
    here, there = socket.socketpair()
    with here, there:
        yield here, there


@pytest.mark.parametrize("size", [0, 1, 100_000, 20_000_000])
def test_any_amount_of_bytes_crosses_without_a_reader(link, size):
    payload = os.urandom(min(size, 1000)) * (size // min(size, 1000)) if size else b""
    wire.send(link[0], {"name": "é\n"}, payload)
    fields, received = wire.receive(link[1], 5.0)
    assert fields == {"name": "é\n", "num_bytes": len(payload)}
    assert received == payload


def test_no_file_descriptor_stays_open(link):
    before = os.listdir("/proc/self/fd")
    for _ in range(20):
        wire.send(link[0], {}, b"abc")
        wire.receive(link[1], 5.0)
    assert os.listdir("/proc/self/fd") == before


def test_long_messages_arrive_whole(link):
    fields = {"frame_indices": list(range(60_000))}
    sender = threading.Thread(target=wire.send, args=(link[0], fields, b"x"))
    sender.start()
    received, _ = wire.receive(link[1], 10.0)
    sender.join()
    assert received["frame_indices"] == fields["frame_indices"]


def test_waiting_ends(link):
    with pytest.raises(TimeoutError):
        wire.receive(link[1], 0.05)
    link[0].sendall(b'{"half": ')
    with pytest.raises(TimeoutError):
        wire.receive(link[1], 0.05)


def test_the_other_side_may_be_gone(link):
    link[0].close()
    with pytest.raises(wire.WireError, match="gone"):
        wire.receive(link[1], 5.0)
    with pytest.raises(wire.WireError, match="gone"):
        wire.send(link[1], {}, b"")


@pytest.mark.parametrize(
    ("line", "size"),
    [
        (b"no json", 0),
        (b"[]", 0),
        (b"{}", 0),
        (b'{"num_bytes": 5}', 4),
        (b'{"num_bytes": 5}', 6),
        (b'{"num_bytes": -1}', 0),
        (b'{"num_bytes": "5"}', 5),
        (b'{"num_bytes": 1e99}', 5),
        (b"\xff\xfe", 0),
        (b"[" * 100_000, 0),
        (b"x" * 2_000_000, 0),
    ],
)
def test_nonsense_is_an_error_and_nothing_worse(link, tmp_path, line, size):
    file = os.open(tmp_path / "payload", os.O_RDWR | os.O_CREAT)
    os.write(file, b"p" * size)
    socket.send_fds(link[0], [line[:10]], [file])
    os.close(file)
    before = os.listdir("/proc/self/fd")
    sender = threading.Thread(target=_send_all, args=(link[0], line[10:] + b"\n"))
    sender.start()
    with pytest.raises(wire.WireError):
        wire.receive(link[1], 5.0)
    link[1].close()
    sender.join()
    assert len(os.listdir("/proc/self/fd")) < len(before)


def _send_all(link, data):
    with contextlib.suppress(BrokenPipeError):
        link.sendall(data)


def test_a_message_without_a_file_or_with_a_pipe_is_nonsense(link):
    link[0].sendall(b'{"num_bytes": 0}\n')
    with pytest.raises(wire.WireError):
        wire.receive(link[1], 5.0)
    read, write = os.pipe()
    socket.send_fds(link[0], [b'{"num_bytes": 3}\n'], [read])
    os.close(read)
    os.close(write)
    with pytest.raises(wire.WireError):
        wire.receive(link[1], 5.0)


def test_requests_and_clips_survive(limits, request_clip):
    for request in (
        request_clip(2, flip=True),
        request_clip(replay=ClipView(frame_indices=(3, 4), crop=(1, 2, 30, 40), flip=True)),
        request_clip(uid="ключ/\x01", replay_decoder="pyav"),
    ):
        fields = json.loads(json.dumps(wire.pack_request(request, limits())))
        assert wire.unpack_request(fields) == (request, limits())
    request: ClipRequest = request_clip(1, flip=True)
    clip = decode_clip(numbered.render(12), request, limits())
    fields, payload = wire.pack_clip(clip)
    fields = json.loads(json.dumps(fields))
    again = wire.unpack_clip(fields, payload, request.policy)
    assert (again.frames == clip.frames).all()
    assert again.frames.flags.writeable
    assert (again.view, again.pts_seconds, again.crc32c) == (
        clip.view,
        clip.pts_seconds,
        clip.crc32c,
    )
    for wrong in (
        {**fields, "crc32c": clip.crc32c ^ 1},
        {**fields, "view": {**fields["view"], "frame_indices": [0]}},
        {key: value for key, value in fields.items() if key != "decoder"},
        {**fields, "pts_seconds": ["x"]},
    ):
        with pytest.raises(wire.WireError):
            wire.unpack_clip(wrong, payload, request.policy)
    with pytest.raises(wire.WireError):
        wire.unpack_clip(fields, payload[:-1], request.policy)
