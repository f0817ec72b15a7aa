"""A cache: its identity, its columns, and what is committed.

Everything is created once, by whoever comes first, and never changed. A part whose commit
records are removed is not there any more.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import google_crc32c

from kdhiera.cache.columns import Columns
from kdhiera.cache.fingerprint import (
    Identity,
    base_differences,
    fingerprint,
    grid_of,
    mask_plan_of,
    table,
)
from kdhiera.cache.layout import (
    CACHE_FILE,
    COMMITS,
    FORMAT,
    PartId,
    attempt_folder,
    commit_file,
    commit_folder,
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
from kdhiera.masking import MaskPlan, MaskSpec
from kdhiera.stores import Store, open_store

_READING_THREADS = 8
_READ_TOGETHER = 256
_RECORD = re.compile(rf"{COMMITS}/[^/]+/\d+/[^/]+\.json")


class Cache:
    """A cache: its identity and commit points; from `create_or_open` or `open`.

    Args:
        store: Where it lives.
        identity: Identity that it has.
    """

    def __init__(self, store: Store, identity: Identity) -> None:
        self.store = store
        self.identity = identity
        self.fingerprint = fingerprint(identity)
        self.columns = Columns(store)

    @property
    def url(self) -> str:
        """Folder or address, as it was given."""
        return self.store.url

    @classmethod
    def create_or_open(
        cls, url: str | Path, identity: Identity, *, provenance: Mapping[str, object]
    ) -> Cache:
        """Open the cache at `url` for extraction, creating it if there is none.

        Args:
            url: Folder or `s3://` address of the cache; made if it does not exist.
            identity: From `fingerprint.base_identity`.
            provenance: Recorded if the cache is created; decides nothing.

        Raises:
            MismatchError: If the cache there was made for another base.
            UsageError: If something else is there.
        """
        store = open_store(url)
        if not store.exists(CACHE_FILE):
            if Path(str(url)).is_file():
                raise UsageError(f"{url} is a file: set cache.dir to a folder")
            if store.names("") and not _made_for(store, fingerprint(identity)):
                raise UsageError(
                    f"{url} holds files but no cache: set cache.dir to a new or empty folder"
                )
            body = {
                "kind": "cache",
                "identity": identity,
                "fingerprint": fingerprint(identity),
                "provenance": provenance,
            }
            store.create(CACHE_FILE, seal(body))
        cache = cls.open(url)
        cache.check(identity)
        return cache

    @classmethod
    def open(cls, url: str | Path) -> Cache:
        """Open an existing cache.

        Args:
            url: Its folder or `s3://` address.

        Raises:
            UsageError: If there is none.
            DamagedError: If its identity is damaged.
            MismatchError: If it has another format version.
        """
        store = open_store(url)
        try:
            body = unseal(store.read(CACHE_FILE), f"{url}/{CACHE_FILE}")
        except FileNotFoundError:
            raise UsageError(
                f"no cache in {url}: run `kdhiera extract-teachers CONFIG` to make it, or set "
                "cache.dir to where it is"
            ) from None
        except DamagedError as error:
            raise DamagedError(
                f"{error}. Restore it from a copy, or remove it and run `kdhiera extract-teachers "
                "CONFIG` with the config that the cache was made with, which writes it anew"
            ) from None
        found = body["identity"].get("format")
        if found != FORMAT:
            raise MismatchError(
                f"the cache in {url} has format {found} and this version of kdhiera reads "
                f"format {FORMAT}: use another cache.dir"
            )
        if body["fingerprint"] != fingerprint(body["identity"]):
            raise DamagedError(f"{url}/{CACHE_FILE} is damaged: its fingerprint is not its own")
        return cls(store, body["identity"])

    def check(self, want: Mapping[str, Any], *, declared_only: bool = False) -> None:
        """Refuse another base: other clips, other scores, or units that are not kept.

        A cache may keep more than is asked for.

        Args:
            want: Identity that the run asks for.
            declared_only: Compare only the fields that `want` has, and no masks
                (`check_masks` does).

        Raises:
            MismatchError: With a table of the fields that differ.
        """
        different = base_differences(want, self.identity, declared_only=declared_only)
        if different:
            raise MismatchError(
                f"the cache in {self.url} was made for other clips or scores:\n"
                f"{table(different)}\n"
                "Change the config to what the cache has, or set cache.dir to another folder "
                "to make a cache for this config"
            )
        if declared_only:
            return
        per_slot = self.grid.units_per_slot
        gaps = self.mask_plan.lacks_plan(mask_plan_of(want), units_per_slot=per_slot)
        if gaps:
            raise MismatchError(
                f"the cache in {self.url} does not keep what `masks` plans: {'; '.join(gaps)}. It "
                f"keeps {self.mask_plan.describe()}. Plan no more than that, or set cache.dir to "
                "another folder: a wider plan is a new cache, made from the videos again"
            )

    def check_masks(self, spec: MaskSpec, *, draws: int) -> None:
        """Refuse masks that would show a unit which is not kept.

        Args:
            spec: The run's masks.
            draws: Draws 0 .. draws-1 are used.

        Raises:
            MismatchError: With what is kept, and the ways out.
        """
        per_slot = self.grid.units_per_slot
        gaps = self.mask_plan.lacks(spec, draws=draws, units_per_slot=per_slot)
        if gaps:
            raise MismatchError(
                f"the cache in {self.url} does not cover the masks that this run draws: "
                f"{'; '.join(gaps)}. It keeps {self.mask_plan.describe()}. Choose "
                "objective.strategy, objective.ratio and objective.draws among these, or plan "
                "yours in `masks` and set cache.dir to another folder: a wider plan is a new "
                "cache, made from the videos again"
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

    def part_commits(self, part: PartId) -> PartCommits | None:
        """What is committed of a part now, or None.

        Raises:
            DamagedError: If a record is damaged or belongs to another base.
        """
        folder = commit_folder(part)
        keys = [f"{folder}/{n}" for n in self.store.names(folder) if n.endswith(".json")]
        return self._together(part, self._read_some(keys))

    def sources(self, shard_id: str) -> list[SourceInfo]:
        """Shard that each committed view of `shard_id` was made from."""
        views = sorted(int(view) for view in self.store.names(f"{COMMITS}/{shard_id}"))
        found = (self.part_commits(PartId(shard_id=shard_id, view=view)) for view in views)
        return [commits.base.source for commits in found if commits is not None]

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

    def records(self) -> dict[PartId, list[str]]:
        """Keys of all commit records there are, by part, in sorted order."""
        folders: dict[str, list[str]] = {}
        for entry in self.store.walk(COMMITS):
            if _RECORD.fullmatch(entry.key):
                folders.setdefault(entry.key.rpartition("/")[0], []).append(entry.key)
        found = {_part_of(keys[0]): sorted(keys) for keys in folders.values()}
        return {part: found[part] for part in sorted(found)}

    def commits(self, shards: Collection[str] | None = None) -> dict[PartId, PartCommits]:
        """Everything that is committed now, in sorted order of parts.

        One listing, and each record read once.

        Args:
            shards: Shard ids to look at; None looks at all.
        """
        wanted = None if shards is None else frozenset(shards)
        records = {
            part: keys
            for part, keys in self.records().items()
            if wanted is None or part.shard_id in wanted
        }
        read = self.read_commits([key for keys in records.values() for key in keys])
        together = {
            part: self._together(part, islice(read, len(records[part]))) for part in records
        }
        return {part: commits for part, commits in together.items() if commits is not None}

    def read_commits(self, keys: Sequence[str]) -> Iterator[Commit | None]:
        """Many commit records, in the order of their keys.

        Returns:
            None for one that is gone, or of a column that the cache does not know (any more).

        Raises:
            DamagedError: If one is damaged, of another part, or made under another identity.
        """
        pieces = [keys[i : i + _READ_TOGETHER] for i in range(0, len(keys), _READ_TOGETHER)]
        with ThreadPoolExecutor(_READING_THREADS) as pool:
            yield from chain.from_iterable(pool.map(self._read_some, pieces))

    def read_commit(self, key: str) -> Commit | None:
        """One commit record; None for a column that the cache does not know (any more).

        Raises:
            DamagedError: If it is damaged, of another part, or made under another identity.
        """
        return self._parse_record(key, self.store.read(key))

    def read_record(self, commit: Commit) -> dict[str, Any]:
        """Body of a commit record, with its list of files.

        Raises:
            DamagedError: If the record is not the one that was listed.
        """
        key = commit_file(commit.part, commit.column)
        try:
            data = self.store.read(key)
        except FileNotFoundError:
            raise self.damaged(commit.part, f"its commit record {key} is gone") from None
        if hashlib.sha256(data).hexdigest() != commit.sha256:
            raise self.damaged(commit.part, f"{key} has changed since the cache was opened")
        return unseal(data, f"{self.url}/{key}")

    def folder(self, commit: Commit) -> str:
        """Folder of the attempt that a commit names."""
        return attempt_folder(commit.part, commit.attempt)

    def check_files(self, *commits: Commit, contents: bool = False) -> None:
        """Check the files of bases or columns: all sizes, and contents of all but chunks.

        Chunks carry checksums of their own, checked whenever one is read.

        Args:
            *commits: Of one part.
            contents: Check the contents of chunk files as well.

        Raises:
            DamagedError: Naming the part and the first file that is wrong.
        """
        for problem in self.file_problems(*commits, contents=contents):
            raise self.damaged(commits[0].part, problem.what)

    def file_problems(self, *commits: Commit, contents: bool) -> Iterator[FileProblem]:
        """Every file of bases or columns of one part that is missing or wrong.

        Args:
            *commits: Of one part.
            contents: Check the contents of chunk files as well.
        """
        wanted: dict[str, tuple[tuple[int, int], list[Commit]]] = {}
        for commit in commits:
            for name, entry in self.read_record(commit)["files"].items():
                key = f"{self.folder(commit)}/{name}"
                wanted.setdefault(key, (tuple(entry), []))[1].append(commit)
        folders = {self.folder(commit) for commit in commits}
        found = {e.key: e.num_bytes for folder in folders for e in self.store.walk(folder)}
        small: list[str] = []
        chunks: list[str] = []  # large: read one at a time
        for key, ((size, _), owners) in wanted.items():
            path = f"{self.url}/{key}"
            if key not in found:
                yield FileProblem(what=f"{path} is missing", key=key, commits=tuple(owners))
            elif found[key] != size:
                what = f"{path} has {found[key]:,} bytes and was written with {size:,}"
                yield FileProblem(what=what, key=key, commits=tuple(owners))
            elif not is_chunk_file(key):
                small.append(key)
            elif contents:
                chunks.append(key)
        for keys in (small, *([key] for key in chunks)):
            for key, data in zip(keys, self.store.read_many(keys), strict=True):
                (_, crc32c), owners = wanted[key]
                if data is None or google_crc32c.value(data) != crc32c:
                    what = f"{self.url}/{key} does not match its checksum"
                    yield FileProblem(what=what, key=key, commits=tuple(owners))

    def read_file(self, commit: Commit, name: str) -> bytes:
        """Contents of one file of a base or column, checked.

        Args:
            commit: The base or column.
            name: Path inside the attempt, such as `rows.parquet`.

        Raises:
            DamagedError: If the file is missing or differs from its checksum.
        """
        key = f"{self.folder(commit)}/{name}"
        try:
            data = self.store.read(key)
        except FileNotFoundError:
            raise self.damaged(commit.part, f"{self.url}/{key} is missing") from None
        if [len(data), google_crc32c.value(data)] != self.read_record(commit)["files"][name]:
            what = f"{self.url}/{key} does not match its checksum"
            raise self.damaged(commit.part, what)
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
            f"part {part} of the cache in {self.url} is damaged: {what}. Run `kdhiera cache verify "
            f"{self.url} --repair` to drop what is damaged, then `kdhiera extract-teachers CONFIG` "
            "to make it anew"
        )

    def _read_some(self, keys: Sequence[str]) -> list[Commit | None]:
        found = zip(keys, self.store.read_many(keys), strict=True)
        return [None if data is None else self._parse_record(key, data) for key, data in found]

    def _together(self, part: PartId, commits: Iterable[Commit | None]) -> PartCommits | None:
        """What is committed of a part, from all its records; None are left out."""
        base: BaseCommit | None = None
        columns: dict[str, ColumnCommit] = {}
        for commit in commits:
            if isinstance(commit, BaseCommit):
                base = commit
            elif commit is not None:
                columns[commit.column] = commit
        if base is None:
            if columns:
                raise self.damaged(part, f"columns {', '.join(columns)} have no base record")
            return None
        for column in columns.values():
            if column.base_sha256 != base.sha256:
                raise self.damaged(part, f"column {column.column} belongs to another base record")
            self.columns.check_basis(column.column, column.basis_sha256)
        return PartCommits(base=base, columns=columns)

    def _parse_record(self, key: str, data: bytes) -> Commit | None:
        part = _part_of(key)
        try:
            commit, made_under = parse_commit(data, f"{self.url}/{key}")
        except DamagedError as error:
            raise self.damaged(part, str(error)) from None
        return self._checked(part, key, commit, made_under)

    def _checked(self, part: PartId, key: str, commit: Commit, made_under: str) -> Commit | None:
        if commit.part != part or key != commit_file(part, commit.column):
            raise self.damaged(part, f"{self.url}/{key} is the record of {commit.part}")
        wanted = self.fingerprint
        if commit.column is not None:
            known = self.columns.fingerprint(commit.column)
            if known is None:
                return None
            wanted = known
        if made_under != wanted:
            raise self.damaged(part, f"{self.url}/{key} was committed under another identity")
        return commit


@dataclass(frozen=True, kw_only=True)
class FileProblem:
    """A file of a part that is missing or wrong.

    Args:
        what: In words.
        key: The file.
        commits: Base or columns that need it.
    """

    what: str
    key: str
    commits: tuple[Commit, ...]


def _part_of(key: str) -> PartId:
    _, shard_id, view, _ = key.split("/")
    return PartId(shard_id=shard_id, view=int(view))


def _made_for(store: Store, wanted: str) -> bool:
    """Whether the commits of a cache that lost its `cache.json` were made for this identity."""
    bases = [e.key for e in store.walk(COMMITS) if e.key.endswith("/base.json")]
    if not bases:
        return False
    try:
        made = {parse_commit(store.read(key), key)[1] for key in bases}
    except DamagedError:
        return False
    return made == {wanted}
