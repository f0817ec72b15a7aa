"""A cache: its identity, its columns, and what is committed.

Everything is created once, by whoever comes first, and never changed. A part whose commit
records are removed is not there any more.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    CACHE_ASIDE,
    CACHE_FILE,
    COLUMNS,
    COMMITS,
    END_BYTES,
    FORMAT,
    PARTS,
    QUARANTINE,
    SHARDS,
    PartId,
    attempt_folder,
    commit_file,
    commit_folder,
    is_chunk_file,
)
from kdhiera.cache.records import (
    COMMIT_KINDS,
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
from kdhiera.masking import MaskPlan, MaskSchedule
from kdhiera.stores import Store, open_store

_READING_THREADS = 8
_READ_TOGETHER = 256
_VIEW = re.compile(r"0|[1-9]\d*")
_RECORD = re.compile(rf"{COMMITS}/[^/]+/({_VIEW.pattern})/[^/]+\.json")


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
            taken = store.names("") and not store.exists(CACHE_FILE)  # another run's comes first
            if taken and not _made_for(store, fingerprint(identity)):
                raise UsageError(
                    f"{url} holds files but no cache, nor commits that this config would have "
                    "made: set cache.dir to a new or empty folder"
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
            body = unseal(store.read(CACHE_FILE), f"{url}/{CACHE_FILE}", kinds=("cache",))
        except FileNotFoundError:
            raise UsageError(
                f"no cache in {url}: run `kdhiera extract-teachers CONFIG` to make it, or set "
                "cache.dir to where it is"
            ) from None
        except DamagedError as error:
            raise DamagedError(f"{error}. {restoring(url)}") from None
        _check_format(url, body["identity"].get("format"))
        if body["fingerprint"] != fingerprint(body["identity"]):
            raise DamagedError(
                f"{url}/{CACHE_FILE} is damaged: its fingerprint is not its own. {restoring(url)}"
            )
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

    def check_masks(self, schedule: MaskSchedule) -> None:
        """Refuse masks under which a unit that is not kept would be needed.

        Args:
            schedule: The run's masks.

        Raises:
            MismatchError: With what is kept, and the ways out.
        """
        per_slot = self.grid.units_per_slot
        gaps = self.mask_plan.lacks_schedule(schedule, units_per_slot=per_slot)
        if gaps:
            raise MismatchError(
                f"the cache in {self.url} does not cover the masks that this run draws: "
                f"{'; '.join(gaps)}. It keeps {self.mask_plan.describe()}. Choose "
                "objective.kind, strategy, ratio and draws among these, or plan "
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
        names = self.store.names(f"{COMMITS}/{shard_id}")
        views = sorted(int(name) for name in names if _VIEW.fullmatch(name))
        keys = [commit_file(PartId(shard_id=shard_id, view=view), None) for view in views]
        found = zip(keys, self.store.read_many(keys), strict=True)
        bases = [self._parse_record(key, data) for key, data in found if data is not None]
        return [base.source for base in bases if isinstance(base, BaseCommit)]

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
        began, busy = time.perf_counter(), time.thread_time()
        first = [self._read_some(piece) for piece in pieces[:1]]
        waiting = time.perf_counter() - began > 2 * (time.thread_time() - busy)
        yield from chain.from_iterable(first)
        if not waiting:  # threads would only take turns at parsing
            yield from chain.from_iterable(map(self._read_some, pieces[1:]))
            return
        with ThreadPoolExecutor(_READING_THREADS) as pool:
            yield from chain.from_iterable(pool.map(self._read_some, pieces[1:]))

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
            raise self._removed(commit) from None
        if hashlib.sha256(data).hexdigest() != commit.sha256:
            raise self.damaged(commit.part, f"{key} has changed since the cache was opened")
        return unseal(data, f"{self.url}/{key}")

    def named_files(self, part: PartId) -> set[str]:
        """Keys of all files that any record of a part names, whatever else is wrong with it.

        Raises:
            DamagedError: If a record is damaged, or of another part.
        """
        folder = commit_folder(part)
        keys = [f"{folder}/{name}" for name in self.store.names(folder)]
        named: set[str] = set()
        for key, data in zip(keys, self.store.read_many(keys), strict=True):
            if data is None:  # dropped since it was listed
                continue
            body = unseal(data, f"{self.url}/{key}", kinds=COMMIT_KINDS)
            if (body["shard_id"], body["view"]) != (part.shard_id, part.view):
                raise DamagedError(f"{self.url}/{key} is the record of another part")
            attempt = attempt_folder(part, body["attempt"])
            named.update(f"{attempt}/{name}" for name in body["files"])
        return named

    def folder(self, commit: Commit) -> str:
        """Folder of the attempt that a commit names."""
        return attempt_folder(commit.part, commit.attempt)

    def check_files(self, *commits: Commit) -> None:
        """Check the files of bases or columns: all sizes, and contents of all but chunks.

        Chunks carry checksums of their own, checked whenever one is read. Of a file of chunks
        the end is checked: it tells one such file from another of the same size.

        Args:
            *commits: Of one part.

        Raises:
            DamagedError: Naming the part and the first file that is wrong.
        """
        wanted: dict[str, tuple[int, int]] = {}
        ends: dict[str, int] = {}
        for commit in commits:
            record, folder = self.read_record(commit), self.folder(commit)
            wanted |= {f"{folder}/{n}": (size, c) for n, (size, c) in record["files"].items()}
            ends |= {f"{folder}/{name}": crc32 for name, crc32 in record["ends"].items()}
        folders = {self.folder(commit) for commit in commits}
        found = {e.key: e.num_bytes for folder in folders for e in self.store.walk(folder)}
        for key, what in self._wrong_files(wanted, ends, found):
            raise self.unreadable(commits, f"{self.url}/{key} {what}")

    def _wrong_files(
        self, wanted: Mapping[str, tuple[int, int]], ends: Mapping[str, int], found: dict[str, int]
    ) -> Iterator[tuple[str, str]]:
        for key, (size, _) in wanted.items():
            if key not in found:
                yield key, "is missing"
            elif found[key] != size:
                yield key, f"has {found[key]:,} bytes and was written with {size:,}"
        whole = [key for key in wanted if not is_chunk_file(key)]
        for key, data in zip(whole, self.store.read_many(whole), strict=True):
            if data is None or google_crc32c.value(data) != wanted[key][1]:
                yield key, "does not match its checksum"
        sizes = {key: wanted[key][0] for key in ends}
        for key, data in zip(ends, self.store.read_ends(sizes, END_BYTES), strict=True):
            if data is None or zlib.crc32(data) != ends[key]:
                yield key, "does not match its checksum"

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
            raise self.unreadable([commit], f"{self.url}/{key} is missing") from None
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

    def unreadable(self, commits: Sequence[Commit], what: str) -> DamagedError:
        """The error for committed bytes of a part that could not be read: why is in the records.

        Args:
            commits: What was being read, of one part.
            what: What happened, in words.
        """
        for commit in commits:
            if not self.store.exists(commit_file(commit.part, commit.column)):
                return self._removed(commit)
        return self.damaged(commits[0].part, what)

    def _removed(self, commit: Commit) -> DamagedError:
        what = "the base" if commit.column is None else f"column {commit.column}"
        return DamagedError(
            f"{what} of part {commit.part} was removed from the cache in {self.url} after it was "
            f"opened: {commit_file(commit.part, commit.column)} is gone (`kdhiera cache drop` and "
            "`kdhiera cache verify --repair` remove records). Run `kdhiera extract-teachers "
            "CONFIG` to make it anew"
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


def _part_of(key: str) -> PartId:
    _, shard_id, view, _ = key.split("/")
    return PartId(shard_id=shard_id, view=int(view))


def restoring(url: str | Path, *, damaged: bool = True) -> str:
    """What to do about a `cache.json` that is gone or damaged; nothing else is lost with it."""
    aside = f"run `kdhiera cache verify {url} --repair`, which sets it aside, then "
    first = aside if damaged else "run "
    return (
        f"Restore it from a copy, or {first}`kdhiera extract-teachers CONFIG` with the config "
        "that the cache was made with, which writes it anew and computes nothing twice"
    )


def _check_format(url: str | Path, found: object) -> None:
    if found == FORMAT:
        return
    newer = isinstance(found, int) and found > FORMAT
    advice = (
        "use a newer kdhiera, or another cache.dir"
        if newer
        else "use the kdhiera that made it, or another cache.dir"
    )
    raise MismatchError(
        f"the cache in {url} has format {found} and this version of kdhiera reads format "
        f"{FORMAT}: {advice}"
    )


def _made_for(store: Store, wanted: str) -> bool:
    """Whether what is there is a cache of this identity that lost its `cache.json`.

    Damaged records say nothing; where nothing is committed, nothing can be lost.
    """
    bases = [e.key for e in store.walk(COMMITS) if e.key.endswith("/base.json")]
    made: set[str] = set()
    for data in store.read_many(bases):
        with contextlib.suppress(DamagedError):
            made |= {parse_commit(data, "")[1]} if data is not None else set()
    if made or bases:
        return made == {wanted}
    return set(store.names("")) <= {COLUMNS, COMMITS, PARTS, QUARANTINE, SHARDS, CACHE_ASIDE}
