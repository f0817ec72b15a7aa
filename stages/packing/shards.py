"""The work of packing: videos are looked at and written, shard by shard."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from threading import Event

from kdhiera.config import DecodeConfig
from kdhiera.data.clip import DecodeFailure, DecodeLimits, Look, LookRequest, shown
from kdhiera.data.folders import Skipped, VideoFile
from kdhiera.data.packing import ShardWriter, describe_sample, sample_bytes
from kdhiera.data.sandbox import Sandbox
from kdhiera.errors import KdhieraError, StoppedError
from kdhiera.machine import num_cpus
from kdhiera.progress import Progress
from kdhiera.stages.packing.journal import Journal, PackedShard, shard_name
from kdhiera.stages.packing.order import PackSettings
from kdhiera.stopping import stop_on_signals
from kdhiera.storage import atomic_file
from kdhiera.views import RowStatus

_AHEAD_BYTES = 2**28  # of videos that are held while they are looked at; one may be larger


def fill(
    folder: Path,
    journal: Journal,
    queues: Mapping[str, Sequence[VideoFile]],
    keys: Mapping[str, str],
    settings: PackSettings,
    progress: Progress,
) -> None:
    """Pack what the journal does not have yet.

    Args:
        folder: Where the shards go.
        journal: Of what is there; told of every shard.
        queues: Videos by split, in order.
        keys: By name of video.
        settings: How.
        progress: Where progress is shown.

    Raises:
        KdhieraError: If the disk is full, or a video changes meanwhile.
        StoppedError: After SIGTERM or SIGINT.
    """
    left = {split: queue[journal.taken(split) :] for split, queue in queues.items()}
    total = sum(map(len, left.values()))
    if not total:
        return
    limits = DecodeLimits(**DecodeConfig().model_dump(exclude={"num_children"}))
    children = settings.num_children or num_cpus()
    num_skipped = 0

    def advance(packed: int, skipped: int) -> None:
        nonlocal num_skipped
        num_skipped += skipped
        progress.advance(bar, packed + skipped, skipped=num_skipped)

    looking = Sandbox(limits, num_children=children) if settings.check else nullcontext()
    with stop_on_signals() as stop, looking as sandbox:
        bar = progress.start("pack", total, "videos")
        for split, queue in left.items():
            _fill_split(
                folder,
                split,
                _Good(_looked(queue, sandbox, limits, ahead=children)),
                journal=journal,
                keys=keys,
                settings=settings,
                stop=stop,
                advance=advance,
            )
        progress.finish(bar)


_Looked = tuple[VideoFile, "bytes | Skipped"]


def _looked(
    videos: Sequence[VideoFile], sandbox: Sandbox | None, limits: DecodeLimits, *, ahead: int
) -> Iterator[_Looked]:
    """Every video's bytes, or why it is skipped; a bounded number is read ahead."""
    waiting: deque[tuple[VideoFile, bytes | Skipped, Future[Look | DecodeFailure] | None]] = deque()

    def first() -> _Looked:
        video, content, look = waiting.popleft()
        outcome = None if look is None else look.result()
        failure = outcome.failure if isinstance(outcome, Look) else outcome
        if failure is not None:
            status, reason = failure.status.value, failure.message
            return video, Skipped(name=video.name, status=status, reason=reason)
        return video, content

    for video in videos:
        content = _read(video, limits if sandbox is not None else None)
        look = None
        if sandbox is not None and isinstance(content, bytes):
            look = sandbox.look(content, LookRequest(indices=()))
        waiting.append((video, content, look))
        while len(waiting) > ahead or sum(v.num_bytes for v, _, _ in waiting) > _AHEAD_BYTES:
            yield first()
    while waiting:
        yield first()


def _read(video: VideoFile, limits: DecodeLimits | None) -> bytes | Skipped:
    """All bytes of a video that is still the one that was listed.

    Raises:
        KdhieraError: If it is another one by now.
    """
    if limits is not None and video.num_bytes > limits.max_video_bytes:
        reason = (
            f"{video.num_bytes} bytes, decode.max_video_bytes is {limits.max_video_bytes} unless "
            "a config sets it; --no-check packs the video"
        )
        return Skipped(name=video.name, status=RowStatus.DECODE_LIMIT.value, reason=reason)
    try:
        with open(video.path, "rb") as file:
            found = os.fstat(file.fileno())
            data = file.read()
    except OSError as error:
        reason = error.strerror or str(error)
        return Skipped(name=video.name, status="not_readable", reason=reason)
    if (found.st_size, found.st_mtime_ns) != (video.num_bytes, video.modified_ns) or len(
        data
    ) != video.num_bytes:
        raise KdhieraError(
            f"{shown(video.path)} changed after it was listed: leave the videos alone while they "
            "are packed, and start again with --overwrite"
        )
    return data


class _Good:
    """The good videos of a stream, one ahead; keeps count of all that were taken.

    Args:
        looked: Videos with their bytes, or why they are skipped.
    """

    def __init__(self, looked: Iterator[_Looked]) -> None:
        self._looked = looked
        self._held: tuple[VideoFile, bytes] | None = None
        self._taken = 0
        self._skipped: list[Skipped] = []

    def peek(self) -> tuple[VideoFile, bytes] | None:
        """The next good one, None if there is none."""
        while self._held is None and (found := next(self._looked, None)) is not None:
            video, content = found
            if isinstance(content, Skipped):
                self._skipped.append(content)
                self._taken += 1
            else:
                self._held = video, content
        return self._held

    def drop(self) -> None:
        """Take the one that `peek` shows."""
        self._held = None
        self._taken += 1

    def count(self) -> tuple[int, tuple[Skipped, ...]]:
        """Videos taken since the last call, and those of them that were skipped."""
        counted_now = self._taken, tuple(self._skipped)
        self._taken, self._skipped = 0, []
        return counted_now


def _fill_split(
    folder: Path,
    split: str,
    good: _Good,
    *,
    journal: Journal,
    keys: Mapping[str, str],
    settings: PackSettings,
    stop: Event,
    advance: Callable[[int, int], None],
) -> None:
    """Pack shard by shard until no video is left.

    Args:
        folder: Where they go.
        split: What they are called.
        good: The videos.
        journal: Told of every shard.
        keys: By name of video.
        settings: How.
        stop: Set when this is to end.
        advance: Told how many videos were taken, and how many of them were skipped.
    """
    while good.peek() is not None:
        name = shard_name(split, journal.num_files(split))
        with atomic_file(folder / name) as file:
            writer = ShardWriter(file)
            num_samples = size = 0
            while (found := good.peek()) is not None and num_samples < settings.max_per_shard:
                video, data = found
                about = describe_sample(video.labels, video.name)
                size += sample_bytes(len(data), len(about))
                if num_samples and size > settings.shard_bytes:
                    break
                if stop.is_set():
                    raise StoppedError(
                        f"stopped: whole shards in {folder} are kept; the same command goes on"
                    )
                writer.add(keys[video.name], video.extension, data, about)
                num_samples += 1
                good.drop()
                advance(1, 0)
            num_bytes, sha256 = writer.close()
        taken, skipped = good.count()
        advance(0, len(skipped))
        journal.append(
            PackedShard(
                split=split,
                file=name,
                num_samples=num_samples,
                num_bytes=num_bytes,
                sha256=sha256,
                taken=taken,
                skipped=skipped,
            )
        )
    taken, skipped = good.count()
    if taken:  # none of them good
        advance(0, len(skipped))
        journal.append(
            PackedShard(
                split=split, file=None, num_samples=0, num_bytes=0, sha256="", taken=taken,
                skipped=skipped,
            )
        )  # fmt: skip
