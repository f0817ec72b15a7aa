"""Writing processes that die: run in children of a fork server that has imported all."""

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults import watched
from tiny_cache import COLUMNS, catch_up, gc, make_cache

from kdhiera.cache import layout
from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import CACHE_FILE, PartId
from kdhiera.errors import KdhieraError

PARTS = tuple(PartId(shard_id=shard, view=view) for shard in ("a-0", "b-0") for view in (0, 1))


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
    with watched(lambda name, args: then(next(numbers))):
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


def extract_among_collectors(root: str) -> None:
    """Extract although one's files may be taken for garbage; then the next run has to do it."""
    try:
        extract_in_child(root)
    except (KdhieraError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


def collect_at_once(root: str) -> None:
    """Collect garbage over and over, every attempt that has not ended being long dead."""
    while True:
        if (Path(root) / CACHE_FILE).exists():
            gc(Cache.open(root), later=1e6)
