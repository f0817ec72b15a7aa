"""How requests and clips cross a socket pair: a line of JSON, and bytes in a file descriptor.

The bytes lie in an anonymous memory file that is passed along (SCM_RIGHTS), so their size
does not matter to the socket, nothing is mapped that the other side could shrink, and
nothing is left behind when a side is killed.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
from dataclasses import asdict
from typing import Any

import numpy as np

from kdhiera.data.clip import (
    Clip,
    ClipRequest,
    DecodeFailure,
    DecodeLimits,
    FrameLook,
    Look,
    LookRequest,
    VideoInfo,
    checksum,
    shown,
)
from kdhiera.views import ClipView, CropPolicy, FramePolicy, RowStatus, ViewPolicy

_LINE_BYTES = 2**20  # a longer message is nonsense
_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)

Fields = dict[str, Any]


class WireError(Exception):
    """The other side is gone, or what it said makes no sense."""


def send(link: socket.socket, fields: Fields, payload: bytes) -> None:
    """Send one message.

    Args:
        link: One end of a socket pair.
        fields: What JSON can say; `num_bytes` is added.
        payload: Bytes that go along.

    Raises:
        WireError: If nobody is there to read.
    """
    line = json.dumps({**fields, "num_bytes": len(payload)}).encode() + b"\n"
    file = memory_file()
    try:
        _write_all(file, payload)
        sent = socket.send_fds(link, [line], [file])
        link.sendall(line[sent:])
    except (BrokenPipeError, ConnectionResetError) as error:
        raise WireError("the other side is gone") from error
    finally:
        os.close(file)


def receive(link: socket.socket, timeout_seconds: float | None) -> tuple[Fields, bytes]:
    """Wait for one message.

    Args:
        link: One end of a socket pair.
        timeout_seconds: For the whole message; None waits for ever.

    Returns:
        The fields and the bytes.

    Raises:
        TimeoutError: If the message is not complete in time.
        WireError: If the other side closed, died, or talks nonsense.
    """
    files: list[int] = []
    line = b""
    end = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    try:
        while not line.endswith(b"\n"):
            link.settimeout(None if end is None else max(end - time.monotonic(), 1e-3))
            try:
                part, passed, _, _ = socket.recv_fds(link, 2**16, 4, _CLOSE_ON_EXEC)
            except ConnectionResetError as error:
                raise WireError("the other side is gone") from error
            files += passed
            line += part
            if not part:
                raise WireError("the other side is gone")
            if len(line) > _LINE_BYTES:
                raise WireError("a message without end")
        fields = json.loads(line)
        return fields, _read_all(files[0], fields["num_bytes"])
    except (ValueError, TypeError, KeyError, IndexError, OSError, RecursionError) as error:
        if isinstance(error, TimeoutError):
            raise
        raise WireError(f"a message that makes no sense ({error})") from error
    finally:
        for file in files:
            os.close(file)


def memory_file() -> int:
    """An anonymous file: in memory where the system has such, else unlinked at once."""
    if sys.platform == "linux":
        return os.memfd_create("kdhiera")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _write_all(file: int, payload: bytes) -> None:
    rest = memoryview(payload)
    while rest:
        rest = rest[os.write(file, rest) :]


def _read_all(file: int, num_bytes: int) -> bytes:
    """Exactly so many bytes, read and not mapped: a mapping can be cut under the reader."""
    if os.fstat(file).st_size != num_bytes:
        raise WireError(f"{os.fstat(file).st_size} bytes where {num_bytes} are promised")
    parts: list[bytes] = []
    count = 0
    while count < num_bytes:
        parts.append(os.pread(file, num_bytes - count, count))
        count += len(parts[-1])
        if not parts[-1]:
            raise WireError("bytes are missing")
    return b"".join(parts)


def pack_request(request: ClipRequest | LookRequest, limits: DecodeLimits) -> Fields:
    """A request and its limits as JSON can say them."""
    kind = "look" if isinstance(request, LookRequest) else "clip"
    return {"kind": kind, "request": asdict(request), "limits": asdict(limits)}


def unpack_request(fields: Fields) -> tuple[ClipRequest | LookRequest, DecodeLimits]:
    """Inverse of `pack_request`."""
    request, limits = fields["request"], DecodeLimits(**fields["limits"])
    if fields["kind"] == "look":
        indices = request["indices"]
        return LookRequest(indices=None if indices is None else tuple(indices)), limits
    policy = request["policy"]
    policy |= {
        "frames": FramePolicy(policy["frames"]),
        "crop": CropPolicy(policy["crop"]),
        "crop_scale": tuple(policy["crop_scale"]),
        "crop_ratio": tuple(policy["crop_ratio"]),
    }
    replay = request["replay"]
    request |= {"policy": ViewPolicy(**policy), "replay": replay and _view(replay)}
    return ClipRequest(**request), limits


def pack_failure(failure: DecodeFailure) -> Fields:
    """A failure as fields."""
    return {"status": failure.status, "message": failure.message}


def unpack_failure(fields: Fields) -> DecodeFailure:
    """Inverse of `pack_failure`; the message is made printable."""
    return DecodeFailure(status=RowStatus(fields["status"]), message=shown(str(fields["message"])))


def pack_look(look: Look) -> tuple[Fields, bytes]:
    """A look as fields and bytes: a long video has more time stamps than a line may hold."""
    return {}, json.dumps(asdict(look)).encode()


def unpack_look(payload: bytes) -> Look:
    """Inverse of `pack_look`.

    Raises:
        WireError: If the message is no look.
    """
    try:
        look = json.loads(payload)
        info, failure = look["info"], look["failure"]
        if info is not None:
            info = VideoInfo(**{**info, "pts_seconds": tuple(map(float, info["pts_seconds"]))})
        return Look(
            info=info,
            failure=None if failure is None else unpack_failure(failure),
            frames=tuple(
                FrameLook(index=int(f["index"]), flaw=shown(str(f["flaw"]))) for f in look["frames"]
            ),
            said=tuple(shown(str(line)) for line in look["said"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise WireError(f"a message that is no look ({error})") from error


def pack_clip(clip: Clip) -> tuple[Fields, bytes]:
    """A clip as fields and bytes."""
    fields = {
        "shape": clip.frames.shape,
        "view": asdict(clip.view),
        "num_frames": clip.num_frames,
        "pts_seconds": clip.pts_seconds,
        "decoder": clip.decoder,
        "crc32c": clip.crc32c,
    }
    return fields, clip.frames.tobytes()


def unpack_clip(fields: Fields, payload: bytes, policy: ViewPolicy) -> Clip:
    """Inverse of `pack_clip`; what does not fit the policy or the checksum is refused.

    Raises:
        WireError: If the message is no clip that the policy can have asked for.
    """
    try:
        view = _view(fields["view"])
        shape = len(view.frame_indices), policy.height, policy.width, 3
        clip = Clip(
            frames=np.frombuffer(payload, np.uint8).reshape(shape).copy(),  # writable
            view=view,
            num_frames=int(fields["num_frames"]),
            pts_seconds=tuple(map(float, fields["pts_seconds"])),
            decoder=str(fields["decoder"]),
            crc32c=int(fields["crc32c"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise WireError(f"a message that is no clip ({error})") from error
    if checksum(clip.frames) != clip.crc32c:
        raise WireError("frames that differ from their checksum")
    return clip


def _view(fields: Fields) -> ClipView:
    y, x, height, width = map(int, fields["crop"])
    return ClipView(
        frame_indices=tuple(map(int, fields["frame_indices"])),
        crop=(y, x, height, width),
        flip=bool(fields["flip"]),
    )
