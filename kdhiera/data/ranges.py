"""A shard's bytes, wherever it lies: on a disk or in a bucket, read by ranges.

Everything that reads shards reads them through `Ranged`, so it does not matter where they
lie. `Forward` goes through one from front to back; `tars.HeaderReader` from header to header.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from kdhiera.addresses import scheme_of
from kdhiera.data.clip import shown
from kdhiera.errors import DamagedError, KdhieraError
from kdhiera.stores import FileVersion

if TYPE_CHECKING:
    from kdhiera.objects import ObjectStore

REQUEST_BYTES = 2**18  # what one more request costs, in bytes that can be read in that time
_BLOCK_BYTES = 4 * 2**20
_BLOCKS_AHEAD = 4


class SourceError(DamagedError):
    """A shard that cannot be read now, or is not the one that was indexed."""


class Ranged(Protocol):
    """A file of which any bytes can be read; never bytes of two versions of it.

    Safe to use from several threads.
    """

    @property
    def version(self) -> FileVersion:
        """Which file this is."""
        ...

    def read(self, start: int, stop: int) -> bytes:
        """Exactly the bytes from `start` to `stop`, which lie inside the file.

        Raises:
            SourceError: If they cannot be read, or the file is not this version any more.
        """
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


def open_ranged(path: str, *, version: FileVersion | None = None) -> Ranged:
    """The file at a path or `s3://` address.

    Args:
        path: Where it lies.
        version: What it must be; None takes what is there.

    Raises:
        SourceError: If it cannot be read, or is not that.
    """
    if scheme_of(path) == "s3:":
        return ObjectFile(path, version)
    return LocalFile(path, version)


def open_bucket(url: str) -> tuple[ObjectStore, str]:
    """The bucket of an `s3://` address, and what is meant in it.

    Raises:
        UsageError: If the address names no bucket, or carries credentials.
    """
    from kdhiera.objects import ObjectStore  # obstore is only loaded where it is used

    bucket, _, key = url.removeprefix("s3://").partition("/")
    return ObjectStore(f"s3://{bucket}"), key


def is_there(path: str) -> bool:
    """Whether there is anything at a path or `s3://` address.

    Raises:
        SourceError: If a bucket cannot be asked.
    """
    if scheme_of(path) != "s3:":
        return os.path.exists(path)
    bucket, key = open_bucket(path)
    try:
        return bucket.exists(key)
    except KdhieraError as error:
        raise SourceError(str(error)) from None


class LocalFile:
    """A file of a local or shared file system."""

    def __init__(self, path: str, version: FileVersion | None = None) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise SourceError(f"{shown(path)} cannot be read: {error.strerror}") from None
        found = os.fstat(self._file)
        self._stamp = found.st_size, found.st_mtime_ns
        self.version = FileVersion(num_bytes=found.st_size)
        if not stat.S_ISREG(found.st_mode):
            os.close(self._file)
            raise SourceError(f"{shown(path)} cannot be read: it is no regular file")
        if version not in (None, self.version):
            os.close(self._file)
            raise _changed(path)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes of the file."""
        pieces = []
        try:
            while start < stop and (piece := os.pread(self._file, stop - start, start)):
                pieces.append(piece)
                start += len(piece)
        except OSError as error:
            raise SourceError(f"{shown(self._path)} cannot be read: {error.strerror}") from None
        found = os.fstat(self._file)
        if start < stop or (found.st_size, found.st_mtime_ns) != self._stamp:
            raise _changed(self._path)
        return b"".join(pieces)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class ObjectFile:
    """An object in a bucket; every request names the version that is meant."""

    def __init__(self, url: str, version: FileVersion | None = None) -> None:
        self._url = url
        self._bucket, self._key = open_bucket(url)
        self.version = version or self._there()

    def read(self, start: int, stop: int) -> bytes:
        """Bytes of the object."""
        from kdhiera.objects import ObjectChangedError

        if start == stop:
            return b""
        try:
            return self._bucket.read_range(self._key, start, stop, version=self.version)
        except ObjectChangedError:
            raise _changed(self._url) from None
        except FileNotFoundError:
            raise SourceError(f"{shown(self._url)} cannot be read: it is not there") from None
        except KdhieraError as error:
            raise SourceError(str(error)) from None

    def close(self) -> None:
        """Connections are shared and stay."""

    def _there(self) -> FileVersion:
        try:
            return self._bucket.version(self._key)
        except FileNotFoundError:
            raise SourceError(f"{shown(self._url)} cannot be read: it is not there") from None
        except KdhieraError as error:
            raise SourceError(str(error)) from None


def _changed(path: str) -> SourceError:
    return SourceError(
        f"{shown(path)} is not the file that was indexed any more: leave shards alone while they "
        "are read, and run the same command again"
    )


class Forward:
    """A file read once from front to back, some blocks ahead, and hashed as it goes by.

    Args:
        file: The file; it is closed with this.
        hashed: Whether the hash is wanted.
    """

    def __init__(self, file: Ranged, *, hashed: bool) -> None:
        self.version = file.version
        self._file = file
        self._block = b""
        self._start = 0  # of the block at hand
        self._asked = 0  # up to where blocks are under way
        self._blocks: deque[Future[bytes]] = deque()
        self._readers = ThreadPoolExecutor(_BLOCKS_AHEAD, thread_name_prefix="shard")
        self._sha256 = hashlib.sha256() if hashed else None
        self._hashed: Future[None] | None = None
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="hash")

    def read(self, start: int, stop: int) -> bytes:
        """Bytes of the file; `start` never lies before a block that has gone by.

        Raises:
            SourceError: As for `Ranged`.
        """
        assert self._start <= start <= stop <= self.version.num_bytes, (self._start, start, stop)
        pieces = []
        while start < stop:
            if start >= self._end:
                self._next_block()
                continue
            piece = self._block[start - self._start : stop - self._start]
            pieces.append(piece)
            start += len(piece)
        return b"".join(pieces)

    def sha256(self) -> str:
        """Hash of the whole file, as hex digits, after reading what is left of it.

        Raises:
            SourceError: As for `Ranged`.
        """
        assert self._sha256 is not None, "made without a hash"
        while self._end < self.version.num_bytes:
            self._next_block()
        if self._hashed is not None:
            self._hashed.result()
        return self._sha256.hexdigest()

    def close(self) -> None:
        """Stop reading."""
        self._readers.shutdown(cancel_futures=True)
        self._hasher.shutdown()
        self._file.close()

    @property
    def _end(self) -> int:
        return self._start + len(self._block)

    def _next_block(self) -> None:
        while len(self._blocks) < _BLOCKS_AHEAD and self._asked < self.version.num_bytes:
            stop = min(self._asked + _BLOCK_BYTES, self.version.num_bytes)
            self._blocks.append(self._readers.submit(self._file.read, self._asked, stop))
            self._asked = stop
        block = self._blocks.popleft().result()
        self._start, self._block = self._end, block
        if self._sha256 is not None:
            if self._hashed is not None:
                self._hashed.result()  # one block behind, not more
            self._hashed = self._hasher.submit(self._sha256.update, block)
