"""Fine-tuning on labelled clips: decoded anew in every epoch, tested in all test views."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int

from kdhiera.config import RunConfig
from kdhiera.config.evaluation import FinetuneConfig
from kdhiera.data.clip import Clip
from kdhiera.data.sandbox import Sandbox
from kdhiera.devices import resolve_device, resolve_precision
from kdhiera.errors import KdhieraError, UsageError
from kdhiera.evaluation.finetune import Batch, Classifier, finetune
from kdhiera.evaluation.scores import Scored, mean_over_views
from kdhiera.machine import num_cpus
from kdhiera.progress import Progress
from kdhiera.stages.assemble import decode_limits
from kdhiera.stages.clips import Place, clips_at
from kdhiera.stages.evaluating.labelled import Splits, Task, evaluation_policy, settings_of
from kdhiera.student.base import Student
from kdhiera.views import CropPolicy, FramePolicy, ViewPolicy, stable_key

logger = logging.getLogger(__name__)


def finetuned(
    config: RunConfig,
    student: Student,
    splits: Splits,
    task: Task,
    rows: Int[np.ndarray, " k"],
    *,
    layer_decay: float,
    seed: int,
    progress: Progress,
    description: str,
) -> Scored:
    """Fine-tune a student on one label and score the test clips.

    Nothing is chosen on the way: the weights of the last epoch are what is measured.

    Args:
        config: The run.
        student: With fresh or distilled weights; is changed.
        splits: The clips.
        task: The label.
        rows: Training clips that are learnt from.
        layer_decay: See `kdhiera.evaluation.finetune.layer_groups`.
        seed: Decides classifier, order, views, drop-path and mixup.
        progress: Where progress is shown.
        description: Of the progress.

    Raises:
        UsageError: If a training clip is missing in every view.
        KdhieraError: If the loss is not finite, or a test clip decodes no longer.
    """
    settings = settings_of(config)
    recipe = settings.finetune
    device = resolve_device(config.train.device)
    dtype = resolve_precision(recipe.precision, device)
    classifier = Classifier(student, len(task.classes), seed=seed)
    train = _Training(
        places=[splits["train"].places[i] for i in rows],
        classes=task.truth["train"][rows],
        recipe=recipe,
        seed=seed,
    )
    bar = progress.start(description, recipe.epochs * train.clips_per_epoch, "clips")
    children = config.train.num_threads or num_cpus()
    with Sandbox(decode_limits(config.decode), num_children=children) as sandbox:
        finetune(
            classifier,
            lambda epoch: train.batches(config, sandbox, epoch),
            steps_per_epoch=train.steps_per_epoch,
            num_classes=len(task.classes),
            settings=recipe,
            layer_decay=layer_decay,
            seed=seed,
            device=device,
            dtype=dtype,
            on_step=lambda clips: progress.advance(bar, clips),
        )
        scores = {
            split: _scores(
                config,
                classifier,
                [splits[split].places[i] for i in task.rows(split)],
                policy=evaluation_policy(config, split),
                sandbox=sandbox,
                device=device,
                dtype=dtype,
            )
            for split in ("validation", "test")
        }
    progress.finish(bar)
    right = scores["validation"].argmax(1) == task.known_truth("validation")
    return Scored(test=scores["test"], validation_accuracy=float(right.mean()))


def training_policy(config: RunConfig) -> ViewPolicy:
    """What fine-tuning draws from: the evaluation's frames, random start and crop."""
    recipe = settings_of(config).finetune
    middle = evaluation_policy(config, "train")
    uniform = middle.frames is FramePolicy.UNIFORM_CENTER
    return replace(
        middle,
        frames=FramePolicy.UNIFORM if uniform else FramePolicy.DENSE,
        crop=CropPolicy.RANDOM_RESIZED,
        crop_scale=recipe.crop_scale,
        crop_ratio=(0.75, 4 / 3),
        flip=recipe.flip,
    )


@dataclass(frozen=True, kw_only=True)
class _Training:
    """Training clips in the order of an epoch, the views of a clip one after the other."""

    places: Sequence[Place]
    classes: Int[np.ndarray, " k"]
    recipe: FinetuneConfig
    seed: int

    @property
    def clips_per_epoch(self) -> int:
        return len(self.places) * self.recipe.repeats

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.clips_per_epoch / self.recipe.batch_size)

    def batches(self, config: RunConfig, sandbox: Sandbox, epoch: int) -> Iterator[Batch]:
        """Steps of nearly equal size; a view that does not decode is left out."""
        key = stable_key("finetune order", self.seed, epoch)
        order = np.random.Generator(np.random.Philox(key=key)).permutation(len(self.places))
        repeats = self.recipe.repeats
        views = [(int(i), epoch * repeats + r) for i in order for r in range(repeats)]
        decoded = clips_at(
            config,
            ((self.places[i], view) for i, view in views),
            policy=replace(training_policy(config), seed=self.seed),
            sandbox=sandbox,
            in_flight=2 * self.recipe.batch_size,
        )
        for part in np.array_split(np.array([i for i, _ in views]), self.steps_per_epoch):
            frames, classes = [], []
            for i, (sample, outcome) in zip(part, decoded, strict=False):
                if isinstance(outcome, Clip):
                    frames.append(outcome.frames)
                    classes.append(self.classes[i])
                else:
                    logger.warning("a view of %s is left out: %s", sample.uid, outcome.message)
            if not frames:
                raise UsageError(
                    "no view of a whole step of fine-tuning decodes: see the warnings, and take "
                    "the damaged videos out of evaluate.train"
                )
            yield np.stack(frames), np.array(classes, np.int64)


def _scores(
    config: RunConfig,
    classifier: Classifier,
    places: Sequence[Place],
    *,
    policy: ViewPolicy,
    sandbox: Sandbox,
    device: torch.device,
    dtype: torch.dtype,
) -> Float[np.ndarray, "m classes"]:
    views = policy.num_spread
    size = settings_of(config).batch_size
    decoded = clips_at(
        config,
        ((place, view) for place in places for view in range(views)),
        policy=policy,
        sandbox=sandbox,
        in_flight=2 * size,
    )
    parts = []
    waiting: list[np.ndarray] = []

    def flush() -> None:
        clips = torch.from_numpy(np.stack(waiting)).to(device)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype != torch.float32)
        with torch.inference_mode(), autocast:
            logits = classifier(clips)
        parts.append(logits.float().softmax(1).cpu().numpy())
        waiting.clear()

    for sample, outcome in decoded:
        if not isinstance(outcome, Clip):
            raise KdhieraError(f"{sample.uid} decoded before and now fails: {outcome.message}")
        waiting.append(outcome.frames)
        if len(waiting) == size:
            flush()
    if waiting:
        flush()
    return mean_over_views(np.concatenate(parts), views)
