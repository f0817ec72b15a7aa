"""Transform coding of features: a few bits a value, and an error that is kept to in every row.

    unit [4, c] minus the calibrated channel means -> 2 x 2 Haar over its tokens
        -> principal components of the mean band and of the detail bands
        -> one step for the row -> codes -> low halves two a byte, the likeliest pair as 0
        -> zstd

The step of a row is the largest at which the row loses no more than the target share of its
own energy about the calibrated means, so the error does not depend on how well the
calibration clips stand for the others: what suits them less takes more bits instead. One
step for all coefficients lets the entropy coder share out the bits (reverse water-filling:
Cover and Thomas, Elements of Information Theory, 10.3.3). `docs/encodings.md` has the format
to the byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int, Int16, Int32, Int64, Shaped, UInt8
from torch import Tensor
from torch.nn import functional

from kdhiera.cache.layout import ArraySpec
from kdhiera.cache.levels import Levels
from kdhiera.grid import TOKENS_PER_UNIT

Basis = Mapping[str, np.ndarray]

LEVELS = Levels(linear=63, curve=1.0, top=119)
ROUND_UP_FROM = 0.58  # fewest bits at equal error on ViT features: 0.5 costs 0.02 to 0.07 more
_STEP_BYTES = 2  # a bfloat16
_LEAST_STEP = 0x0080  # bits of the least normal one
_LARGEST = 1e36  # of a coefficient: sums over thousands of them stay within float32
_GROUP_BYTES = 64
_BLOCK_BYTES = 1 << 14  # shares a Huffman table; zstd searches larger blocks less well
_COMPRESSION_LEVEL = 6


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
        mean: Of every channel.
        components: Orthonormal, one a row: of the mean band, and of the three detail bands.
        order: Numbers of the coefficients (band * c + component) in the order of storage.
        place: Its inverse: where coefficient i is stored.
        pairs: What a byte of low halves stands for, by position.
        bytes_: Its inverse: how a pair of low halves is stored.
        error: Share of a row's energy about `mean` that may be lost.
    """

    mean: Float32[Tensor, " c"]
    components: Float32[Tensor, "2 c c"]
    order: Int64[Tensor, " 4*c"]
    place: Int64[Tensor, " 4*c"]
    pairs: UInt8[Tensor, "2*c 256"]
    bytes_: UInt8[Tensor, "2*c 256"]
    error: float

    @classmethod
    def of(cls, basis: Basis) -> CompactCodec:
        """The codec of a stored basis."""
        order = torch.from_numpy(basis["order"].astype(np.int64))
        pairs = torch.from_numpy(basis["pairs"])
        return cls(
            mean=torch.from_numpy(basis["mean"]),
            components=torch.from_numpy(basis["components"]),
            order=order,
            place=order.argsort(),
            pairs=pairs,
            bytes_=pairs.long().argsort(dim=1).to(torch.uint8),
            error=float(basis["error"]),
        )

    def specs(self, max_kept: int) -> dict[str, ArraySpec]:
        """Records of `max_kept` units, cut into groups that are stored group by group."""
        groups, width = self._groups(max_kept)
        spec = ArraySpec(
            shape=(max_kept, groups, width),
            dtype="uint8",
            axes=("row", "kept_unit", "group", "byte"),
            order=(0, 2, 1, 3),
            compression_level=_COMPRESSION_LEVEL,
            block_bytes=min(_BLOCK_BYTES, max_kept * groups * width),
        )
        return {"codes": spec}

    def encode(self, features: Float[Tensor, "n k 4 c"], units: Int[Tensor, "n k"]) -> Encoded:
        """A row comes out the same in whatever batch it is.

        It is not representable only if its numbers overflow float32.
        """
        kept = (units >= 0)[..., None]
        # Row by row: how a matrix product rounds depends on the number of its rows.
        rows = [self.coefficients(row) for row in features.float()]
        values = torch.stack(rows).flatten(2).index_select(2, self.order).masked_fill_(~kept, 0.0)
        at_once = 1 if values.device.type == "cpu" else len(values)  # one row stays in the cache
        encoded = [
            self._records(some, there)
            for some, there in zip(
                torch.split(values, at_once), torch.split(kept, at_once), strict=True
            )
        ]
        records = torch.cat([r for r, _ in encoded]).masked_fill_(~kept, 0)
        groups, width = self._groups(units.shape[1])
        filled = functional.pad(records, (0, groups * width - records.shape[-1]))
        return Encoded(
            arrays={"codes": filled.view(*units.shape, groups, width)},
            representable=torch.cat([fits for _, fits in encoded]),
        )

    def decode(
        self, arrays: Mapping[str, Shaped[Tensor, "n k ..."]], units: Int[Tensor, "n k"]
    ) -> Float32[Tensor, "n k 4 c"]:
        """A table, bit operations, a permutation and two small matrix products."""
        records = arrays["codes"].flatten(2)
        width = len(self.mean)
        step = records[..., :_STEP_BYTES].contiguous().view(torch.bfloat16).float()
        low, high = records[..., _STEP_BYTES : _STEP_BYTES + len(self.order)].chunk(2, -1)
        low = _look_up(self.pairs, low)
        shifted = torch.stack(((low & 15) | (high << 4), (low >> 4) | (high & 240)), -1)
        codes = shifted.flatten(-2).view(torch.int8)
        mean_band, details = (
            LEVELS.signed(codes.index_select(-1, place).float() - 8).mul_(step)
            for place in (self.place[:width], self.place[width:])
        )
        bands = torch.cat(
            (
                (mean_band.view(-1, width) @ self.components[0]).view(-1, 1, width),
                (details.view(-1, width) @ self.components[1]).view(-1, 3, width),
            ),
            1,
        )
        return haar(bands).add_(self.mean).view(*codes.shape[:2], TOKENS_PER_UNIT, width)

    def coefficients(self, units: Float32[Tensor, "*n 4 c"]) -> Float32[Tensor, "*n 4 c"]:
        """What is rounded, by band and component: as much energy as the units about `mean`."""
        bands = haar(units - self.mean)
        mean_band, details = bands[..., :1, :], bands[..., 1:, :].contiguous()
        return torch.cat((mean_band @ self.components[0].T, details @ self.components[1].T), -2)

    def to(self, device: torch.device) -> CompactCodec:
        """The same codec on a device."""
        return replace(
            self,
            mean=self.mean.to(device),
            components=self.components.to(device),
            order=self.order.to(device),
            place=self.place.to(device),
            pairs=self.pairs.to(device),
            bytes_=self.bytes_.to(device),
        )

    def _groups(self, max_kept: int) -> tuple[int, int]:
        """How many groups a record is cut into, and how many bytes a group.

        A group of all units is at most one block of the compressor.
        """
        record = _STEP_BYTES + len(self.order)
        groups = -(-record // max(1, min(_GROUP_BYTES, _BLOCK_BYTES // max_kept)))
        return groups, -(-record // groups)

    def _records(
        self, values: Float32[Tensor, "n k d"], kept: Bool[Tensor, "n k 1"]
    ) -> tuple[UInt8[Tensor, "n k bytes"], Bool[Tensor, " n"]]:
        """Records of some rows, and which of them are representable."""
        counts = kept.flatten(1).sum(1) * values.shape[2]
        steps, fits = _steps(values.abs().flatten(1), counts, self.error)
        size = _bfloat16(steps)[:, None, None]
        scaled = (values.abs() / size).masked_fill_((steps == 0)[:, None, None], 0.0)
        codes = LEVELS.nearest(scaled, up_from=ROUND_UP_FROM).copysign_(values)
        shifted = codes.to(torch.int16) + 8
        head = torch.stack((steps & 255, steps >> 8), -1).to(torch.uint8)
        low, high = (_paired(half & 15) for half in (shifted, shifted >> 4))
        parts = (head[:, None].expand(-1, values.shape[1], -1), _look_up(self.bytes_, low), high)
        return torch.cat(parts, -1), fits


def haar(tokens: Float[Tensor, "*k 4 c"]) -> Float[Tensor, "*k 4 c"]:
    """Mean and differences of a unit's 2 x 2 tokens; its own inverse.

    Half of the sum, and of the differences over x, over y, and over both: orthonormal.
    """
    a, b, c, d = tokens.unbind(-2)
    left, right, over, under = a + c, b + d, a - c, b - d
    return torch.stack((left + right, left - right, over + under, over - under), -2) / 2


def _steps(
    values: Float32[Tensor, "n m"], counts: Int[Tensor, " n"], error: float
) -> tuple[Int32[Tensor, " n"], Bool[Tensor, " n"]]:
    """The largest bfloat16 step of every row that loses at most `error` of its energy.

    Positive bfloat16 numbers are in the order of their bits, nearly their logarithm, over
    which the logarithm of the loss is nearly straight: false position (Illinois variant)
    finds the step in about six trials. Sums are float64, so that no order of summation
    changes which one it is.

    Args:
        values: Magnitudes.
        counts: How many of a row's are not padding.
        error: Share of the energy.

    Returns:
        Bits of the steps, 0 where a row is as good as zero or has none; and which rows have.
    """
    largest = values.amax(1)
    fits = largest <= _LARGEST
    allowed = error * values.double().square().sum(1)
    # No coefficient errs by more than `ROUND_UP_FROM` steps, except where levels are far apart.
    low = _bits((allowed / counts.clamp_min(1)).sqrt() / ROUND_UP_FROM)
    searched = fits & (low >= _LEAST_STEP)
    values = values.masked_fill(~searched[:, None], 0.0)
    below = _excess(values, low, allowed)
    while bool((coarse := searched & fits & (below > 0)).any()):
        low = torch.where(coarse, low - 64, low)  # half an octave
        fits &= ~coarse | (low >= _LEAST_STEP)
        below = torch.where(coarse, _excess(values, low, allowed), below)
    high = _bits(2 * largest) + 1  # everything becomes 0
    above = torch.full_like(below, -math.log(error))
    was = torch.zeros_like(low)
    while bool((open_ := searched & fits & (high - low > 1)).any()):
        share = (below / (below - above)).nan_to_num_(0.5)
        middle = low + ((high - low) * share).int().clamp_min_(1).minimum(high - low - 1)
        found = _excess(values, middle, allowed)
        kept = torch.where(found <= 0, 1, -1).int()
        above = torch.where((kept == 1) & (was == 1), above / 2, above)
        below = torch.where((kept == -1) & (was == -1), below / 2, below)
        raised, lowered = open_ & (kept == 1), open_ & (kept == -1)
        low, below = torch.where(raised, middle, low), torch.where(raised, found, below)
        high, above = torch.where(lowered, middle, high), torch.where(lowered, found, above)
        was = kept
    return low.masked_fill(~(searched & fits), 0), fits


def _excess(
    values: Float32[Tensor, "n m"], steps: Int32[Tensor, " n"], allowed: Float64[Tensor, " n"]
) -> Float64[Tensor, " n"]:
    """Logarithm of what rows lose over what they may."""
    size = _bfloat16(steps)
    scaled = values / size[:, None]
    lost = LEVELS.level(LEVELS.nearest(scaled, up_from=ROUND_UP_FROM)).sub_(scaled)
    return (lost.square_().sum(1, dtype=torch.float64) * size.double().square() / allowed).log()


def _bits(values: Float[Tensor, " n"]) -> Int32[Tensor, " n"]:
    """Bits of the bfloat16 at or below positive numbers."""
    return values.float().view(torch.int32) >> 16


def _bfloat16(bits: Int32[Tensor, " n"]) -> Float32[Tensor, " n"]:
    return (bits.clamp_min(_LEAST_STEP) << 16).view(torch.float32)


def _paired(halves: Int16[Tensor, "n k d"]) -> UInt8[Tensor, "n k d/2"]:
    """Two half bytes a byte, the first one low."""
    return (halves[..., 0::2] | (halves[..., 1::2] << 4)).to(torch.uint8)


def _look_up(
    tables: UInt8[Tensor, "d 256"], bytes_: UInt8[Tensor, "*n d"]
) -> UInt8[Tensor, "*n d"]:
    """Every byte in the table of its position."""
    starts = torch.arange(0, tables.numel(), 256, dtype=torch.int32, device=tables.device)
    return tables.flatten().index_select(0, (bytes_ + starts).flatten()).view(bytes_.shape)
