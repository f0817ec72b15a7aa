"""WebDataset tar shards: what lies where in them, and the samples read from there.

A shard is indexed first, from its headers alone (`tars`): the index knows every member's
place, says what is wrong with the file, and is what samples are read by. Keys are names of
samples and never paths.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import cast

import google_crc32c

from kdhiera.addresses import scheme_of
from kdhiera.data.clip import shown
from kdhiera.data.ranges import REQUEST_BYTES, Forward, Ranged, SourceError, open_ranged
from kdhiera.data.tars import BLOCK_BYTES, Member, SampleRef, ShardError, read_headers
from kdhiera.stores import FileVersion
from kdhiera.views import RowStatus

_LABEL_BYTES = 2**20
_INDEXERS = 32  # a bucket takes its time to answer


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What a shard holds, by its headers.

    Args:
        path: Absolute path or `s3://` address.
        shard_id: `<stem>-<12 hex digits of the index's digest>`; safe as a file name, and the
            same wherever the shard lies.
        version: Which file was indexed.
        samples: In tar order.
        problems: What is wrong with the file, one line each.
    """

    path: str
    shard_id: str
    version: FileVersion
    samples: tuple[SampleRef, ...]
    problems: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self.version.num_bytes

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


def try_index_shards(paths: Sequence[str]) -> Iterator[ShardIndex | ShardError]:
    """The index of each shard, or why it has none; some are made at once.

    Args:
        paths: From `patterns.expand`.

    Yields:
        What `index_shard` returns or raises, in the order of the paths.
    """

    def index(path: str) -> ShardIndex | ShardError:
        try:
            return index_shard(path)
        except ShardError as error:
            return error

    with ThreadPoolExecutor(_INDEXERS) as pool:
        yield from pool.map(index, paths)


def index_shards(paths: Sequence[str]) -> list[ShardIndex]:
    """The indices of shards, all of which must have one.

    Args:
        paths: From `patterns.expand`.

    Raises:
        ShardError: For the first that cannot be read or is no tar archive.
    """
    indices = []
    for index in try_index_shards(paths):
        if isinstance(index, ShardError):
            raise index
        indices.append(index)
    return indices


def shard_stem(path: str) -> str:
    """What the id of a shard at a path begins with, whatever the shard holds."""
    return (re.sub(r"[^A-Za-z0-9._-]", "_", Path(path).stem).strip(".") or "shard")[:100]


def index_shard(path: str) -> ShardIndex:
    """Read the headers of a shard and hold them against the file.

    Args:
        path: Local path or `s3://` address of a tar file.

    Returns:
        The index of all that can be read; what cannot is among its problems.

    Raises:
        ShardError: If the file cannot be read, is empty, compressed, or no tar archive.
    """
    try:
        with closing(open_ranged(path)) as file:
            version = file.version
            samples, digest, problems = read_headers(file)
    except SourceError as error:
        raise ShardError(str(error)) from error
    except ShardError as error:
        raise ShardError(f"{shown(path)} {error}") from error
    repeated = sum(count - 1 for count in Counter(sample.key for sample in samples).values())
    if repeated:
        problems.append(f"duplicate_keys: {repeated} samples have the key of an earlier one")
    if not samples:
        problems.append("no_samples: the archive holds no sample")
    return ShardIndex(
        path=path if scheme_of(path) == "s3:" else os.path.abspath(path),
        shard_id=f"{shard_stem(path)}-{digest[:12]}",
        version=version,
        samples=tuple(samples),
        problems=tuple(problems),
    )


class ShardPass:
    """One reading of a whole shard, front to back; a context manager.

    Args:
        index: Of the shard.
        video_extensions: Members with these extensions are videos; the first that a sample has.
        label_extensions: Of `json`, `cls` and `txt`: where labels are taken from.
        max_video_bytes: Larger videos are passed over and become `decode_limit`.
        hashed: Whether `sha256` will be asked for.

    Raises:
        SourceError: If the file cannot be read, or is not the one that was indexed.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        video_extensions: Sequence[str],
        label_extensions: Sequence[str] = ("json", "cls"),
        max_video_bytes: int | None = None,
        hashed: bool = True,
    ) -> None:
        self._index = index
        self._reading = video_extensions, label_extensions, max_video_bytes
        file = open_ranged(index.path, version=index.version)
        self._file = Forward(file, hashed=hashed)

    def __enter__(self) -> ShardPass:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def samples(self) -> Iterator[Sample]:
        """Every sample, good or bad, in tar order; to be called once.

        Raises:
            SourceError: If the file cannot be read, or is not the one that was indexed.
        """
        for ref in self._index.samples:
            yield _read(self._file, self._index, ref, *self._reading)

    def sha256(self) -> str:
        """Hash of all bytes of the shard, those that the samples were made of among them.

        Raises:
            SourceError: If the file cannot be read, or is not the one that was indexed.
        """
        return self._file.sha256()


def shard_sha256(index: ShardIndex) -> str:
    """Hash of all bytes of a shard, as hex digits.

    Raises:
        SourceError: If the file cannot be read, or is not the one that was indexed.
    """
    with closing(Forward(open_ranged(index.path, version=index.version), hashed=True)) as file:
        return file.sha256()


def read_shard(
    index: ShardIndex,
    *,
    video_extensions: Sequence[str],
    label_extensions: Sequence[str] = ("json", "cls"),
    max_video_bytes: int | None = None,
) -> Iterator[Sample]:
    """Every sample of a shard, good or bad, in tar order; see `ShardPass`."""
    with ShardPass(
        index,
        video_extensions=video_extensions,
        label_extensions=label_extensions,
        max_video_bytes=max_video_bytes,
        hashed=False,
    ) as shard:
        yield from shard.samples()


def read_sample(
    index: ShardIndex,
    ordinal: int,
    *,
    video_extensions: Sequence[str],
    label_extensions: Sequence[str] = ("json", "cls"),
    max_video_bytes: int | None = None,
) -> Sample:
    """One sample of a shard, by as few reads as its members lie apart.

    Args:
        index: Of the shard.
        ordinal: Which of `index.samples`.
        video_extensions: As for `ShardPass`.
        label_extensions: As for `ShardPass`.
        max_video_bytes: As for `ShardPass`.

    Raises:
        SourceError: If the file cannot be read, or is not the one that was indexed.
    """
    ref = index.samples[ordinal]
    with closing(open_ranged(index.path, version=index.version)) as file:
        return _read(file, index, ref, video_extensions, label_extensions, max_video_bytes)


def _read(
    file: Ranged,
    index: ShardIndex,
    ref: SampleRef,
    video_extensions: Sequence[str],
    label_extensions: Sequence[str],
    max_video_bytes: int | None,
) -> Sample:
    status, message = RowStatus.OK, ""
    labels = {e: member for e in label_extensions if (member := _find(ref, [e])) is not None}
    wanted = [member for member in labels.values() if member.num_bytes <= _LABEL_BYTES]
    video = _find(ref, video_extensions)
    if video is None:
        status = RowStatus.MISSING_MEMBER
        there = ", ".join(f".{shown(m.extension, 20)}" for m in ref.members[:10])
        message = f"no member ends in {', '.join(video_extensions)}; there is {there}"
    elif max_video_bytes is not None and video.num_bytes > max_video_bytes:
        status = RowStatus.DECODE_LIMIT
        message = f"{video.num_bytes} bytes of video, decode.max_video_bytes is {max_video_bytes}"
    else:
        wanted.append(video)
    contents = _contents(file, index, wanted)
    parsed, label_message = _labels(labels, contents)
    return Sample(
        key=ref.key,
        ordinal=ref.ordinal,
        uid=index.uid(ref),
        offset=ref.offset,
        num_bytes=ref.num_bytes,
        video=contents[video] if video is not None and status is RowStatus.OK else None,
        labels=parsed,
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


def _contents(file: Ranged, index: ShardIndex, members: Sequence[Member]) -> dict[Member, bytes]:
    """Contents of members, read with their headers in the order of the file.

    What lies between two that are wanted is read along where that is cheaper than another
    request.
    """
    runs: list[list[Member]] = []
    for member in sorted(set(members), key=lambda member: member.offset):
        gap = member.offset - (runs[-1][-1].offset + runs[-1][-1].num_bytes) if runs else 0
        if not runs or gap > REQUEST_BYTES:
            runs.append([])
        runs[-1].append(member)
    contents: dict[Member, bytes] = {}
    for run in runs:
        start = run[0].offset - BLOCK_BYTES
        data = memoryview(file.read(start, run[-1].offset + run[-1].num_bytes))
        for member in run:
            at = member.offset - start
            if google_crc32c.value(bytes(data[at - BLOCK_BYTES : at])) != member.header_crc32c:
                raise SourceError(
                    f"{shown(index.path)} does not hold at byte {member.offset} what was indexed "
                    "there: leave shards alone while they are read, and run the same command again"
                )
            contents[member] = bytes(data[at : at + member.num_bytes])
    return contents


def _labels(
    members: Mapping[str, Member], contents: Mapping[Member, bytes]
) -> tuple[dict[str, str | int], str]:
    """Labels of a sample, and what is wrong with them: never a reason to lose the sample."""
    labels: dict[str, str | int] = {}
    for extension, member in members.items():
        if member not in contents:
            return {}, f"labels left out: .{extension} has {member.num_bytes} bytes"
        try:
            labels |= _parse(extension, contents[member].decode())
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
