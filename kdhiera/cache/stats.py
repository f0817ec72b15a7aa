"""Count, mean and M2 of every channel, merged without loss of precision.

Two sets merge by Chan, Golub and LeVeque (1979), Eq. 2.1: with d = mean_b - mean_a,

    mean = mean_a + d * n_b / n          M2 = M2_a + M2_b + d^2 * n_a * n_b / n

In float64 the order of merging moves the result only in its last digits; parts are
merged in sorted order all the same, so that a training run sees one value.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ChannelStatistics:
    """Statistics of `count` tokens.

    Args:
        count: Tokens seen.
        mean: Mean of every channel.
        m2: Sum of squared deviations from the mean, of every channel.
    """

    count: int
    mean: Float64[np.ndarray, " c"]
    m2: Float64[np.ndarray, " c"]

    @property
    def std(self) -> Float64[np.ndarray, " c"]:
        """Population standard deviation of every channel, `sqrt(M2 / count)`."""
        return np.sqrt(self.m2 / max(self.count, 1))


def nothing(width: int) -> ChannelStatistics:
    """Statistics of no token."""
    return ChannelStatistics(count=0, mean=np.zeros(width), m2=np.zeros(width))


def channel_statistics(tokens: Float[Tensor, "*rows c"]) -> ChannelStatistics:
    """Statistics of a batch of tokens, in float64 on the tokens' device."""
    flat = tokens.reshape(-1, tokens.shape[-1]).double()
    if not len(flat):
        return nothing(tokens.shape[-1])
    mean = flat.mean(0)
    m2 = torch.sum((flat - mean) ** 2, 0)
    return ChannelStatistics(count=len(flat), mean=mean.cpu().numpy(), m2=m2.cpu().numpy())


def merge(parts: Iterable[ChannelStatistics], width: int) -> ChannelStatistics:
    """Statistics of all tokens together, merged in the order given.

    Args:
        parts: Statistics of disjoint sets of tokens.
        width: Channels; says the shape where there are no parts.
    """
    return reduce(_merge_two, parts, nothing(width))


def to_npz(statistics: Mapping[str, ChannelStatistics]) -> bytes:
    """Statistics of some columns as one file."""
    arrays: dict[str, np.ndarray] = {}
    for column, values in statistics.items():
        arrays[f"{column}.count"] = np.array(values.count)
        arrays[f"{column}.mean"] = values.mean
        arrays[f"{column}.m2"] = values.m2
    sink = io.BytesIO()
    np.savez(sink, allow_pickle=False, **arrays)
    return sink.getvalue()


def from_npz(data: bytes, column: str) -> ChannelStatistics:
    """Statistics of one column of a file; inverse of `to_npz`."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return ChannelStatistics(
            count=int(arrays[f"{column}.count"]),
            mean=arrays[f"{column}.mean"],
            m2=arrays[f"{column}.m2"],
        )


def _merge_two(a: ChannelStatistics, b: ChannelStatistics) -> ChannelStatistics:
    count = a.count + b.count
    if not count:
        return a
    delta = b.mean - a.mean
    return ChannelStatistics(
        count=count,
        mean=a.mean + delta * (b.count / count),
        m2=a.m2 + b.m2 + delta**2 * (a.count * (b.count / count)),
    )
