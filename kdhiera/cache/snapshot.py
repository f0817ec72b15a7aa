"""Which commits a run reads: named one by one, kept with the run, found again or refused.

A cache grows while a run is stopped. What was committed when the run began is what it goes
on with, so that its losses are those of an uninterrupted run.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import PartId, commit_file
from kdhiera.cache.records import BaseCommit, ColumnCommit, Commit, PartCommits, seal, unseal
from kdhiera.errors import DamagedError, MismatchError
from kdhiera.storage import write_atomic

SNAPSHOT_FILE = "cache-snapshot.json"

_GZIP_ABOVE = 2**20  # bytes of JSON; hashes only shrink to half, small files stay readable
_GZIP_MAGIC = b"\x1f\x8b"

Named = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Commits by name.

    Args:
        num_views: Views 0 .. num_views-1 of every shard are named.
        columns: Column ids, sorted.
        parts: For every part attempt and sha256 of its base record, then of the record of
            each of `columns`.
    """

    num_views: int
    columns: tuple[str, ...]
    parts: Mapping[PartId, tuple[Named, ...]]

    @property
    def sha256(self) -> str:
        """Hash over the records of all that is named."""
        digest = hashlib.sha256()
        for part in sorted(self.parts):
            hashes = " ".join(sha256 for _, sha256 in self.parts[part])
            digest.update(f"{part.shard_id}\n{part.view}\n{hashes}\n".encode())
        return digest.hexdigest()

    def check(self, *, num_views: int, columns: Collection[str]) -> None:
        """Refuse to read other views or columns than the run began with.

        Raises:
            MismatchError: If they differ.
        """
        wanted = (num_views, tuple(sorted(columns)))
        if wanted != (self.num_views, self.columns):
            raise MismatchError(
                f"this run began with {self.num_views} views of {', '.join(self.columns)} and the "
                f"config asks for {num_views} views of {', '.join(wanted[1])}: go back to these "
                "settings, choose another run_dir, or start again with --overwrite"
            )

    def find(self, cache: Cache) -> dict[PartId, PartCommits]:
        """The commits that are named, in sorted order of parts.

        Raises:
            MismatchError: If one of them is gone, or another one stands there.
            DamagedError: If a record is damaged.
        """
        wanted = [
            (part, column, named)
            for part in sorted(self.parts)
            for column, named in zip((None, *self.columns), self.parts[part], strict=True)
        ]
        keys = [commit_file(part, column) for part, column, _ in wanted]
        found = [
            _named(cache, *item, commit)
            for item, commit in zip(wanted, cache.read_commits(keys), strict=True)
        ]
        bases = {c.part: c for c in found if isinstance(c, BaseCommit)}
        columns: dict[PartId, dict[str, ColumnCommit]] = {part: {} for part in bases}
        for commit in found:
            if isinstance(commit, ColumnCommit):
                columns[commit.part][commit.column] = commit
        return {p: PartCommits(base=base, columns=columns[p]) for p, base in bases.items()}


def take(
    parts: Mapping[PartId, PartCommits], *, num_views: int, columns: Sequence[str]
) -> Snapshot:
    """Name some commits.

    Args:
        parts: All of them have the columns.
        num_views: Views of every shard.
        columns: Columns that are read.
    """
    names = tuple(sorted(columns))

    def name(commits: PartCommits) -> tuple[Named, ...]:
        base = commits.base
        chosen = [commits.columns[column] for column in names]
        return (base.attempt, base.sha256), *((c.attempt, c.sha256) for c in chosen)

    return Snapshot(
        num_views=num_views,
        columns=names,
        parts={part: name(parts[part]) for part in sorted(parts)},
    )


def save_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """Write `cache-snapshot.json` into a run's folder, gzipped where it is large."""
    body = {
        "kind": "snapshot",
        "num_views": snapshot.num_views,
        "columns": list(snapshot.columns),
        "parts": [[p.shard_id, p.view, *named] for p, named in snapshot.parts.items()],
    }
    data = seal(body)
    if len(data) > _GZIP_ABOVE:
        data = gzip.compress(data, compresslevel=1, mtime=0)
    write_atomic(folder / SNAPSHOT_FILE, data)


def load_snapshot(folder: Path) -> Snapshot | None:
    """What `save_snapshot` wrote into a run's folder, or None.

    Raises:
        DamagedError: If the file is damaged.
    """
    path = folder / SNAPSHOT_FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        body = _unpack(data, path)
    except (DamagedError, OSError, EOFError, zlib.error):
        raise DamagedError(
            f"{path} is damaged: restore it from a copy, or start again with --overwrite"
        ) from None
    return Snapshot(
        num_views=body["num_views"],
        columns=tuple(body["columns"]),
        parts={
            PartId(shard_id=shard_id, view=view): tuple((a, h) for a, h in named)
            for shard_id, view, *named in body["parts"]
        },
    )


def _unpack(data: bytes, path: Path) -> dict[str, Any]:
    return unseal(gzip.decompress(data) if data.startswith(_GZIP_MAGIC) else data, str(path))


def _named(
    cache: Cache, part: PartId, column: str | None, named: Named, commit: Commit | None
) -> Commit:
    """The commit that stands where one was named, refused if it is not that one."""
    if commit is None or (commit.attempt, commit.sha256) != named:
        what = f"the {'base' if column is None else f'column {column}'} of {part}"
        state = "is gone" if commit is None else "was replaced by another one"
        raise MismatchError(
            f"this run began with {what} (attempt {named[0]}), which {state} in the cache in "
            f"{cache.url}: restore it from a copy, or start again with --overwrite"
        )
    if isinstance(commit, ColumnCommit):
        cache.columns.check_basis(commit.column, commit.basis_sha256)
    return commit
