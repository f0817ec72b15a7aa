"""Clips of the run's shards as pictures: what teachers and student see, and all masks."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure

from kdhiera.config import RunConfig
from kdhiera.data.clip import Clip, shown
from kdhiera.devices import resolve_device
from kdhiera.featurize import Featurized
from kdhiera.masking import draw_mask, to_keep_mask
from kdhiera.progress import Progress
from kdhiera.report.masks import MaskPicture, draw_masks, show_masks
from kdhiera.report.pictures import ClipPicture, FeatureRow, show_clip
from kdhiera.stages.assemble import exported_student, featurizer_of
from kdhiera.stages.clips import spread_clips
from kdhiera.student.base import Student

logger = logging.getLogger(__name__)


def clip_figures(
    config: RunConfig, *, num_clips: int, with_masks: bool, progress: Progress
) -> tuple[list[Figure], Figure | None]:
    """Pictures of clips spread over the run's shards.

    Args:
        config: The run; its student is drawn too if there is one.
        num_clips: Clips to draw; 0 draws only masks.
        with_masks: Whether the masks of the first clip are drawn.
        progress: Where progress is shown.

    Returns:
        One figure a clip, none if no clip decodes; and that of the masks.

    Raises:
        UsageError: If a pattern matches no shard, or a teacher cannot be had.
    """
    device = resolve_device(config.extract.device)
    clips = [(sample.uid, clip) for sample, clip in spread_clips(config, max(num_clips, 1))]
    if not clips:
        return [], None
    bar = progress.start("clips", len(clips), "clips")
    featurizer = featurizer_of(config, device=device, keep_all=True)
    student = _student(config, device) if num_clips else None
    layers = {
        name: teacher.layers if num_clips else () for name, teacher in config.teachers.items()
    }
    figures: list[Figure] = []
    masks: Figure | None = None
    for uid, clip in clips:
        out = featurizer(clip.frames[None], uids=[uid], view=0, layers=layers)
        if with_masks and masks is None:
            masks = show_masks(_masks(config, uid, clip, out.scores[0]))
        if num_clips:
            figures.append(show_clip(_picture(config, uid, clip, out, student, device)))
        progress.advance(bar)
    progress.finish(bar)
    return figures, masks


def _masks(
    config: RunConfig, uid: str, clip: Clip, scores: Float[np.ndarray, "slots units"]
) -> MaskPicture:
    grid, spec = config.clip.grid, config.mask_schedule.widest
    strategies, ratios = draw_masks(spec, scores, grid, uid=uid)
    return MaskPicture(
        title=f"{_name(uid)}: what each strategy shows with {100 * spec.ratio:g} % hidden, and "
        "what other ratios show",
        frames=clip.frames,
        scores=scores.reshape(grid.units),
        scores_note=_scores_note(config),
        strategies=strategies,
        ratios=ratios,
    )


def _picture(
    config: RunConfig,
    uid: str,
    clip: Clip,
    out: Featurized,
    student: Student | None,
    device: torch.device,
) -> ClipPicture:
    grid = config.clip.grid
    spec = config.mask_schedule.widest
    scores = out.scores[0]
    visible = draw_mask(spec, scores, uid=uid, view=0, draw=0)
    rows = []
    for name, teacher in config.teachers.items():
        layer = teacher.layers[-1]
        tokens = grid.units_to_tokens(out.features[name, layer])[0].float().cpu().numpy()
        rows.append(FeatureRow(title=f"{name} teacher, layer {layer}", features=tokens))
    if student is not None:
        title = "student, whole clip, last block"
        rows.append(FeatureRow(title=title, features=_student_tokens(student, out, device)))
    return ClipPicture(
        title=f"{_name(uid)}: {spec.strategy} mask, {100 * spec.ratio:g} % hidden",
        frames=clip.frames,
        scores=scores.reshape(grid.units),
        scores_title=_scores_note(config).capitalize(),
        visible=to_keep_mask([visible], grid.num_units)[0].reshape(grid.units),
        feature_rows=tuple(rows),
    )


def _name(uid: str) -> str:
    return shown(uid.split("/", 2)[2], 40)


def _scores_note(config: RunConfig) -> str:
    if config.scores.source == "uniform":
        return "all units have the same score"
    return f"where the {config.scores.teacher} teacher looks (brighter: more)"


@torch.inference_mode()
def _student_tokens(
    student: Student, out: Featurized, device: torch.device
) -> Float[np.ndarray, "slots y x c"]:
    pixels = torch.from_numpy(out.pixels).to(device)
    units = torch.from_numpy(out.units.astype(np.int64)).to(device)
    tokens = student(pixels, units)[student.last_tap]
    dense: np.ndarray = student.grid.units_to_tokens(tokens)[0].float().cpu().numpy()
    return dense


def _student(config: RunConfig, device: torch.device) -> Student | None:
    folder = Path(config.run_dir) / "export"
    if not (folder / "model.safetensors").is_file():
        logger.info("no trained student in %s: pictures show the teachers only", folder)
        return None
    return exported_student(config, folder).to(device)
