"""Transform coding of features: a few bits a value, most coefficients zero.

    unit [4, c] -> 2 x 2 Haar over its tokens -> minus the calibrated mean of every band
                -> principal components of every band -> one step for all -> int8

One step for all coefficients lets the entropy coder share out the bits (reverse
water-filling: Cover and Thomas, Elements of Information Theory, 10.3.3). Codes are stored
component by component, so that what a block of the compressor sees is alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Shaped
from torch import Tensor

from kdhiera.cache.layout import ArraySpec
from kdhiera.grid import TOKENS_PER_UNIT

Basis = Mapping[str, np.ndarray]

_LIMIT = 127
_BISECTIONS = 40
_HAAR = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 2.0


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Features as arrays.

    Args:
        arrays: Axes `n k ...` each.
        representable: False where a value of the row is beyond the encoding's range.
    """

    arrays: dict[str, Tensor]
    representable: Bool[Tensor, " n"]


@dataclass(frozen=True, kw_only=True)
class CompactCodec:
    """See the module.

    Args:
        mean: Of every band's coefficients.
        components: Orthonormal, one a row, largest variance first, by band.
        step: Distance of two levels.
    """

    mean: Float32[Tensor, "4 c"]
    components: Float32[Tensor, "4 c c"]
    step: float

    @classmethod
    def of(cls, basis: Basis) -> CompactCodec:
        """The codec of a stored basis."""
        return cls(
            mean=torch.from_numpy(basis["mean"]),
            components=torch.from_numpy(basis["components"]),
            step=float(basis["step"]),
        )

    def specs(self, max_kept: int) -> dict[str, ArraySpec]:
        """Codes of `max_kept` units."""
        spec = ArraySpec(
            shape=(max_kept, TOKENS_PER_UNIT, self.mean.shape[1]),
            dtype="int8",
            axes=("row", "kept_unit", "band", "component"),
            order=(0, 2, 3, 1),
        )
        return {"codes": spec}

    def encode(self, features: Float[Tensor, "n k 4 c"], units: Int[Tensor, "n k"]) -> Encoded:
        """Rows with a coefficient beyond 127 steps are not representable; nothing is clipped."""
        levels = (self._transform(features.float()) / self.step).round_()
        levels = levels.masked_fill((units < 0)[:, :, None, None], 0.0)
        fits = (levels.abs() <= _LIMIT).flatten(1).all(1)
        codes = levels.clamp_(-_LIMIT, _LIMIT).to(torch.int8)
        return Encoded(arrays={"codes": codes}, representable=fits)

    def decode(
        self, arrays: Mapping[str, Shaped[Tensor, "n k ..."]], units: Int[Tensor, "n k"]
    ) -> Float32[Tensor, "n k 4 c"]:
        """Two small matrix products."""
        levels = arrays["codes"].float() * self.step
        bands = torch.einsum("nkbp,bpc->nkbc", levels, self.components) + self.mean
        return torch.einsum("nkbc,bt->nktc", bands, _HAAR.to(bands.device))

    def to(self, device: torch.device) -> CompactCodec:
        """The same codec on a device."""
        return replace(self, mean=self.mean.to(device), components=self.components.to(device))

    def _transform(self, features: Float32[Tensor, "n k 4 c"]) -> Float32[Tensor, "n k 4 c"]:
        bands = torch.einsum("nktc,bt->nkbc", features, _HAAR.to(features.device)) - self.mean
        return torch.einsum("nkbc,bpc->nkbp", bands, self.components)


def calibrate_compact(
    features: Float32[Tensor, "n units 4 c"], *, error: float
) -> dict[str, np.ndarray]:
    """Means, principal components and the step that loses `error` of the centred variance.

    Args:
        features: All units of some clips.
        error: Share of their variance about the channel means, above 0.
    """
    bands = torch.einsum("nktc,bt->nkbc", features, _HAAR).flatten(0, 1).double()
    mean = bands.mean(0)
    centred = bands - mean
    components = []
    for band in range(TOKENS_PER_UNIT):
        values = centred[:, band]
        _, vectors = torch.linalg.eigh(values.T @ values)
        components.append(vectors.flip(1).T)
    codec = CompactCodec(
        mean=mean.float(), components=torch.stack(components).float().contiguous(), step=1.0
    )
    coefficients = codec._transform(features)
    channels = features.flatten(0, 2).double()
    allowed = error * float((channels - channels.mean(0)).square().sum())
    low, high = 0.0, 4 * float(coefficients.abs().max()) + 1e-30
    for _ in range(_BISECTIONS):
        step = (low + high) / 2
        lost = (coefficients / step).round_().mul_(step).sub_(coefficients)
        if float(lost.double().square().sum()) > allowed:
            high = step
        else:
            low = step
    return {
        "mean": codec.mean.numpy(),
        "components": codec.components.numpy(),
        "step": np.array(low or high),
    }
