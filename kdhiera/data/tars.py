"""The headers of a tar archive: what lies where in it, and what is wrong with it.

A tar that is cut off or damaged looks like a shorter one to a streaming reader, which stops
without a word and mixes samples that share a key. Here the headers are followed from one to
the next and held against the size of the file; no member is read.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import google_crc32c

from kdhiera.data.clip import shown
from kdhiera.data.ranges import REQUEST_BYTES, Ranged
from kdhiera.errors import UsageError

BLOCK_BYTES = 512
_END_BYTES = 2 * BLOCK_BYTES  # two blocks of zeros end an archive
_MAX_HEADER_BYTES = 2**26
_LEAST_BYTES, _MOST_BYTES = 2**14, 2**22  # read at once where headers lie far apart, and close
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own members
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

_Found = tuple[tarfile.TarInfo, int]  # a member and the crc32c of its header block


class ShardError(UsageError):
    """A file that is no tar shard at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A file of a sample.

    Args:
        extension: Lower case, all that follows the key's dot (`mp4`, `left.jpg`).
        offset: Where its bytes start in the shard.
        num_bytes: How many there are.
        header_crc32c: Of the header block before them, which is read and checked with them.
    """

    extension: str
    offset: int
    num_bytes: int
    header_crc32c: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRef:
    """Where a sample lies.

    Args:
        key: Name of the sample; need not be unique.
        ordinal: Number of the sample in its shard, 0 upwards, in tar order.
        offset: Where its first header starts in the shard.
        num_bytes: From there to the end of its last member.
        members: Its files, in tar order.
    """

    key: str
    ordinal: int
    offset: int
    num_bytes: int
    members: tuple[Member, ...]


def read_headers(file: Ranged) -> tuple[list[SampleRef], str, list[str]]:
    """What an archive holds.

    Args:
        file: The archive.

    Returns:
        Its samples in tar order, a digest of all headers as hex digits, and what is wrong
        with the archive, one line each.

    Raises:
        ShardError: If it is empty, compressed, or no tar archive.
        SourceError: If it cannot be read.
    """
    from webdataset.tariterators import base_plus_ext  # imports torch: seconds

    members, problems = _members(HeaderReader(file), file.version.num_bytes)
    digest = hashlib.sha256()
    for info, _ in members:
        digest.update(f"{info.name!r} {info.offset} {info.size} {info.chksum}\n".encode())
    return _group(members, base_plus_ext), digest.hexdigest(), problems


class HeaderReader:
    """A file for `tarfile` that goes from header to header with few and small requests.

    Where the next header lies close behind what was read, more is read at once the next
    time; where it lies far behind, only a little, and what is between is never read.

    Args:
        file: The file.
    """

    def __init__(self, file: Ranged) -> None:
        self._file = file
        self._at = 0
        self._window = b""
        self._start = 0
        self._ahead = _LEAST_BYTES

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def seek(self, offset: int) -> int:
        """Go to a place; nothing is read yet."""
        self._at = offset
        return offset

    def read(self, size: int) -> bytes:
        """Bytes from here on, fewer at the end of the file.

        Raises:
            MemoryError: If more is asked for than any header has.
        """
        if size > _MAX_HEADER_BYTES:
            raise MemoryError(f"a header claims {size} bytes")
        stop = max(self._at, min(self._at + size, self._file.version.num_bytes))
        end = self._start + len(self._window)
        if stop > self._at and not self._start <= self._at <= stop <= end:
            self._fetch(stop, gap=self._at - end)
        data = self._window[self._at - self._start : stop - self._start]
        self._at = stop
        return data

    def _fetch(self, stop: int, gap: int) -> None:
        near = gap <= REQUEST_BYTES
        self._ahead = min(2 * self._ahead, _MOST_BYTES) if near else _LEAST_BYTES
        end = min(max(stop, self._at + self._ahead), self._file.version.num_bytes)
        self._window = self._file.read(self._at, end)
        self._start = self._at


def _members(file: HeaderReader, num_bytes: int) -> tuple[list[_Found], list[str]]:
    """The whole regular members of an archive, and what is wrong with the rest."""
    head = file.read(BLOCK_BYTES)
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise ShardError(f"is compressed ({name}): unpack it to a plain .tar")
    file.seek(0)
    members: list[_Found] = []
    skipped = 0
    problems: list[str] = []
    try:
        tar = tarfile.open(fileobj=cast("Any", file), mode="r:")  # noqa: SIM115 - owns nothing
    except tarfile.TarError as error:
        start = shown(head[:16].decode("latin-1"))
        reason = f"starts with '{start}'" if head else "is empty"
        raise ShardError(f"is no tar archive ({num_bytes} bytes, {reason}): {error}") from error
    at = -1
    try:
        while (info := tar.next()) is not None:
            if info.size < 0 or tar.offset <= at:
                raise tarfile.ReadError("a size that makes no sense")
            if info.isreg() and info.offset_data + info.size > num_bytes:
                raise tarfile.ReadError(f"the file ends inside member '{shown(info.name)}'")
            at = tar.offset
            if not info.isreg() or info.issparse():
                skipped += not info.isdir()
            elif not _META.match(info.name):
                file.seek(info.offset_data - BLOCK_BYTES)
                members.append((info, google_crc32c.value(file.read(BLOCK_BYTES))))
        problems += _check_end(file, tar.offset, num_bytes)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        problems.append(_truncated(tar.offset, num_bytes, str(error)))
    if skipped:
        problems.append(f"skipped_members: {skipped} members are links, sparse or special files")
    return members, problems


def _check_end(file: HeaderReader, offset: int, num_bytes: int) -> list[str]:
    """Whether an archive ends as archives do, after the last header that could be read."""
    file.seek(offset)
    end = file.read(_END_BYTES)
    if end.strip(b"\0"):
        return [_truncated(offset, num_bytes, "the header there cannot be read")]
    if len(end) < _END_BYTES:
        return [_truncated(offset, num_bytes, "no end-of-archive blocks follow")]
    while block := file.read(2**20):
        if block.strip(b"\0"):
            return [f"trailing_data: {num_bytes - offset} bytes follow the end of the archive"]
    return []


def _truncated(offset: int, num_bytes: int, reason: str) -> str:
    return f"shard_truncated: readable up to byte {offset} of {num_bytes}: {reason}"


def _group(
    members: Sequence[_Found], split: Callable[[str], tuple[str | None, str | None]]
) -> list[SampleRef]:
    """Neighbours that share a key, as webdataset groups them; a second extension starts anew."""
    groups: list[tuple[str, list[tuple[tarfile.TarInfo, Member]]]] = []
    for info, header_crc32c in members:
        name = info.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        key, extension = split(name)
        if key is None or extension is None:
            continue
        extension = extension.lower()
        repeats = groups and extension in (found.extension for _, found in groups[-1][1])
        if not groups or groups[-1][0] != key or repeats:
            groups.append((key, []))
        member = Member(
            extension=extension,
            offset=info.offset_data,
            num_bytes=info.size,
            header_crc32c=header_crc32c,
        )
        groups[-1][1].append((info, member))
    return [
        SampleRef(
            key=key,
            ordinal=ordinal,
            offset=files[0][0].offset,
            num_bytes=files[-1][0].offset_data + files[-1][0].size - files[0][0].offset,
            members=tuple(member for _, member in files),
        )
        for ordinal, (key, files) in enumerate(groups)
    ]
