"""The caches below a folder or prefix, one line each, whatever state they are in."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdhiera.cache.commit import Cache
from kdhiera.cache.info_text import aligned, clip_size, gap_words
from kdhiera.cache.layout import CACHE_FILE, COMMITS, PARTS
from kdhiera.cache.totals import find_gaps, sum_up
from kdhiera.errors import DamagedError, MismatchError, UsageError
from kdhiera.progress import Progress, counted, human_bytes
from kdhiera.stores import Store, open_store

_HEAD = ("cache", "state", "clips", "size", "shards", "views", "columns", "last commit")
_LEFT = 3


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One cache.

    Args:
        cache: Folder or address.
        state: `complete`, `incomplete`, `empty`, `damaged` or `other format`.
        why: What is damaged, or what is missing, in words; empty if nothing is.
        clips: Frames, height and width; empty if unknown.
        stored_bytes: Bytes that commits name.
        shards: Shards that something is committed of.
        views: Views that something is committed of.
        columns: Column ids.
        last_commit: When the last committed attempt began, in seconds since 1970; None if
            nothing is committed.
    """

    cache: str
    state: str
    why: str = ""
    clips: str = ""
    stored_bytes: int = 0
    shards: int = 0
    views: int = 0
    columns: tuple[str, ...] = ()
    last_commit: float | None = None


@dataclass(frozen=True, kw_only=True)
class Listing:
    """All caches below a folder.

    Args:
        folder: Where it was looked.
        caches: In sorted order of their addresses.
    """

    folder: str
    caches: tuple[Listed, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"folder": self.folder, "caches": [asdict(cache) for cache in self.caches]}

    def describe(self) -> str:
        """For people: a line for every cache."""
        if not self.caches:
            return f"no cache in {self.folder} or below it"
        lines = aligned([_HEAD, *(_cells(cache) for cache in self.caches)], left=_LEFT)
        notes = [f"{c.cache}: {c.why}" for c in self.caches if c.why]
        return "\n".join([*lines, *(["", *notes] if notes else [])])


def list_caches(url: str, *, progress: Progress | None = None) -> Listing:
    """Find caches and sum up each.

    Folders with a dot in front and what lies inside a cache are passed over.

    Args:
        url: A folder, or `s3://bucket/prefix`.
        progress: Where progress is shown if there is much to read.

    Raises:
        UsageError: If it is no folder.
    """
    store = open_store(url)
    if "://" not in url and not Path(url).is_dir():
        raise UsageError(f"{url} is no folder: name the folder that holds the caches")
    return Listing(folder=store.url, caches=tuple(_sum_up(at, progress) for at in _find(store)))


def _find(store: Store) -> Iterator[str]:
    """Addresses of caches at and below the root; each folder once, wherever links lead."""
    root = store.url if "://" in store.url else os.path.realpath(store.url)
    seen: set[str] = set()
    folders = [""]
    while folders:
        folder = folders.pop()
        at = f"{store.url}/{folder}".rstrip("/")
        place = at if "://" in at else os.path.realpath(at)
        if place in seen or (f"{root}/".startswith(f"{place.rstrip('/')}/") and folder):
            continue  # a link up would lead everywhere
        seen.add(place)
        try:
            names = store.folders(folder)
        except PermissionError:
            continue
        key = f"{folder}/{CACHE_FILE}".lstrip("/")
        if store.exists(key) or {COMMITS, PARTS} <= set(names):
            yield at
        else:
            folders += [f"{folder}/{name}".lstrip("/") for name in reversed(names)]


def _sum_up(url: str, progress: Progress | None) -> Listed:
    try:
        cache = Cache.open(url)
        names = cache.columns.names()
        totals = sum_up(cache, unnamed=False, progress=progress)
        for column in names:
            cache.columns.identity(column)
    except UsageError:
        return Listed(cache=url, state="damaged", why="its cache.json is missing")
    except MismatchError as error:
        return Listed(cache=url, state="other format", why=str(error))
    except DamagedError as error:
        return Listed(cache=url, state="damaged", why=str(error))
    gaps = find_gaps(cache, totals, names)
    state = "incomplete" if gaps else "complete" if totals.bases else "empty"
    why = gap_words(gaps)
    if totals.damaged:
        state, why = "damaged", f"{counted(len(totals.damaged), 'record')}: {totals.damaged[0]}"
    return Listed(
        cache=url,
        state=state,
        why=why,
        clips=clip_size(cache.identity),
        stored_bytes=sum(totals.stored.values()),
        shards=len(totals.samples),
        views=totals.num_views,
        columns=names,
        last_commit=max(totals.times, default=None),
    )


def _cells(cache: Listed) -> Sequence[str]:
    last = ""
    if cache.last_commit is not None:
        last = time.strftime("%Y-%m-%d %H:%M", time.localtime(cache.last_commit))
    counts = (cache.shards, cache.views, len(cache.columns))
    known = bool(cache.clips)
    return (
        cache.cache,
        cache.state,
        cache.clips,
        human_bytes(cache.stored_bytes) if known else "",
        *(f"{count:,}" if known else "" for count in counts),
        last,
    )
