"""The Hiera student: timm's Hiera in 3-D, fed with nothing but the visible mask units.

A mask unit is 2 frames x 32 x 32 px, 8 x 8 student tokens of 4 x 4 px. With `q_pool=2`
the backbone stages carry 64, 16, 4 and 4 tokens a unit, so stages 3 and 4 match the
teachers' 2 x 2 tokens one to one (Hiera's own MAE does the same, arXiv:2306.00989). The
weights are timm's and load strictly into `timm.models.hiera.Hiera`.

Masked forward. timm zeroes the hidden units of a whole clip, embeds all of it and drops
what is hidden. The patch kernel (3, 7, 7), stride (2, 4, 4), padding (1, 3, 3) lets a
unit's tokens see their own pixels, one frame before and three pixels above and to the
left, never further:

      t-1 | t, t+1           .-.-------.
      one |  two             |.|. . . .|  3 px of the unit above
    frame | frames           |.+-------+
                             |.|       |
                             |.| 32 px |
                             '-'-------'

So every visible unit is embedded from a 3 x 35 x 35 window, filled in from those of its
neighbours that are visible too. The result equals timm's, and the hidden share of the
patch embedding is not computed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from timm.models.hiera import Hiera
from torch import Tensor
from torch.nn import functional as F

from kdhiera.config import StudentConfig
from kdhiera.errors import UsageError
from kdhiera.grid import TUBELET_FRAMES, UNIT_PX, Grid
from kdhiera.student.base import Student, block_number

# Official sizes from tiny upward (arXiv:2306.00989, Table 1); nano is ours, for CPUs.
SIZES: Mapping[str, Mapping[str, Any]] = {
    "nano": {"embed_dim": 32, "num_heads": 1, "stages": (1, 1, 5, 2)},
    "tiny": {"embed_dim": 96, "num_heads": 1, "stages": (1, 2, 7, 2)},
    "small": {"embed_dim": 96, "num_heads": 1, "stages": (1, 2, 11, 2)},
    "base": {"embed_dim": 96, "num_heads": 1, "stages": (2, 3, 16, 3)},
    "base_plus": {"embed_dim": 112, "num_heads": 2, "stages": (2, 3, 16, 3)},
    "large": {"embed_dim": 144, "num_heads": 2, "stages": (2, 6, 36, 4)},
    "huge": {"embed_dim": 256, "num_heads": 4, "stages": (2, 6, 36, 4)},
}

PATCH_HALO_PX = 3  # the kernel's reach above and to the left of a unit
PATCH_HALO_FRAMES = 1  # and before it


def hiera_args(config: StudentConfig, grid: Grid, *, q_pool: int = 2) -> dict[str, Any]:
    """Arguments that build the student as `timm.models.hiera.Hiera`, JSON values only.

    Args:
        config: Named size and drop-path rate.
        grid: Clip geometry.
        q_pool: Times that queries are pooled: 2 for pre-training, 3 as in Hiera's
            fine-tuning (same weights, one token a unit in the last backbone stage).
    """
    size = SIZES[config.size]
    return {
        "img_size": [grid.num_frames, grid.height, grid.width],
        "embed_dim": size["embed_dim"],
        "num_heads": size["num_heads"],
        "stages": list(size["stages"]),
        "num_classes": 0,
        "q_pool": q_pool,
        "q_stride": [1, 2, 2],
        "mask_unit_size": [1, 8, 8],
        "patch_kernel": [3, 7, 7],
        "patch_stride": [2, 4, 4],
        "patch_padding": [1, 3, 3],
        "sep_pos_embed": True,
        "drop_path_rate": config.drop_path,
    }


def build(config: StudentConfig, grid: Grid, *, q_pool: int = 2, seed: int) -> Any:
    """A freshly initialised timm Hiera for clips of this grid.

    Args:
        config: Named size and drop-path rate.
        grid: Clip geometry.
        q_pool: See `hiera_args`.
        seed: Decides the weights; the global generators are left as they were.

    Returns:
        `timm.models.hiera.Hiera` on the CPU, in training mode, without a classifier.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Hiera(**hiera_args(config, grid, q_pool=q_pool))


def default_taps(num_layers: int, depths: Sequence[int]) -> tuple[str, ...]:
    """Where the heads of a teacher's layers read when the config does not say.

    Args:
        num_layers: Layers of the teacher, ascending, at least 1.
        depths: Blocks of the four backbone stages.

    Returns:
        One tap a layer. Up to three come from `stage3.mid`, `stage3.end`, `stage4.end`,
        the last ones first; more are spread evenly over the blocks of stages 3 and 4.
    """
    named = ("stage3.mid", "stage3.end", "stage4.end")
    if num_layers <= len(named):
        return named[len(named) - num_layers :]
    before, available = sum(depths[:2]), sum(depths[2:])
    return tuple(
        f"block:{before + math.ceil((i + 1) * available / num_layers)}" for i in range(num_layers)
    )


def tap_block(tap: str, depths: Sequence[int]) -> int:
    """Blocks done when a tap is read (1-based, as with teacher layers).

    Args:
        tap: `stage1.mid`, `stage1.end`, ... `stage4.end`, or `block:N`. The middle of a
            backbone stage of an odd number of blocks is after the larger half.
        depths: Blocks of the four backbone stages.

    Raises:
        UsageError: If there is no such tap; the message says which there are.
    """
    name, _, place = tap.partition(".")
    if name.startswith("stage") and place in ("mid", "end") and name[5:] in ("1", "2", "3", "4"):
        stage = int(name[5:]) - 1
        done = depths[stage] if place == "end" else math.ceil(depths[stage] / 2)
        return sum(depths[:stage]) + done
    number = block_number(tap, sum(depths))
    if number is not None:
        return number
    raise UsageError(
        f"there is no tap `{tap}`: use stage1.mid, stage1.end, ... stage4.end, or block:1 to "
        f"block:{sum(depths)}"
    )


class HieraStudent(Student):
    """A Hiera that is shown visible units and read at taps.

    Its masked forward equals `Hiera.forward_features(clip, mask=...)` of the whole normalised
    clip: to rounding (the patch embedding sums in another order), independent of what the
    hidden units hold. A tap has 64, 16, 4, 4 tokens a unit in the four backbone stages (at
    `q_pool=2`). Its names: see `tap_block`.

    Its backbone comes from `build`, or is an equal `timm.models.hiera.Hiera`.
    """

    kind = "hiera"

    @property
    def last_tap(self) -> str:
        """End of backbone stage 4."""
        return "stage4.end"

    def tap_block(self, tap: str) -> int:
        """See the function `tap_block`."""
        return tap_block(tap, depths_of(self.backbone))

    def block_name(self, number: int) -> str:
        """With its backbone stage."""
        ends = list(itertools.accumulate(depths_of(self.backbone)))
        stage = next(i for i, end in enumerate(ends) if number <= end) + 1
        return f"block {number} (stage {stage})"

    def tap_shape(self, tap: str) -> tuple[int, int]:
        """Tokens a unit and width at a tap."""
        block = self.tap_block(tap) - 1
        schedule, _ = self.backbone.reroll.schedule[block]
        return math.prod(math.prod(stride) for stride in schedule), self._width(block)

    def dense(
        self, clips: UInt8[Tensor, "b f y x 3"] | Float[Tensor, "b f y x 3"]
    ) -> Float[Tensor, "b t h w c"]:
        """Tokens of whole clips (RGB, 0..255) after the last block, on their grid."""
        backbone = self.backbone
        tokens = backbone.patch_embed(rearrange(self._normalise(clips), "b f y x c -> b c f y x"))
        tokens = backbone.unroll(backbone._pos_embed(tokens))
        for block in backbone.blocks:
            tokens = self._run(block, tokens)
        rolled: Tensor = backbone.reroll(tokens, len(backbone.blocks) - 1)
        return rolled

    def _windows(self, pixels: Tensor, units: Tensor) -> Tensor:
        """Every visible unit with its halo, `[b k, 3, 3, 35, 35]`; zero where hidden."""
        b, k = units.shape
        _, rows, columns = self.grid.units
        own = rearrange(pixels, "b k f y x c -> (b k) c f y x")
        halo_t, halo_s = PATCH_HALO_FRAMES, PATCH_HALO_PX
        size = (TUBELET_FRAMES + halo_t, UNIT_PX + halo_s, UNIT_PX + halo_s)
        windows = own.new_zeros(b * k, 3, *size)
        windows[:, :, halo_t:, halo_s:, halo_s:] = own

        # row of `own` that holds a unit of a clip; b * k where the unit is hidden
        holder = units.new_full((b, self.grid.num_units), b * k)
        numbers = torch.arange(b * k, device=units.device).view(b, k)
        holder.scatter_(1, units, numbers)
        padded = torch.cat([own, own.new_zeros(1, *own.shape[1:])])
        y, x = units // columns % rows, units % columns
        for dt, dy, dx in ((i >> 2, i >> 1 & 1, i & 1) for i in range(1, 8)):
            neighbour = units - (dt * rows + dy) * columns - dx
            there = (neighbour >= 0) & (y >= dy) & (x >= dx)
            rows_of = holder.gather(1, neighbour.clamp(min=0)).masked_fill(~there, b * k)
            into, source = zip(
                _halo(dt, TUBELET_FRAMES, halo_t),
                _halo(dy, UNIT_PX, halo_s),
                _halo(dx, UNIT_PX, halo_s),
                strict=True,
            )
            slab = padded[(slice(None), slice(None), *source)]
            windows[(slice(None), slice(None), *into)] = slab[rows_of.flatten()]
        return windows

    def _embed(self, pixels: Tensor, units: Tensor) -> Tensor:
        """Patch and position embedding in Hiera's unrolled order, `[b, 64 k, c]`.

        A window holds exactly the frames of one output slot, so the 3-D convolution is a
        2-D one over 3 x 3 channels.
        """
        b = len(units)
        windows = self._windows(pixels, units)
        proj = self.backbone.patch_embed.proj
        tokens = F.conv2d(
            windows.flatten(1, 2), proj.weight.flatten(1, 2), proj.bias, stride=proj.stride[1:]
        )
        # 8 x 8 tokens of a unit: finest 2 x 2 first, unit last (timm's `Unroll`)
        tokens = rearrange(
            tokens, "(b k) c (y3 y2 y1) (x3 x2 x1) -> b (y1 x1 y2 x2 y3 x3) k c",
            b=b, y2=2, y1=2, x2=2, x1=2, y3=2, x3=2,
        )  # fmt: skip
        zero = tokens.new_zeros(1, self._num_tokens, tokens.shape[-1])
        positions = self.backbone.unroll(self.backbone._pos_embed(zero))
        table = rearrange(positions, "1 (n u) c -> u (n c)", u=self.grid.num_units)
        # an embedding, not an index: the gradient of indexing adds up in an order that
        # depends on the threads, and resuming would not be bit-exact
        shown = F.embedding(units, table)
        placed = tokens + rearrange(shown, "b k (n c) -> b n k c", c=tokens.shape[-1])
        return placed.reshape(b, -1, placed.shape[-1])

    def _by_unit(self, tokens: Tensor, block: int, units: Tensor) -> Tensor:
        b, k = units.shape
        rolled: Tensor = self.backbone.reroll(tokens, block, mask=units)
        return rolled.reshape(b, k, -1, rolled.shape[-1])

    def _final_norm(self, pooled: Tensor) -> Tensor:
        normed: Tensor = self.backbone.head.norm(pooled)
        return normed

    @property
    def _num_tokens(self) -> int:
        return self.grid.num_units * int(self.backbone.mu_size)

    def _width(self, block: int) -> int:
        return int(self.backbone.blocks[block].attn.dim_out)


def depths_of(backbone: Any) -> tuple[int, ...]:
    """Blocks of the backbone stages of a timm Hiera."""
    ends = [-1, *backbone.stage_ends]
    return tuple(later - earlier for earlier, later in pairwise(ends))


def _halo(offset: int, size: int, halo: int) -> tuple[slice, slice]:
    """Along one axis: where a neighbour's values go in a window, and which they are."""
    if offset:
        return slice(0, halo), slice(size - halo, size)
    return slice(halo, halo + size), slice(0, size)
