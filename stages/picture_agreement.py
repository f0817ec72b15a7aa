"""How far the student of a run agrees with its teachers, measured and drawn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from kdhiera.config import RunConfig
from kdhiera.devices import resolve_device
from kdhiera.evaluation.agreement import HeadFit, linear_cka, unit_tokens
from kdhiera.objective.targets import normalise
from kdhiera.progress import Progress
from kdhiera.report.agreement import AgreementPicture, Fit, show_agreement
from kdhiera.stages.distill import Opened, begun_with, open_source
from kdhiera.stages.trained import (
    Trained,
    fresh_of,
    newest_checkpoint,
    trained_of,
    with_all_blocks,
)
from kdhiera.student.hiera import Student
from kdhiera.training.batches import Batch, Position, make_batch

NUM_CLIPS = 256
CKA_TOKENS = 8192  # many more than channels, and little enough for the largest student
BATCH = 32


def agreement_figure(config: RunConfig, *, progress: Progress) -> Figure | None:
    """Explained variance, cosine and CKA over clips spread evenly over the run's.

    Args:
        config: The run.
        progress: Where progress is shown.

    Returns:
        None if the run has no checkpoint.

    Raises:
        UsageError: If there is no cache that the run could be read from.
        MismatchError: If cache or checkpoint are of another config.
    """
    state = newest_checkpoint(config)
    if state is None:
        return None
    with open_source(config, begun_with(Path(config.run_dir))) as opened:
        trained = trained_of(config, opened, state)
        return show_agreement(_measure(config, opened, trained, progress))


@torch.inference_mode()
def _measure(
    config: RunConfig, opened: Opened, trained: Trained, progress: Progress
) -> AgreementPicture:
    fresh = with_all_blocks(fresh_of(config, opened))
    student = with_all_blocks(trained.student)
    blocks = [f"block:{i + 1}" for i in range(sum(student.depths))]
    names = [spec.name for spec in trained.targets]
    fits = {
        name: HeadFit(kind=config.objective.loss, beta=config.objective.beta)
        for name in (names if config.objective.kind == "visible" else ())
    }
    seen: dict[str, list[list[Tensor]]] = {
        "fresh": [[] for _ in blocks],
        "trained": [[] for _ in blocks],
        "teachers": [[] for _ in names],
    }
    samples = _spread(opened.source.num_samples)
    bar = progress.start("agreement", len(samples), "clips")
    tokens = 0
    for batch in _batches(config, opened, samples):
        features = [s.decode(batch.columns[s.column], batch.units) for s in trained.targets]
        taps = student(batch.pixels, batch.units)
        if fits:
            predicted = trained.heads(taps, batch.units, batch.units)
            for spec, feature in zip(trained.targets, features, strict=True):
                target = normalise(feature, config.objective.normalise, spec.statistics)
                fits[spec.name].add(predicted[spec.name].float(), target, trained.means[spec.name])
        chosen = _thinned(batch.units.numel() * 4, len(batch.samples), len(samples))
        before = fresh(batch.pixels, batch.units)
        for kept, values in (
            (seen["fresh"], [unit_tokens(before[tap]) for tap in blocks]),
            (seen["trained"], [unit_tokens(taps[tap]) for tap in blocks]),
            (seen["teachers"], features),
        ):
            for layer, value in zip(kept, values, strict=True):
                layer.append(value.float().flatten(0, 2)[chosen])
        tokens += len(chosen)
        progress.advance(bar, len(batch.samples))
    progress.finish(bar)
    layers = [torch.cat(parts) for parts in seen["teachers"]]
    before_cka, after_cka = (
        linear_cka([torch.cat(parts) for parts in seen[which]], layers)
        for which in ("fresh", "trained")
    )
    masks = config.mask_schedule.widest
    return AgreementPicture(
        title=f"{config.name}: how far the student agrees with its teachers",
        foot=f"{len(samples):,} clips that it was trained on, as it sees them ({masks.strategy}, "
        f"{100 * masks.ratio:g} % hidden); step {trained.steps:,}. CKA over {tokens:,} tokens: 1 "
        "is equal but for rotation and scale."
        + ("" if config.student.mix else " Orange frames: the block that a head reads."),
        fits=tuple(
            Fit(
                target=name,
                explained_variance=fit.explained_variance,
                cosine=fit.cosine,
                constant_cosine=fit.constant_cosine,
            )
            for name, fit in fits.items()
        ),
        blocks=tuple(_block_names(student)),
        layers=tuple(names),
        before=before_cka,
        after=after_cka,
        read=tuple(
            None if config.student.mix else trained.student.taps[s.tap] - 1 for s in trained.targets
        ),
    )


def _spread(num_samples: int) -> np.ndarray:
    """Numbers of samples spread evenly over all, ascending; the same ones every time."""
    count = min(num_samples, NUM_CLIPS)
    return np.arange(count) * num_samples // count


def _thinned(tokens: int, clips: int, of_clips: int) -> Tensor:
    """Places of a batch's share of the tokens that CKA is computed on, spread evenly."""
    share = min(tokens, CKA_TOKENS * clips // of_clips)
    return torch.arange(share) * tokens // share


def _batches(config: RunConfig, opened: Opened, samples: np.ndarray) -> Iterator[Batch]:
    """Samples under the first mask of view 0, with the features of what it shows."""
    device = resolve_device(config.train.device)
    position = Position(step=0, epoch=0, view=0, draw=0)
    for start in range(0, len(samples), BATCH):
        numbers = samples[start : start + BATCH]
        rows = opened.source.read(numbers, view=0)
        batch = make_batch(rows, config.mask_schedule.widest, position, numbers)
        yield batch.map(lambda tensor: tensor.to(device))


def _block_names(student: Student) -> Iterator[str]:
    number = 0
    for stage, depth in enumerate(student.depths):
        for _ in range(depth):
            number += 1
            yield f"block {number} (stage {stage + 1})"
