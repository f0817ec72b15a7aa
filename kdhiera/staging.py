"""Temporary folders that do not outlive their process for long.

A process that is killed leaves its folder behind; the next one that makes a folder on the
same disk removes it. Whether a process lives is told by a lock that it holds on a file
beside the folder, which holds across containers and dies with it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import uuid
from pathlib import Path

from kdhiera.storage import STAGED, disk_errors

_LOCK = ".lock"
_held: dict[Path, int] = {}


def new_folder() -> Path:
    """A new folder below TMPDIR, after those of dead processes are removed.

    Raises:
        KdhieraError: If the disk takes no more.
    """
    parent = Path(tempfile.gettempdir())
    for lock in parent.glob(f"{STAGED}*{_LOCK}"):
        _remove_if_dead(lock)
    with disk_errors(parent / STAGED):
        while True:
            folder = parent / f"{STAGED}{uuid.uuid4().hex}"
            try:
                held = _lock(_lock_file(folder), os.O_CREAT | os.O_EXCL)
            except BlockingIOError:  # another process took it for a dead one's
                continue
            _held[folder] = held
            if _lock_file(folder).exists():
                break
            remove_folder(folder)
        folder.mkdir(mode=0o700)
    return folder


def remove_folder(folder: Path) -> None:
    """Remove a folder that `new_folder` made."""
    shutil.rmtree(folder, ignore_errors=True)
    _lock_file(folder).unlink(missing_ok=True)
    held = _held.pop(folder, None)
    if held is not None:
        os.close(held)


def _remove_if_dead(lock: Path) -> None:
    try:
        held = _lock(lock, 0)
    except OSError:  # it is alive, another user's, or gone
        return
    shutil.rmtree(lock.with_name(lock.name.removesuffix(_LOCK)), ignore_errors=True)
    lock.unlink(missing_ok=True)
    os.close(held)


def _lock_file(folder: Path) -> Path:
    return folder.with_name(folder.name + _LOCK)


def _lock(path: Path, flags: int) -> int:
    """Open a file and lock it; the lock is gone when the process is.

    Raises:
        OSError: If another process holds it.
    """
    held = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        raise
    return held
