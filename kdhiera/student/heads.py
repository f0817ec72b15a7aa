"""Heads: from a tap of the student to a teacher layer, one for every pair."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from kdhiera.errors import UsageError
from kdhiera.grid import TOKENS_PER_UNIT


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """What one head connects.

    Args:
        tap: Student tap it reads.
        tokens: Tokens a unit at the tap.
        width_in: Width at the tap.
        width_out: Width of the teacher layer.
    """

    tap: str
    tokens: int
    width_in: int
    width_out: int


class Head(nn.Module):
    """LayerNorm and a linear map; a finer tap is first pooled to 2 x 2 tokens a unit.

    The pooling is a convolution whose kernel is its stride, as in Hiera's fusion heads
    (arXiv:2306.00989): taps of backbone stages 1 and 2 hold 8 x 8 and 4 x 4 tokens a unit.

    Args:
        spec: Shapes at both ends.

    Raises:
        UsageError: If the tap is coarser than 2 x 2 tokens a unit.
    """

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        side, target = math.isqrt(spec.tokens), math.isqrt(TOKENS_PER_UNIT)
        if side < target:
            raise UsageError(
                f"tap `{spec.tap}` has {spec.tokens} token a mask unit, targets have "
                f"{TOKENS_PER_UNIT}: read a finer tap, or build the student with q_pool=2"
            )
        self.side = side
        stride = side // target
        self.pool = nn.Conv2d(spec.width_in, spec.width_in, stride, stride) if stride > 1 else None
        self.norm = nn.LayerNorm(spec.width_in)
        self.linear = nn.Linear(spec.width_in, spec.width_out)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Float[Tensor, "b k n c"]) -> Float[Tensor, "b k 4 d"]:
        """Predicted (normalised) features of every unit's four tokens."""
        if self.pool is not None:
            b = len(tokens)
            grid = rearrange(tokens, "b k (p q) c -> (b k) c p q", p=self.side)
            tokens = rearrange(self.pool(grid), "(b k) c p q -> b k (p q) c", b=b)
        predicted: Tensor = self.linear(self.norm(tokens))
        return predicted


def build_heads(specs: Mapping[str, HeadSpec], *, seed: int) -> nn.ModuleDict:
    """One freshly initialised head a target.

    Args:
        specs: By target name, such as `image/9`.
        seed: Decides the weights; the global generators are left as they were.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.ModuleDict({name: Head(spec) for name, spec in specs.items()})
