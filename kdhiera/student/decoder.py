r"""Decoders: from the units that the student saw to features of those it did not.

As in MVD (arXiv:2212.04500) every teacher has one of its own, and as in MAE a hidden token
begins as one learned vector and its position:

    taps of the teacher -> one width, summed -> + positions  \
                                                              blocks -> hidden tokens -> heads
    mask vector, for every hidden token      -> + positions  /

MVD's student is a plain ViT, whose last block is all that is decoded; a Hiera's stages are
fused before its decoder (arXiv:2306.00989), which the sum over taps does here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int64
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from kdhiera.grid import TOKENS_PER_UNIT, Grid
from kdhiera.student.heads import Aligner, Head, HeadSpec
from kdhiera.student.positions import positions

HEAD_WIDTH = 64  # channels of an attention head
_NORM = partial(nn.LayerNorm, eps=1e-6)


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """What one decoder connects.

    Args:
        taps: (tokens a unit, width) of every student tap that it reads.
        targets: Width of every teacher layer that it predicts, by target name.
        width: Channels inside, a multiple of 64.
        depth: Blocks.
        head: Kind of the heads.
    """

    taps: Mapping[str, tuple[int, int]]
    targets: Mapping[str, int]
    width: int
    depth: int
    head: Literal["linear", "mlp"] = "linear"


class Decoder(nn.Module):
    """Predicts one teacher's features of hidden units.

    Args:
        spec: Shapes at both ends.
        grid: Clip geometry.

    Raises:
        UsageError: If a tap is coarser than 2 x 2 tokens a unit.
    """

    positions: Tensor

    def __init__(self, spec: DecoderSpec, grid: Grid) -> None:
        super().__init__()
        self.aligner = Aligner(spec.taps, spec.width)
        self.mask = nn.Parameter(torch.empty(spec.width))
        nn.init.trunc_normal_(self.mask, std=0.02)
        self.register_buffer("positions", positions(grid, spec.width), persistent=False)
        self.blocks = nn.Sequential(
            *(
                Block(spec.width, spec.width // HEAD_WIDTH, qkv_bias=True, norm_layer=_NORM)
                for _ in range(spec.depth)
            )
        )
        self.heads = nn.ModuleDict(
            {
                name: Head(
                    HeadSpec(
                        tap="decoder",
                        tokens=TOKENS_PER_UNIT,
                        width_in=spec.width,
                        width_out=width,
                        kind=spec.head,
                    )
                )
                for name, width in spec.targets.items()
            }
        )

    def forward(
        self,
        taps: Mapping[str, Float[Tensor, "b k n c"]],
        units: Int64[Tensor, "b k"],
        target_units: Int64[Tensor, "b m"],
    ) -> dict[str, Float[Tensor, "b m 4 d"]]:
        """Predictions by target name."""
        visible = self.aligner(taps).sum(0) + self.positions[units]
        hidden = self.mask + self.positions[target_units]
        every = torch.cat([visible, hidden], dim=1)
        tokens = self.blocks(rearrange(every, "b u n c -> b (u n) c"))
        decoded = rearrange(tokens, "b (u n) c -> b u n c", n=TOKENS_PER_UNIT)
        wanted = decoded[:, units.shape[1] :]
        return {name: head(wanted) for name, head in self.heads.items()}


class Decoders(nn.ModuleDict):
    """All decoders of a run, by teacher."""

    def forward(
        self,
        taps: Mapping[str, Float[Tensor, "b k n c"]],
        units: Int64[Tensor, "b k"],
        target_units: Int64[Tensor, "b m"],
    ) -> dict[str, Float[Tensor, "b m 4 d"]]:
        """Predictions by target name.

        Args:
            taps: What the student gave, by tap.
            units: Where it stands.
            target_units: Where predictions are wanted; none of `units`.
        """
        every: dict[str, Tensor] = {}
        for decoder in self.values():
            every |= decoder(taps, units, target_units)
        return every


def build_decoders(specs: Mapping[str, DecoderSpec], grid: Grid, *, seed: int) -> Decoders:
    """One freshly initialised decoder a teacher.

    Args:
        specs: By teacher.
        grid: Clip geometry.
        seed: Decides the weights; the global generators are left as they were.

    Raises:
        UsageError: If a tap is coarser than 2 x 2 tokens a unit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoders({teacher: Decoder(spec, grid) for teacher, spec in specs.items()})
