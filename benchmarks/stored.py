"""The floor of reading: stored bytes mapped into memory, their checksums, their decompression.

It knows what the cache's arrays are made of and checks nothing that it is not handed: whole rows
of Blosc and crc32c, at places that are looked up once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc

from kdhiera.cache.commit import Cache

blosc.use_threads = False
_CRC_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class MappedArray:
    """One array of a part.

    Args:
        row_shape: Shape of a row.
        dtype: Its type.
        rows: Bytes of every row that is a chunk of its own.
        block: All rows where they share chunks, decompressed on first use.
    """

    row_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    rows: Sequence[memoryview]
    block: list[np.ndarray]

    def read_into(self, out: np.ndarray, places: Sequence[int], rows: Sequence[int]) -> None:
        """Put some rows where they belong."""
        if self.block:
            out[places] = self.block[0][rows]
            return
        for place, row in zip(places, rows, strict=True):
            blosc.decompress(_checked(self.rows[row]), out[place])


class StoredBytes:
    """All arrays of a cache whose parts have one Zarr shard an array and equally many rows.

    Args:
        cache: The cache.
        paths: Arrays inside a part.
        threads: Threads that read.
    """

    def __init__(self, cache: Cache, paths: Sequence[str], *, threads: int) -> None:
        self._parts = [
            {path: map_array(Path(cache.url) / cache.folder(found.base) / path) for path in paths}
            for found in cache.commits().values()
        ]
        self._rows = next(iter(cache.commits().values())).base.array_rows
        self._pool = ThreadPoolExecutor(threads)

    def read(self, samples: np.ndarray) -> Mapping[str, np.ndarray]:
        """One batch of all arrays."""
        first = self._parts[0]
        out = {
            path: np.empty((len(samples), *array.row_shape), array.dtype)
            for path, array in first.items()
        }
        moves: list[Callable[[], None]] = []
        for part in np.unique(samples // self._rows):
            places = np.flatnonzero(samples // self._rows == part)
            rows = (samples[places] % self._rows).tolist()
            moves += [
                partial(array.read_into, out[path], places, rows)
                for path, array in self._parts[part].items()
            ]
        list(self._pool.map(lambda move: move(), moves))
        return out


def map_array(folder: Path) -> MappedArray:
    """Map an array of one file."""
    metadata = json.loads((folder / "zarr.json").read_text())
    num_rows, *row_shape = metadata["shape"]
    dtype = np.dtype(metadata["data_type"])
    (path,) = [path for path in folder.iterdir() if path.name != "zarr.json"]
    data = memoryview(np.memmap(path, np.uint8, "r"))  # type: ignore[arg-type]
    sharding = metadata["codecs"][0]
    if sharding["name"] != "sharding_indexed":
        assert [c["name"] for c in metadata["codecs"]] == ["bytes", "blosc", "crc32c"], metadata
        block = np.frombuffer(blosc.decompress(_checked(data)), dtype)
        return MappedArray(
            row_shape=tuple(row_shape),
            dtype=dtype,
            rows=(),
            block=[block.reshape(-1, *row_shape)],
        )
    inner = sharding["configuration"]["codecs"]
    assert [c["name"] for c in inner] == ["bytes", "blosc", "crc32c"], inner
    chunks = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
    index = np.frombuffer(data[-16 * chunks - _CRC_BYTES : -_CRC_BYTES], "<u8").reshape(-1, 2)
    rows = [data[start : start + size] for start, size in index[:num_rows].tolist()]
    return MappedArray(row_shape=tuple(row_shape), dtype=dtype, rows=rows, block=[])


def _checked(stored: memoryview) -> bytes:
    content = bytes(stored[:-_CRC_BYTES])
    checksum = int.from_bytes(stored[-_CRC_BYTES:], "little")
    assert google_crc32c.value(content) == checksum
    return content
