"""Videos on a disk: those in a folder and below it, or those that a table names."""

from __future__ import annotations

import csv
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdhiera.addresses import scheme_of
from kdhiera.data.clip import shown
from kdhiera.errors import UsageError

PATH_COLUMN = "path"
FOLDER_LABEL = "class"
TABLES = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoFile:
    """A video that is there.

    Args:
        name: Path relative to the folder, or to the folder of the table, `/` between folders;
            not safe to print (`shown`).
        path: Where it is.
        num_bytes: Its size when it was listed.
        modified_ns: When it was last written, by the clock of the file system.
        labels: By name.
        split: What the table says; empty if it is not asked.
    """

    name: str
    path: str
    num_bytes: int
    modified_ns: int
    labels: Mapping[str, str]
    split: str = ""

    @property
    def extension(self) -> str:
        """Lower case, without the dot; empty if it has none."""
        return extension_of(self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """A file that was asked for and is not packed.

    Args:
        name: As for `VideoFile`.
        status: `not_found`, `not_readable`, `not_a_video`, `listed_twice`, or the status that
            its rows would have in a cache.
        reason: In words.
    """

    name: str
    status: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a folder or a table holds.

    Args:
        videos: Sorted by name, bytewise.
        skipped: What was named and cannot be had, in the order it was found.
        passed_by: How many entries are no videos, by what they are in words.
    """

    videos: tuple[VideoFile, ...]
    skipped: tuple[Skipped, ...]
    passed_by: Mapping[str, int]

    def digest(self) -> str:
        """SHA-256 of names, sizes, times, labels and splits; another where any of them changes."""
        digest = hashlib.sha256()
        for video in self.videos:
            labels = sorted(video.labels.items())
            facts = (video.name, video.num_bytes, video.modified_ns, labels, video.split)
            digest.update(ascii(facts).encode() + b"\n")
        for skipped in self.skipped:
            digest.update(ascii((skipped.name, skipped.status)).encode() + b"\n")
        return digest.hexdigest()


def extension_of(name: str) -> str:
    """What follows the last dot of a path's last part, in lower case; empty if nothing does."""
    stem, dot, extension = name.rpartition("/")[2].rpartition(".")
    return extension.lower() if dot and stem else ""


def list_folder(
    folder: Path, *, extensions: Sequence[str], folder_labels: bool, leave_out: Path | None = None
) -> Listing:
    """The videos of a folder and of all folders below it.

    Hidden files and folders are passed over. A link to a file is the file; a link to a folder
    is not followed, for it may lead back.

    Args:
        folder: Where to look.
        extensions: Files with these are videos, in lower case.
        folder_labels: Whether the first folder below `folder` is a label, named `class`.
        leave_out: A folder that is not looked into.

    Raises:
        UsageError: If the folder cannot be listed.
    """
    found: list[VideoFile | Skipped] = []
    passed_by: Counter[str] = Counter()

    def failed(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise UsageError(f"{folder} cannot be listed ({error.strerror}): correct the path")
        name = Path(error.filename).relative_to(folder).as_posix()
        reason = f"the folder cannot be listed: {error.strerror}"
        found.append(Skipped(name=name, status="not_readable", reason=reason))

    left_out = leave_out and leave_out.resolve()
    for parent, folders, files in os.walk(folder, onerror=failed):
        hidden = {name for name in folders if name.startswith(".")}
        links = {name for name in folders if os.path.islink(os.path.join(parent, name))} - hidden
        passed_by["hidden folders"] += len(hidden)
        passed_by["links to folders (not followed)"] += len(links)
        folders[:] = sorted(
            name
            for name in folders
            if name not in hidden | links and Path(parent, name).resolve() != left_out
        )
        for file in sorted(files):
            path = os.path.join(parent, file)
            name = os.path.relpath(path, folder)
            if file.startswith("."):
                passed_by["hidden files"] += 1
            elif extension_of(name) not in extensions:
                extension = extension_of(name)
                passed_by[f".{shown(extension, 20)} files" if extension else "other files"] += 1
            else:
                first, slash, _ = name.partition("/")
                labels = {FOLDER_LABEL: first} if folder_labels and slash else {}
                found.append(_look_up(name, path, labels))
    return _listing(found, +passed_by)


def read_table(table: Path, *, extensions: Sequence[str], split_column: str | None) -> Listing:
    """The videos that a table names: a column `path`, and labels in all other columns.

    Paths are relative to the table's folder. An empty cell is no label.

    Args:
        table: A file with a header: `.csv` with commas, or `.tsv` with tabs.
        extensions: Files with these are videos, in lower case.
        split_column: Column that says which split a video is in; None if none does.

    Raises:
        UsageError: If it is no such table; the line is named.
    """
    found: list[VideoFile | Skipped] = []
    lines: dict[str, int] = {}
    for line, row in _rows(table, split_column):
        path = os.path.normpath(table.parent / row.pop(PATH_COLUMN))
        inside = os.path.relpath(path, table.parent)
        name = os.path.abspath(path).lstrip("/") if inside.startswith("..") else inside
        split = row.pop(split_column) if split_column is not None else ""
        labels = {label: value for label, value in row.items() if value}
        if name in lines:
            reason = f"line {line} names it again; line {lines[name]} is the one that counts"
            found.append(Skipped(name=name, status="listed_twice", reason=reason))
        elif extension_of(name) not in extensions:
            reason = f"its name ends in none of {', '.join(extensions)}"
            found.append(Skipped(name=name, status="not_a_video", reason=reason))
        else:
            found.append(_look_up(name, path, labels, split))
        lines.setdefault(name, line)
    return _listing(found, {})


def _listing(found: Sequence[VideoFile | Skipped], passed_by: Mapping[str, int]) -> Listing:
    videos = [one for one in found if isinstance(one, VideoFile)]
    return Listing(
        videos=tuple(sorted(videos, key=lambda video: os.fsencode(video.name))),
        skipped=tuple(one for one in found if isinstance(one, Skipped)),
        passed_by=passed_by,
    )


def _look_up(
    name: str, path: str, labels: Mapping[str, str], split: str = ""
) -> VideoFile | Skipped:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        reason = "the link leads nowhere" if os.path.islink(path) else "there is no such file"
        return Skipped(name=name, status="not_found", reason=reason)
    except OSError as error:
        return Skipped(name=name, status="not_readable", reason=error.strerror or str(error))
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a device, pipe or socket"
        return Skipped(name=name, status="not_a_video", reason=f"it is {kind}")
    return VideoFile(
        name=name,
        path=path,
        num_bytes=found.st_size,
        modified_ns=found.st_mtime_ns,
        labels=labels,
        split=split,
    )


def _rows(table: Path, split_column: str | None) -> Iterator[tuple[int, dict[str, str]]]:
    """Lines of a table by column, with their numbers."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            delimiter = TABLES[table.suffix.lower()]
            reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
            header = [name.strip() for name in next(reader, [])]
            _check_header(table, header, split_column)
            for cells in reader:
                if not cells:
                    continue
                line = reader.line_num
                if len(cells) != len(header):
                    raise UsageError(
                        f"{table}, line {line}: {len(cells)} cells, and the header has "
                        f"{len(header)}: correct the line (text with commas needs quotes)"
                    )
                row = dict(zip(header, cells, strict=True))
                _check_row(table, line, row, split_column)
                yield line, row
    except OSError as error:
        raise UsageError(f"{table} cannot be read ({error.strerror}): correct the path") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UsageError(f"{table} is no table in UTF-8: {error}") from error


def _check_header(table: Path, header: Sequence[str], split_column: str | None) -> None:
    columns = ", ".join(shown(name, 60) for name in header) or "nothing"
    if PATH_COLUMN not in header:
        raise UsageError(
            f"{table}: the first line must name the columns, and one of them must be "
            f"`{PATH_COLUMN}`; there is {columns}"
        )
    if len(set(header)) < len(header) or "" in header:
        raise UsageError(f"{table}: every column needs a name of its own; there is {columns}")
    if split_column is not None and split_column not in header:
        raise UsageError(f"{table} has no column `{split_column}` for splits; there is {columns}")


def _check_row(table: Path, line: int, row: Mapping[str, str], split_column: str | None) -> None:
    path = row[PATH_COLUMN]
    if not path or "\0" in path:
        raise UsageError(f"{table}, line {line}: the path is empty or no path: correct the line")
    if scheme_of(path) and "://" in path:
        raise UsageError(
            f"{table}, line {line}: '{shown(path, 100)}' is an address; only files on this "
            "machine are packed: copy or mount the videos"
        )
    if split_column is not None and not row[split_column]:
        raise UsageError(
            f"{table}, line {line}: column `{split_column}` is empty: name the split of every video"
        )
