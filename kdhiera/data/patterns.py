"""Which shards a config's patterns name, on disks and in buckets."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from kdhiera.addresses import (
    GLOB,
    expand_braces,
    matches,
    name_matches,
    redact,
    refuse_secrets,
    scheme_of,
    without_file_scheme,
)
from kdhiera.data.clip import shown
from kdhiera.data.ranges import open_bucket
from kdhiera.errors import KdhieraError, UsageError

if TYPE_CHECKING:
    from kdhiera.objects import ObjectStore

_COMPRESSED_NAMES = (".tgz", ".gz", ".bz2", ".xz", ".zst", ".zip")
_THREADS = 32


def expand(patterns: Sequence[str]) -> list[str]:
    """Paths and addresses of the shards that patterns name.

    Args:
        patterns: Local paths, `file://` or `s3://` addresses, with braces (`{000..099}`,
            `{train,val}`) and globs (`*`, `?`, `[..]`, `**`).

    Returns:
        Absolute paths and addresses in the order of the patterns (globs sorted), each file
        once.

    Raises:
        UsageError: If a pattern matches nothing, names another scheme, a compressed file or
            a bucket that cannot be read.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        paths = expand_braces(_checked(pattern))
        with ThreadPoolExecutor(_THREADS) as pool:
            for path, names in zip(paths, pool.map(_find, paths), strict=True):
                if not names:
                    raise UsageError(_no_match(path, pattern))
                for name in names:
                    _refuse_compressed(name)
                    found.setdefault(*_identified(name))
    return list(found.values())


def _checked(pattern: str) -> str:
    scheme = scheme_of(pattern)
    if scheme not in ("", "file:", "s3:"):
        raise UsageError(
            f"data.shards: '{shown(redact(pattern))}' has the scheme '{scheme}'; only local "
            "paths, file:// and s3:// are read: mount or download the shards"
        )
    refuse_secrets(pattern, "data.shards")
    return without_file_scheme(pattern)


def _find(path: str) -> list[str]:
    """What there is under a path without braces, which may be a glob or a strange name."""
    if scheme_of(path) == "s3:":
        return _find_objects(path)
    return [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))


def _find_objects(url: str) -> list[str]:
    if not url.removeprefix("s3://").partition("/")[2]:
        raise UsageError(f"data.shards: '{shown(url)}' names no object: write s3://bucket/KEY.tar")
    try:
        store, key = open_bucket(url)
        if store.exists(key):
            return [url]
        if GLOB.search(key):
            return sorted(f"{store.url}/{name}" for name in _glob(store, "", key.split("/")))
        store.names(key)  # tells a bucket that is not there from an object that is not
    except KdhieraError as error:
        raise UsageError(f"data.shards: {error} (of '{shown(url)}')") from None
    return []


def _glob(store: ObjectStore, folder: str, patterns: list[str]) -> Iterator[str]:
    """Keys below a folder, by listings of the folders that can hold one."""
    first, *rest = patterns
    below = f"{folder}/" if folder else ""
    if first == "**":
        keys = (entry.key for entry in store.walk(folder))
        yield from (key for key in keys if matches(key[len(below) :], "/".join(patterns)))
    elif rest and not GLOB.search(first):
        yield from _glob(store, below + first, rest)
    elif rest:
        for name in store.folders(folder):
            if name_matches(name, first):
                yield from _glob(store, below + name, rest)
    else:
        yield from (below + name for name in store.objects(folder) if name_matches(name, first))


def _no_match(path: str, pattern: str) -> str:
    what, where = "file", f", looked in {os.getcwd()}"
    if scheme_of(path) == "s3:":
        what, where = "object", ""
    return (
        f"data.shards: no {what} matches '{shown(path)}' (of '{shown(pattern)}'{where}): correct "
        "the path or the braces"
    )


def _refuse_compressed(path: str) -> None:
    if path.lower().endswith(_COMPRESSED_NAMES):
        raise UsageError(
            f"data.shards: '{shown(path)}' is compressed; shards are read by offset, so unpack "
            "it to a plain .tar (videos hardly shrink)"
        )


def _identified(path: str) -> tuple[str, str]:
    """What tells a file from the others, and how it is called from here on."""
    if scheme_of(path) == "s3:":
        return path, path
    return os.path.realpath(path), os.path.abspath(path)
