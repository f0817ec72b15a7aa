"""Keys of samples, made from the paths of their files.

A key names one sample of a WebDataset: it may hold slashes, but no dot, for webdataset splits
names at the first one, and no folder `__NAME__`, which webdataset passes over.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_UNSAFE = re.compile(r"[^\w-]+")  # letters and digits of any script, `_` and `-` stay
_PART_CHARACTERS = 60  # at most 240 bytes: a file name of any disk
_DIGITS = (8, 64)


def make_keys(names: Sequence[str]) -> list[str]:
    """A key for every file, all different, also where upper and lower case are one.

    A key is the path without its extension, whatever is unsafe in it replaced by `_`. Where
    several paths would share one, all of these get a piece of their path's SHA-256, so the
    result does not depend on the order.

    Args:
        names: Paths relative to a common folder, `/` between folders, each once; bytes that
            are no text as `os.fsdecode` gives them.
    """
    keys = [_key(name) for name in names]
    for digits in _DIGITS:
        counts = Counter(key.casefold() for key in keys)
        if len(counts) == len(keys):
            break
        keys = [
            f"{_key(name)}-{_digest(name)[:digits]}" if counts[key.casefold()] > 1 else key
            for name, key in zip(names, keys, strict=True)
        ]
    return keys


def _key(name: str) -> str:
    folders, _, file = name.rpartition("/")
    stem = file.rpartition(".")[0] or file
    return "/".join(_safe(part) for part in (*filter(None, folders.split("/")), stem))


def _safe(part: str) -> str:
    """A part of a path without dots, blanks, controls, and marks at its ends."""
    plain = unicodedata.normalize("NFC", part)
    return _UNSAFE.sub("_", plain)[:_PART_CHARACTERS].strip("_-") or "_"


def _digest(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()
