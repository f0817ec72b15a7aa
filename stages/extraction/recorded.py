"""What made the columns of a cache: the config they were created with is recorded beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kdhiera.cache.commit import Cache
from kdhiera.cache.fingerprint import differences
from kdhiera.cache.info import natural_order
from kdhiera.cache.layout import parse_column
from kdhiera.config import RunConfig
from kdhiera.config.loading import parse_run
from kdhiera.data.clip import shown
from kdhiera.errors import UsageError
from kdhiera.stages.extraction.plan import identify

NOT_RECORDED = (
    "the cache does not record what made its columns: give --config CONFIG to run the teachers"
)


@dataclass(frozen=True, kw_only=True)
class ColumnTeachers:
    """Teachers that make some columns.

    Args:
        config: With precisions resolved.
        columns: Column ids, as (teacher, layer).
        folder: Where relative paths of the config lead from.
    """

    config: RunConfig
    columns: Mapping[str, tuple[str, str]]
    folder: Path


def _recorded(cache: Cache) -> Iterator[tuple[str, RunConfig, Path]]:
    """The config that every column was created with, where that is recorded, newest first."""
    records = [(column, cache.columns.record(column)) for column in cache.columns.names()]
    made = {c: r["provenance"] for c, r in records if r and "config" in r["provenance"]}
    for column in sorted(made, key=lambda c: -float(made[c].get("time", 0.0))):
        raw = made[column]["config"]
        raw = {**raw, "cache": {**raw["cache"], "dir": cache.url}}
        try:
            config = parse_run(raw, f"the config recorded with column {column}")
        except UsageError:  # of another version, with other keys
            continue
        yield column, config, Path(made[column]["folder"])


def recorded_config(cache: Cache) -> RunConfig | None:
    """The config of the newest column, or None if none is recorded."""
    return next((config for _, config, _ in _recorded(cache)), None)


def column_teachers(
    cache: Cache, config: RunConfig | None
) -> tuple[list[ColumnTeachers], dict[str, str]]:
    """What makes the cache's columns, and the columns that nothing here makes, with the reason."""
    wanted = sorted(cache.columns.names(), key=natural_order)
    if config is not None:
        return _of_config(cache, config, wanted, Path.cwd())
    found: list[ColumnTeachers] = []
    left_out = dict.fromkeys(wanted, NOT_RECORDED)
    groups: dict[str, tuple[RunConfig, Path, list[str]]] = {}
    for column, recorded, folder in _recorded(cache):
        key = f"{folder} {recorded.model_dump_json()}"
        groups.setdefault(key, (recorded, folder, []))[2].append(column)
    for recorded, folder, columns in groups.values():
        with working_in(folder):
            more, why = _of_config(cache, recorded, columns, folder)
        found += more
        left_out = {c: w for c, w in left_out.items() if c not in columns} | why
    return found, left_out


def _of_config(
    cache: Cache, config: RunConfig, wanted: Sequence[str], folder: Path
) -> tuple[list[ColumnTeachers], dict[str, str]]:
    """The columns among some that a config's teachers make; a config of another cache is refused.

    Raises:
        MismatchError: If the config asks for other clips or scores than the cache has.
    """
    try:
        identities = identify(config)
    except UsageError as error:
        return [], dict.fromkeys(wanted, shown(str(error)))
    cache.check(identities.base, declared_only=True)
    columns: dict[str, tuple[str, str]] = {}
    left_out: dict[str, str] = {}
    for column in wanted:
        name = parse_column(column)
        if column not in identities.columns:
            left_out[column] = "the config does not make it"
            continue
        changed = differences(identities.columns[column], cache.columns.identity(column) or {})
        if changed:
            fields = ", ".join(d.field for d in changed)
            left_out[column] = f"the config's teacher is another one ({fields} differ)"
        else:
            columns[column] = (name.teacher, name.layer)
    if not columns:
        return [], left_out
    return [ColumnTeachers(config=identities.config, columns=columns, folder=folder)], left_out


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Work in a folder, if it is still there: relative paths of a config lead from it."""
    before = Path.cwd()
    if folder.is_dir():
        os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
