"""Videos in a folder, or named by a table, into WebDataset shards.

The order of the videos, and with it every byte of every shard, follows from the files and
the settings. A shard is written under another name, synced and renamed; then a line in
`pack.jsonl` says which videos it holds. Killed at any instant, the same call goes on behind
the last line.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from filelock import FileLock, Timeout

from kdhiera.addresses import scheme_of
from kdhiera.config import DecodeConfig
from kdhiera.config.videos import DataConfig
from kdhiera.data.clip import DecodeFailure, DecodeLimits, Look, shown
from kdhiera.data.folders import (
    TABLES,
    Listing,
    Skipped,
    VideoFile,
    list_folder,
    read_table,
)
from kdhiera.data.keys import make_keys
from kdhiera.data.packing import ShardWriter, describe_sample, sample_bytes
from kdhiera.data.sandbox import Sandbox
from kdhiera.errors import ExitCode, KdhieraError, StoppedError, UsageError
from kdhiera.progress import Progress, counted, human_bytes
from kdhiera.stages.pack_journal import JOURNAL, Journal, PackedShard, shard_name
from kdhiera.stopping import stop_on_signals
from kdhiera.storage import atomic_file, disk_errors, is_temporary, make_folder, write_atomic
from kdhiera.views import RowStatus, stable_uniforms

SKIPPED = "skipped.csv"
EXTENSIONS: tuple[str, ...] = DataConfig.model_fields["video_extensions"].default
WHOLE = "videos"  # what shards are called where there are no splits
REST = "train"  # the split of what no share takes
_SPLIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,40}")
_SHOWN_LABELS = 12
_LEAST_TO_JUDGE = 20  # videos


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """How videos are packed; each of these changes the shards, but for `num_children`.

    Args:
        shard_bytes: A shard is ended before it has more; a larger video has a shard of its own.
        max_per_shard: Most samples of a shard.
        folder_labels: Whether the first folder below the source is the label `class`.
        splits: Share of the videos by name of split, in (0, 1); the rest is `train`. A video's
            split depends on its path and the seed alone.
        split_column: Column of the table that names the split instead.
        shuffle: Mix the videos, so that shards are alike; otherwise they are in order of path.
        seed: Of the mixing and the splits.
        check: Look at every video and leave out those that cannot be read.
        extensions: Files with these are videos, in lower case.
        max_bad_fraction: More skipped videos than this share are too many, of 20 at least.
        num_children: Processes that look; 0 means one a CPU.
    """

    shard_bytes: int = 256 * 10**6
    max_per_shard: int = 1000
    folder_labels: bool = False
    splits: Mapping[str, float] = field(default_factory=dict)
    split_column: str | None = None
    shuffle: bool = False
    seed: int = 0
    check: bool = True
    extensions: tuple[str, ...] = EXTENSIONS
    max_bad_fraction: float = 0.1
    num_children: int = 0

    def __post_init__(self) -> None:
        for name, share in self.splits.items():
            if not _SPLIT.fullmatch(name) or name == REST:
                raise UsageError(
                    f"--split {shown(name)}={share:g}: a split is named with letters, digits, _ "
                    f"and -, and `{REST}` is what the others leave: write --split validation=0.1"
                )
            if not 0 < share < 1:
                raise UsageError(f"--split {name}={share:g}: a share lies between 0 and 1")
        if sum(self.splits.values()) >= 1:
            raise UsageError(f"the splits leave nothing for `{REST}`: make their shares smaller")
        if self.splits and self.split_column is not None:
            raise UsageError("splits come from shares or from a column: use only one of the two")

    def identity(self) -> dict[str, Any]:
        """All that changes the shards."""
        values = asdict(self)
        for name in ("max_bad_fraction", "num_children"):
            values.pop(name)
        return {**values, "extensions": sorted(self.extensions)}


@dataclass(frozen=True, kw_only=True)
class PackSummary:
    """What was packed.

    Args:
        out: Folder of the shards.
        shards: In order; by split, and as they are numbered.
        skipped: What was asked for and is not in them.
        passed_by: What lies in the folder and is no video.
        labels: Values by label, with their counts.
        max_bad_fraction: As in the settings.
    """

    out: str
    shards: tuple[PackedShard, ...]
    skipped: tuple[Skipped, ...]
    passed_by: Mapping[str, int]
    labels: Mapping[str, Mapping[str, int]]
    max_bad_fraction: float

    @property
    def num_videos(self) -> int:
        """Videos in the shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def exit_code(self) -> ExitCode:
        """Too much bad data, or done."""
        bad, total = len(self.skipped), len(self.skipped) + self.num_videos
        many = total >= _LEAST_TO_JUDGE and bad > self.max_bad_fraction * total
        return ExitCode.TOO_MUCH_BAD_DATA if many or not self.num_videos else ExitCode.OK

    def patterns(self) -> dict[str, str]:
        """Paths of the shards with braces, by split."""
        files: dict[str, list[str]] = {}
        for shard in self.shards:
            if shard.file is not None:
                files.setdefault(shard.split, []).append(shard.file)
        return {split: f"{self.out}/{_braces(names)}" for split, names in files.items()}

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "out": self.out,
            "num_videos": self.num_videos,
            "patterns": self.patterns(),
            "shards": [
                {k: v for k, v in asdict(shard).items() if k != "skipped"}
                for shard in self.shards
                if shard.file is not None
            ],
            "skipped": [asdict(skipped) for skipped in self.skipped],
            "passed_by": dict(self.passed_by),
            "labels": {label: dict(values) for label, values in self.labels.items()},
        }

    def describe(self) -> str:
        """For people."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for split, pattern in self.patterns().items():
            of_split = [s for s in self.shards if s.split == split and s.file is not None]
            videos = counted(sum(s.num_samples for s in of_split), "video")
            size = human_bytes(sum(s.num_bytes for s in of_split))
            yield f"packed    {videos}, {counted(len(of_split), 'shard')}, {size}: {pattern}"
        for label, values in self.labels.items():
            some = ", ".join(
                f"{shown(value, 40)} {count:,}"
                for value, count in [*values.items()][:_SHOWN_LABELS]
            )
            more = ", ..." if len(values) > _SHOWN_LABELS else ""
            yield f"label     {shown(label, 40)}: {counted(len(values), 'value')} ({some}{more})"
        if self.skipped:
            kinds = Counter(skipped.status for skipped in self.skipped)
            said = ", ".join(f"{count:,} {status}" for status, count in sorted(kinds.items()))
            files = counted(len(self.skipped), "file")
            yield f"skipped   {files} ({said}): see {self.out}/{SKIPPED}"
        if self.passed_by:
            said = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.passed_by.items()))
            yield f"passed by {said}"
        if self.num_videos:
            yield f"next      kdhiera init my.yaml --videos {self.out}"
        if self.exit_code:
            yield (
                f"too many of the videos cannot be packed ({len(self.skipped):,} of "
                f"{len(self.skipped) + self.num_videos:,}): look at {self.out}/{SKIPPED}"
            )


def pack(
    source: str,
    out: str,
    *,
    settings: PackSettings | None = None,
    overwrite: bool = False,
    progress: Progress,
) -> PackSummary:
    """Pack videos into tar shards, byte by byte as they are.

    Args:
        source: A folder of videos, or a `.csv` or `.tsv` table of paths and labels.
        out: Folder of the shards; it is made.
        settings: How.
        overwrite: Remove what an earlier call made there, and start anew.
        progress: Where progress is shown.

    Raises:
        UsageError: If there is no video, a table is wrong, or the folder holds other shards.
        MismatchError: If the folder's shards were begun from other videos or settings.
        KdhieraError: If the disk is full, or a video changes meanwhile.
        StoppedError: After SIGTERM or SIGINT; the same call goes on.
    """
    settings = settings or PackSettings()
    if scheme_of(out) and "://" in out:
        raise UsageError(
            f"shards are packed into a folder of this machine, and {out.partition('?')[0]} is an "
            "address: pack into a folder, and copy the shards there afterwards"
        )
    folder = Path(out)
    listing = _list(source, settings, folder)
    queues = _queues(listing.videos, settings)
    keys = dict(
        zip(
            (video.name for video in listing.videos),
            make_keys([video.name for video in listing.videos]),
            strict=True,
        )
    )
    with disk_errors(folder):
        make_folder(folder)
    with _locked(folder), disk_errors(folder / JOURNAL):
        journal = Journal.open(
            folder,
            settings=settings.identity(),
            videos={
                "count": len(listing.videos),
                "splits": list(queues),
                "sha256": listing.digest(),
            },
            overwrite=overwrite,
        )
        for name in os.listdir(folder):
            if is_temporary(name):  # of a call that was killed
                (folder / name).unlink()
        _fill(folder, journal, queues, keys, settings, progress)
        skipped = (*listing.skipped, *(s for shard in journal.shards for s in shard.skipped))
        _write_skipped(folder / SKIPPED, skipped)
    return PackSummary(
        out=out.rstrip("/") or "/",
        shards=journal.shards,
        skipped=skipped,
        passed_by=listing.passed_by,
        labels=_count_labels(queues, journal),
        max_bad_fraction=settings.max_bad_fraction,
    )


def _list(source: str, settings: PackSettings, out: Path) -> Listing:
    """What there is to be packed.

    Raises:
        UsageError: If that is nothing.
    """
    path = Path(source)
    if path.is_dir():
        if settings.split_column is not None:
            raise UsageError("--split-column names a column of a table, and the source is a folder")
        listing = list_folder(
            path,
            extensions=settings.extensions,
            folder_labels=settings.folder_labels,
            leave_out=out,
        )
        found = ", ".join(f"{n:,} {kind}" for kind, n in sorted(listing.passed_by.items()))
        shards = ".tar files" in listing.passed_by
        advice = "name a folder with videos"
        if shards:
            advice = "tar shards need no packing: `kdhiera init my.yaml --videos 'FOLDER/*.tar'`"
        elif listing.passed_by:
            advice = "--extension NAME makes other files videos"
    elif path.suffix.lower() in TABLES and path.is_file():
        if settings.folder_labels:
            raise UsageError("--labels folder is for a folder: a table's labels are its columns")
        listing = read_table(
            path, extensions=settings.extensions, split_column=settings.split_column
        )
        found = ", ".join(f"{s.name}: {s.reason}" for s in listing.skipped[:3])
        advice = "correct the paths, which are relative to the table's folder"
    else:
        what = "no folder and no .csv or .tsv table" if path.exists() else "not there"
        raise UsageError(f"{shown(source)} is {what}: name a folder of videos, or a table of paths")
    if not listing.videos:
        raise UsageError(
            f"{shown(source)} names no video that is there ({shown(found) or 'it is empty'}; "
            f"looked for {', '.join(settings.extensions)}): {advice}"
        )
    return listing


def _queues(
    videos: Sequence[VideoFile], settings: PackSettings
) -> dict[str, tuple[VideoFile, ...]]:
    """Videos by split, each in the order they are packed."""
    names = [WHOLE]
    if settings.splits:
        names = [REST, *settings.splits]
    elif settings.split_column is not None:
        names = sorted({video.split for video in videos})
        wrong = [name for name in names if not _SPLIT.fullmatch(name)]
        if wrong:
            raise UsageError(
                f"column {settings.split_column} names the split '{shown(wrong[0], 60)}': use "
                "letters, digits, _ and -, for files are called so"
            )
    queues: dict[str, list[VideoFile]] = {name: [] for name in names}
    for video in videos:
        queues[_split_of(video, settings)].append(video)
    if settings.shuffle:
        for queue in queues.values():
            queue.sort(key=lambda video: _draw("order", settings.seed, video))
    return {name: tuple(queue) for name, queue in queues.items()}


def _split_of(video: VideoFile, settings: PackSettings) -> str:
    if not settings.splits:
        return video.split or WHOLE
    drawn = _draw("split", settings.seed, video)
    for name, share in settings.splits.items():
        if drawn < share:
            return name
        drawn -= share
    return REST


def _draw(what: str, seed: int, video: VideoFile) -> float:
    """A number in (0, 1) that is the video's own, whatever other videos there are."""
    return float(stable_uniforms(1, f"pack {what}", seed, video.name)[0])


def _fill(
    folder: Path,
    journal: Journal,
    queues: Mapping[str, Sequence[VideoFile]],
    keys: Mapping[str, str],
    settings: PackSettings,
    progress: Progress,
) -> None:
    """Pack what the journal does not have yet."""
    left = {split: queue[journal.taken(split) :] for split, queue in queues.items()}
    total = sum(map(len, left.values()))
    if not total:
        return
    limits = DecodeLimits(**DecodeConfig().model_dump(exclude={"num_children"}))
    children = settings.num_children or os.cpu_count() or 1
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
        if isinstance(outcome, DecodeFailure):
            status, reason = outcome.status.value, outcome.message
            return video, Skipped(name=video.name, status=status, reason=reason)
        return video, content

    for video in videos:
        content = _read(video, limits if sandbox is not None else None)
        look = None
        if sandbox is not None and isinstance(content, bytes):
            look = sandbox.look(content)
        waiting.append((video, content, look))
        if len(waiting) > ahead:
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


def _write_skipped(path: Path, skipped: Sequence[Skipped]) -> None:
    """The list of what is not in the shards; no file where nothing was skipped."""
    if not skipped:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("path", "status", "reason"))
    rows.writerows((entry.name, entry.status, entry.reason) for entry in skipped)
    write_atomic(path, text.getvalue().encode(errors="backslashreplace"))


def _count_labels(
    queues: Mapping[str, Sequence[VideoFile]], journal: Journal
) -> dict[str, dict[str, int]]:
    """Packed videos by label and value, the frequent ones first."""
    left_out = {skipped.name for shard in journal.shards for skipped in shard.skipped}
    counts: dict[str, Counter[str]] = {}
    for queue in queues.values():
        for video in queue:
            if video.name not in left_out:
                for label, value in video.labels.items():
                    counts.setdefault(label, Counter())[value] += 1
    return {label: dict(values.most_common()) for label, values in counts.items()}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process a folder."""
    try:
        with FileLock(folder / ".pack.lock").acquire(timeout=0):
            yield
    except Timeout:
        raise UsageError(
            f"another process packs into {folder}: wait for it, or choose another folder"
        ) from None


def _braces(files: Sequence[str]) -> str:
    """Numbered files as one pattern: `videos-{000000..000011}.tar`."""
    numbers = [file.removesuffix(".tar").rpartition("-")[2] for file in files]
    stem = files[0].removesuffix(f"{numbers[0]}.tar")
    span = numbers[0] if len(files) == 1 else f"{{{numbers[0]}..{numbers[-1]}}}"
    return f"{stem}{span}.tar"
