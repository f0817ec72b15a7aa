"""Losses between predictions and targets, and how much they explain."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from kdhiera.errors import UsageError
from kdhiera.objective.targets import TargetSpec
from kdhiera.views import stable_uniforms


def loss(
    predicted: Float[Tensor, "*tokens c"],
    target: Float[Tensor, "*tokens c"],
    kind: str,
    *,
    beta: float = 1.0,
) -> Float[Tensor, ""]:
    """Mean loss of one teacher layer: `token_losses` averaged over all tokens.

    Args:
        predicted: What a head gives.
        target: What it should give.
        kind: See `token_losses`.
        beta: Where smooth L1 turns linear.

    Raises:
        UsageError: If the kind has another name.
    """
    if kind == "smooth_l1":  # one pass over the features, nothing of their size is kept
        return F.smooth_l1_loss(predicted, target, beta=beta)
    if kind == "mse":
        return F.mse_loss(predicted, target)
    return token_losses(predicted, target, kind, beta=beta).mean()


def token_losses(
    predicted: Float[Tensor, "*tokens c"],
    target: Float[Tensor, "*tokens c"],
    kind: str,
    *,
    beta: float = 1.0,
) -> Float[Tensor, "*tokens"]:
    """Loss of every token.

    With d = predicted - target (averaged over channels) and cos = cos(predicted, target):

    | kind               | loss                                         | source                 |
    |--------------------|----------------------------------------------|------------------------|
    | `smooth_l1`        | d^2 / (2 beta) below beta, else d - beta / 2 | MVD, arXiv:2212.04500  |
    | `mse`              | d^2                                          |                        |
    | `cosine`           | 2 - 2 cos                                    | UMT, arXiv:2303.16058  |
    | `cosine_smooth_l1` | (1 - cos) / 2 + smooth_l1 / 2                | UNIC, arXiv:2408.05088 |

    `cosine` is the squared distance of the unit vectors.

    Args:
        predicted: What a head gives.
        target: What it should give.
        kind: One of the table.
        beta: Where smooth L1 turns linear.

    Raises:
        UsageError: If the kind has another name.
    """
    if kind == "smooth_l1":
        return F.smooth_l1_loss(predicted, target, beta=beta, reduction="none").mean(-1)
    if kind == "mse":
        return F.mse_loss(predicted, target, reduction="none").mean(-1)
    cosines = F.cosine_similarity(predicted, target, dim=-1)
    if kind == "cosine":
        return 2.0 - 2.0 * cosines
    if kind == "cosine_smooth_l1":
        return 0.5 * (1.0 - cosines) + 0.5 * token_losses(predicted, target, "smooth_l1", beta=beta)
    raise UsageError(
        f"objective.loss must be smooth_l1, mse, cosine or cosine_smooth_l1, got {kind!r}"
    )


def sample_losses(
    predicted: Float[Tensor, "b *tokens c"],
    target: Float[Tensor, "b *tokens c"],
    kind: str,
    *,
    beta: float = 1.0,
) -> Float[Tensor, " b"]:
    """Mean loss of every sample; the mean of these is `loss`.

    Args:
        predicted: What a head gives.
        target: What it should give.
        kind: See `token_losses`.
        beta: Where smooth L1 turns linear.

    Raises:
        UsageError: If the kind has another name.
    """
    return token_losses(predicted, target, kind, beta=beta).flatten(1).mean(1)


def cosine(
    predicted: Float[Tensor, "*tokens c"], target: Float[Tensor, "*tokens c"]
) -> Float[Tensor, ""]:
    """Mean over tokens of the cosine between prediction and target."""
    return F.cosine_similarity(predicted, target, dim=-1).mean()


def teacher_losses(
    losses: Mapping[str, Float[Tensor, "*b"]], targets: Sequence[TargetSpec]
) -> dict[str, Float[Tensor, "*b"]]:
    """Mean over the layers of every teacher, in proportion to the layers' weights.

    Args:
        losses: By target name, of the batch or of every sample.
        targets: All targets of the run.
    """
    sums: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    for spec in targets:
        term = spec.layer_weight * losses[spec.name]
        sums[spec.teacher] = sums[spec.teacher] + term if spec.teacher in sums else term
        weights[spec.teacher] = weights.get(spec.teacher, 0.0) + spec.layer_weight
    return {teacher: value / weights[teacher] for teacher, value in sums.items()}


def total(
    losses: Mapping[str, Float[Tensor, "*b"]],
    targets: Sequence[TargetSpec],
    dropped: Mapping[str, Bool[Tensor, " b"]] | None = None,
) -> Float[Tensor, ""]:
    """Sum over teachers of weight times the weighted mean over their layers.

    A teacher of weight 0 is only measured: it trains nothing, and no sample is left to it.

    With `dropped`, what UNIC calls teacher dropping (arXiv:2408.05088): a sample learns
    from the teacher that it is worst at, and from those others that are not dropped. UNIC
    divides by the number of teachers that are kept; here a dropped teacher adds nothing,
    which is the same up to one factor a step.

    Args:
        losses: By target name; of every sample where `dropped` is given.
        targets: All targets of the run.
        dropped: By teacher, whether a sample may do without it; see `draw_drops`.
    """
    weights = {spec.teacher: spec.weight for spec in targets}
    measured = teacher_losses(losses, targets)
    by_teacher = {teacher: each for teacher, each in measured.items() if weights[teacher]}
    if dropped is not None:
        worst = torch.stack([*by_teacher.values()]).detach().argmax(0)
        by_teacher = {
            teacher: each.masked_fill(dropped[teacher] & (worst != place), 0.0).mean()
            for place, (teacher, each) in enumerate(by_teacher.items())
        }
    return torch.stack([weights[teacher] * each for teacher, each in by_teacher.items()]).sum()


def draw_drops(
    teachers: Collection[str], samples: Sequence[int], probability: float, *, seed: int, step: int
) -> dict[str, Bool[Tensor, " b"]]:
    """Which teachers a sample may do without in a step.

    A function of seed, step and sample: where a sample stands in the batch, or on which
    device, does not matter.

    Args:
        teachers: Their names, in any order.
        samples: Sample numbers of the batch.
        probability: Of every (teacher, sample).
        seed: Of the run.
        step: Number of the step.
    """
    names = sorted(teachers)
    noise = [stable_uniforms(len(names), "teacher_drop", seed, step, s) for s in samples]
    drawn = torch.from_numpy(np.stack(noise)) < probability
    return {name: drawn[:, place] for place, name in enumerate(names)}


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
        self.update_by(target.flatten(0, -2).mean(0), target.numel() // target.shape[-1])

    def update_by(self, mean: Float[Tensor, " c"], tokens: int) -> None:
        """Take a batch in of which only the mean and the number of tokens are known."""
        self.count += tokens
        self.mean = self.mean + (mean - self.mean) * (tokens / self.count)

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
        for the other two the mean comes close to the best constant.

        Args:
            predicted: What a head gives.
            target: What it should give.
            kind: Loss; see `loss`.
            beta: Where smooth L1 turns linear.
        """
        reference = self.constant_loss(target, kind, beta=beta)
        return 1.0 - loss(predicted, target, kind, beta=beta) / reference

    def constant_loss(
        self, target: Float[Tensor, "*tokens c"], kind: str, *, beta: float = 1.0
    ) -> Float[Tensor, ""]:
        """Loss of predicting the mean; see `explained_variance`.

        Args:
            target: What it should give.
            kind: Loss; see `loss`.
            beta: Where smooth L1 turns linear.
        """
        return loss(self.mean.expand_as(target), target, kind, beta=beta)

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
