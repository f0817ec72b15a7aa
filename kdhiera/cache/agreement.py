"""Whether the pieces of a cache agree: identities, bases of columns, views, shards asked for.

What is looked at here takes more than one part to see. Where most pieces disagree with one,
the one is to blame: an identity that no part was made under is never held against the parts.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TypeVar

from kdhiera.cache.columns import Columns
from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import CACHE_FILE, SHARDS, column_file, shard_file
from kdhiera.cache.problems import Problem, part_problem, sha256_of
from kdhiera.cache.records import BaseCommit, ColumnCommit, unseal
from kdhiera.cache.survey import PartRecords, Record
from kdhiera.errors import DamagedError

_DROP_SECONDS = 1.0

T = TypeVar("T")


def disagreements(cache: Cache, parts: Sequence[PartRecords]) -> Iterator[Problem]:
    """What is wrong between parts, columns and the cache.

    Args:
        cache: The cache.
        parts: Records of all parts, sorted; their lists of files may be empty.
    """
    yield from _base_identity_problems(cache, parts)
    yield from _column_problems(cache, parts)
    yield from _view_problems(parts)
    yield from _shard_problems(cache, parts)


def _base_identity_problems(cache: Cache, parts: Sequence[PartRecords]) -> Iterator[Problem]:
    """Bases that were made under another identity, or an identity that no base was made under."""
    bases = [
        (found, record)
        for found in parts
        if (record := found.base_record) is not None and not record.problem
    ]
    made = Counter(record.fingerprint for _, record in bases)
    if len(bases) > 1 and len(made) == 1 and cache.fingerprint not in made:
        yield Problem(
            what=(
                f"{cache.url}/{CACHE_FILE} is of another cache: all {len(bases):,} parts were "
                "made under another identity. Restore it from a copy, or remove it and run "
                "`kdhiera extract-teachers CONFIG` with the config that the parts were made with"
            ),
            where=CACHE_FILE,
            evidence={CACHE_FILE: sha256_of(cache.store, CACHE_FILE)},
        )
        return
    for found, record in bases:
        if record.fingerprint != cache.fingerprint:
            what = f"{cache.url}/{record.key} was committed under another identity"
            yield part_problem(found, [record], what, record.key)


def _column_problems(cache: Cache, parts: Sequence[PartRecords]) -> Iterator[Problem]:
    """What is wrong with columns as a whole: their identities and their bases."""
    commits: dict[str, list[tuple[PartRecords, Record]]] = {}
    for found in parts:
        for record in found.records:
            if isinstance(record.commit, ColumnCommit):
                commits.setdefault(record.commit.column, []).append((found, record))
    columns = Columns(cache.store)
    for column in sorted({*commits, *columns.names()}):
        yield from _one_column(cache, columns, column, commits.get(column, []))


def _one_column(
    cache: Cache, columns: Columns, column: str, commits: Sequence[tuple[PartRecords, Record]]
) -> Iterator[Problem]:
    key = column_file(column)
    evidence = {key: sha256_of(cache.store, key)}
    try:
        fingerprint = columns.fingerprint(column)
    except DamagedError as error:
        yield Problem(what=str(error), where=key, drops=(key,), evidence=evidence)
        return
    if fingerprint is None:
        if commits:
            first = commits[0][1]
            time.sleep(_DROP_SECONDS)  # a drop removes it a moment after the identity
            yield Problem(
                what=(
                    f"{cache.url}/{key} is missing and {len(commits):,} parts have the column: if "
                    f"it was being dropped, run `kdhiera cache drop {cache.url} {column}` again; "
                    "otherwise restore it from a copy, or run `kdhiera extract-teachers CONFIG` "
                    "with the config that it was made with, which writes it anew"
                ),
                where=key,
                evidence={**evidence, first.key: first.sha256},
            )
        return
    made = Counter(record.fingerprint for _, record in commits)
    if len(commits) > 1 and len(made) == 1 and fingerprint not in made:
        yield Problem(
            what=(
                f"{cache.url}/{key} is of another column: all {len(commits):,} parts were made "
                "under another identity. Restore it from a copy, or run `kdhiera cache drop "
                f"{cache.url} {column}` and `kdhiera extract-teachers CONFIG`"
            ),
            where=key,
            evidence=evidence,
        )
        return
    for found, record in commits:
        if record.fingerprint != fingerprint:
            what = f"{cache.url}/{record.key} was committed under another identity"
            problem = part_problem(found, [record], what, record.key)
            yield replace(problem, evidence={**problem.evidence, **evidence})
    same = [item for item in commits if item[1].fingerprint == fingerprint]
    yield from _basis_problems(cache, columns, column, same)


def _basis_problems(
    cache: Cache, columns: Columns, column: str, commits: Sequence[tuple[PartRecords, Record]]
) -> Iterator[Problem]:
    """A basis that is not the one parts were encoded with, or parts of another basis."""
    key = columns.basis_key(column)
    present = columns.basis_sha256(column)
    named = [
        (found, record, record.commit.basis_sha256)
        for found, record in commits
        if isinstance(record.commit, ColumnCommit) and record.commit.basis_sha256 is not None
    ]
    if key is None or (present is None and not named):
        return
    evidence = {key: present}
    if present is not None and not named:
        try:
            columns.basis(column)
        except DamagedError as error:
            yield Problem(what=str(error), where=key, drops=(key,), evidence=evidence)
        return
    if present not in {sha256 for *_, sha256 in named}:
        state = "missing" if present is None else "damaged"
        records = [record for _, record, _ in named]
        yield Problem(
            what=(
                f"{cache.url}/{key} is {state}: the {len(named):,} parts of the column cannot be "
                "decoded. Restore it from a copy; repair drops them"
            ),
            where=key,
            drops=(*([] if present is None else [key]), *(record.key for record in records)),
            evidence=evidence,
            seen={record.key: record.sha256 for record in records},
        )
        return
    for found, record, sha256 in named:
        if sha256 != present:
            what = f"{cache.url}/{record.key} was encoded with another basis than {key}"
            problem = part_problem(found, [record], what, record.key)
            yield replace(problem, evidence={**problem.evidence, **evidence})


def _view_problems(parts: Sequence[PartRecords]) -> Iterator[Problem]:
    """Views of one shard that hold other samples, or were made of other bytes, than the rest."""
    shards: dict[str, list[tuple[PartRecords, BaseCommit]]] = {}
    for found in parts:
        if found.base is not None:
            shards.setdefault(found.part.shard_id, []).append((found, found.base))
    for views in shards.values():
        left = views
        for what, value in (
            ("was made of other bytes", _source_sha256),
            ("holds other samples", _samples_digest),
        ):
            odd = _outvoted(left, [value(base) for _, base in left])
            left = [view for view in left if view not in odd]
            yield from (_odd_view(found, left[0][0], what) for found, _ in odd)


def _source_sha256(base: BaseCommit) -> str | None:
    return base.source.sha256


def _samples_digest(base: BaseCommit) -> str | None:
    return base.samples_digest


def _odd_view(found: PartRecords, other: PartRecords, what: str) -> Problem:
    record, rest = found.base_record, other.base_record
    assert record is not None
    assert rest is not None
    problem = part_problem(found, [record], f"{what} than {other.part}", record.key)
    return replace(problem, evidence={**problem.evidence, rest.key: rest.sha256})


def _outvoted(items: Sequence[T], values: Sequence[str | None]) -> list[T]:
    """Items whose value is not the most frequent one; of equally frequent ones the first wins."""
    counts = Counter(value for value in values if value is not None)
    if len(counts) < 2:
        return []
    winner, _ = counts.most_common(1)[0]
    return [i for i, value in zip(items, values, strict=True) if value not in (None, winner)]


def _shard_problems(cache: Cache, parts: Sequence[PartRecords]) -> Iterator[Problem]:
    """Records of shards that are damaged, or missing: training would leave the shard out."""
    bases = {
        found.part.shard_id: record
        for found in reversed(parts)
        if (record := found.base_record) is not None and not record.problem
    }
    names = cache.store.names(SHARDS)
    found = dict(zip(names, cache.store.read_many(map(shard_file, names)), strict=True))
    for shard_id in sorted({*names, *bases}):
        key, data = shard_file(shard_id), found.get(shard_id)
        what = _shard_wrong(cache, key, data)
        if not what or (data is None and shard_id not in bases):
            continue
        evidence: dict[str, str | None] = {
            key: None if data is None else hashlib.sha256(data).hexdigest()
        }
        restores: tuple[tuple[str, str, float], ...] = ()
        if shard_id in bases:
            record = bases[shard_id]
            assert isinstance(record.commit, BaseCommit)
            evidence[record.key] = record.sha256
            when = float(record.provenance.get("time", 0.0))
            restores = ((shard_id, record.commit.source.path, when),)
        yield Problem(
            what=what,
            where=key,
            drops=() if restores or data is None else (key,),
            restores=restores,
            evidence=evidence,
        )


def _shard_wrong(cache: Cache, key: str, data: bytes | None) -> str:
    if data is None:
        return f"{cache.url}/{key} is missing: training would leave the shard out"
    try:
        body: Mapping[str, object] = unseal(data, f"{cache.url}/{key}")
    except DamagedError as error:
        return str(error)
    its_own = (body.get("kind"), body.get("shard_id")) == ("shard", PurePosixPath(key).name)
    if its_own and isinstance(body.get("path"), str) and isinstance(body.get("time"), int | float):
        return ""
    return f"{cache.url}/{key} is not the record of that shard"
