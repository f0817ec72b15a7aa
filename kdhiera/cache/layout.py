"""Where everything in a cache lies, and what shape it has. No torch, no zarr.

    CACHE/
      cache.json                                    identity of the base
      columns/<column>/column.json                  identity of a column
      columns/<column>/basis-<fingerprint>.npz      what it needs before its first part
      parts/<shard-id>/<view>/<attempt>/            what one attempt wrote
          attempt.json                              when it began, its lease; whether it ended
          rows.parquet                              one row per sample, good or bad
          base.zarr/     units scores pixels
          targets.zarr/  <teacher>/<layer>.<encoding>/  codes [scale] status
          stats.npz                                 channel statistics of its columns
      commits/<shard-id>/<view>/base.json           the commit points
      commits/<shard-id>/<view>/<column>.json
      shards/<shard-id>                             a shard that was asked for
      quarantine/<shard-id>.<view>                  a part that was given up, and why

A column is named `<teacher>.<layer>.<encoding>`, so two encodings of one layer lie side
by side, in the cache and inside a part.
"""

from __future__ import annotations

import calendar
import re
import secrets
import time
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from kdhiera.grid import TUBELET_FRAMES, UNIT_PX, Grid

FORMAT = 1
ZARR_SHARD_ROWS = 128
ZARR_SHARD_BYTES = 256 * 10**6
END_BYTES = 4096  # of a chunk file: the index of a Zarr shard and the crc32c of its last chunk
SMALL_ROW_BYTES = 4096
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_ATTEMPT = re.compile(r"(\d{8}T\d{6}Z)-[0-9a-f]{12}")
_STAMP = "%Y%m%dT%H%M%SZ"


class ColumnStatus(IntEnum):
    """What became of a good row in one column; the value is what the array holds."""

    OK = 0
    NONFINITE = 1
    OVERFLOW = 2
    TEACHER_ERROR = 3
    REPLAY_MISMATCH = 4


@dataclass(frozen=True, kw_only=True, order=True)
class PartId:
    """One source shard in one view: the unit of work and of commitment.

    Args:
        shard_id: Identity of the source shard; one path component.
        view: View number, 0 upwards.
    """

    shard_id: str
    view: int

    def __post_init__(self) -> None:
        bad = {"", ".", ".."}
        if self.shard_id in bad or "/" in self.shard_id or not self.shard_id.isprintable():
            raise ValueError(f"a shard id must be one printable path component: {self.shard_id!r}")
        if self.view < 0:
            raise ValueError(f"a view number must be at least 0, got {self.view}")

    def __str__(self) -> str:
        return f"{self.shard_id} view {self.view}"


@dataclass(frozen=True, kw_only=True)
class ColumnName:
    """The three names that make a column id."""

    teacher: str
    layer: str
    encoding: str


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """Shape and type of one array of a part; axis 0, the rows, is left out.

    Args:
        shape: Shape of one row.
        dtype: NumPy name of the type.
        axes: Names of all axes, rows included.
        flags: Whether a row is no more than a flag, and chunks hold a thousand of them.
        order: Order in which the axes of a chunk are stored, rows included; None is theirs.
        compression_level: Of Blosc's zstd, 1 to 9.
        block_bytes: Bytes that Blosc compresses at a time, a row by default: smaller and faster
            than Blosc's own choice.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]
    flags: bool = False
    order: tuple[int, ...] | None = None
    compression_level: int = 1
    block_bytes: int = 2**20

    @property
    def row_bytes(self) -> int:
        """Bytes of one row before compression."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    @property
    def row_chunks(self) -> bool:
        """Whether a row is a chunk of its own, read alone; small rows share one, read once.

        A chunk costs its reader as much time as some kB of its content.
        """
        return not self.flags and self.row_bytes > SMALL_ROW_BYTES

    @property
    def block_rows(self) -> int:
        """Rows of a file (a Zarr shard, or one chunk): up to 128 and 256 MB; written once."""
        if self.flags:
            return 1024
        return max(1, min(ZARR_SHARD_ROWS, ZARR_SHARD_BYTES // max(1, self.row_bytes)))


def column_id(teacher: str, layer: str, encoding: str) -> str:
    """Name of a column, such as `image.9.int8`.

    Raises:
        ValueError: If a name holds anything but letters, digits, `_` and `-`.
    """
    for name in (teacher, layer, encoding):
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot be part of a column's name: use [A-Za-z0-9_-]")
    return f"{teacher}.{layer}.{encoding}"


def parse_column(column: str) -> ColumnName:
    """Inverse of `column_id`.

    Raises:
        ValueError: If `column` is not a column id.
    """
    names = column.split(".")
    if len(names) != 3 or not all(_NAME.fullmatch(n) for n in names):
        raise ValueError(f"{column!r} is not a column id (teacher.layer.encoding)")
    return ColumnName(teacher=names[0], layer=names[1], encoding=names[2])


def column_group(column: str) -> str:
    """Path of a column's group inside an attempt."""
    name = parse_column(column)
    return f"targets.zarr/{name.teacher}/{name.layer}.{name.encoding}"


CACHE_FILE = "cache.json"  # identity of the base
ATTEMPT_FILE = "attempt.json"  # of one attempt; named by no commit
CACHE_ASIDE = "cache.json.damaged"  # where repair puts one that cannot be believed
COLUMNS = "columns"  # holds a folder for every column
COMMITS = "commits"  # holds all commit points
PARTS = "parts"  # holds what attempts wrote
SHARDS = "shards"  # holds which shards were asked for
QUARANTINE = "quarantine"  # holds which parts were given up


def column_folder(column: str) -> str:
    """Holds what a column is."""
    return f"{COLUMNS}/{column}"


def column_file(column: str) -> str:
    """Identity of a column."""
    return f"{column_folder(column)}/column.json"


def basis_file(column: str, fingerprint: str) -> str:
    """What a column needs before its first part.

    Args:
        column: Column id.
        fingerprint: Of the column's identity: a basis never serves a column that was made
            anew in another way.
    """
    return f"{column_folder(column)}/basis-{fingerprint[:12]}.npz"


def commit_folder(part: PartId) -> str:
    """Holds the commit points of a part; without it the part is not there."""
    return f"{COMMITS}/{part.shard_id}/{part.view}"


def commit_file(part: PartId, column: str | None) -> str:
    """Commit point of a column, or of the base where `column` is None."""
    return f"{commit_folder(part)}/{'base' if column is None else column}.json"


def quarantine_file(part: PartId) -> str:
    """Key of what is known of a part that was given up."""
    return f"{QUARANTINE}/{part.shard_id}.{part.view}"


def shard_file(shard_id: str) -> str:
    """Says that a shard was asked for, and where it lay."""
    return f"{SHARDS}/{shard_id}"


def part_folder(part: PartId) -> str:
    """Holds all attempts at a part."""
    return f"{PARTS}/{part.shard_id}/{part.view}"


def attempt_folder(part: PartId, attempt: str) -> str:
    """What one attempt at a part wrote."""
    return f"{part_folder(part)}/{attempt}"


def new_attempt(began: float) -> str:
    """Name of a new attempt.

    Args:
        began: Seconds since 1970.
    """
    return f"{time.strftime(_STAMP, time.gmtime(began))}-{secrets.token_hex(6)}"


def attempt_began(attempt: str) -> float | None:
    """When an attempt began by its name, in seconds since 1970; None for any other name."""
    found = _ATTEMPT.fullmatch(attempt)
    try:
        return float(calendar.timegm(time.strptime(found[1], _STAMP))) if found else None
    except ValueError:
        return None


def attempt_file(part: PartId, attempt: str) -> str:
    """Says when an attempt began, how long it may take, and once it has ended that it has."""
    return f"{attempt_folder(part, attempt)}/{ATTEMPT_FILE}"


def is_chunk_file(file: str) -> bool:
    """Whether a file of an attempt holds chunks, which carry checksums of their own."""
    return ".zarr/" in file and not file.endswith("zarr.json")


def base_arrays(grid: Grid, max_kept: int) -> dict[str, ArraySpec]:
    """Arrays of `base.zarr`.

    Args:
        grid: Geometry of the clips.
        max_kept: Bound on the kept units of a row, `K`.
    """
    cube = (TUBELET_FRAMES, UNIT_PX, UNIT_PX, 3)
    return {
        "units": ArraySpec(shape=(max_kept,), dtype="int16", axes=("row", "kept_unit")),
        "scores": ArraySpec(
            shape=(grid.slots, grid.units_per_slot),
            dtype="float32",
            axes=("row", "slot", "unit"),
        ),
        "pixels": ArraySpec(
            shape=(max_kept, *cube),
            dtype="uint8",
            axes=("row", "kept_unit", "frame", "y", "x", "rgb"),
        ),
    }


STATUS = ArraySpec(shape=(), dtype="uint8", axes=("row",), flags=True)
