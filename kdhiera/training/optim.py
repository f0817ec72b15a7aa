"""AdamW with decay only on matrices, and the learning rate of every step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from kdhiera.config import TrainConfig
from kdhiera.schedule import Schedule

LR_BATCH_SIZE = 256  # the batch that `train.lr` is meant for


def parameter_groups(
    modules: Iterable[nn.Module], *, weight_decay: float
) -> list[dict[str, object]]:
    """Two AdamW groups: matrices with decay; norms, biases, position embeddings without.

    Args:
        modules: Whose trainable parameters are taken.
        weight_decay: Of the first group.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                spare = parameter.ndim <= 1 or "pos_embed" in name
                (spared if spare else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]


def build_optimizer(modules: Iterable[nn.Module], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW as the config says; the learning rate is set at every step."""
    groups = parameter_groups(modules, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=True)


def build_schedule(config: TrainConfig, num_steps: int) -> Schedule:
    """The config's schedule stretched over a run.

    The peak is `lr * batch_size / 256`. The warm-up is the share `warmup_epochs / epochs`
    of the run, also when `max_steps` makes it shorter than its epochs.

    Args:
        config: Learning rates, epochs and warm-up.
        num_steps: Steps of the whole run.
    """
    share = min(1.0, config.warmup_epochs / config.epochs)
    return Schedule(
        peak=config.lr * config.batch_size / LR_BATCH_SIZE,
        final=config.min_lr,
        warmup_steps=round(share * num_steps),
        num_steps=num_steps,
    )
