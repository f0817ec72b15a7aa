"""How far the student of a run agrees with its teachers, measured and drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from kdhiera.config import RunConfig
from kdhiera.devices import resolve_device
from kdhiera.evaluation.agreement import HeadFit, linear_cka, unit_tokens
from kdhiera.grid import TOKENS_PER_UNIT
from kdhiera.objective.targets import normalise
from kdhiera.progress import Progress
from kdhiera.report.agreement import AgreementPicture, Fit, show_agreement
from kdhiera.stages.distillation.source import Opened, begun_with, open_source
from kdhiera.stages.distillation.trained import (
    Trained,
    fresh_of,
    newest_checkpoint,
    trained_of,
    with_all_blocks,
)
from kdhiera.training.batches import Batch, Position, make_batch

NUM_CLIPS = {"cached": 256, "live": 64}  # live teachers take their time
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


@dataclass(frozen=True, kw_only=True)
class _Layers:
    """Features of several layers at the same tokens, collected batch by batch."""

    parts: list[list[Tensor]]

    @classmethod
    def empty(cls, num_layers: int) -> _Layers:
        return cls(parts=[[] for _ in range(num_layers)])

    def add(self, layers: Iterable[Tensor], chosen: Tensor) -> None:
        for part, tokens in zip(self.parts, layers, strict=True):
            part.append(tokens.float().flatten(0, 2)[chosen])

    def whole(self) -> list[Tensor]:
        return [torch.cat(part) for part in self.parts]


@torch.inference_mode()
def _measure(
    config: RunConfig, opened: Opened, trained: Trained, progress: Progress
) -> AgreementPicture:
    targets, objective = trained.targets, config.objective
    fresh = with_all_blocks(fresh_of(config, opened))
    student = with_all_blocks(trained.student)
    blocks = [f"block:{i + 1}" for i in range(student.num_blocks)]
    fits = {s.name: HeadFit(kind=objective.loss, beta=objective.beta) for s in targets}
    before, after, teachers = (_Layers.empty(len(n)) for n in (blocks, blocks, targets))
    samples = _spread(opened.source.num_samples, NUM_CLIPS[config.cache.mode])
    bar = progress.start("agreement", len(samples), "clips")
    for batch in _batches(config, opened, samples):
        features = [s.decode(batch.columns[s.column], batch.units) for s in targets]
        taps = student(batch.pixels, batch.units)
        if objective.kind == "visible":
            predicted = trained.heads(taps, batch.units, batch.units)
            for spec, feature in zip(targets, features, strict=True):
                target = normalise(feature, objective.normalise, spec.statistics)
                fits[spec.name].add(predicted[spec.name].float(), target, trained.means[spec.name])
        chosen = _thinned(batch, len(samples))
        untrained = fresh(batch.pixels, batch.units)
        before.add((unit_tokens(untrained[tap]) for tap in blocks), chosen)
        after.add((unit_tokens(taps[tap]) for tap in blocks), chosen)
        teachers.add(features, chosen)
        progress.advance(bar, len(batch.samples))
    progress.finish(bar)
    layers = teachers.whole()
    # Decoders of hidden units and mixing heads read many blocks.
    one_block = objective.kind == "visible" and not config.student.mix
    masks = config.mask_schedule.widest
    return AgreementPicture(
        title=f"{config.name}: how far the student agrees with its teachers",
        foot=f"{len(samples):,} clips that it was trained on, as it sees them ({masks.strategy}, "
        f"{100 * masks.ratio:g} % hidden); step {trained.steps:,}. CKA over {len(layers[0]):,} "
        "tokens: 1 is equal but for rotation and scale."
        + (" Orange frames: the block that a head reads." if one_block else ""),
        fits=tuple(
            Fit(
                target=name,
                explained_variance=fit.explained_variance,
                cosine=fit.cosine,
                constant_cosine=fit.constant_cosine,
            )
            for name, fit in fits.items()
            if fit.tokens
        ),
        blocks=tuple(student.block_name(i + 1) for i in range(student.num_blocks)),
        layers=tuple(spec.name for spec in targets),
        before=linear_cka(before.whole(), layers),
        after=linear_cka(after.whole(), layers),
        read=tuple(student.taps[spec.tap] - 1 if one_block else None for spec in targets),
    )


def _spread(num_samples: int, count: int) -> np.ndarray:
    """Numbers of samples spread evenly over all, ascending; the same ones every time."""
    count = min(num_samples, count)
    return np.arange(count) * num_samples // count


def _thinned(batch: Batch, num_clips: int) -> Tensor:
    """Places of a batch's share of the tokens that CKA is computed on, spread evenly."""
    tokens = batch.units.numel() * TOKENS_PER_UNIT
    share = min(tokens, CKA_TOKENS * len(batch.samples) // num_clips)
    return torch.arange(share, device=batch.units.device) * tokens // share


def _batches(config: RunConfig, opened: Opened, samples: np.ndarray) -> Iterator[Batch]:
    """Samples under the first mask of view 0, with the features of what it shows."""
    device = resolve_device(config.train.device)
    position = Position(step=0, epoch=0, view=0, draw=0)
    for start in range(0, len(samples), BATCH):
        numbers = samples[start : start + BATCH]
        rows = opened.source.read(numbers, view=0)
        batch = make_batch(rows, config.mask_schedule.widest, position, numbers)
        yield batch.map(lambda tensor: tensor.to(device))
