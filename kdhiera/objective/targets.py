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
class TargetSpec:
    """One teacher layer that trains the student.

    Args:
        teacher: Teacher's name.
        layer: Layer's name, such as `9` or `norm`.
        tap: Student tap that its head reads.
        column: Column id in the batches.
        width: Channels.
        weight: The teacher's share of the total; the same for all layers of a teacher.
        decode: A column's arrays and the unit numbers that they stand at to float32 features
            `[b, k, 4, c]`, on the arrays' device.
        statistics: For `standardize`; None otherwise.
    """

    teacher: str
    layer: str
    tap: str
    column: str
    width: int
    weight: float
    decode: Callable[[Mapping[str, Tensor], Tensor], Tensor]
    statistics: ChannelMoments | None = None

    @property
    def name(self) -> str:
        """`teacher/layer`, the name of its head and of its metrics."""
        return f"{self.teacher}/{self.layer}"


def normalise(
    features: Float[Tensor, "*tokens c"],
    kind: str,
    statistics: ChannelMoments | None = None,
) -> Float[Tensor, "*tokens c"]:
    """The target that a teacher's raw features stand for.

    | kind          | target                                | source                      |
    |---------------|---------------------------------------|-----------------------------|
    | `layer_norm`  | each token to mean 0, variance 1      | MaskAlign, arXiv:2211.08887 |
    | `standardize` | each channel to mean 0, variance 1    | Theia, arXiv:2407.20179     |
    | `l2`          | each token to unit length             | UMT, arXiv:2303.16058       |
    | `none`        | the features themselves               | MVD, arXiv:2212.04500       |

    Args:
        features: Raw features of a teacher layer.
        kind: One of the table.
        statistics: Moments of the cache, needed by `standardize`.

    Raises:
        UsageError: If the kind is none of the table, or statistics are missing.
    """
    if kind == "layer_norm":
        return F.layer_norm(features, features.shape[-1:], eps=LAYER_NORM_EPS)
    if kind == "l2":
        return F.normalize(features, dim=-1)
    if kind == "none":
        return features
    if kind != "standardize":
        raise UsageError(
            f"objective.normalise must be layer_norm, standardize, l2 or none, got {kind!r}"
        )
    if statistics is None:
        raise UsageError(
            "objective.normalise=standardize needs the channel statistics of a cache, and there "
            "are none here: choose layer_norm, or train from a cache"
        )
    std = torch.clamp_min(statistics.std, STD_FLOOR).to(features.dtype)
    return (features - statistics.mean.to(features.dtype)) / std
