"""A cache folder: its identity, its columns, and what is committed.

Everything is created once, by whoever comes first, and never changed. A part whose commit
folder is removed is not there any more.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c

from kdhiera.cache.fingerprint import (
    Identity,
    differences,
    fingerprint,
    grid_of,
    mask_plan_of,
    table,
)
from kdhiera.cache.layout import (
    FORMAT,
    PartId,
    attempt_folder,
    cache_file,
    column_file,
    columns_folder,
    commit_file,
    commit_folder,
    commits_folder,
    is_chunk_file,
)
from kdhiera.cache.records import (
    BaseCommit,
    ColumnCommit,
    Commit,
    Missing,
    PartCommits,
    SourceInfo,
    parse_commit,
    seal,
    unseal,
)
from kdhiera.cache.table import Row, from_parquet
from kdhiera.errors import DamagedError, MismatchError, UsageError
from kdhiera.grid import Grid
from kdhiera.masking import MaskPlan
from kdhiera.storage import file_crc32c, put_if_absent

_LISTING_THREADS = 8


class Cache:
    """A cache folder: its identity and commit points; from `create_or_open` or `open`.

    Args:
        root: Folder of the cache.
        identity: Identity that it has.
    """

    def __init__(self, root: Path, identity: Identity) -> None:
        self.root = root
        self.identity = identity
        self.fingerprint = fingerprint(identity)
        self._column_fingerprints: dict[str, str] = {}

    @classmethod
    def create_or_open(
        cls, root: Path, identity: Identity, *, provenance: Mapping[str, object]
    ) -> Cache:
        """Open the cache in `root` for extraction, creating it if there is none.

        Args:
            root: Folder of the cache; made if it does not exist.
            identity: From `fingerprint.base_identity`.
            provenance: Recorded if the cache is created; decides nothing.

        Raises:
            MismatchError: If the cache there was made for another base.
            UsageError: If the folder holds something else.
        """
        path = cache_file(root)
        if not path.exists():
            if root.is_file():
                raise UsageError(f"{root} is a file: set cache.dir to a folder")
            if root.is_dir() and any(not p.name.startswith(".") for p in root.iterdir()):
                raise UsageError(
                    f"{root} holds files but no cache: set cache.dir to a new or empty folder"
                )
            body = {
                "kind": "cache",
                "identity": identity,
                "fingerprint": fingerprint(identity),
                "provenance": provenance,
            }
            put_if_absent(path, seal(body))
        cache = cls.open(root)
        cache.check(identity)
        return cache

    @classmethod
    def open(cls, root: Path) -> Cache:
        """Open an existing cache.

        Raises:
            UsageError: If there is none.
            DamagedError: If its identity is damaged.
            MismatchError: If it has another format version.
        """
        path = cache_file(root)
        try:
            body = unseal(path.read_bytes(), path)
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(
                f"no cache in {root}: run `kdhiera extract-teachers CONFIG` to make it, or set "
                "cache.dir to where it is"
            ) from None
        found = body["identity"].get("format")
        if found != FORMAT:
            raise MismatchError(
                f"the cache in {root} has format {found} and this version of kdhiera reads "
                f"format {FORMAT}: use another cache.dir"
            )
        return cls(root, body["identity"])

    def check(self, want: Mapping[str, object], *, declared_only: bool = False) -> None:
        """Refuse another base.

        Args:
            want: Identity that the run asks for.
            declared_only: Compare only the fields that `want` has.

        Raises:
            MismatchError: With a table of the fields that differ.
        """
        different = differences(want, self.identity, declared_only=declared_only)
        if different:
            raise MismatchError(
                f"the cache in {self.root} was made for other clips, scores or masks:\n"
                f"{table(different)}\n"
                "Change the config to what the cache has, or set cache.dir to another folder "
                "to make a cache for this config"
            )

    @cached_property
    def grid(self) -> Grid:
        """Geometry of the clips."""
        return grid_of(self.identity)

    @cached_property
    def mask_plan(self) -> MaskPlan:
        """Which units are kept."""
        return mask_plan_of(self.identity)

    @property
    def max_kept(self) -> int:
        """Bound on the kept units of a row, `K`."""
        return self.mask_plan.max_kept(self.grid.slots, self.grid.units_per_slot)

    def columns(self) -> tuple[str, ...]:
        """Columns that the cache knows, sorted; a part may lack any of them."""
        folder = columns_folder(self.root)
        if not folder.is_dir():
            return ()
        return tuple(sorted(p.name for p in folder.iterdir() if (p / "column.json").exists()))

    def column_identity(self, column: str) -> Identity | None:
        """Identity of a column, or None if the cache does not know it."""
        path = column_file(self.root, column)
        try:
            body = unseal(path.read_bytes(), path)
        except FileNotFoundError:
            return None
        identity: Identity = body["identity"]
        return identity

    def ensure_column(
        self, column: str, identity: Identity, *, provenance: Mapping[str, object]
    ) -> None:
        """Create a column, or check that the one there is the same.

        Args:
            column: Column id.
            identity: From `fingerprint.column_identity`.
            provenance: Recorded if the column is created; decides nothing.

        Raises:
            MismatchError: With a table of the fields that differ.
        """
        body = {
            "kind": "column",
            "column": column,
            "identity": identity,
            "fingerprint": fingerprint(identity),
            "provenance": provenance,
        }
        path = column_file(self.root, column)
        if not path.exists():
            put_if_absent(path, seal(body))
        self.check_column(column, identity)

    def check_column(
        self, column: str, want: Mapping[str, object], *, declared_only: bool = False
    ) -> None:
        """Refuse a column that was made by another teacher or in another way.

        Args:
            column: Column id.
            want: Identity that the run asks for.
            declared_only: Compare only the fields that `want` has.

        Raises:
            MismatchError: If the cache does not have the column, or with a table of the
                fields that differ.
        """
        has = self.column_identity(column)
        if has is None:
            there = ", ".join(self.columns()) or "none"
            raise MismatchError(
                f"the cache in {self.root} has no column {column} (it has: {there}): run "
                "`kdhiera extract-teachers CONFIG` to add it"
            )
        different = differences(want, has, declared_only=declared_only)
        if different:
            raise MismatchError(
                f"column {column} of the cache in {self.root} was made in another way:\n"
                f"{table(different)}\n"
                "Change the config to what the cache has, give the teacher another name to make "
                "a column of its own, or set cache.dir to another folder"
            )

    def column_fingerprint(self, column: str) -> str:
        """Fingerprint of a column that the cache knows."""
        if column not in self._column_fingerprints:
            identity = self.column_identity(column)
            if identity is None:
                raise DamagedError(
                    f"{column_file(self.root, column)} is missing, but parts of the column are "
                    "committed: restore the file from a copy of the cache"
                )
            self._column_fingerprints[column] = fingerprint(identity)
        return self._column_fingerprints[column]

    def part_commits(self, part: PartId) -> PartCommits | None:
        """What is committed of a part now, or None.

        Raises:
            DamagedError: If a record is damaged or belongs to another base.
        """
        base: BaseCommit | None = None
        columns: dict[str, ColumnCommit] = {}
        for path in _record_files(commit_folder(self.root, part)):
            commit, made_under = parse_commit(path.read_bytes(), path)
            if commit.part != part or path.name != f"{commit.column or 'base'}.json":
                raise self.damaged(part, f"{path} is the record of {commit.part}")
            if isinstance(commit, BaseCommit):
                base, wanted = commit, self.fingerprint
            else:
                columns[commit.column] = commit
                wanted = self.column_fingerprint(commit.column)
            if made_under != wanted:
                raise self.damaged(part, f"{path} was committed under another identity")
        if base is None:
            if columns:
                raise self.damaged(part, f"columns {', '.join(columns)} have no base record")
            return None
        for column in columns.values():
            if column.base_sha256 != base.sha256:
                raise self.damaged(part, f"column {column.column} belongs to another base record")
        return PartCommits(base=base, columns=columns)

    def sources(self, shard_id: str) -> list[SourceInfo]:
        """Shard that each committed view of `shard_id` was made from."""
        views = _folders(commits_folder(self.root) / shard_id)
        parts = sorted(PartId(shard_id=shard_id, view=int(view.name)) for view in views)
        commits = (self.part_commits(part) for part in parts)
        return [found.base.source for found in commits if found is not None]

    def missing(self, part: PartId, columns: Sequence[str]) -> Missing:
        """What of a part is not committed yet.

        Args:
            part: Which part.
            columns: Columns asked for.
        """
        commits = self.part_commits(part)
        if commits is None:
            return Missing(base=True, columns=tuple(columns))
        return Missing(base=False, columns=tuple(c for c in columns if c not in commits.columns))

    def commits(self) -> dict[PartId, PartCommits]:
        """Everything that is committed now, in sorted order of parts."""
        parts = [
            PartId(shard_id=shard.name, view=int(view.name))
            for shard in _folders(commits_folder(self.root))
            for view in _folders(Path(shard.path))
        ]
        parts.sort()
        with ThreadPoolExecutor(_LISTING_THREADS) as pool:
            read = pool.map(self.part_commits, parts)
            return {p: c for p, c in zip(parts, read, strict=True) if c is not None}

    def read_record(self, commit: Commit) -> dict[str, Any]:
        """Body of a commit record, with its list of files.

        Raises:
            DamagedError: If the record is not the one that was listed.
        """
        path = commit_file(self.root, commit.part, commit.column)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise self.damaged(commit.part, f"its commit record {path.name} is gone") from None
        if hashlib.sha256(data).hexdigest() != commit.sha256:
            raise self.damaged(commit.part, f"{path.name} has changed since the cache was opened")
        return unseal(data, path)

    def folder(self, commit: Commit) -> Path:
        """Folder of the attempt that a commit names."""
        return attempt_folder(self.root, commit.part, commit.attempt)

    def check_files(self, commit: Commit) -> None:
        """Check the files of a base or column: all sizes, and contents of all but chunks.

        Chunks carry checksums of their own, checked whenever one is read.

        Raises:
            DamagedError: Naming the part and the file.
        """
        for name, (size, crc32c) in self.read_record(commit)["files"].items():
            path = self.folder(commit) / name
            try:
                found = path.stat().st_size
            except FileNotFoundError:
                raise self.damaged(commit.part, f"{path} is missing") from None
            if found != size:
                raise self.damaged(
                    commit.part, f"{path} has {found:,} bytes and was written with {size:,}"
                )
            if not is_chunk_file(name) and file_crc32c(path) != crc32c:
                raise self.damaged(commit.part, f"{path} does not match its checksum")

    def read_file(self, commit: Commit, name: str) -> bytes:
        """Contents of one file of a base or column, checked.

        Args:
            commit: The base or column.
            name: Path inside the attempt, such as `rows.parquet`.

        Raises:
            DamagedError: If the file is missing or differs from its checksum.
        """
        path = self.folder(commit) / name
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise self.damaged(commit.part, f"{path} is missing") from None
        if [len(data), google_crc32c.value(data)] != self.read_record(commit)["files"][name]:
            raise self.damaged(commit.part, f"{path} does not match its checksum")
        return data

    def rows(self, base: BaseCommit) -> list[Row]:
        """All rows of a committed part, in the order of the shard.

        Raises:
            DamagedError: If their file is missing or damaged.
        """
        return from_parquet(self.read_file(base, "rows.parquet"))

    def damaged(self, part: PartId, what: str) -> DamagedError:
        """The error for bytes of a part that are missing or wrong, with the way out."""
        return DamagedError(
            f"part {part} of the cache in {self.root} is damaged: {what}. To make it anew, remove "
            f"{commit_folder(self.root, part)} and run `kdhiera extract-teachers CONFIG`"
        )


def _folders(path: Path) -> Iterator[os.DirEntry[str]]:
    with contextlib.suppress(FileNotFoundError), os.scandir(path) as entries:
        yield from (e for e in entries if e.is_dir(follow_symlinks=False))


def _record_files(folder: Path) -> list[Path]:
    """Commit records of a part; those that are being written have hidden names."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return [folder / n for n in sorted(names) if n.endswith(".json") and not n.startswith(".")]
