"""WebDataset tar shards: what lies where in them, and the samples read from there.

A shard is indexed first, from its headers alone: a tar that is cut off or damaged looks
like a shorter one to a streaming reader, which stops without a word and mixes samples that
share a key. The index knows every member's place, says what is wrong with the file, and
is what samples are read by. Keys are names of samples and never paths.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import unquote

from kdhiera.data.clip import shown
from kdhiera.errors import DamagedError, UsageError
from kdhiera.views import RowStatus

_BLOCK_BYTES = 512
_END_BYTES = 2 * _BLOCK_BYTES  # two blocks of zeros end an archive
_LABEL_BYTES = 2**20
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBERS = re.compile(r"(\d+)\.\.(\d+)")
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own members
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_COMPRESSED_NAMES = (".tgz", ".gz", ".bz2", ".xz", ".zst", ".zip")


class ShardError(UsageError):
    """A file that is no tar shard at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A file of a sample.

    Args:
        extension: Lower case, all that follows the key's dot (`mp4`, `left.jpg`).
        offset: Where its bytes start in the shard.
        num_bytes: How many there are.
    """

    extension: str
    offset: int
    num_bytes: int


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


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What a shard holds, by its headers.

    Args:
        path: Local path.
        shard_id: `<stem>-<12 hex digits of the index's digest>`; safe as a file name.
        num_bytes: Size of the file.
        samples: In tar order.
        problems: What is wrong with the file, one line each.
    """

    path: str
    shard_id: str
    num_bytes: int
    samples: tuple[SampleRef, ...]
    problems: tuple[str, ...]

    def uid(self, sample: SampleRef) -> str:
        """Identity of a sample: the same wherever the shard lies, also if keys repeat."""
        return f"{self.shard_id}/{sample.offset}/{sample.key}"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample as read.

    Args:
        key: Name of the sample; not unique, not safe to print (`shown`).
        ordinal: Number of the sample in its shard.
        uid: Identity of the sample.
        offset: Where its first header starts in the shard.
        num_bytes: From there to the end of its last member.
        video: Encoded video, None unless the status is `ok`.
        labels: By name; empty where there are none.
        status: `ok`, `missing_member` or `decode_limit`.
        message: Why not, or what is wrong with the labels; empty if nothing is.
    """

    key: str
    ordinal: int
    uid: str
    offset: int
    num_bytes: int
    video: bytes | None
    labels: Mapping[str, str | int]
    status: RowStatus
    message: str


def expand(patterns: Sequence[str]) -> list[str]:
    """Paths of the shards that patterns name.

    Args:
        patterns: Local paths or `file://` addresses, with braces (`{000..099}`, `{train,val}`)
            and globs (`*`, `?`, `[..]`, `**`).

    Returns:
        Absolute paths in the order of the patterns (globs sorted), each file once.

    Raises:
        UsageError: If a pattern matches nothing or names another scheme or a compressed file.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        for path in expand_braces(_local(pattern)):
            matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
            if not matches:
                raise UsageError(
                    f"data.shards: no file matches '{shown(path)}' (of '{shown(pattern)}', looked "
                    f"in {os.getcwd()}): correct the path or the braces"
                )
            for match in matches:
                if match.lower().endswith(_COMPRESSED_NAMES):
                    raise UsageError(
                        f"data.shards: '{shown(match)}' is compressed; shards are read by offset, "
                        "so unpack it to a plain .tar (videos hardly shrink)"
                    )
                found.setdefault(os.path.realpath(match), os.path.abspath(match))
    return list(found.values())


def _local(pattern: str) -> str:
    if pattern.startswith("file://"):
        return unquote(pattern.removeprefix("file://"))
    if scheme := _SCHEME.match(pattern):
        raise UsageError(
            f"data.shards: '{shown(pattern)}' has the scheme '{scheme.group()}'; only local paths "
            "and file:// are read: mount or download the shards"
        )
    return pattern


def expand_braces(pattern: str) -> list[str]:
    """Every path that a pattern's braces stand for; the files need not exist."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    if numbers := _NUMBERS.fullmatch(match[1]):
        first, last = int(numbers[1]), int(numbers[2])
        step = 1 if first <= last else -1
        words = [f"{i:0{len(numbers[1])}d}" for i in range(first, last + step, step)]
    else:
        words = match[1].split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [path for word in words for path in expand_braces(head + word + tail)]


def shard_stem(path: str) -> str:
    """What the id of a shard at a path begins with, whatever the shard holds."""
    return (re.sub(r"[^A-Za-z0-9._-]", "_", Path(path).stem).strip(".") or "shard")[:100]


def index_shard(path: str) -> ShardIndex:
    """Read the headers of a shard and hold them against the file.

    Args:
        path: Local path of a tar file.

    Returns:
        The index of all that can be read; what cannot is among its problems.

    Raises:
        ShardError: If the file cannot be read, is empty, compressed, or no tar archive.
    """
    from webdataset.tariterators import base_plus_ext  # imports torch: seconds

    try:
        with open(path, "rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            members, problems = _headers(file, num_bytes)
    except ShardError as error:
        raise ShardError(f"{shown(path)} {error}") from error
    except OSError as error:
        raise ShardError(f"{shown(path)} cannot be read: {error.strerror}") from error
    digest = hashlib.sha256()
    for info in members:
        digest.update(f"{info.name!r} {info.offset} {info.size} {info.chksum}\n".encode())
    samples = _group(members, base_plus_ext)
    repeated = sum(count - 1 for count in Counter(sample.key for sample in samples).values())
    if repeated:
        problems.append(f"duplicate_keys: {repeated} samples have the key of an earlier one")
    if not samples:
        problems.append("no_samples: the archive holds no sample")
    return ShardIndex(
        path=os.path.abspath(path),
        shard_id=f"{shard_stem(path)}-{digest.hexdigest()[:12]}",
        num_bytes=num_bytes,
        samples=tuple(samples),
        problems=tuple(problems),
    )


def _headers(file: BinaryIO, num_bytes: int) -> tuple[list[tarfile.TarInfo], list[str]]:
    """The whole regular members of an archive, and what is wrong with the rest."""
    head = file.read(_BLOCK_BYTES)
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise ShardError(f"is compressed ({name}): unpack it to a plain .tar")
    file.seek(0)
    members: list[tarfile.TarInfo] = []
    skipped = 0
    problems: list[str] = []
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - owns nothing but the list
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
                members.append(info)
        problems += _check_end(file, tar.offset, num_bytes)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        problems.append(_truncated(tar.offset, num_bytes, str(error)))
    if skipped:
        problems.append(f"skipped_members: {skipped} members are links, sparse or special files")
    return members, problems


def _check_end(file: BinaryIO, offset: int, num_bytes: int) -> list[str]:
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
    members: Sequence[tarfile.TarInfo], split: Callable[[str], tuple[str | None, str | None]]
) -> list[SampleRef]:
    """Neighbours that share a key, as webdataset groups them; a second extension starts anew."""
    groups: list[tuple[str, list[tuple[tarfile.TarInfo, str]]]] = []
    for info in members:
        name = info.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        key, extension = split(name)
        if key is None or extension is None:
            continue
        extension = extension.lower()
        repeats = groups and extension in (found for _, found in groups[-1][1])
        if not groups or groups[-1][0] != key or repeats:
            groups.append((key, []))
        groups[-1][1].append((info, extension))
    return [
        SampleRef(
            key=key,
            ordinal=ordinal,
            offset=files[0][0].offset,
            num_bytes=files[-1][0].offset_data + files[-1][0].size - files[0][0].offset,
            members=tuple(
                Member(extension=extension, offset=info.offset_data, num_bytes=info.size)
                for info, extension in files
            ),
        )
        for ordinal, (key, files) in enumerate(groups)
    ]


def read_shard(
    index: ShardIndex,
    *,
    video_extensions: Sequence[str],
    label_extensions: Sequence[str] = ("json", "cls"),
    max_video_bytes: int | None = None,
) -> Iterator[Sample]:
    """Every sample of a shard, good or bad, in tar order.

    Args:
        index: Of the shard.
        video_extensions: Members with these extensions are videos; the first that a sample has.
        label_extensions: Of `json`, `cls` and `txt`: where labels are taken from.
        max_video_bytes: Larger videos are not read and become `decode_limit`.

    Yields:
        Samples.

    Raises:
        DamagedError: If the file is not the one that was indexed.
        OSError: If the file cannot be read.
    """
    with _open(index) as file:
        for ref in index.samples:
            yield _read(file, index, ref, video_extensions, label_extensions, max_video_bytes)


def read_sample(
    index: ShardIndex,
    ordinal: int,
    *,
    video_extensions: Sequence[str],
    label_extensions: Sequence[str] = ("json", "cls"),
    max_video_bytes: int | None = None,
) -> Sample:
    """One sample of a shard; see `read_shard`.

    Args:
        index: Of the shard.
        ordinal: Which of `index.samples`.
        video_extensions: As for `read_shard`.
        label_extensions: As for `read_shard`.
        max_video_bytes: As for `read_shard`.

    Raises:
        DamagedError: If the file is not the one that was indexed.
        OSError: If the file cannot be read.
    """
    ref = index.samples[ordinal]
    with _open(index) as file:
        return _read(file, index, ref, video_extensions, label_extensions, max_video_bytes)


def _open(index: ShardIndex) -> BinaryIO:
    file = open(index.path, "rb")  # noqa: SIM115 - the caller's with closes it
    size = os.fstat(file.fileno()).st_size
    if size == index.num_bytes:
        return file
    file.close()
    raise DamagedError(
        f"{index.path} has {size} bytes and had {index.num_bytes} when it was indexed: "
        "leave shards alone while they are read, and run the same command again"
    )


def _read(
    file: BinaryIO,
    index: ShardIndex,
    ref: SampleRef,
    video_extensions: Sequence[str],
    label_extensions: Sequence[str],
    max_video_bytes: int | None,
) -> Sample:
    status, message, video = RowStatus.OK, "", None
    labels, label_message = _labels(file, index, ref, label_extensions)
    member = _find(ref, video_extensions)
    if member is None:
        status = RowStatus.MISSING_MEMBER
        there = ", ".join(f".{shown(m.extension, 20)}" for m in ref.members[:10])
        message = f"no member ends in {', '.join(video_extensions)}; there is {there}"
    elif max_video_bytes is not None and member.num_bytes > max_video_bytes:
        status = RowStatus.DECODE_LIMIT
        message = f"{member.num_bytes} bytes of video, decode.max_video_bytes is {max_video_bytes}"
    else:
        video = _bytes(file, index, member)
    return Sample(
        key=ref.key,
        ordinal=ref.ordinal,
        uid=index.uid(ref),
        offset=ref.offset,
        num_bytes=ref.num_bytes,
        video=video,
        labels=labels,
        status=status,
        message="; ".join(filter(None, (message, label_message))),
    )


def _find(ref: SampleRef, extensions: Sequence[str]) -> Member | None:
    """The first member with one of the extensions (`cam0.mp4` ends in mp4), the first first."""
    for extension in extensions:
        wanted = extension.lower().removeprefix(".")
        for member in ref.members:
            if member.extension == wanted or member.extension.endswith(f".{wanted}"):
                return member
    return None


def _bytes(file: BinaryIO, index: ShardIndex, member: Member) -> bytes:
    file.seek(member.offset)
    data = file.read(member.num_bytes)
    if len(data) != member.num_bytes:
        raise DamagedError(f"{index.path} became shorter while it was read: run again")
    return data


def _labels(
    file: BinaryIO, index: ShardIndex, ref: SampleRef, extensions: Sequence[str]
) -> tuple[dict[str, str | int], str]:
    """Labels of a sample, and what is wrong with them: never a reason to lose the sample."""
    labels: dict[str, str | int] = {}
    for extension in extensions:
        member = _find(ref, [extension])
        if member is None:
            continue
        if member.num_bytes > _LABEL_BYTES:
            return {}, f"labels left out: .{extension} has {member.num_bytes} bytes"
        try:
            labels |= _parse(extension, _bytes(file, index, member).decode())
        except (ValueError, RecursionError) as error:
            return {}, shown(f"labels left out: .{extension} cannot be read ({error})")
    return labels, ""


def _parse(extension: str, text: str) -> dict[str, str | int]:
    """Labels in a member: JSON's `labels`, or else its plain fields; a class; a text."""
    if extension == "cls":
        return {"cls": int(text)}
    if extension == "txt":
        return {"txt": text.strip()}
    if extension != "json":
        raise ValueError("labels are read from json, cls and txt")
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    fields = cast("dict[str, object]", content.get("labels", content))
    if not isinstance(fields, dict):
        raise ValueError("its labels are no JSON object")
    return {
        name: value
        for name, value in fields.items()
        if isinstance(value, str) or (type(value) is int and -(2**63) <= value < 2**63)
    }
