"""One array of a part: zarr describes it, tensorstore moves its bytes.

    chunk      = one row, or a block of small rows:
                 [transpose ->] bytes -> blosc(zstd, byte shuffle) -> crc32c
    Zarr shard = a block of one-row chunks; any block is encoded and written whole, once

A Zarr shard is never written twice: two writers of one shard, or one writer in two
goes, can lose rows without an error. A chunk that is not there is an error when it is
read, where Zarr's own rule would give zeros.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import tensorstore as ts
import zarr
from jaxtyping import Int, Shaped
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, TransposeCodec
from zarr.storage import MemoryStore

from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import ArraySpec
from kdhiera.cache.records import Commit


class ArrayWriter:
    """Appends rows to a new array; holds at most two blocks of them.

    A full block is encoded and written by tensorstore's threads while the next one
    fills. Its crc32c before encoding is kept, for `verify`.

    Args:
        folder: An existing Zarr group.
        name: Name of the array, new in the group.
        spec: Shape of its rows.
    """

    def __init__(self, folder: Path, name: str, spec: ArraySpec) -> None:
        self.path = folder / name
        self.spec = spec
        self.num_rows = 0
        self._checksums: list[int] = []
        block = (spec.block_rows, *spec.shape)
        dtype = np.dtype(spec.dtype)
        self._described: dict[str, Any] = {}
        self._array: Any = zarr.create_array(
            MemoryStore(self._described),
            shape=(0, *spec.shape),
            chunks=(1, *spec.shape) if spec.row_chunks else block,
            shards=block if spec.row_chunks else None,
            dtype=dtype,
            filters=[TransposeCodec(order=spec.order)] if spec.order else None,
            serializer=BytesCodec(),
            compressors=[
                BloscCodec(
                    typesize=dtype.itemsize,
                    cname="zstd",
                    clevel=spec.compression_level,
                    shuffle="shuffle",
                    blocksize=spec.block_bytes,
                ),
                Crc32cCodec(),
            ],
            fill_value=0,
            dimension_names=spec.axes,
            chunk_key_encoding={"name": "default", "separator": "."},  # no folders to sync
            zarr_format=3,
        )
        self.path.mkdir()
        _describe(self.path, self._described)
        self._block = np.empty(block, dtype)
        self._filled = 0
        self._writing: Any = None

    def append(self, rows: Shaped[np.ndarray, "n ..."]) -> None:
        """Add rows at the end; full blocks are written at once.

        Raises:
            OSError: If a block could not be written.
        """
        assert rows.shape[1:] == self.spec.shape, (rows.shape, self.spec.shape)
        taken = 0
        while taken < len(rows):
            n = min(len(rows) - taken, self.spec.block_rows - self._filled)
            self._block[self._filled : self._filled + n] = rows[taken : taken + n]
            self._filled += n
            taken += n
            if self._filled == self.spec.block_rows:
                self._write_block()
                self._block = np.empty_like(self._block)  # the old one is being written

    def finish(self) -> None:
        """Write what is left and wait for it; nothing can be appended after it.

        Raises:
            OSError: If a block could not be written.
        """
        if self._filled:
            self._write_block()
        self._wait()
        self._block = self._block[:0]

    def stop(self) -> None:
        """Wait until nothing is being written any more, whatever becomes of it."""
        if self._writing is not None:
            self._writing.exception()
            self._writing = None

    def verify(self) -> str | None:
        """Read the whole array back.

        Returns:
            What is wrong with it, or None if every block comes back as it was appended.
        """
        stored = open_array(_file(self.path))
        if stored.shape != (self.num_rows, *self.spec.shape):
            return f"{self.path.name} has the shape {stored.shape}"
        for i, checksum in enumerate(self._checksums):
            start = i * self.spec.block_rows
            rows = slice(start, min(start + self.spec.block_rows, self.num_rows))
            try:
                block = stored[rows].read().result()
            except ValueError as error:
                return f"{self.path.name}: {error}"
            if google_crc32c.value(np.ascontiguousarray(block)) != checksum:
                return f"{self.path.name}: block {i} reads back differently"
        return None

    def _write_block(self) -> None:
        self._wait()
        start, stop = self.num_rows, self.num_rows + self._filled
        block = self._block[: self._filled]
        self._array.resize((stop, *self.spec.shape))
        _describe(self.path, self._described)
        self._writing = open_array(_file(self.path), write=True)[start:stop].write(block)
        self._checksums.append(google_crc32c.value(block))
        self.num_rows, self._filled = stop, 0

    def _wait(self) -> None:
        if self._writing is None:
            return
        try:
            self._writing.result()
        except ValueError as error:
            code = re.search(r"os_error_code='(\d+)'", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), str(error)) from None
        self._writing = None


def _file(path: Path) -> Mapping[str, Any]:
    return {"driver": "file", "path": f"{path.absolute()}/"}


def create_group(folder: Path, attributes: Mapping[str, object]) -> None:
    """Create a Zarr group; the folder above its own must be there."""
    described: dict[str, Any] = {}
    zarr.create_group(MemoryStore(described), attributes=dict(attributes), zarr_format=3)
    folder.mkdir(exist_ok=True)
    _describe(folder, described)


def _describe(folder: Path, described: Mapping[str, Any]) -> None:
    """Write what zarr says of an array or a group, here and now.

    Zarr's own writing of it goes on in threads after one of them failed, and makes folders
    anew that were removed meanwhile.
    """
    (folder / "zarr.json").write_bytes(described["zarr.json"].to_bytes())


def reading_context(pool_bytes: int) -> Any:
    """What arrays that are read together share.

    Rows that are chunks of their own are decoded for one reader and forgotten: they would
    only push out what is used again, the indices of Zarr shards and blocks of small rows.

    Args:
        pool_bytes: Bound on what is kept of those.
    """
    pools = {"cache_pool": pool_bytes, "cache_pool#none": 0}
    return ts.Context({name: {"total_bytes_limit": size} for name, size in pools.items()})


def start_opening(kvstore: Mapping[str, Any], context: Any, *, row_chunks: bool) -> Any:
    """Begin to open an array for reading.

    Args:
        kvstore: Of the array's folder, from `Store.kvstore`.
        context: From `reading_context`.
        row_chunks: Whether a row is a chunk of its own.

    Returns:
        A future, whose `result()` raises `ValueError` if the array's metadata is missing or
        broken.
    """
    pools = {"cache_pool": "cache_pool#none", "metadata_cache_pool": "cache_pool"}
    spec = {**_spec(kvstore), **(pools if row_chunks else {})}
    return ts.open(spec, open=True, read=True, context=context)


def open_array(kvstore: Mapping[str, Any], *, write: bool = False) -> Any:
    """Open an array with tensorstore, sharing nothing with others.

    Args:
        kvstore: Of the array's folder, from `Store.kvstore`.
        write: For writing (not synced) instead of reading.

    Raises:
        ValueError: If the array's metadata is missing or broken.
    """
    context = ts.Context({"file_io_sync": False})
    return ts.open(_spec(kvstore), open=True, read=not write, write=write, context=context).result()


def _spec(kvstore: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": kvstore,
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
        "recheck_cached_metadata": False,
        "recheck_cached_data": False,
    }


def read_array(cache: Cache, commit: Commit, path: str) -> np.ndarray:
    """Read one array of a base or column whole, its files checked first.

    Args:
        cache: The cache.
        commit: The base or column.
        path: Array inside the attempt, such as `base.zarr/units`.

    Raises:
        DamagedError: If a file is missing or damaged.
    """
    cache.check_files(commit)
    try:
        folder = cache.store.kvstore(f"{cache.folder(commit)}/{path}")
        values: np.ndarray = open_array(folder).read().result()
    except ValueError as error:
        raise cache.unreadable([commit], f"{path}: {error}") from None
    return values


def read_rows(
    cache: Cache, commit: Commit, path: str, rows: Int[np.ndarray, " n"]
) -> Shaped[np.ndarray, "n ..."]:
    """Read some rows of one array of a base or column, and no others.

    Args:
        cache: The cache; `Cache.check_files` has found the commit's files whole.
        commit: The base or column.
        path: Array inside the attempt, such as `base.zarr/pixels`.
        rows: Array rows, in any order.

    Raises:
        DamagedError: If a chunk is missing or damaged.
    """
    try:
        folder = cache.store.kvstore(f"{cache.folder(commit)}/{path}")
        values: np.ndarray = open_array(folder)[np.asarray(rows, np.int64)].read().result()
    except ValueError as error:
        raise cache.damaged(commit.part, f"{path}: {error}") from None
    return values
