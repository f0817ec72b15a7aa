"""Files that are whole or absent: atomic writes and put-if-absent on a local disk."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

import google_crc32c

from kdhiera.errors import KdhieraError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_SYNC_THREADS = 8
_TRIES = 100
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
_Made = TypeVar("_Made")

STAGED = "kdhiera-staged-"  # begins the names of temporary folders that are uploaded


def fsync_folder(folder: Path) -> None:
    """Make the folder's entries survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents so that they survive a power cut."""
    in_folder(folder, lambda: None)


def in_folder(folder: Path, make: Callable[[], _Made]) -> _Made:
    """Make something in a folder that is created, with its parents, where it is missing.

    Another process may remove empty folders at any moment: it is tried again then.

    Args:
        folder: The folder.
        make: Makes it; raises FileNotFoundError if the folder has gone.

    Returns:
        What `make` does.
    """
    for _ in range(_TRIES):
        with contextlib.suppress(FileNotFoundError):
            return _once_in_folder(folder, make)
    return _once_in_folder(folder, make)


def _once_in_folder(folder: Path, make: Callable[[], _Made]) -> _Made:
    created: list[Path] = []
    while not folder.is_dir():
        created.append(folder)
        folder = folder.parent
    for path in reversed(created):
        path.mkdir(exist_ok=True)
    made = make()
    for path in created:
        with contextlib.suppress(FileNotFoundError):  # only if nothing was made in it
            fsync_folder(path.parent)
    return made


def file_crc32c(path: Path) -> int:
    """crc32c of a file, read in pieces."""
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            checksum = google_crc32c.extend(checksum, piece)
    return checksum


def sync_folder(folder: Path) -> dict[str, tuple[int, int]]:
    """Make every file and folder below `folder` survive a power cut.

    Returns:
        Size and crc32c of every file, by path relative to `folder`, sorted.
    """

    def sync(path: Path) -> tuple[str, tuple[int, int]]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        entry = path.stat().st_size, file_crc32c(path)
        return path.relative_to(folder).as_posix(), entry

    walked = list(os.walk(folder, topdown=False))
    paths = sorted(Path(parent, name) for parent, _, names in walked for name in names)
    with ThreadPoolExecutor(_SYNC_THREADS) as pool:  # a journal takes many at once
        files = dict(pool.map(sync, paths))
        list(pool.map(fsync_folder, (Path(parent) for parent, _, _ in walked)))
    return files


def file_sha256(path: Path) -> str:
    """SHA-256 of a whole file, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a disk that is full or may not be written into one clear sentence.

    Args:
        path: What is written to; it or a folder above it must exist.

    Raises:
        KdhieraError: Naming the path, the reason and, on a full disk, what is free.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (*_FULL, *_REFUSED):
            raise
        reason = os.strerror(error.errno)
        if error.errno in _REFUSED:
            raise KdhieraError(f"cannot write to {path}: {reason}") from error
        what = "free some space"
        if any(name.startswith(STAGED) for name in path.parts):
            what += ", or set TMPDIR to a folder on another disk,"
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
        raise KdhieraError(
            f"the disk of {path} takes no more ({reason}; {_free(existing)} free): {what} and "
            "run the same command again; what was committed is kept"
        ) from error


def _free(folder: Path) -> str:
    """What a disk has left; files are mentioned where it may hold no more of them."""
    found = os.statvfs(folder)
    num_bytes = f"{found.f_bavail * found.f_frsize:,} bytes"
    return f"{num_bytes} and 0 files" if found.f_files and not found.f_favail else num_bytes


def temporary_path(path: Path) -> Path:
    """A new name beside `path` for what is to become it."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def is_temporary(name: str) -> bool:
    """Whether `temporary_path` made a file's name: it is being written, or its writer died."""
    return _TEMPORARY.fullmatch(name) is not None


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears under `path` only when it is whole and synced.

    Args:
        path: Final name; an existing file is replaced. Its folder must exist.
    """
    temporary = temporary_path(path)
    try:
        with disk_errors(path):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a whole file atomically; see `atomic_file`."""
    with atomic_file(path) as file:
        file.write(data)


def put_if_absent(path: Path, data: bytes) -> bool:
    """Create `path` with `data` unless it exists; whoever links first wins.

    Returns:
        Whether this call created the file. Never replaces and never leaves half a file.
    """
    temporary = temporary_path(path)
    try:
        with disk_errors(path):
            with in_folder(path.parent, lambda: temporary.open("xb")) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            fsync_folder(path.parent)
            return True
    finally:
        temporary.unlink(missing_ok=True)
