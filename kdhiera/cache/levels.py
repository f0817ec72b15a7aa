"""Magnitudes that the codes 0, 1, 2, ... stand for: even at first, then ever further apart.

    level(n) = n + curve * max(0, n - linear)^2

One byte so reaches the outliers that some channels of large ViTs have, without a coarser
step for all the others. Everything is exact in float32 on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float32
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Levels:
    """See the module.

    Args:
        linear: Last code whose level is itself.
        curve: How fast levels spread beyond it, a power of 2.
        top: Largest code.
    """

    linear: int
    curve: float
    top: int

    @property
    def largest(self) -> float:
        """Level of the largest code."""
        return self.top + self.curve * (self.top - self.linear) ** 2

    def level(self, codes: Float32[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
        """Levels of codes that are not negative."""
        beyond = (codes - self.linear).clamp_min_(0)
        return beyond.square_().mul_(self.curve).add_(codes)

    def signed(self, codes: Float32[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
        """Levels of codes with a sign."""
        return self.level(codes.abs()).copysign_(codes)

    def nearest(
        self, values: Float32[Tensor, "*shape"], *, up_from: float = 0.5
    ) -> Float32[Tensor, "*shape"]:
        """Codes of values that are not negative.

        Args:
            values: In steps; beyond the largest level they become its code.
            up_from: Fraction from which a value up to `linear` is rounded up.
        """
        if values.numel() and float(values.amax()) <= self.linear:
            return (values + (1 - up_from)).floor_()
        even = values.clamp_max(self.linear).add_(1 - up_from).floor_()
        start = 1 / (4 * self.curve)  # solves curve * places^2 + places = values - linear
        beyond = values.sub(self.linear - start).clamp_min_(start).div_(self.curve)
        places = beyond.sqrt_().sub_(1 / (2 * self.curve)).round_()
        return even.add_(places).clamp_max_(self.top)
