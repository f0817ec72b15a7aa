"""Pictures of a run for a slide: clips, masks, agreement with the teachers, row statuses."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from kdhiera.cache.layout import CACHE_FILE
from kdhiera.config import RunConfig
from kdhiera.errors import UsageError
from kdhiera.progress import Progress
from kdhiera.report.plots import save
from kdhiera.stages.bad_rows import RowStatuses
from kdhiera.stages.pictures.agreement import agreement_figure
from kdhiera.stages.pictures.clips import clip_figures
from kdhiera.stages.pictures.statuses import status_figure
from kdhiera.stores import open_store

logger = logging.getLogger(__name__)


class Kind(StrEnum):
    """What can be drawn."""

    CLIPS = "clips"
    MASKS = "masks"
    AGREEMENT = "agreement"
    STATUSES = "statuses"


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One picture.

    Args:
        kind: What it shows.
        name: Of its file, without `.png`.
        caption: One line in plain words.
        figure: The picture.
    """

    kind: Kind
    name: str
    caption: str
    figure: Figure


@dataclass(kw_only=True)
class Drawing:
    """Pictures of a run, and what there was no material for.

    Args:
        pictures: In the order of the kinds.
        left_out: Why a kind is not among them, in one sentence, by kind.
        statuses: What became of the cache's rows, if that was drawn.
    """

    pictures: list[Drawn] = field(default_factory=list)
    left_out: dict[Kind, str] = field(default_factory=dict)
    statuses: RowStatuses | None = None


@dataclass(frozen=True, kw_only=True)
class ShowSummary:
    """What was drawn, and where it lies.

    Args:
        paths: Of the PNGs, in the order of the drawing's pictures.
        drawing: What was drawn.
    """

    paths: tuple[Path, ...]
    drawing: Drawing

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        drawing = self.drawing
        return {
            "pictures": [
                {"kind": drawn.kind.value, "path": str(path), "caption": drawn.caption}
                for path, drawn in zip(self.paths, drawing.pictures, strict=True)
            ],
            "left_out": {kind.value: why for kind, why in drawing.left_out.items()},
            "statuses": drawing.statuses.to_json() if drawing.statuses else None,
        }

    def describe(self) -> str:
        """For people: one path a line."""
        return "\n".join(map(str, self.paths))


def parse_kinds(words: Sequence[str]) -> tuple[Kind, ...]:
    """Kinds by name, several in a word with commas between; none at all means every kind.

    Raises:
        UsageError: If there is no such kind.
    """
    names = [name.strip() for word in words for name in word.split(",")]
    known = [kind.value for kind in Kind]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"--what {unknown[0]!r} is no picture: choose from {', '.join(known)}")
    return tuple(kind for kind in Kind if not names or kind.value in names)


def show(
    config: RunConfig,
    *,
    progress: Progress,
    kinds: Sequence[Kind] = tuple(Kind),
    num_clips: int = 2,
    folder: Path | None = None,
) -> ShowSummary:
    """Draw a run and write the pictures as PNG.

    Args:
        config: The run.
        progress: Where progress is shown.
        kinds: What to draw; a kind without material is left out, and the log says why.
        num_clips: Pictures of clips.
        folder: Where they go; None means `pictures/` in the run folder.

    Raises:
        UsageError: If nothing that was asked for can be drawn.
        MismatchError: If cache or student are of another config.
    """
    drawing = draw(config, kinds=kinds, num_clips=num_clips, progress=progress)
    if not drawing.pictures:
        raise UsageError(f"nothing to show: {'; '.join(drawing.left_out.values())}")
    for kind, why in drawing.left_out.items():
        logger.info("no picture of %s: %s", kind, why)
    target = folder or Path(config.run_dir) / "pictures"
    target.mkdir(parents=True, exist_ok=True)
    paths = tuple(target / f"{drawn.name}.png" for drawn in drawing.pictures)
    for path, drawn in zip(paths, drawing.pictures, strict=True):
        save(drawn.figure, path)
    if Kind.CLIPS in kinds:  # of an earlier call with more clips
        for path in set(target.glob("clip-[0-9][0-9].png")) - set(paths):
            path.unlink()
    return ShowSummary(paths=paths, drawing=drawing)


def draw(
    config: RunConfig, *, kinds: Sequence[Kind], num_clips: int, progress: Progress
) -> Drawing:
    """The pictures of a run as figures; see `show`."""
    drawing = Drawing()
    if Kind.CLIPS in kinds or Kind.MASKS in kinds:
        _draw_clips(config, drawing, kinds, num_clips, progress)
    if Kind.AGREEMENT in kinds:
        _draw_agreement(config, drawing, progress)
    if Kind.STATUSES in kinds:
        _draw_statuses(config, drawing, progress)
    return drawing


def _draw_clips(
    config: RunConfig,
    drawing: Drawing,
    kinds: Sequence[Kind],
    num_clips: int,
    progress: Progress,
) -> None:
    figures, masks = clip_figures(
        config,
        num_clips=num_clips if Kind.CLIPS in kinds else 0,
        with_masks=Kind.MASKS in kinds,
        progress=progress,
    )
    drawing.pictures += [
        Drawn(
            kind=Kind.CLIPS,
            name=f"clip-{number:02d}",
            caption=f"Clip {number + 1}: scores, mask and features",
            figure=figure,
        )
        for number, figure in enumerate(figures)
    ]
    if masks is not None:
        caption = "Masks of every strategy, and of several ratios"
        drawing.pictures.append(Drawn(kind=Kind.MASKS, name="masks", caption=caption, figure=masks))
    drawn = {picture.kind for picture in drawing.pictures}
    drawing.left_out |= {
        kind: "no clip of data.shards decodes"
        for kind in (Kind.CLIPS, Kind.MASKS)
        if kind in kinds and kind not in drawn
    }


def _draw_agreement(config: RunConfig, drawing: Drawing, progress: Progress) -> None:
    if config.cache.mode == "cached" and not _has_cache(config):
        drawing.left_out[Kind.AGREEMENT] = f"there is no cache in {config.cache.dir}"
        return
    figure = agreement_figure(config, progress=progress)
    if figure is None:
        why = f"no student has been trained in {config.run_dir} (kdhiera distill)"
        drawing.left_out[Kind.AGREEMENT] = why
        return
    caption = "Agreement of the student with every teacher layer"
    drawing.pictures.append(
        Drawn(kind=Kind.AGREEMENT, name="agreement", caption=caption, figure=figure)
    )


def _draw_statuses(config: RunConfig, drawing: Drawing, progress: Progress) -> None:
    if not _has_cache(config):
        drawing.left_out[Kind.STATUSES] = f"there is no cache in {config.cache.dir}"
        return
    figure, drawing.statuses = status_figure(config, progress=progress)
    caption = "Rows of the cache by status"
    drawing.pictures.append(
        Drawn(kind=Kind.STATUSES, name="statuses", caption=caption, figure=figure)
    )


def _has_cache(config: RunConfig) -> bool:
    return open_store(config.cache.dir).exists(CACHE_FILE)
