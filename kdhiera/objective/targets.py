"""From cached features to what a head must predict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from kdhiera.errors import UsageError

LAYER_NORM_EPS = 1e-6
STD_FLOOR = 1e-6
NEEDS_STATISTICS = frozenset({"standardize", "phi_s"})


@dataclass(frozen=True, kw_only=True)
class ChannelMoments:
    """Moments of a column over all tokens of its good rows.

    Args:
        mean: Per channel, float64 as merged.
        std: Per channel, population form, float64.
        count: Tokens that they are of.
    """

    mean: Float[Tensor, " c"]
    std: Float[Tensor, " c"]
    count: int

    def state_dict(self) -> dict[str, int | Tensor]:
        """As a checkpoint keeps them."""
        return {"count": self.count, "mean": self.mean.cpu(), "std": self.std.cpu()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> ChannelMoments:
        """Inverse of `state_dict`."""
        mean, std = (state[name].to(device) for name in ("mean", "std"))
        return cls(mean=mean, std=std, count=state["count"])


@dataclass(frozen=True, kw_only=True)
class PhiS:
    """The isotropic map of a column; see `kdhiera.objective.phi_s`.

    Args:
        mean: Per channel, float64.
        matrix: `target = matrix @ (feature - mean)`, float64.
        count: Tokens that they are of.
    """

    mean: Float[Tensor, " c"]
    matrix: Float[Tensor, "c c"]
    count: int

    def state_dict(self) -> dict[str, int | Tensor]:
        """As a checkpoint keeps it."""
        return {"count": self.count, "mean": self.mean.cpu(), "matrix": self.matrix.cpu()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> PhiS:
        """Inverse of `state_dict`."""
        mean, matrix = (state[name].to(device) for name in ("mean", "matrix"))
        return cls(mean=mean, matrix=matrix, count=state["count"])


Statistics = ChannelMoments | PhiS


def statistics_from_state(state: Mapping[str, Any], device: torch.device) -> Statistics:
    """What a checkpoint keeps of a target's statistics, whichever kind it is."""
    kind = PhiS if "matrix" in state else ChannelMoments
    return kind.from_state(state, device)


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """One teacher layer that trains the student.

    Args:
        teacher: Teacher's name.
        layer: Layer's name, such as `9` or `norm`.
        tap: Student tap that its head reads.
        column: Column id in the batches.
        width: Channels.
        weight: The teacher's share of the total; the same for all layers of a teacher.
        layer_weight: The layer's share of its teacher, in proportion to the other layers.
        decode: A column's arrays and the unit numbers that they stand at to float32 features
            `[b, k, 4, c]`, on the arrays' device.
        statistics: For `standardize` and `phi_s`; None otherwise.
    """

    teacher: str
    layer: str
    tap: str
    column: str
    width: int
    weight: float
    decode: Callable[[Mapping[str, Tensor], Tensor], Tensor]
    layer_weight: float = 1.0
    statistics: Statistics | None = None

    @property
    def name(self) -> str:
        """`teacher/layer`, the name of its head and of its metrics."""
        return f"{self.teacher}/{self.layer}"


def normalise(
    features: Float[Tensor, "*tokens c"],
    kind: str,
    statistics: Statistics | None = None,
) -> Float[Tensor, "*tokens c"]:
    """The target that a teacher's raw features stand for.

    | kind          | target                                     | source                      |
    |---------------|--------------------------------------------|-----------------------------|
    | `layer_norm`  | each token to mean 0, variance 1           | MaskAlign, arXiv:2211.08887 |
    | `standardize` | each channel to mean 0, variance 1         | Theia, arXiv:2407.20179     |
    | `phi_s`       | turned, then one scale: likewise           | PHI-S, arXiv:2410.01680     |
    | `l2`          | each token to unit length                  | UMT, arXiv:2303.16058       |
    | `none`        | the features themselves                    | MVD, arXiv:2212.04500       |

    Args:
        features: Raw features of a teacher layer.
        kind: One of the table.
        statistics: Of the cache: `ChannelMoments` for `standardize`, `PhiS` for `phi_s`.

    Raises:
        UsageError: If the kind is none of the table, or its statistics are missing.
    """
    if kind == "layer_norm":
        return F.layer_norm(features, features.shape[-1:], eps=LAYER_NORM_EPS)
    if kind == "l2":
        return F.normalize(features, dim=-1)
    if kind == "none":
        return features
    if kind == "standardize" and isinstance(statistics, ChannelMoments):
        std = torch.clamp_min(statistics.std, STD_FLOOR).to(features.dtype)
        return (features - statistics.mean.to(features.dtype)) / std
    if kind == "phi_s" and isinstance(statistics, PhiS):
        centred = features - statistics.mean.to(features.dtype)
        return centred @ statistics.matrix.to(features.dtype).T
    if kind not in NEEDS_STATISTICS:
        raise UsageError(
            f"objective.normalise must be layer_norm, standardize, phi_s, l2 or none, got {kind!r}"
        )
    raise UsageError(
        f"objective.normalise={kind} needs statistics of the features in a cache, and there are "
        "none here: choose layer_norm, or train from a cache"
    )
