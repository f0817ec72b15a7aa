"""Draws the demo's clips into WebDataset shards.

A labelled sample is `KEY.mp4` and `KEY.json`; an unlabelled one has no labels and is a
window of a training background, so that no held-out video is ever seen. The same spec
and assets give the same frames; file times are zero.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

from kdhiera.demo.draw import draw_clips, draw_object
from kdhiera.demo.task import (
    DIRECTIONS,
    TaskSpec,
    Trajectory,
    plan_trajectories,
    split_assets,
)
from kdhiera.demo.video import Frames, decode, encode
from kdhiera.storage import atomic_file

log = logging.getLogger(__name__)

_DRAWING_VERSION = 2  # raised when the same spec is drawn otherwise


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One record of a shard.

    Args:
        key: Its key.
        video: An MP4 file.
        facts: Its JSON.
    """

    key: str
    video: bytes
    facts: Mapping[str, object]


@lru_cache(maxsize=32)
def _background(path: Path, short_side: int) -> Frames:
    return decode(path, short_side)


def labelled_samples(
    spec: TaskSpec, name: str, trajectories: Sequence[Trajectory], videos: Mapping[str, Path]
) -> Iterator[Sample]:
    """Two samples for each trajectory.

    Args:
        spec: Size and number of frames.
        name: Name of the split.
        trajectories: What to draw.
        videos: Files by name.
    """
    for trajectory in trajectories:
        video = _background(videos[trajectory.background], spec.window_px)
        clips = draw_clips(spec, trajectory, video)
        height, width = draw_object(trajectory, spec.size_px)[1].shape[:2]
        offsets = trajectory.offsets(spec.num_frames, spec.size_px, height, width)
        for which, clip in enumerate(clips):
            direction = DIRECTIONS[trajectory.axis][which]
            centres = (offsets[::-1] if which else offsets) + (height / 2, width / 2)
            centres %= spec.size_px
            yield Sample(
                key=f"{name}-{2 * trajectory.number + which:06d}",
                video=encode(clip, spec.frames_per_second),
                facts={
                    "labels": {
                        "category": trajectory.category,
                        "direction": direction,
                        "object": f"{trajectory.category}/{trajectory.stamp.stem}",
                        "background": trajectory.background,
                    },
                    "trajectory": trajectory.number,
                    "centres_yx_px": centres.tolist(),
                },
            )


def unlabelled_samples(
    spec: TaskSpec, backgrounds: Sequence[str], videos: Mapping[str, Path]
) -> Iterator[Sample]:
    """Windows of whole videos, each overlapping the next by half.

    Args:
        spec: Size and length of a window.
        backgrounds: Names of the videos: training backgrounds only.
        videos: Files by name.
    """
    number = 0
    for name in backgrounds:
        video = _background(videos[name], spec.window_px)
        for start in range(0, len(video) - spec.window_frames + 1, spec.window_frames // 2):
            window = video[start : start + spec.window_frames]
            yield Sample(
                key=f"unlabelled-{number:06d}",
                video=encode(window, spec.frames_per_second),
                facts={"background": name, "start_frame": start},
            )
            number += 1


def write_shard(path: Path, samples: Callable[[], Iterator[Sample]]) -> int:
    """Write one tar shard, visible under its name only when complete.

    Args:
        path: The shard.
        samples: Makes the records; not called if the shard is there.

    Returns:
        Bytes of the shard.
    """
    from webdataset.writer import TarWriter

    if not path.exists():
        with atomic_file(path) as file, TarWriter(file, mtime=0) as writer:
            for sample in samples():
                facts = json.dumps(sample.facts, sort_keys=True).encode()
                writer.write({"__key__": sample.key, "mp4": sample.video, "json": facts})
    return path.stat().st_size


def render_task(
    spec: TaskSpec,
    *,
    videos: Mapping[str, Path],
    stamps: Mapping[str, Sequence[Path]],
    out: Path,
    num_processes: int = 2,
    progress: Callable[[str], None] = log.info,
) -> None:
    """Draw all shards into `out`, unless `task.json` says that they are there.

    `out` appears as a whole: shards are drawn beside it, an interrupted call goes on
    with them, and shards of another spec are replaced at the end.

    Args:
        spec: What to draw.
        videos: Files by name.
        stamps: Cut-outs by category; without any, only unlabelled shards are drawn.
        out: Folder of the shards.
        num_processes: Processes that draw; 1 draws in this one.
        progress: Takes one line of text for every step.

    Raises:
        UsageError: If there are too few videos for the splits.
    """
    digest = _digest(spec, videos, stamps)
    if _is_complete(out, digest):
        return
    temp = out.with_name(f".{out.name}-{digest[:12]}")
    temp.mkdir(parents=True, exist_ok=True)
    # Without a labelled task nothing has to be held out.
    splits = split_assets(spec, stamps, videos) if stamps else {}
    unlabelled = splits["train"].backgrounds if splits else tuple(sorted(videos))
    tasks: dict[str, Callable[[], Iterator[Sample]]] = {
        "unlabelled-000000.tar": partial(unlabelled_samples, spec, unlabelled, videos)
    }
    for name, split in splits.items():
        planned = plan_trajectories(spec, name, split)
        step = spec.clips_per_shard // 2
        for shard, first in enumerate(range(0, len(planned), step)):
            tasks[f"{name}-{shard:06d}.tar"] = partial(
                labelled_samples, spec, name, planned[first : first + step], videos
            )
    sizes = _write_all(temp, tasks, num_processes, progress)
    facts = {
        "digest": digest,
        "spec": asdict(spec),
        "splits": {
            name: {
                "backgrounds": split.backgrounds,
                "objects": {c: [p.stem for p in files] for c, files in split.objects.items()},
            }
            for name, split in splits.items()
        },
        "shard_bytes": sizes,
    }
    (temp / "task.json").write_text(json.dumps(facts, indent=1, sort_keys=True))
    if out.exists():
        shutil.rmtree(out)
    temp.replace(out)


def _write_all(
    folder: Path,
    tasks: Mapping[str, Callable[[], Iterator[Sample]]],
    num_processes: int,
    progress: Callable[[str], None],
) -> dict[str, int]:
    sizes = {}
    if num_processes == 1:
        for name, samples in tasks.items():
            sizes[name] = write_shard(folder / name, samples)
            progress(f"drew {name} ({sizes[name] / 1e6:.1f} MB)")
        return sizes
    # Spawned, not forked: FFmpeg's and torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        futures = {n: pool.submit(write_shard, folder / n, s) for n, s in tasks.items()}
        for name, future in futures.items():
            sizes[name] = future.result()
            progress(f"drew {name} ({sizes[name] / 1e6:.1f} MB)")
    return sizes


def _digest(
    spec: TaskSpec, videos: Mapping[str, Path], stamps: Mapping[str, Sequence[Path]]
) -> str:
    """Names the spec and which assets there were (their content is pinned)."""
    facts = {
        "version": _DRAWING_VERSION,
        "spec": asdict(spec),
        "videos": sorted(videos),
        "stamps": sorted(f"{c}/{p.stem}" for c, paths in stamps.items() for p in paths),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _is_complete(out: Path, digest: str) -> bool:
    manifest = out / "task.json"
    if not manifest.exists():
        return False
    facts = json.loads(manifest.read_text())
    return facts["digest"] == digest and all(
        (out / name).exists() and (out / name).stat().st_size == size
        for name, size in facts["shard_bytes"].items()
    )
