"""Records: what a commit point says, and how it is kept whole.

A sealed file is one line of JSON, `{"body":BODY,"sha256":"HEX"}`, with the hash over the
bytes of BODY. A base record names the files, rows and source of a part; a column record
names in addition the base record it belongs to by its sha256. Both name the rows that are bad
in them, so that a reader knows its samples when it has read the records.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from kdhiera.cache.fingerprint import canonical_json
from kdhiera.cache.gaps import Runs
from kdhiera.cache.layout import PartId
from kdhiera.errors import DamagedError

COMMIT_KINDS = ("base", "column")

Versions = tuple[tuple[str, str], ...]

_HEAD, _MIDDLE, _TAIL = b'{"body":', b',"sha256":"', b'"}\n'
_SEAL_BYTES = len(_MIDDLE) + 64 + len(_TAIL)


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """Where a part's samples came from.

    Args:
        path: As listed; query strings and credentials are cut before it is recorded.
        num_bytes: Size of the shard.
        sha256: Of the whole shard, or None where it was not read whole.
        problems: What is wrong with the shard itself, in words.
    """

    path: str
    num_bytes: int
    sha256: str | None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseCommit:
    """A base record without its list of files.

    Args:
        part: Which part.
        attempt: Attempt that holds its arrays.
        sha256: Of the record; columns are bound to it.
        num_rows: Samples, good or bad.
        array_rows: Good samples.
        statuses: Rows by status.
        bad: Bad rows, by their place in the shard.
        samples_digest: Hash of which samples there are.
        rows_digest: Hash of all that a column depends on.
        num_bytes: Bytes of its files.
        versions: Versions of what made it, as (package, version), sorted.
        source: The shard.
    """

    part: PartId
    attempt: str
    sha256: str
    num_rows: int
    array_rows: int
    statuses: Mapping[str, int]
    bad: Runs
    samples_digest: str
    rows_digest: str
    num_bytes: int
    versions: Versions
    source: SourceInfo

    @property
    def column(self) -> None:
        """A base belongs to no column."""
        return


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnCommit:
    """A column record without its list of files.

    Args:
        part: Which part.
        column: Column id.
        attempt: Attempt that holds its arrays.
        sha256: Of the record.
        base_sha256: The base record it belongs to.
        width: Channels.
        statuses: Good rows by column status.
        bad: Rows that are not ok in this column, by array row.
        num_bytes: Bytes of its files.
        versions: Versions of what made it, as (package, version), sorted.
        basis_sha256: Of the basis it was encoded with; None if its encoding needs none.
    """

    part: PartId
    column: str
    attempt: str
    sha256: str
    base_sha256: str
    width: int
    statuses: Mapping[str, int]
    bad: Runs
    num_bytes: int
    versions: Versions
    basis_sha256: str | None


Commit = BaseCommit | ColumnCommit


@dataclass(frozen=True, kw_only=True, slots=True)
class PartCommits:
    """What is committed of one part."""

    base: BaseCommit
    columns: Mapping[str, ColumnCommit]


@dataclass(frozen=True, kw_only=True)
class Missing:
    """What a part still lacks.

    Args:
        base: Whether its base is missing (then all columns are).
        columns: Columns that are missing, in the order asked for.
    """

    base: bool
    columns: tuple[str, ...]

    def __bool__(self) -> bool:
        return self.base or bool(self.columns)


def seal(body: Mapping[str, object]) -> bytes:
    """A JSON record with its own checksum."""
    data = canonical_json(body)
    return b"".join((_HEAD, data, _MIDDLE, hashlib.sha256(data).hexdigest().encode(), _TAIL))


def unseal(data: bytes, path: str, *, kinds: Collection[str] = ()) -> dict[str, Any]:
    """Inverse of `seal`.

    Args:
        data: Bytes of the file.
        path: Where they came from, for the message.
        kinds: What the record may be: a sound record may lie in another one's place.

    Raises:
        DamagedError: If they are not what `seal` wrote, or a record of another kind.
    """
    body, end = data[len(_HEAD) : -_SEAL_BYTES], data[-_SEAL_BYTES:]
    expected = b"".join((_MIDDLE, hashlib.sha256(body).hexdigest().encode(), _TAIL))
    if not data.startswith(_HEAD) or end != expected:
        raise DamagedError(f"{path} is damaged: it does not match its own checksum")
    record: dict[str, Any] = json.loads(body)
    if kinds and record.get("kind") not in kinds:
        wanted = " or ".join(kinds)
        raise DamagedError(f"{path} is damaged: it is a {record.get('kind')}, not a {wanted}")
    return record


def parse_commit(data: bytes, path: str) -> tuple[Commit, str]:
    """A commit record without its list of files.

    Args:
        data: Bytes of the record.
        path: Where they came from, for the message.

    Returns:
        The commit and the fingerprint it was made under.

    Raises:
        DamagedError: If the record is damaged, or is none of a commit.
    """
    return commit_of(
        unseal(data, path, kinds=COMMIT_KINDS), sha256=hashlib.sha256(data).hexdigest(), path=path
    )


def commit_of(body: Mapping[str, Any], *, sha256: str, path: str) -> tuple[Commit, str]:
    """What `parse_commit` gives, from a record's body.

    Args:
        body: From `unseal`.
        sha256: Of the whole record.
        path: Where it came from, for the message.

    Raises:
        DamagedError: If it is no body of a commit record.
    """
    try:
        return _commit(body, sha256)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"{path} is no record of a commit ({error!r})") from None


def _commit(body: Mapping[str, Any], sha256: str) -> tuple[Commit, str]:
    part = PartId(shard_id=body["shard_id"], view=body["view"])
    files, _ = body["files"], body["ends"]  # both are read again where files are checked
    num_bytes = sum(size for size, _ in files.values())
    versions = _shared(tuple(sorted(body["provenance"].get("versions", {}).items())))
    if body["kind"] == "base":
        source = body["source"]
        base = BaseCommit(
            part=part,
            attempt=body["attempt"],
            sha256=sha256,
            num_rows=body["num_rows"],
            array_rows=body["array_rows"],
            statuses=body["statuses"],
            bad=_runs(body["bad"]),
            samples_digest=body["samples_digest"],
            rows_digest=body["rows_digest"],
            num_bytes=num_bytes,
            versions=versions,
            source=SourceInfo(**{**source, "problems": tuple(source["problems"])}),
        )
        return base, body["fingerprint"]
    column = ColumnCommit(
        part=part,
        column=body["column"],
        attempt=body["attempt"],
        sha256=sha256,
        base_sha256=body["base_sha256"],
        width=body["width"],
        statuses=body["statuses"],
        bad=_runs(body["bad"]),
        num_bytes=num_bytes,
        versions=versions,
        basis_sha256=body.get("basis_sha256"),
    )
    return column, body["fingerprint"]


def _runs(pairs: Sequence[Sequence[int]]) -> Runs:
    return tuple((start, stop) for start, stop in pairs)


@cache
def _shared(versions: Versions) -> Versions:
    """One copy of equal versions: a large cache has tens of thousands of records."""
    return versions
