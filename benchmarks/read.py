"""Figure 5: random clips a second, read and decompressed, warm and cold.

The same clips of the demo in four forms: the cache (int8, two draws at ratio 0.8) as the reader
reads it, its stored bytes mapped into memory with nothing but the checksums and the decompression
that they need (the floor), the cache as zarr-python reads it, and Theia's tars of all tokens with
Theia's own way of reading them: in order. All give whole batches of all columns.

Every measurement has a process of its own, on one core or on all of them, that takes the four in
turn. Cold means that the kernel was told to forget the files (`POSIX_FADV_DONTNEED`).
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from benchmarks.material import demo_config, make_cache, teach, write_part
from benchmarks.peers import read_theia, write_theia
from benchmarks.report import publish
from benchmarks.stored import StoredBytes
from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import base_arrays, column_group
from kdhiera.cache.reader import CacheReader
from kdhiera.training.batches import epoch_order

CLIPS, COPIES = 92, 4  # clips of a part, parts with the same clips
BATCH, BLOCK = 64, 128
ROUNDS = 5
EPOCHS_FLAT = 20
NUM_LAYERS = 5  # of the demo's teachers

Read = Callable[[Sequence[np.ndarray]], None]


def run() -> None:
    """Store some clips in all forms, then read them on one core and on all."""
    seconds: dict[str, list[float]] = {}
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        _store(Path(folder))
        os.sync()
        for cores in ("one core", "all cores"):
            found = _measure(folder, cores)
            seconds |= found["seconds"]
            figures |= found["figures"]
        figures |= _measure(folder, "memory")["figures"]
    publish("read", seconds, figures)


def _store(folder: Path) -> None:
    config = demo_config()
    taught = teach(config, shard=0, view=0, num_clips=CLIPS)
    cache = make_cache(folder / "cache", config)
    for copy in range(COPIES):
        write_part(cache, config, f"copy-{copy}", taught)
        for way, by_slot in (("slots", True), ("clips", False)):
            tars = folder / f"theia-{way}-{copy}"
            write_theia(tars, taught, config.clip.grid, clips_a_shard=1000, by_slot=by_slot)


def _measure(folder: str, what: str) -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.read", what, folder]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return found


def _compare(folder: Path, cores: str) -> dict[str, dict[str, Any]]:
    """Seconds a batch of every form, warm and cold, taken in turn."""
    reader = _open(folder)
    stored = StoredBytes(reader.cache, _paths(reader), threads=len(os.sched_getaffinity(0)))
    zarrs = _Zarrs(reader)
    _check_equal(reader, stored, zarrs)
    ways: dict[str, Read] = {
        "the reader": lambda batches: _each(lambda b: reader.read(b, view=0), batches),
        "stored bytes": lambda batches: _each(stored.read, batches),
        "zarr-python": lambda batches: _each(zarrs.read, batches),
        "Theia's reader": lambda batches: _theia(
            folder, "slots", len(batches), BATCH * reader.cache.grid.slots
        ),
        "Theia's reader, clips as samples": lambda batches: _theia(
            folder, "clips", len(batches), BATCH
        ),
    }
    seconds: dict[str, list[float]] = {}
    figures: dict[str, float] = {}
    for state in ("warm", "cold"):
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(ROUNDS + 1):
            batches = list(epoch_order(0, turn, reader.num_samples, BATCH, block=BLOCK))
            for name, read in ways.items():
                if state == "cold":
                    _forget(folder)
                began = time.perf_counter()
                read(batches)
                if turn:  # the first turn opens files
                    taken[name].append((time.perf_counter() - began) / len(batches))
        seconds |= {f"{cores}, {state}: a batch by {n}": s for n, s in taken.items()}
        medians = {name: statistics.median(samples) for name, samples in taken.items()}
        ours = medians.pop("the reader")
        figures[f"{cores}, {state}: clips/s of the reader"] = BATCH / ours
        figures |= {
            f"{cores}, {state}: speed / that of {name}": median / ours
            for name, median in medians.items()
        }
    return {"seconds": seconds, "figures": figures}


def _memory(folder: Path) -> dict[str, dict[str, Any]]:
    """Resident memory after one pass over the cache and after twenty."""
    reader = _open(folder)
    resident = []
    for epoch in range(EPOCHS_FLAT):
        for samples in epoch_order(0, epoch, reader.num_samples, BATCH, block=BLOCK):
            reader.read(samples, view=0)
        resident.append(_resident_mb())
    return {
        "seconds": {},
        "figures": {
            "resident MB after 1 epoch": resident[0],
            f"resident MB after {EPOCHS_FLAT} epochs": resident[-1],
        },
    }


def _open(folder: Path) -> CacheReader:
    cache = Cache.open(folder / "cache")
    return CacheReader(cache, num_views=1, columns=cache.columns.names())


def _paths(reader: CacheReader) -> list[str]:
    """Arrays of a part that a batch is made of."""
    cache = reader.cache
    paths = [f"base.zarr/{name}" for name in base_arrays(cache.grid, cache.max_kept)]
    for column in reader.columns:
        specs = reader.codec(column).specs(cache.max_kept)
        paths += [f"{column_group(column)}/{name}" for name in specs]
    return paths


def _each(read: Callable[[np.ndarray], object], batches: Sequence[np.ndarray]) -> None:
    for samples in batches:
        read(samples)


def _theia(folder: Path, way: str, num_batches: int, samples_a_batch: int) -> None:
    """As many clips as the others read, of all columns, stacked to batches."""
    samples = itertools.chain.from_iterable(
        read_theia(path) for path in sorted(folder.glob(f"theia-{way}-*"))
    )
    for _ in range(num_batches):
        batch = list(itertools.islice(samples, samples_a_batch))
        assert len(batch) == samples_a_batch, len(batch)
        assert len(batch[0]) == 1 + NUM_LAYERS, batch[0].keys()
        for name in batch[0]:
            torch.stack([sample[name] for sample in batch])


class _Zarrs:
    """The cache through zarr-python: every array of every part, at the rows asked for."""

    def __init__(self, reader: CacheReader) -> None:
        cache = reader.cache
        folders = [Path(cache.url) / cache.folder(c.base) for c in cache.commits().values()]
        self._parts = [
            {path: zarr.open_array(folder / path, mode="r") for path in _paths(reader)}
            for folder in folders
        ]

    def read(self, samples: np.ndarray) -> dict[str, np.ndarray]:
        """One batch of all arrays."""
        out = {
            path: np.empty((len(samples), *array.shape[1:]), array.dtype)
            for path, array in self._parts[0].items()
        }
        for part in np.unique(samples // CLIPS):
            places = np.flatnonzero(samples // CLIPS == part)
            for path, array in self._parts[part].items():
                out[path][places] = array.oindex[samples[places] % CLIPS]
        return out


def _check_equal(reader: CacheReader, stored: StoredBytes, zarrs: _Zarrs) -> None:
    """All ways read the same."""
    samples = np.array([reader.num_samples - 1, 0, 5])
    rows = reader.read(samples, view=0)
    read = {f"base.zarr/{name}": getattr(rows, name) for name in ("units", "scores", "pixels")}
    for column, arrays in rows.columns.items():
        read |= {f"{column_group(column)}/{name}": array for name, array in arrays.items()}
    for other in (stored.read(samples), zarrs.read(samples)):
        assert other.keys() == read.keys()
        assert all(np.array_equal(other[path], array) for path, array in read.items())


def _forget(folder: Path) -> None:
    """Have the kernel drop the files from its page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    what, where = sys.argv[1:]
    if what == "one core":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(json.dumps(_memory(Path(where)) if what == "memory" else _compare(Path(where), what)))
