"""Killable decode children: whatever a video does to a decoder happens in a process of its own.

    worker thread                              child (python -m kdhiera.data.sandbox)
        request, bytes of the video   ->
                                      <-       frames, or the reason why there are none
        deadline over: SIGKILL, next child

One thread owns one child. A child that is killed, crashes or hangs costs one clip.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from kdhiera.data import wire
from kdhiera.data.clip import (
    Clip,
    ClipError,
    ClipRequest,
    DecodeFailure,
    DecodeLimits,
    Look,
    LookRequest,
    shown,
)
from kdhiera.data.confine import confine
from kdhiera.errors import KdhieraError, UsageError
from kdhiera.views import RowStatus

_START_SECONDS = 120.0  # imports on a crowded machine; no clip's deadline runs meanwhile
_HEADROOM_BYTES = 256 * 2**20  # address space a child needs beyond its libraries
_PR_SET_PDEATHSIG = 1
_INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR")


_Request = ClipRequest | LookRequest
_Outcome = Clip | Look | DecodeFailure


@dataclass(frozen=True, kw_only=True)
class _Job:
    data: bytes
    request: _Request
    future: Future[Any]  # of a clip or a look, as was asked for, or of a failure


class _LostError(Exception):
    """A child that cannot answer any more; `killed` if by SIGKILL, and not for being late."""

    def __init__(self, status: RowStatus, message: str, *, killed: bool = False) -> None:
        self.status = status
        self.killed = killed
        super().__init__(message)


class Sandbox:
    """A pool of decode children; use it as a context manager.

    Args:
        limits: What one video may cost.
        num_children: Processes that decode at the same time, at least 1.

    Raises:
        UsageError: If the backend is not installed.
    """

    def __init__(self, limits: DecodeLimits, *, num_children: int) -> None:
        if num_children < 1:
            raise UsageError(f"decoding needs at least 1 child process, got {num_children}")
        _check_installed(limits.backend)
        self._limits = limits
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._children: set[_Child] = set()
        self._workers = [
            threading.Thread(target=self._work, name=f"decode-{number}", daemon=True)
            for number in range(num_children)
        ]
        for worker in self._workers:
            worker.start()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def submit(self, data: bytes, request: ClipRequest) -> Future[Clip | DecodeFailure]:
        """Queue one clip; how many are queued is the caller's matter.

        Args:
            data: The whole encoded video.
            request: Which clip of it.

        Returns:
            A future of the clip or of why there is none. It raises `KdhieraError` if children
            do not start, and `CancelledError` if the pool is closed meanwhile.

        Raises:
            RuntimeError: If the pool is closed.
        """
        return self._queue(data, request)

    def look(self, data: bytes, request: LookRequest) -> Future[Look | DecodeFailure]:
        """Queue a look at a video; see `submit`.

        Args:
            data: The whole encoded video.
            request: Which frames of it, beside the first.

        Returns:
            Will hold what there is to say, or why a child could not say it.
        """
        return self._queue(data, request)

    def _queue(self, data: bytes, request: _Request) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the sandbox is closed")
            self._jobs.put(_Job(data=data, request=request, future=future))
        return future

    def close(self) -> None:
        """Kill all children, cancel what is unfinished, and wait for the threads."""
        with self._lock:
            self._closed = True
            for child in self._children:
                child.process.kill()
        for _ in self._workers:
            self._jobs.put(None)
        for worker in self._workers:
            worker.join()

    def _work(self) -> None:
        """A worker thread: one job after the other, with a child of its own."""
        child: _Child | None = None
        while (job := self._jobs.get()) is not None:
            if self._closed:
                job.future.cancel()
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                child, result = self._decode(child, job)
            except BaseException as error:
                child = None
                job.future.set_exception(error)
            else:
                job.future.set_result(result)
        self._drop(child)

    def _decode(self, child: _Child | None, job: _Job) -> tuple[_Child | None, _Outcome]:
        """Decode a job, starting a child where there is none that can."""
        tried = False
        while True:
            backend = self._backend(job.request)
            if child is None or child.is_spent(backend):
                self._drop(child)
                child = self._start(backend)
            try:
                return child, child.ask(job.data, job.request, self._limits)
            except _LostError as lost:
                self._drop(child)
                child = None
                if self._closed:
                    raise CancelledError from lost
                if tried or not lost.killed:  # SIGKILL says more of the machine than of the video
                    return None, DecodeFailure(status=lost.status, message=shown(str(lost)))
                tried = True

    def _backend(self, request: _Request) -> str:
        """Who decodes a request; PyAV looks at videos."""
        asked = None if isinstance(request, LookRequest) else request.replay_decoder
        backend = asked or self._limits.backend
        return "pyav" if backend == "auto" or isinstance(request, LookRequest) else backend

    def _start(self, backend: str) -> _Child:
        with self._lock:
            if self._closed:
                raise CancelledError
            child = _Child(self._limits, backend)
            self._children.add(child)
        try:
            child.wait_until_ready()
        except KdhieraError as error:
            self._drop(child)
            if self._closed:
                raise CancelledError from error
            raise
        return child

    def _drop(self, child: _Child | None) -> None:
        if child is not None:
            with self._lock:
                self._children.discard(child)
            child.close()


class _Child:
    """One decode process, as the thread that started it sees it (it dies with that thread)."""

    def __init__(self, limits: DecodeLimits, backend: str) -> None:
        self._clips_left = limits.clips_per_child
        self._backend = backend
        self._link, there = socket.socketpair()
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        arguments = [there.fileno(), os.getpid(), limits.max_memory_bytes, backend]
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        with there:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", __spec__.name, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._words,
                pass_fds=[there.fileno()],
                env=environment,  # no tokens, no proxies
            )

    def wait_until_ready(self) -> None:
        """Wait for the first message, which says that all is imported."""
        try:
            wire.receive(self._link, _START_SECONDS)
        except (wire.WireError, TimeoutError) as error:
            self.process.kill()
            self.process.wait()
            self._words.seek(0)
            lines = self._words.read().decode(errors="replace").strip().splitlines()
            reason = shown(lines[-1]) if lines else str(error) or "no answer"
            raise KdhieraError(f"the decode process does not start: {reason}") from error

    def is_spent(self, backend: str) -> bool:
        """Whether the process has ended, did its share, or was started for another decoder."""
        ended = self.process.poll() is not None
        return ended or self._clips_left < 1 or self._backend != backend

    def ask(self, data: bytes, request: _Request, limits: DecodeLimits) -> _Outcome:
        """Have one clip decoded, or one video looked at.

        Raises:
            _LostError: If the child hangs, dies or talks nonsense.
        """
        self._clips_left -= 1
        try:
            wire.send(self._link, wire.pack_request(request, limits), data)
            fields, payload = wire.receive(self._link, limits.deadline_seconds)
            if "status" in fields:
                return wire.unpack_failure(fields)
            if isinstance(request, LookRequest):
                return wire.unpack_look(payload)
            return wire.unpack_clip(fields, payload, request.policy)
        except TimeoutError as error:
            words = f"no clip after decode.deadline_seconds ({limits.deadline_seconds:g} s)"
            raise _LostError(RowStatus.DECODE_TIMEOUT, words) from error
        except (wire.WireError, ValueError, KeyError) as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> _LostError:
        """What became of a child that did not answer as it should."""
        try:
            code = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return _LostError(RowStatus.DECODE_ERROR, f"the decode process sent {error}")
        if code == -signal.SIGKILL:
            words = "the decode process was killed (SIGKILL; is the machine out of memory?)"
            return _LostError(RowStatus.DECODE_ERROR, words, killed=True)
        end = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return _LostError(RowStatus.DECODE_ERROR, f"the decode process {end}")

    def close(self) -> None:
        """Kill the process and free everything."""
        self.process.kill()
        self.process.wait()
        self._link.close()
        self._words.close()


def serve(link: socket.socket) -> None:
    """Answer requests until the other side is gone; runs in the child.

    Args:
        link: The child's end of the socket pair.
    """
    from kdhiera.data.decode import decode_clip, look  # the parent never loads a decoder

    def answer() -> tuple[wire.Fields, bytes]:
        try:
            fields, data = wire.receive(link, None)
            request, limits = wire.unpack_request(fields)
            if isinstance(request, LookRequest):
                return wire.pack_look(look(data, request, limits))
            return wire.pack_clip(decode_clip(data, request, limits))
        except wire.WireError:
            raise
        except ClipError as error:
            return {"status": error.status, "message": error.message}, b""
        except MemoryError:
            words = "decoding needs more than decode.max_memory_bytes"
            return {"status": RowStatus.DECODE_LIMIT, "message": words}, b""
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
            return {"status": RowStatus.DECODE_ERROR, "message": words}, b""

    wire.send(link, {"ready": True}, b"")
    with suppress(wire.WireError):  # the parent is gone or closed the link
        while True:
            wire.send(link, *answer())


def main(arguments: list[str]) -> None:
    """The child: bound to its parent's life, within its limits, deaf and dumb.

    Args:
        arguments: File descriptor of the link, process id of the parent, address space in bytes,
            name of the decoder.
    """
    link, parent, max_memory_bytes = map(int, arguments[:3])
    backend = arguments[3]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it could matter
        return
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the parent, which ends us
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from kdhiera.data.decode import preload  # before the limit, so that it can be compared

    plain = _address_space()
    preload(backend)
    if sys.platform == "linux":
        needed = plain + _HEADROOM_BYTES
        if max_memory_bytes < needed:
            sys.exit(f"decode.max_memory_bytes is {max_memory_bytes}, at least {needed} are needed")
        limit = max_memory_bytes + _address_space() - plain  # torch comes on top
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    silence = os.open(os.devnull, os.O_WRONLY)
    if not confine() and sys.platform == "linux" and backend != "pyav":
        sys.exit(
            f"this kernel cannot confine {backend}, which opens files: use decode.backend auto"
        )
    os.dup2(silence, sys.stderr.fileno())  # decoders chatter
    os.close(silence)
    with socket.socket(fileno=link) as there:
        serve(there)


def _address_space() -> int:
    """Bytes that this process has mapped, 0 where that is not known."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _check_installed(backend: str) -> None:
    """Refuse a decoder that is not there.

    Raises:
        UsageError: With the way to get it.
    """
    if backend == "decord" and importlib.util.find_spec("decord") is None:
        raise UsageError("decode.backend is decord, which is not installed: use auto")
    if backend == "torchcodec" and importlib.util.find_spec("torchcodec") is None:
        raise UsageError(
            "decode.backend is torchcodec, which is not installed: pip install "
            "'kdhiera[torchcodec]', and FFmpeg's shared libraries with it, or use auto"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
