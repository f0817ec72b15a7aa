"""Losses between predictions and targets, and how much they explain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from kdhiera.errors import UsageError
from kdhiera.objective.targets import TargetSpec


def loss(
    predicted: Float[Tensor, "*tokens c"],
    target: Float[Tensor, "*tokens c"],
    kind: str,
    *,
    beta: float = 1.0,
) -> Float[Tensor, ""]:
    """Mean loss of one teacher layer.

    With d = predicted - target: `smooth_l1` is d^2 / (2 beta) below beta and |d| - beta / 2
    above, `mse` is d^2, both averaged over channels and tokens; `cosine` is
    2 - 2 cos(predicted, target), averaged over tokens, the squared distance of the unit
    vectors.

    Args:
        predicted: What a head gives.
        target: What it should give.
        kind: `smooth_l1`, `mse` or `cosine`.
        beta: Where smooth L1 turns linear.

    Raises:
        UsageError: If the kind has another name.
    """
    if kind == "smooth_l1":
        return F.smooth_l1_loss(predicted, target, beta=beta)
    if kind == "mse":
        return F.mse_loss(predicted, target)
    if kind == "cosine":
        return 2.0 - 2.0 * cosine(predicted, target)
    raise UsageError(f"objective.loss must be smooth_l1, mse or cosine, got {kind!r}")


def cosine(
    predicted: Float[Tensor, "*tokens c"], target: Float[Tensor, "*tokens c"]
) -> Float[Tensor, ""]:
    """Mean over tokens of the cosine between prediction and target."""
    return F.cosine_similarity(predicted, target, dim=-1).mean()


def total(losses: Mapping[str, Tensor], targets: Sequence[TargetSpec]) -> Float[Tensor, ""]:
    """Sum over teachers of weight times the mean over their layers.

    Args:
        losses: By target name.
        targets: All targets of the run.
    """
    by_teacher: dict[str, list[TargetSpec]] = {}
    for spec in targets:
        by_teacher.setdefault(spec.teacher, []).append(spec)
    means = [
        group[0].weight * torch.stack([losses[spec.name] for spec in group]).mean()
        for group in by_teacher.values()
    ]
    return torch.stack(means).sum()


class RunningMean:
    """Per-channel mean of all targets a run has seen: the constant predictor to beat.

    The mean of the steps *before* the current one, so that a batch is never explained by
    its own mean; zeros before the first step.

    Args:
        width: Channels.
        device: Where the targets are.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = 0
        self.mean = torch.zeros(width, device=device)

    def update(self, target: Float[Tensor, "*tokens c"]) -> None:
        """Take the tokens of one batch in."""
        tokens = target.numel() // target.shape[-1]
        self.count += tokens
        step = target.flatten(0, -2).mean(0) - self.mean
        self.mean = self.mean + step * (tokens / self.count)

    def explained_variance(
        self,
        predicted: Float[Tensor, "*tokens c"],
        target: Float[Tensor, "*tokens c"],
        kind: str,
        *,
        beta: float = 1.0,
    ) -> Float[Tensor, ""]:
        """1 - loss(predicted) / loss(mean), both on this batch; call it before `update`.

        For `mse` the mean is the best constant predictor there is, and this is the usual
        R^2 pooled over channels; for `cosine` the same holds of targets of equal length;
        for `smooth_l1` the mean comes close to the best constant.

        Args:
            predicted: What a head gives.
            target: What it should give.
            kind: Loss; see `loss`.
            beta: Where smooth L1 turns linear.
        """
        constant = self.mean.expand_as(target)
        reference = loss(constant, target, kind, beta=beta)
        return 1.0 - loss(predicted, target, kind, beta=beta) / reference

    def state_dict(self) -> dict[str, int | Tensor]:
        """What a checkpoint keeps."""
        return {"count": self.count, "mean": self.mean.cpu()}

    def load_state_dict(self, state: Mapping[str, int | Tensor]) -> None:
        """Continue from a checkpoint."""
        count, mean = state["count"], state["mean"]
        assert isinstance(count, int)
        assert isinstance(mean, Tensor)
        self.count = count
        self.mean = mean.to(self.mean.device)
