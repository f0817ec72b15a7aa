"""Fine-tuning: the whole student learns the classes.

The recipe of masked video pre-training (Hiera, arXiv:2306.00989, App. A; MVD; VideoMAE):
AdamW whose learning rate shrinks from block to block towards the input (BEiT,
arXiv:2106.08254), drop-path, label smoothing and mixup (arXiv:1710.09412). Groups,
targets and loss are timm's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from kdhiera.config.evaluation import FinetuneConfig
from kdhiera.errors import KdhieraError
from kdhiera.schedule import Schedule
from kdhiera.seeding import seeded
from kdhiera.student.base import Student, set_fused_attention
from kdhiera.views import stable_key

LR_BATCH_SIZE = 256  # the batch that `evaluate.finetune.lr` is meant for
HEAD_INIT_SCALE = 1e-3  # Hiera's: the first predictions are even

Batch = tuple[UInt8[np.ndarray, "b f y x 3"], Int[np.ndarray, " b"]]
Batches = Callable[[int], Iterator[Batch]]


class Classifier(nn.Module):
    """A student with its backbone's own head: mean over tokens, norm, linear map.

    Args:
        student: Becomes part of this; its backbone gets a classifier.
        num_classes: Classes.
        seed: Decides the classifier's weights.
    """

    def __init__(self, student: Student, num_classes: int, *, seed: int) -> None:
        super().__init__()
        self.student = student
        generator = torch.Generator().manual_seed(stable_key("classifier", seed) % 2**63)
        with torch.random.fork_rng(devices=[]):  # timm draws weights that are drawn again here
            student.backbone.reset_classifier(num_classes)
        head: nn.Linear = student.backbone.get_classifier()
        nn.init.trunc_normal_(head.weight, std=0.02, generator=generator)
        nn.init.zeros_(head.bias)
        with torch.no_grad():
            head.weight.mul_(HEAD_INIT_SCALE)

    def forward(
        self, clips: UInt8[Tensor, "b f y x 3"] | Float[Tensor, "b f y x 3"]
    ) -> Float[Tensor, "b classes"]:
        """Logits of RGB clips, 0..255."""
        return self.classify(self.student.dense(clips))

    def classify(self, tokens: Float[Tensor, "b t h w c"]) -> Float[Tensor, "b classes"]:
        """Logits from the tokens of the last block."""
        pooled = self.student.pool(tokens, "mean")
        logits: Tensor = self.student.backbone.get_classifier()(pooled)
        return logits


def layer_groups(backbone: Any, *, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """AdamW groups, each with the `lr_scale` of its depth.

    The classifier and the final norm learn at the full rate, the last block at `layer_decay`
    of it, the first at `layer_decay ** blocks`, patch and position embedding at one factor
    less. Norms, biases and position embeddings are not decayed.

    Args:
        backbone: timm's, with a classifier. What is spared from decay is named here, as
            Hiera's own list fails in 3-D.
        weight_decay: Of matrices.
        layer_decay: Factor from a block to the one before it.
    """
    groups: list[dict[str, Any]] = param_groups_layer_decay(
        backbone,
        weight_decay=weight_decay,
        no_weight_decay_list=("*pos_embed*",),
        layer_decay=layer_decay,
    )
    return groups


def mix(
    clips: UInt8[Tensor, "b f y x 3"],
    labels: Int[Tensor, " b"],
    *,
    share: float,
    num_classes: int,
    label_smoothing: float,
) -> tuple[Float[Tensor, "b f y x 3"], Float[Tensor, "b classes"]]:
    """Clips mixed with those of the reversed batch, and the targets likewise.

    Args:
        clips: RGB.
        labels: Class numbers.
        share: Of a clip's own, 0..1; 1 mixes nothing.
        num_classes: Classes.
        label_smoothing: Share of a target that is spread over all classes.
    """
    targets: Tensor = mixup_target(labels, num_classes, share, label_smoothing)
    pixels = clips.float()
    if share < 1:
        pixels = share * pixels + (1 - share) * pixels.flip(0)
    return pixels, targets


def finetune(
    classifier: Classifier,
    batches: Batches,
    *,
    steps_per_epoch: int,
    num_classes: int,
    settings: FinetuneConfig,
    layer_decay: float,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    on_step: Callable[[int], None] = lambda _: None,
) -> None:
    """Train a classifier in place; the weights of the last step stay.

    Drop-path and mixup of a step follow from the seed and the step's number.

    Args:
        classifier: Moved to the device; left in evaluation mode.
        batches: Clips and class numbers of an epoch, by its number.
        steps_per_epoch: Batches that an epoch gives.
        num_classes: Classes.
        settings: Recipe.
        layer_decay: See `layer_groups`.
        seed: Decides drop-path and mixup.
        device: Where it computes.
        dtype: `torch.float32`, or what autocast multiplies in.
        on_step: Told the clips of each step.

    Raises:
        KdhieraError: If the loss is not finite.
    """
    classifier.to(device).train()
    backbone = classifier.student.backbone
    set_fused_attention(backbone, device.type != "cpu" or dtype is torch.float32)
    optimizer = torch.optim.AdamW(
        layer_groups(backbone, weight_decay=settings.weight_decay, layer_decay=layer_decay),
        lr=0.0,
        betas=(0.9, 0.999),
    )
    num_steps = steps_per_epoch * settings.epochs
    schedule = Schedule(
        peak=settings.lr * settings.batch_size / LR_BATCH_SIZE,
        final=settings.min_lr,
        warmup_steps=min(num_steps, round(settings.warmup_epochs * steps_per_epoch)),
        num_steps=num_steps,
    )
    criterion = SoftTargetCrossEntropy()
    for epoch in range(settings.epochs):
        for i, (frames, numbers) in enumerate(batches(epoch)):
            step = epoch * steps_per_epoch + i
            clips, labels = (torch.from_numpy(array).to(device) for array in (frames, numbers))
            pixels, targets = mix(
                clips,
                labels,
                share=_share(settings.mixup, seed, step),
                num_classes=num_classes,
                label_smoothing=settings.label_smoothing,
            )
            with (
                seeded("finetune", seed, step, device=device),
                torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype != torch.float32),
            ):
                logits = classifier(pixels)
            loss = criterion(logits.float(), targets)
            if not bool(torch.isfinite(loss)):
                raise KdhieraError(
                    f"fine-tuning: the loss is not finite at step {step}: lower "
                    "evaluate.finetune.lr, or set evaluate.finetune.precision=fp32"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if settings.clip_grad is not None:
                nn.utils.clip_grad_norm_(classifier.parameters(), settings.clip_grad)
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr(step) * group["lr_scale"]
            optimizer.step()
            on_step(len(labels))
    classifier.eval()


def _share(alpha: float, seed: int, step: int) -> float:
    """A clip's own share in mixup, drawn for a step."""
    if alpha == 0:
        return 1.0
    rng = np.random.Generator(np.random.Philox(key=stable_key("mixup", seed, step)))
    return float(rng.beta(alpha, alpha))
