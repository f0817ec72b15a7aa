"""Where a cache lives: named bytes that are whole or absent, on a disk or in a bucket.

A store is a tree of files under one root, named by keys such as `commits/a-1/0/base.json`.
What a cache needs of it is little: whole writes, a write that fails if the name is taken
(the only way anything is ever published), listings, and for tensorstore the address of a key.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

from kdhiera.errors import UsageError
from kdhiera.storage import (
    disk_errors,
    file_crc32c,
    fsync_folder,
    in_folder,
    is_temporary,
    make_folder,
    put_if_absent,
    sync_folder,
    write_atomic,
)

Files = dict[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One file of a store.

    Args:
        key: Its name.
        num_bytes: Its size.
        modified: Seconds since 1970 when it was last written.
    """

    key: str
    num_bytes: int
    modified: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FileVersion:
    """Which of the files that may come to lie under one name is meant.

    Args:
        num_bytes: Its size.
        tag: What a bucket calls it; empty for a local file, of which the size is all that
            is the same on every machine.
    """

    num_bytes: int
    tag: str = ""


@runtime_checkable
class Store(Protocol):
    """A tree of files; safe to use from several threads and processes."""

    @property
    def url(self) -> str:
        """Address for people, and for `open_store`."""
        ...

    @property
    def writes_late(self) -> bool:
        """Whether a write that failed may still happen: a request may be on its way."""
        ...

    def read(self, key: str) -> bytes:
        """Contents of a file.

        Raises:
            FileNotFoundError: If there is none.
        """
        ...

    def read_many(self, keys: Iterable[str]) -> list[bytes | None]:
        """Contents of many files, at once where that helps; None for what is not there."""
        ...

    def read_ends(self, sizes: Mapping[str, int], num_bytes: int) -> list[bytes | None]:
        """The last bytes of many files, at once where that helps; None for what is not there.

        Args:
            sizes: How long each file is taken to be.
            num_bytes: Bytes of each, or all of one that has no more.
        """
        ...

    def checksum(self, key: str) -> tuple[int, int]:
        """Size and crc32c of a file, read in pieces of a few MB.

        Raises:
            FileNotFoundError: If there is none.
        """
        ...

    def exists(self, key: str) -> bool:
        """Whether there is such a file."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Put a whole file in place, replacing what is there.

        Raises:
            KdhieraError: If the store takes no more, or may not be written.
        """
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Put a whole file in place unless there is one; whoever comes first wins.

        Returns:
            Whether the file there now holds `data`: an attempt whose own success was
            reported as an error, or not at all, is told so.

        Raises:
            KdhieraError: If the store takes no more, or may not be written.
        """
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove files, in the order given; one that is not there is fine."""
        ...

    def delete_folder(self, folder: str) -> None:
        """Remove everything below a folder."""
        ...

    def names(self, folder: str) -> list[str]:
        """Names of the files and folders directly in `folder`, sorted; none if it is not there."""
        ...

    def folders(self, folder: str) -> list[str]:
        """Names of the folders alone directly in `folder`, sorted."""
        ...

    def walk(self, folder: str) -> Iterator[Entry]:
        """All files below a folder, in no order; files being written are left out."""
        ...

    def unfinished(self) -> Iterator[Entry]:
        """Files that are being written, or whose writer died; `walk` leaves them out."""
        ...

    def prune(self, folder: str) -> None:
        """Remove the folders at and below `folder` that hold nothing, then those above."""
        ...

    def stage(self, folder: str) -> Path:
        """A new local folder to write files into that are to become `folder`."""
        ...

    def keep(self, folder: str, staged: Path) -> Files:
        """Make everything in a staged folder last, under `folder`.

        Returns:
            Size and crc32c of every file, by path inside the folder, sorted.

        Raises:
            KdhieraError: If the store takes no more, or does not hold what was sent.
        """
        ...

    def discard(self, folder: str, staged: Path) -> None:
        """Remove a staged folder and what was kept of it, as far as that is possible."""
        ...

    def kvstore(self, folder: str) -> Mapping[str, Any]:
        """Tensorstore's key-value store for a folder."""
        ...


def open_store(url: str | Path) -> Store:
    """The store at an address; nothing is read or created yet.

    Args:
        url: A folder, or `s3://bucket/prefix`.

    Raises:
        UsageError: If the scheme is another one.
    """
    text = str(url)
    scheme, found, _ = text.partition("://")
    if not found or scheme == "file":
        return LocalStore(Path(text.removeprefix("file://")))
    if scheme == "s3":
        from kdhiera.objects import ObjectStore  # obstore is only loaded where it is used

        return ObjectStore(text)
    raise UsageError(f"{text} has the scheme '{scheme}': a cache lives in a folder or at s3://")


class LocalStore:
    """A folder of a local or shared file system.

    Args:
        root: The folder; made when something is first written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def __repr__(self) -> str:
        return f"LocalStore({str(self.root)!r})"

    @property
    def url(self) -> str:
        """The folder's path as it was given."""
        return str(self.root)

    @property
    def writes_late(self) -> bool:
        """A system call has ended."""
        return False

    def read(self, key: str) -> bytes:
        """Contents of a file."""
        try:
            return (self.root / key).read_bytes()
        except (NotADirectoryError, IsADirectoryError) as error:
            raise FileNotFoundError(*error.args) from None

    def read_many(self, keys: Iterable[str]) -> list[bytes | None]:
        """Contents of many files, one by one."""
        return [self._read_or_none(key) for key in keys]

    def read_ends(self, sizes: Mapping[str, int], num_bytes: int) -> list[bytes | None]:
        """The last bytes of many files, one by one."""
        return [self._end_or_none(key, max(0, n - num_bytes), n) for key, n in sizes.items()]

    def checksum(self, key: str) -> tuple[int, int]:
        """Size and crc32c of a file."""
        path = self.root / key
        try:
            return path.stat().st_size, file_crc32c(path)
        except (NotADirectoryError, IsADirectoryError) as error:
            raise FileNotFoundError(*error.args) from None

    def exists(self, key: str) -> bool:
        """Whether there is such a file."""
        return (self.root / key).is_file()

    def write(self, key: str, data: bytes) -> None:
        """Put a whole file in place by renaming it."""
        path = self.root / key
        with disk_errors(self.root):
            in_folder(path.parent, lambda: write_atomic(path, data))

    def create(self, key: str, data: bytes) -> bool:
        """Put a whole file in place by linking it."""
        path = self.root / key
        try:
            if put_if_absent(path, data):
                return True
        except OSError:
            if not path.exists():
                raise
        return path.read_bytes() == data

    def delete(self, keys: Iterable[str]) -> None:
        """Remove files so that they stay removed after a power cut."""
        for key in keys:
            path = self.root / key
            path.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):  # as an empty folder
                fsync_folder(path.parent)

    def delete_folder(self, folder: str) -> None:
        """Remove a folder."""
        shutil.rmtree(self.root / folder, ignore_errors=True)

    def names(self, folder: str) -> list[str]:
        """Names in a folder; those of files being written are hidden."""
        try:
            return sorted(n for n in os.listdir(self.root / folder) if not n.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def folders(self, folder: str) -> list[str]:
        """Names of folders, and of links to them."""
        return [name for name in self.names(folder) if (self.root / folder / name).is_dir()]

    def walk(self, folder: str) -> Iterator[Entry]:
        """All files below a folder."""
        try:
            with os.scandir(self.root / folder) as found:
                entries = [entry for entry in found if not entry.name.startswith(".")]
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            key = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from self.walk(key)
                continue
            try:
                stat = entry.stat()
            except FileNotFoundError:  # removed since it was listed
                continue
            yield Entry(key=key, num_bytes=stat.st_size, modified=stat.st_mtime)

    def unfinished(self) -> Iterator[Entry]:
        """All files with the names that atomic writes give them first."""
        for parent, _, names in os.walk(self.root):
            for path in (Path(parent, name) for name in names if is_temporary(name)):
                with contextlib.suppress(FileNotFoundError):  # finished since it was listed
                    stat = path.stat()
                    key = path.relative_to(self.root).as_posix()
                    yield Entry(key=key, num_bytes=stat.st_size, modified=stat.st_mtime)

    def prune(self, folder: str) -> None:
        """Remove empty folders, the lowest first; never the root."""
        below = [Path(parent) for parent, _, _ in os.walk(self.root / folder, topdown=False)]
        above = [self.root / parent for parent in PurePosixPath(folder).parents]
        for path in (*below, *above[:-1]):
            with contextlib.suppress(OSError):  # not empty, or gone
                path.rmdir()

    def stage(self, folder: str) -> Path:
        """The folder itself: what no commit names is not part of the cache."""
        path = self.root / folder
        with disk_errors(self.root):
            make_folder(path)
        return path

    def keep(self, folder: str, staged: Path) -> Files:
        """Sync what was written."""
        assert staged == self.root / folder, (staged, folder)
        return sync_folder(staged)

    def discard(self, folder: str, staged: Path) -> None:
        """Remove the folder."""
        shutil.rmtree(staged, ignore_errors=True)

    def kvstore(self, folder: str) -> Mapping[str, Any]:
        """The file driver."""
        return {"driver": "file", "path": f"{(self.root / folder).absolute()}/"}

    def _read_or_none(self, key: str) -> bytes | None:
        try:
            return self.read(key)
        except FileNotFoundError:
            return None

    def _end_or_none(self, key: str, start: int, stop: int) -> bytes | None:
        try:
            with (self.root / key).open("rb") as file:
                return os.pread(file.fileno(), stop - start, start)
        except FileNotFoundError:
            return None
