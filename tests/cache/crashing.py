"""Writing processes that die: run in children of a fork server that has imported all."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_cache import COLUMNS, catch_up, make_cache

from kdhiera.cache import layout
from kdhiera.cache.layout import PartId

PARTS = tuple(PartId(shard_id=shard, view=view) for shard in ("a-0", "b-0") for view in (0, 1))
FILE_OPERATIONS = ("fsync", "link", "mkdir", "replace", "unlink", "rmdir", "open")


def extract(root: Path, parts: tuple[PartId, ...] = PARTS) -> None:
    """Bring all parts up to date."""
    cache = make_cache(root)
    for part in parts:
        catch_up(cache, part, COLUMNS)


def extract_in_child(root: str) -> None:
    """The same in Zarr shards of two rows."""
    layout.ZARR_SHARD_ROWS = 2
    extract(Path(root))


def extract_counting(root: str, then: Callable[[int], None]) -> None:
    """Extract one part, calling `then` with its number before every file operation."""
    layout.ZARR_SHARD_ROWS = 2
    numbers = itertools.count()

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            then(next(numbers))
            return original(*args, **kwargs)

        return call

    for name in FILE_OPERATIONS:
        setattr(os, name, wrapped(getattr(os, name)))
    extract(Path(root), PARTS[:1])


def extract_and_count(root: str, answer: Any) -> None:
    """Put the number of file operations of one part into `answer`."""

    def note(number: int) -> None:
        answer.value = number + 1

    extract_counting(root, note)


def extract_and_die(root: str, operation: int) -> None:
    """Die by SIGKILL instead of doing file operation number `operation`."""

    def die(number: int) -> None:
        if number == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    extract_counting(root, die)


def extract_together(root: str, start: Any) -> None:
    """Extract at the same time as others."""
    start.wait()
    extract_in_child(root)
