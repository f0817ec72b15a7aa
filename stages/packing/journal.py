"""What a call of `pack` has done so far: a line of JSON a shard, in `pack.jsonl`.

The first line says what is packed and how. A line that a dying process left half written is
cut off.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdhiera.data.folders import Skipped
from kdhiera.errors import DamagedError, MismatchError, UsageError
from kdhiera.storage import fsync_folder, write_atomic

JOURNAL = "pack.jsonl"
_FORMAT = 1
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*-\d{6}\.tar")


@dataclass(frozen=True, kw_only=True)
class PackedShard:
    """A shard that is whole.

    Args:
        split: What it belongs to.
        file: Its name; None for videos of which none was good.
        num_samples: Videos in it.
        num_bytes: Of the file.
        sha256: Of its bytes, as hex digits.
        taken: Videos of the split that it has or passes over.
        skipped: Those that it passes over.
    """

    split: str
    file: str | None
    num_samples: int
    num_bytes: int
    sha256: str
    taken: int
    skipped: tuple[Skipped, ...]


def shard_name(split: str, number: int) -> str:
    """What the shards of a split are called."""
    return f"{split}-{number:06d}.tar"


class Journal:
    """The shards of a folder, as far as they are whole; made by `open`.

    Args:
        path: The file.
        shards: In the order they were packed.
    """

    def __init__(self, path: Path, shards: list[PackedShard]) -> None:
        self._path = path
        self._shards = shards

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        settings: Mapping[str, Any],
        videos: Mapping[str, Any],
        overwrite: bool,
    ) -> Journal:
        """Go on with a folder, or begin with it.

        Args:
            folder: Of the shards.
            settings: How they are packed.
            videos: What is packed.
            overwrite: Remove what was packed there before.

        Raises:
            UsageError: If it holds shards that were not packed there.
            MismatchError: If they were packed from other videos or in another way.
            DamagedError: If one of them is gone or has another size.
        """
        path = folder / JOURNAL
        header = json.loads(json.dumps({"format": _FORMAT, "settings": settings, "videos": videos}))
        if overwrite and path.exists():
            _remove(folder, path)
        if not path.exists():
            foreign = sorted(name for name in os.listdir(folder) if _SHARD_NAME.fullmatch(name))
            if foreign and not overwrite:
                raise UsageError(
                    f"{folder} holds {foreign[0]}, which was not packed there: choose another "
                    "folder"
                )
            write_atomic(path, _line(header))
            return cls(path, [])
        first, *rest = _read(path)
        _check(folder, header, first)
        journal = cls(path, [_parse(line) for line in rest])
        journal._check_files(folder)
        return journal

    @property
    def shards(self) -> tuple[PackedShard, ...]:
        """In the order they were packed."""
        return tuple(self._shards)

    def taken(self, split: str) -> int:
        """Videos of a split that are packed or passed over."""
        return sum(shard.taken for shard in self._shards if shard.split == split)

    def num_files(self, split: str) -> int:
        """Shards of a split."""
        return sum(s.file is not None for s in self._shards if s.split == split)

    def append(self, shard: PackedShard) -> None:
        """Keep for ever that a shard is whole."""
        with self._path.open("ab") as file:
            file.write(_line(asdict(shard)))
            file.flush()
            os.fsync(file.fileno())
        self._shards.append(shard)

    def _check_files(self, folder: Path) -> None:
        for shard in self._shards:
            if shard.file is None:
                continue
            path = folder / shard.file
            if not path.is_file() or path.stat().st_size != shard.num_bytes:
                what = "has another size" if path.exists() else "is gone"
                raise DamagedError(
                    f"{path} was packed and {what}: put it back, or start again with --overwrite"
                )


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; a broken end is cut off the file."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    try:
        lines = [json.loads(line) for line in data[:whole].splitlines()]
        if not lines or lines[0]["format"] != _FORMAT:
            raise ValueError("another format")
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(
            f"{path} cannot be read ({error}): start again with --overwrite after removing it and "
            "the shards beside it"
        ) from error
    return lines


def _parse(line: dict[str, Any]) -> PackedShard:
    return PackedShard(**{**line, "skipped": tuple(Skipped(**one) for one in line["skipped"])})


def _check(folder: Path, want: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse what was begun from other videos or in another way."""
    ways = "choose another folder, go back to that, or start again with --overwrite"
    lines = [
        f"  {name}: {found['settings'].get(name)!r} there, now {value!r}"
        for name, value in want["settings"].items()
        if found["settings"].get(name) != value
    ]
    there, now = found["videos"]["count"], want["videos"]["count"]
    if there != now:
        lines.append(f"  videos: {there} there, now {now}")
    elif want["videos"] != found["videos"] and not lines:
        lines.append("  videos: other files, or their sizes, times or labels have changed")
    if lines:
        raise MismatchError(
            f"{folder} holds shards that were packed otherwise:\n" + "\n".join(lines) + f"\n{ways}"
        )


def _remove(folder: Path, path: Path) -> None:
    """Remove the shards that a journal names, and the journal last."""
    header, *lines = _read(path)
    journal = Journal(path, [_parse(line) for line in lines])
    names = [shard.file for shard in journal.shards if shard.file is not None]
    # One that was renamed when its process died has no line yet.
    names += [shard_name(split, journal.num_files(split)) for split in header["videos"]["splits"]]
    for name in filter(_SHARD_NAME.fullmatch, names):
        (folder / name).unlink(missing_ok=True)
    path.unlink()
    fsync_folder(folder)


def _line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value) + "\n").encode()
