"""Heads: from taps of the student to teacher layers, one for every target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from kdhiera.errors import UsageError
from kdhiera.grid import TOKENS_PER_UNIT

ALIGNER = "aligner"  # beside the heads, whose names all hold a slash


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """What one head connects.

    Args:
        tap: Student tap it reads.
        tokens: Tokens a unit at the tap.
        width_in: Width at the tap.
        width_out: Width of the teacher layer.
        kind: `linear`, or `mlp` with a hidden layer as wide as the wider end.
    """

    tap: str
    tokens: int
    width_in: int
    width_out: int
    kind: Literal["linear", "mlp"] = "linear"


class Pool(nn.Module):
    """A tap of any resolution to 2 x 2 tokens a unit.

    A convolution whose kernel is its stride, as in Hiera's fusion heads
    (arXiv:2306.00989): taps of backbone stages 1 and 2 hold 8 x 8 and 4 x 4 tokens a unit.

    Args:
        tokens: Tokens a unit at the tap, 16 or 64.
        width: Channels, in and out.
    """

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.side = math.isqrt(tokens)
        stride = self.side // math.isqrt(TOKENS_PER_UNIT)
        self.conv = nn.Conv2d(width, width, stride, stride)

    def forward(self, tokens: Float[Tensor, "b k n c"]) -> Float[Tensor, "b k 4 c"]:
        """Every unit by itself."""
        b = len(tokens)
        grid = rearrange(tokens, "b k (p q) c -> (b k) c p q", p=self.side)
        pooled: Tensor = rearrange(self.conv(grid), "(b k) c p q -> b k (p q) c", b=b)
        return pooled


def _pool(tap: str, tokens: int, width: int) -> nn.Module:
    """`Pool` where the tap is finer than the targets."""
    if tokens < TOKENS_PER_UNIT:
        raise UsageError(
            f"tap `{tap}` has {tokens} token a mask unit, targets have {TOKENS_PER_UNIT}: "
            "read a finer tap, or build the student with q_pool=2"
        )
    return Pool(tokens, width) if tokens > TOKENS_PER_UNIT else nn.Identity()


class Head(nn.Module):
    """LayerNorm and a linear map or MLP; a finer tap is first pooled to 2 x 2 tokens a unit.

    Args:
        spec: Shapes at both ends, and the kind.

    Raises:
        UsageError: If the tap is coarser than 2 x 2 tokens a unit.
    """

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.tap = spec.tap
        self.pool = _pool(spec.tap, spec.tokens, spec.width_in)
        self.norm = nn.LayerNorm(spec.width_in)
        hidden = max(spec.width_in, spec.width_out) if spec.kind == "mlp" else None
        self.hidden = _linear(spec.width_in, hidden) if hidden else None
        self.linear = _linear(hidden or spec.width_in, spec.width_out)

    def forward(self, tokens: Float[Tensor, "b k n c"]) -> Float[Tensor, "b k 4 d"]:
        """Predicted (normalised) features of every unit's four tokens."""
        inner = self.norm(self.pool(tokens))
        if self.hidden is not None:
            inner = F.gelu(self.hidden(inner))
        predicted: Tensor = self.linear(inner)
        return predicted


class MixedHead(nn.Module):
    """A head that reads a learned mix of taps: MaskAlign's dynamic alignment.

    The weights are free, and equal at the start (arXiv:2211.08887).

    Args:
        spec: Shapes at both ends, the mix being 2 x 2 tokens a unit.
        num_taps: What is mixed.
    """

    def __init__(self, spec: HeadSpec, num_taps: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.full((num_taps,), 1 / num_taps))
        self.head = Head(spec)

    def forward(self, aligned: Float[Tensor, "taps b k 4 c"]) -> Float[Tensor, "b k 4 d"]:
        """Predictions from what `Aligner` gives."""
        predicted: Tensor = self.head(torch.einsum("s,sbknc->bknc", self.mix, aligned))
        return predicted


class Aligner(nn.Module):
    """All taps at one width and 2 x 2 tokens a unit, so that they can be mixed.

    MaskAlign mixes the blocks of a plain ViT as they are; a Hiera's differ in width and
    resolution, so each is pooled, normed and mapped first.

    Args:
        taps: (tokens a unit, width) of every tap.
        width: Of what comes out.

    Raises:
        UsageError: If a tap is coarser than 2 x 2 tokens a unit.
    """

    def __init__(self, taps: Mapping[str, tuple[int, int]], width: int) -> None:
        super().__init__()
        self.taps = sorted(taps)
        self.maps = nn.ModuleList(
            nn.Sequential(
                _pool(tap, *taps[tap]), nn.LayerNorm(taps[tap][1]), _linear(taps[tap][1], width)
            )
            for tap in self.taps
        )

    def forward(
        self, taps: Mapping[str, Float[Tensor, "b k n c"]]
    ) -> Float[Tensor, "taps b k 4 d"]:
        """Taps in the order of their names."""
        return torch.stack([f(taps[tap]) for f, tap in zip(self.maps, self.taps, strict=True)])


class Heads(nn.ModuleDict):
    """All heads of a run by target name, and the aligner before them where taps are mixed."""

    def forward(
        self,
        taps: Mapping[str, Float[Tensor, "b k n c"]],
        units: Int64[Tensor, "b k"],
        target_units: Int64[Tensor, "b k"],
    ) -> dict[str, Float[Tensor, "b k 4 d"]]:
        """Predictions by target name.

        Args:
            taps: What the student gave, by tap.
            units: Where it stands.
            target_units: Where predictions are wanted, which is there.
        """
        assert units.shape == target_units.shape, "a head predicts what the student saw"
        if ALIGNER not in self:
            return {name: head(taps[str(head.tap)]) for name, head in self.items()}
        aligned = self[ALIGNER](taps)
        return {name: head(aligned) for name, head in self.items() if name != ALIGNER}


def build_heads(specs: Mapping[str, HeadSpec], *, seed: int, mix_width: int | None = None) -> Heads:
    """One freshly initialised head a target.

    Args:
        specs: By target name, such as `image/9`.
        seed: Decides the weights; the global generators are left as they were.
        mix_width: Every head reads a mix of all taps, of this width; None: its own tap.

    Raises:
        UsageError: If a tap is coarser than 2 x 2 tokens a unit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if mix_width is None:
            return Heads({name: Head(spec) for name, spec in specs.items()})
        taps = {spec.tap: (spec.tokens, spec.width_in) for spec in specs.values()}
        heads: dict[str, nn.Module] = {
            name: MixedHead(replace(spec, tokens=TOKENS_PER_UNIT, width_in=mix_width), len(taps))
            for name, spec in specs.items()
        }
        return Heads({**heads, ALIGNER: Aligner(taps, mix_width)})


def _linear(width_in: int, width_out: int) -> nn.Linear:
    linear = nn.Linear(width_in, width_out)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear
