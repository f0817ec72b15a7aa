"""Pictures of clips: what the teachers see, what is masked, what the student makes of it."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure

from kdhiera.config import RunConfig
from kdhiera.data.clip import Clip
from kdhiera.devices import resolve_device
from kdhiera.errors import UsageError
from kdhiera.featurize import Featurized
from kdhiera.masking import draw_mask, to_keep_mask
from kdhiera.progress import Progress
from kdhiera.report.pictures import ClipPicture, FeatureRow, show_clip
from kdhiera.report.plots import save
from kdhiera.stages.assemble import exported_student, featurizer_of
from kdhiera.stages.clips import spread_clips
from kdhiera.student.base import Student

logger = logging.getLogger(__name__)


def show(
    config: RunConfig, *, num_clips: int, folder: Path | None, progress: Progress
) -> list[Path]:
    """Draw clips of the run's shards, spread over them.

    Args:
        config: The run; its student is drawn too if there is one.
        num_clips: Pictures.
        folder: Where they go; None means `pictures/` in the run folder.
        progress: Where progress is shown.

    Returns:
        Paths of the PNGs.

    Raises:
        UsageError: If no clip of the shards decodes.
    """
    figures = clip_figures(config, num_clips=num_clips, progress=progress)
    target = folder or Path(config.run_dir) / "pictures"
    target.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, figure in enumerate(figures):
        path = target / f"clip-{number:02d}.png"
        save(figure, path)
        paths.append(path)
    return paths


def clip_figures(config: RunConfig, *, num_clips: int, progress: Progress) -> list[Figure]:
    """The same as figures; see `show`."""
    device = resolve_device(config.extract.device)
    clips = [(sample.uid, clip) for sample, clip in spread_clips(config, num_clips)]
    if not clips:
        raise UsageError("no clip of data.shards decodes: nothing to show")
    bar = progress.start("show", len(clips), "clips")
    featurizer = featurizer_of(config, device=device, keep_all=True)
    student = _student(config, device)
    layers = {name: teacher.layers for name, teacher in config.teachers.items()}
    figures = []
    for uid, clip in clips:
        out = featurizer(clip.frames[None], uids=[uid], view=0, layers=layers)
        figures.append(show_clip(_picture(config, uid, clip, out, student, device)))
        progress.advance(bar)
    progress.finish(bar)
    return figures


def _picture(
    config: RunConfig,
    uid: str,
    clip: Clip,
    out: Featurized,
    student: Student | None,
    device: torch.device,
) -> ClipPicture:
    grid = config.clip.grid
    scores = out.scores[0]
    visible = draw_mask(config.mask_schedule.widest, scores, uid=uid, view=0, draw=0)
    rows = []
    for name, teacher in config.teachers.items():
        layer = teacher.layers[-1]
        tokens = grid.units_to_tokens(out.features[name, layer])[0].float().cpu().numpy()
        rows.append(FeatureRow(title=f"{name} teacher, layer {layer}", features=tokens))
    if student is not None:
        title = "student, whole clip, last block"
        rows.append(FeatureRow(title=title, features=_student_tokens(student, out, device)))
    spec = config.mask_schedule.widest
    key = uid.rpartition("/")[2]
    return ClipPicture(
        title=f"{key}: {spec.strategy} mask, {100 * spec.ratio:.0f} % hidden",
        frames=clip.frames,
        scores=scores.reshape(grid.units),
        visible=to_keep_mask([visible], grid.num_units)[0].reshape(grid.units),
        feature_rows=tuple(rows),
    )


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
