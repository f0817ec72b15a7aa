"""Checkpoints: whole or absent, checked, the newest sound one found by itself.

checkpoints/
    step-00001200.pt          tensors and plain values only
    step-00001200.pt.sha256   its checksum
    latest                    name of the newest, written last
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kdhiera.errors import DamagedError
from kdhiera.storage import atomic_file, write_atomic

logger = logging.getLogger(__name__)

POINTER = "latest"


def save(folder: Path, state: Mapping[str, Any], *, step: int, keep_last: int) -> Path:
    """Write a checkpoint, then its checksum, then the pointer; drop the oldest.

    Args:
        folder: Created if needed.
        state: Tensors, numbers, strings, and lists and dicts of these.
        step: Steps done.
        keep_last: Checkpoints that stay.

    Returns:
        The checkpoint's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    with atomic_file(path) as file:
        torch.save(dict(state), file)
    write_atomic(_sidecar(path), f"{_sha256(path)}  {path.name}\n".encode())
    write_atomic(folder / POINTER, f"{path.name}\n".encode())
    for old in _newest_first(folder)[keep_last:]:
        old.unlink(missing_ok=True)
        _sidecar(old).unlink(missing_ok=True)
    return path


def load_latest(folder: Path) -> dict[str, Any] | None:
    """State of the newest sound checkpoint, or None if there is no checkpoint.

    A damaged one is reported in a warning and the one before is taken.

    Args:
        folder: Where `save` wrote.

    Raises:
        DamagedError: If there are checkpoints and all of them are damaged.
    """
    candidates = _newest_first(folder)
    for path in candidates:
        flaw = _flaw(path)
        if flaw is None:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return state
        logger.warning("checkpoint %s is damaged (%s): trying the one before", path, flaw)
    if candidates:
        raise DamagedError(
            f"all {len(candidates)} checkpoints in {folder} are damaged: restore one from a copy, "
            "or start the run again with --overwrite"
        )
    return None


def _newest_first(folder: Path) -> list[Path]:
    """Checkpoints by step; one whose pointer was never written counts, it is whole."""
    return sorted(folder.glob("step-*.pt"), reverse=True)


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flaw(path: Path) -> str | None:
    """What is wrong with a checkpoint's bytes; None if nothing is."""
    try:
        wanted = _sidecar(path).read_text().split()[0]
    except (OSError, IndexError):
        return "its checksum file is missing or empty"
    found = _sha256(path)
    return None if found == wanted else f"sha256 is {found[:12]}, not {wanted[:12]}"
