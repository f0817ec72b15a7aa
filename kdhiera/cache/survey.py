"""The records of a part, each looked at by itself, so that any damage is seen whole.

`Cache.commits` stops at the first record that is wrong, as a reader must. What looks after
a cache wants them all, the good and the bad, and the files that each of them names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import PartId, commit_file, commit_folder
from kdhiera.cache.records import BaseCommit, ColumnCommit, Commit, commit_of, unseal
from kdhiera.errors import DamagedError

Files = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One commit record as it was found.

    Args:
        key: Its name in the store.
        sha256: Of its bytes.
        commit: What it says; None if it cannot be believed.
        fingerprint: Identity that it was made under; empty if it cannot be believed.
        files: Size and crc32c of every file that it names, by path inside the attempt.
        ends: crc32 of how its chunk files end.
        provenance: What made it.
        problem: Why it cannot be believed, in words; empty if nothing is wrong.
    """

    key: str
    sha256: str
    commit: Commit | None
    fingerprint: str
    files: Files
    ends: Mapping[str, int]
    provenance: Mapping[str, Any]
    problem: str

    @property
    def is_base(self) -> bool:
        """Whether it stands where a base record does."""
        return self.key.endswith("/base.json")


@dataclass(frozen=True, kw_only=True)
class PartRecords:
    """All records of one part.

    Args:
        part: Which part.
        records: In the order of their names.
    """

    part: PartId
    records: tuple[Record, ...]

    @property
    def base_record(self) -> Record | None:
        """The record where the base's is, good or bad."""
        return next((record for record in self.records if record.is_base), None)

    @property
    def base(self) -> BaseCommit | None:
        """The base, if its record can be believed."""
        record = self.base_record
        return record.commit if record and isinstance(record.commit, BaseCommit) else None

    @property
    def columns(self) -> dict[str, Record]:
        """Records of columns that can be believed and belong to that base, by column id."""
        base = self.base
        return {
            record.commit.column: record
            for record in self.records
            if isinstance(record.commit, ColumnCommit)
            and base is not None
            and record.commit.base_sha256 == base.sha256
        }


def survey_part(cache: Cache, part: PartId) -> PartRecords:
    """Read all records that a part has now.

    Args:
        cache: The cache.
        part: Which part.
    """
    folder = commit_folder(part)
    names = [name for name in cache.store.names(folder) if name.endswith(".json")]
    return read_part(cache, part, [f"{folder}/{name}" for name in names])


def read_part(cache: Cache, part: PartId, keys: Sequence[str]) -> PartRecords:
    """Read records that were listed before; what is gone meanwhile is left out.

    Args:
        cache: The cache.
        part: Which part they belong to.
        keys: Their names.
    """
    found = zip(keys, cache.store.read_many(keys), strict=True)
    records = tuple(_read(cache, part, key, data) for key, data in found if data is not None)
    return PartRecords(part=part, records=records)


def _read(cache: Cache, part: PartId, key: str, data: bytes) -> Record:
    sha256 = hashlib.sha256(data).hexdigest()
    path = f"{cache.url}/{key}"
    try:
        body = unseal(data, path)
        commit, made_under = commit_of(body, sha256=sha256, path=path)
        if commit.part != part or key != commit_file(part, commit.column):
            column = "" if commit.column is None else f", column {commit.column}"
            raise DamagedError(f"{path} is the record of {commit.part}{column}")
    except DamagedError as error:
        return Record(
            key=key,
            sha256=sha256,
            commit=None,
            fingerprint="",
            files={},
            ends={},
            provenance={},
            problem=str(error),
        )
    files = {name: (int(size), int(crc32c)) for name, (size, crc32c) in body["files"].items()}
    return Record(
        key=key,
        sha256=sha256,
        commit=commit,
        fingerprint=made_under,
        files=files,
        ends=body["ends"],
        provenance=body["provenance"],
        problem="",
    )
