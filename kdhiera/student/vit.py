"""The plain ViT student: what the Hiera is compared with at equal compute.

timm's `VisionTransformer` has no patch embedding in 3-D, and needs none: a tubelet of
2 x 16 x 16 px is a patch of 16 x 16 px with six channels, and slots stacked on top of one
another are one tall image whose patches in raster order are the token grid's:

    clip [f y x c] -> image [(f c) (t y) x]      f: the two frames of slot t

So the weights are timm's and load strictly into it. A token sees its own pixels alone: a
visible unit is four tokens, embedded from that unit. There is no class token; every block
joins all tokens.

Positions are fixed sines and cosines along the three axes, as in MAE, VideoMAE and MVD
(arXiv:2111.06377, 2203.12602, 2212.04500): weights of one clip size serve any other, and
nothing about place has to be learned from few clips.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from kdhiera.config import StudentConfig
from kdhiera.errors import UsageError
from kdhiera.grid import TOKEN_PX, TOKENS_PER_UNIT, TUBELET_FRAMES, Grid
from kdhiera.student.base import Student, block_number
from kdhiera.student.positions import positions

HEAD_WIDTH = 64  # channels of an attention head

# The multiply-accumulates of the Hiera of the same name; docs/decisions/026-vit-student.md
SIZES: Mapping[str, Mapping[str, int]] = {
    "nano": {"width": 192, "depth": 7},
    "tiny": {"width": 576, "depth": 8},
    "small": {"width": 576, "depth": 10},
    "base": {"width": 640, "depth": 12},
    "base_plus": {"width": 640, "depth": 16},
    "large": {"width": 832, "depth": 29},
    "huge": {"width": 1408, "depth": 32},
}


def vit_args(config: StudentConfig, grid: Grid) -> dict[str, Any]:
    """Arguments that build the student as timm's `VisionTransformer`, JSON values only.

    Args:
        config: Named size and drop-path rate.
        grid: Clip geometry.
    """
    size = SIZES[config.size]
    return {
        "img_size": [grid.slots * grid.height, grid.width],
        "patch_size": TOKEN_PX,
        "in_chans": TUBELET_FRAMES * 3,
        "embed_dim": size["width"],
        "depth": size["depth"],
        "num_heads": size["width"] // HEAD_WIDTH,
        "class_token": False,
        "global_pool": "avg",
        "num_classes": 0,
        "drop_path_rate": config.drop_path,
    }


def build(config: StudentConfig, grid: Grid, *, seed: int) -> Any:
    """A freshly initialised timm `VisionTransformer` for clips of this grid.

    Args:
        config: Named size and drop-path rate.
        grid: Clip geometry.
        seed: Decides the weights; the global generators are left as they were.

    Returns:
        On the CPU, in training mode, without a classifier; its position embedding is fixed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = VisionTransformer(**vit_args(config, grid))
    backbone.pos_embed.requires_grad_(False)
    places = grid.units_to_tokens(positions(grid, backbone.embed_dim)[None])
    backbone.pos_embed.copy_(rearrange(places, "1 t y x c -> 1 (t y x) c"))
    return backbone


def is_vit(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is of `build`'s kind: its patches are flat and of two frames."""
    patch = state.get("patch_embed.proj.weight")
    return patch is not None and patch.ndim == 4 and patch.shape[1] == TUBELET_FRAMES * 3


def default_taps(num_layers: int, num_blocks: int) -> tuple[str, ...]:
    """Where the heads of a teacher's layers read when the config does not say.

    Args:
        num_layers: Layers of the teacher, ascending, at least 1.
        num_blocks: Of the student.

    Returns:
        One tap a layer: the last quarters of the depth (after 1/2, 3/4 and all of it for three
        layers), or even steps over the whole depth for more than four.
    """
    steps = max(4, num_layers)
    first = steps - num_layers + 1
    return tuple(f"block:{-(-num_blocks * i // steps)}" for i in range(first, steps + 1))


class VitStudent(Student):
    """A plain ViT that is shown visible units and read at taps.

    Its masked forward equals timm's of the whole normalised clip with attention restricted to
    the visible tokens, to rounding. Its taps are `block:N`, all of 4 tokens a unit.

    Its backbone comes from `build`, or is an equal `VisionTransformer`.
    """

    kind = "vit"

    @property
    def last_tap(self) -> str:
        """After the last block."""
        return f"block:{len(self.backbone.blocks)}"

    def tap_block(self, tap: str) -> int:
        """The N of `block:N`.

        Raises:
            UsageError: If there is no such block; the message says which there are.
        """
        number = block_number(tap, len(self.backbone.blocks))
        if number is None:
            raise UsageError(
                f"there is no tap `{tap}`: a plain ViT has no backbone stages, use block:1 to "
                f"{self.last_tap}"
            )
        return number

    def tap_shape(self, tap: str) -> tuple[int, int]:
        """Tokens a unit and width at a tap."""
        self.tap_block(tap)
        return TOKENS_PER_UNIT, self.num_features

    def dense(
        self, clips: UInt8[Tensor, "b f y x 3"] | Float[Tensor, "b f y x 3"]
    ) -> Float[Tensor, "b t h w c"]:
        """Tokens of whole clips after the last block, on their grid."""
        units = torch.arange(self.grid.num_units, device=clips.device).expand(len(clips), -1)
        tokens = self._embed(self._normalise(self.grid.frames_to_units(clips)), units)
        for block in self.backbone.blocks:
            tokens = self._run(block, tokens)
        grid: Tensor = self.grid.units_to_tokens(self._by_unit(tokens, -1, units))
        return grid

    def _embed(self, pixels: Tensor, units: Tensor) -> Tensor:
        proj = self.backbone.patch_embed.proj
        patches = rearrange(pixels, "b k f (p y) (q x) c -> b (k p q) (f c y x)", p=2, q=2)
        tokens = F.linear(patches, proj.weight.flatten(1), proj.bias)
        t, y, x = self.grid.units
        table = rearrange(
            self.backbone.pos_embed, "1 (t y p x q) c -> (t y x) (p q) c", t=t, y=y, x=x, p=2, q=2
        )
        placed: Tensor = tokens + table[units].flatten(1, 2)
        return placed

    def _by_unit(self, tokens: Tensor, block: int, units: Tensor) -> Tensor:
        del block  # all are alike
        regrouped: Tensor = rearrange(tokens, "b (k n) c -> b k n c", k=units.shape[1])
        return regrouped

    def _final_norm(self, pooled: Tensor) -> Tensor:
        normed: Tensor = self.backbone.fc_norm(pooled)
        return normed
