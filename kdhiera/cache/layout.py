"""Where everything in a cache lies, and what shape it has. No torch, no zarr.

    CACHE/
      cache.json                                    identity of the base
      columns/<column>/column.json                  identity of a column
      columns/<column>/basis.npz                    what it needs before its first part
      parts/<shard-id>/<view>/<attempt>/            what one attempt wrote
          attempt.json                              when it began, its lease
          rows.parquet                              one row per sample, good or bad
          base.zarr/     units scores pixels
          targets.zarr/  <teacher>/<layer>.<encoding>/  codes [scale] status
          stats.npz                                 channel statistics of its columns
      commits/<shard-id>/<view>/base.json           the commit points
      commits/<shard-id>/<view>/<column>.json
      shards/<shard-id>                             a shard that was asked for

A column is named `<teacher>.<layer>.<encoding>`, so two encodings of one layer lie side
by side, in the cache and inside a part.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from kdhiera.grid import TUBELET_FRAMES, UNIT_PX, Grid

FORMAT = 1
ZARR_SHARD_ROWS = 128
ZARR_SHARD_BYTES = 256 * 10**6
_NAME = re.compile(r"[A-Za-z0-9_-]+")


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
        row_chunks: Whether a row is a chunk of its own, read alone; otherwise an array
            is small and chunked by the thousand rows.
        order: Order in which the axes of a chunk are stored, rows included; None is theirs.
        compression_level: Of Blosc's zstd, 1 to 9.
        block_bytes: Bytes that Blosc compresses at a time; 0 leaves it to Blosc.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]
    row_chunks: bool = True
    order: tuple[int, ...] | None = None
    compression_level: int = 1
    block_bytes: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one row before compression."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    @property
    def block_rows(self) -> int:
        """Rows of a Zarr shard: up to 128 and 256 MB; written whole, once."""
        if not self.row_chunks:
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
COLUMNS = "columns"  # holds a folder for every column
COMMITS = "commits"  # holds all commit points
PARTS = "parts"  # holds what attempts wrote
SHARDS = "shards"  # holds which shards were asked for


def column_folder(column: str) -> str:
    """Holds what a column is."""
    return f"{COLUMNS}/{column}"


def column_file(column: str) -> str:
    """Identity of a column."""
    return f"{column_folder(column)}/column.json"


def basis_file(column: str) -> str:
    """What a column needs before its first part."""
    return f"{column_folder(column)}/basis.npz"


def commit_folder(part: PartId) -> str:
    """Holds the commit points of a part; without it the part is not there."""
    return f"{COMMITS}/{part.shard_id}/{part.view}"


def commit_file(part: PartId, column: str | None) -> str:
    """Commit point of a column, or of the base where `column` is None."""
    return f"{commit_folder(part)}/{'base' if column is None else column}.json"


def part_folder(part: PartId) -> str:
    """Holds all attempts at a part."""
    return f"{PARTS}/{part.shard_id}/{part.view}"


def attempt_folder(part: PartId, attempt: str) -> str:
    """What one attempt at a part wrote."""
    return f"{part_folder(part)}/{attempt}"


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


STATUS = ArraySpec(shape=(), dtype="uint8", axes=("row",), row_chunks=False)
