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
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kdhiera.addresses import scheme_of
from kdhiera.data.clip import shown
from kdhiera.data.folders import (
    TABLES,
    Listing,
    Skipped,
    VideoFile,
    list_folder,
    read_table,
)
from kdhiera.data.keys import make_keys
from kdhiera.errors import ExitCode, UsageError
from kdhiera.progress import Progress, counted, human_bytes
from kdhiera.stages.packing.journal import JOURNAL, Journal, PackedShard
from kdhiera.stages.packing.order import PackSettings, queues_of
from kdhiera.stages.packing.shards import fill
from kdhiera.storage import disk_errors, is_temporary, make_folder, write_atomic

SKIPPED = "skipped.csv"
_SHOWN_LABELS = 12
_LEAST_TO_JUDGE = 20  # videos


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
    queues = queues_of(listing.videos, settings)
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
        fill(folder, journal, queues, keys, settings, progress)
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
