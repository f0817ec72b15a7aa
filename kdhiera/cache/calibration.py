"""What `compact` calibrates on some clips: means, principal components, likely codes."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from kdhiera.cache.compact import ROUND_UP_FROM, haar
from kdhiera.grid import TOKENS_PER_UNIT


class Calibration:
    """Means and principal components of features, clip by clip; holds no clip.

    Attributes:
        num_units: Units that were taken in.

    Args:
        width: Channels.
    """

    def __init__(self, width: int) -> None:
        self.num_units = 0
        self._shift: Tensor | None = None  # about the first clip's means no digits cancel
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._moments = torch.zeros(TOKENS_PER_UNIT, width, width, dtype=torch.float64)

    def add(self, features: Float[Tensor, "n units 4 c"]) -> None:
        """Take in all units of some clips."""
        for clip in features.double():
            if self._shift is None:
                self._shift = clip.mean((0, 1))
                self._sum, self._moments = (t.to(clip.device) for t in (self._sum, self._moments))
            bands = haar(clip - self._shift)
            self.num_units += len(bands)
            self._sum += bands[:, 0].sum(0)
            self._moments += torch.einsum("kbc,kbd->bcd", bands, bands)

    def basis(self, *, error: float) -> dict[str, np.ndarray]:
        """What a column stores of it.

        Args:
            error: Share of every row's energy that encoding may lose, above 0.
        """
        assert self._shift is not None, "nothing was added"
        moments = self._moments / self.num_units
        mean = self._sum / self.num_units  # of the mean band: twice that of the channels
        moments[0] -= mean[:, None] * mean
        components = torch.stack([_principal(moments[0]), _principal(moments[1:].sum(0))])
        of_bands = components[[0, 1, 1, 1]]
        variances = torch.einsum("bpc,bcd,bpd->bp", of_bands, moments, of_bands).flatten()
        falling = variances.argsort(dim=0, descending=True, stable=True)
        half = len(falling) // 2
        # A byte holds the largest with the smallest: all bytes have about as much to say.
        order = torch.stack((falling[:half], falling.flip(0)[:half]), 1).flatten()
        pairs = _likeliest_first(variances, order, error)
        return {
            "mean": (self._shift + mean / 2).float().cpu().numpy(),
            "components": components.float().cpu().numpy(),
            "order": order.to(torch.int32).cpu().numpy(),
            "pairs": pairs.cpu().numpy(),
            "error": np.array(error),
        }


def _principal(moments: Float[Tensor, "c c"]) -> Float[Tensor, "c c"]:
    """Eigenvectors, one a row, largest eigenvalue first."""
    vectors: Tensor = torch.linalg.eigh(moments).eigenvectors
    return vectors.flip(1).T.contiguous()


def _likeliest_first(
    variances: Float[Tensor, " n"], order: Int64[Tensor, " n"], error: float
) -> UInt8[Tensor, "n/2 256"]:
    """Pairs of low halves by falling probability, were the coefficients Gaussian.

    So every byte has about the same distribution, and one Huffman table suits all.
    """
    step = math.sqrt(12 * _water_level(variances, error)) or 1.0
    sizes = (variances / step**2).clamp_min(1e-4).sqrt()[order, None]
    codes = torch.arange(-128, 128, dtype=sizes.dtype, device=sizes.device)
    edges = (codes.abs() + ROUND_UP_FROM - 1).copysign(codes)
    inner = torch.special.ndtr(edges / sizes)
    outer = torch.special.ndtr((edges + codes.sign()) / sizes)
    likely = torch.where(
        codes == 0, 2 * torch.special.ndtr(ROUND_UP_FROM / sizes) - 1, (outer - inner).abs()
    )
    halves = likely.roll(8, 1).view(-1, 16, 16).sum(1)  # by the low half of code + 8
    together = (halves[1::2, :, None] * halves[0::2, None, :]).flatten(1)
    return together.argsort(dim=1, descending=True, stable=True).to(torch.uint8)


def _water_level(variances: Float[Tensor, " n"], error: float) -> float:
    """Loss of every coefficient that has so much, at `error` of their sum (Cover and Thomas)."""
    low, high = 0.0, float(variances.max())
    for _ in range(60):
        level = (low + high) / 2
        enough = variances.clamp_max(level).sum() >= error * variances.sum()
        low, high = (low, level) if enough else (level, high)
    return high
