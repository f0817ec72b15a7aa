"""A small extraction whose undisturbed result is known: what failures are injected into."""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import yaml

from benchmarks.processes import start
from kdhiera.cache.arrays import read_array
from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import column_group

SHARDS, CLIPS, VIEWS = 12, 6, 2


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """What all trials share.

    Args:
        folder: Where everything lies.
        config: The run's YAML file.
        calm: Digest of every part of an undisturbed run.
        work_seconds: From its first part to its last commit.
    """

    folder: Path
    config: Path
    calm: dict[str, str]
    work_seconds: float

    def start(self, cache: Path, *overrides: str) -> subprocess.Popen[bytes]:
        """The command on a cache, in a process group of its own."""
        arguments = ("extract-teachers", str(self.config), f"cache.dir={cache}", *overrides)
        return start(self.folder / "errors.txt", *arguments)

    def errors(self) -> str:
        """What the last command said."""
        return (self.folder / "errors.txt").read_text(errors="replace")

    def equal(self, cache: Path, *, whole: bool) -> bool:
        """Whether the committed parts hold what they should, and whether all are there."""
        return holds(digests(cache), self.calm, whole=whole)


def digests(cache: Path) -> dict[str, str]:
    """A hash of all that a reader gets from every commit; a part may have only some of its own."""
    if not (cache / "cache.json").exists():
        return {}
    opened = Cache.open(cache)
    found = {}
    for part, commits in sorted(opened.commits().items()):
        digest = hashlib.sha256()
        for row in opened.rows(commits.base):
            digest.update(repr((row.uid, row.status, row.view, row.clip_crc32c)).encode())
        for name in ("units", "scores", "pixels"):
            digest.update(read_array(opened, commits.base, f"base.zarr/{name}").tobytes())
        found[f"{part}"] = digest.hexdigest()
        for column, commit in sorted(commits.columns.items()):
            digest = hashlib.sha256()
            scale = ("scale",) if column.endswith(".int8") else ()
            for name in ("codes", *scale, "status"):
                array = read_array(opened, commit, f"{column_group(column)}/{name}")
                digest.update(array.tobytes())
            found[f"{part} {column}"] = digest.hexdigest()
    return found


def holds(found: Mapping[str, str], calm: Mapping[str, str], *, whole: bool) -> bool:
    """Whether parts hold what those of the undisturbed run do, and whether all are there."""
    same = all(calm.get(part) == digest for part, digest in found.items())
    return same and (not whole or found.keys() == calm.keys())


def prepare(folder: Path) -> Campaign:
    """Make shards and a config, and run it undisturbed."""
    rng = np.random.default_rng(0)
    for number in range(SHARDS):
        write_shard(folder / f"shard-{number:02}.tar", [make_clip(rng) for _ in range(CLIPS)])
    config = folder / "faults.yaml"
    config.write_text(yaml.safe_dump(small_config(folder, "shard-*.tar")))
    campaign = Campaign(folder=folder, config=config, calm={}, work_seconds=0.0)
    calm = folder / "calm"
    assert campaign.start(calm).wait() == 0, campaign.errors()
    begun = min(f.stat().st_mtime for f in calm.glob("parts/*/*/*/base.zarr"))
    work = max(f.stat().st_mtime for f in calm.glob("commits/*/*/*.json")) - begun
    return Campaign(folder=folder, config=config, calm=digests(calm), work_seconds=work)


def small_config(folder: Path, shards: str) -> dict[str, Any]:
    """A run of low-level teachers over the shards of a pattern."""
    return {
        "name": "faults",
        "run_dir": str(folder / "run"),
        "data": {"shards": [str(folder / shards)], "max_bad_fraction": 1.0},
        "clip": {"num_frames": 8, "height": 64, "width": 64},
        "views": {"num": VIEWS, "frame_stride": 2},
        "teachers": {"pixels": {"kind": "pixels"}, "hog": {"kind": "hog"}},
        "scores": {"teacher": "pixels", "source": "uniform"},
        "masks": {"ratio": 0.5, "draws": 1},
        "cache": {"dir": str(folder / "cache"), "encoding": "fp32"},
        "extract": {"batch_size": 2, "device": "cpu", "max_attempts": 100},
        "decode": {"num_children": 1},
        "ray": {"enabled": False},
    }


def make_clip(rng: np.random.Generator, *, white: bool = False) -> bytes:
    """A short video of a noisy square that moves, or of nothing but white."""
    out = BytesIO()
    picture = rng.integers(0, 200, (32, 32, 3), dtype=np.uint8)
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.width = stream.height = 96
        stream.pix_fmt = "yuv420p"
        for i in range(24):
            frame = np.full((96, 96, 3), 255 if white else 40, np.uint8)
            if not white:
                frame[i : i + 32, 2 * i : 2 * i + 32] = picture
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode(None))
    return out.getvalue()


def write_shard(path: Path, clips: list[bytes]) -> None:
    """A tar of clips that are named after it."""
    with tarfile.open(path, "w") as tar:
        for number, clip in enumerate(clips):
            info = tarfile.TarInfo(f"{path.stem}-{number}.mp4")
            info.size = len(clip)
            tar.addfile(info, BytesIO(clip))


def attempts(cache: Path) -> int:
    """Attempts at parts that were begun."""
    return sum(1 for _ in cache.glob("parts/*/*/*/attempt.json"))


def first_byte(process: subprocess.Popen[bytes], cache: Path, before: int) -> None:
    """Wait until a run writes its first part."""
    while process.poll() is None and attempts(cache) <= before:
        time.sleep(0.02)
