"""Position embeddings of a teacher that runs on another grid than it was trained on.

Every family's own code resamples in its own way, and the way matters: on the demo's
teacher the largest feature of the last block moves by 2 to 5 between antialiasing and
not (docs/decisions/003). So the family decides.
"""

from __future__ import annotations

import math
import re
from enum import StrEnum

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, cat
from torch.nn import functional

from kdhiera.errors import UsageError


class Resampling(StrEnum):
    """How a grid of positions is resampled; the value enters the teacher's identity.

    `BICUBIC` (to size, no antialiasing) is what DINO, DINOv2, MAE and EVA do, and
    VideoMAE V2 in space. `BICUBIC_ANTIALIASED` is DINOv2's with registers and open_clip's.
    `BILINEAR_CORNERS` (the corners stay where they are) is big_vision's, where SigLIP
    comes from. `NONE` is for rotary positions, which have no table.
    """

    BICUBIC = "bicubic"
    BICUBIC_ANTIALIASED = "bicubic-antialias"
    BILINEAR_CORNERS = "bilinear-corners"
    NONE = "none"


_OPTIONS: dict[Resampling, dict[str, object]] = {
    Resampling.BICUBIC: {"mode": "bicubic", "align_corners": False},
    Resampling.BICUBIC_ANTIALIASED: {
        "mode": "bicubic",
        "align_corners": False,
        "antialias": True,
    },
    Resampling.BILINEAR_CORNERS: {"mode": "bilinear", "align_corners": True},
}
_TIMM_FAMILIES = (
    (r"siglip", Resampling.BILINEAR_CORNERS),
    (r"_reg\d+_dinov2", Resampling.BICUBIC_ANTIALIASED),
    (r"^vit_\w+_clip_", Resampling.BICUBIC_ANTIALIASED),
)


def timm_resampling(name: str) -> Resampling:
    """What the family of a timm model does."""
    for pattern, resampling in _TIMM_FAMILIES:
        if re.search(pattern, name):
            return resampling
    return Resampling.BICUBIC


def grid_side(positions: Float[Tensor, "1 n c"], *, num_prefix: int) -> int:
    """Rows (and columns) of a square position grid.

    Raises:
        UsageError: If it is not square.
    """
    count = positions.shape[1] - num_prefix
    side = math.isqrt(max(count, 0))
    if side * side != count or not side:
        raise UsageError(
            f"the teacher's position embedding holds {positions.shape[1]} positions, {num_prefix} "
            "of them for prefix tokens: the rest is no square grid, so name the weights' own model"
        )
    return side


def resample_positions(
    positions: Float[Tensor, "1 n c"],
    *,
    num_prefix: int,
    size: tuple[int, int],
    resampling: Resampling = Resampling.BICUBIC,
) -> Float[Tensor, "1 m c"]:
    """Resample a square position grid to `size` in float32, prefix positions kept.

    Args:
        positions: Prefix positions, then a square grid in raster order.
        num_prefix: Class and register positions at the front.
        size: Rows and columns wanted; the grid's own leave it untouched.
        resampling: How.

    Raises:
        UsageError: If the grid is not square.
    """
    side = grid_side(positions, num_prefix=num_prefix)
    if (side, side) == size:
        return positions
    prefix, grid = positions[:, :num_prefix], positions[:, num_prefix:]
    image = rearrange(grid, "1 (h w) c -> 1 c h w", h=side).float()
    resized = functional.interpolate(image, size=size, **_OPTIONS[resampling])  # type: ignore[arg-type]
    return cat([prefix, rearrange(resized, "1 c h w -> 1 (h w) c").to(prefix)], dim=1)


def resample_table(
    table: Float[Tensor, "1 n c"], *, native: tuple[int, int, int], size: tuple[int, int, int]
) -> Float[Tensor, "1 m c"]:
    """Resample a space-time table of positions: bicubic in space, then linear in time.

    That is what VideoMAE V2's own fine-tuning does with its table for 16 frames of 224 px.
    VideoMAE's table is one sine wave over the flat token number, so making it anew for
    another grid would give tokens positions that the model never saw there.

    Args:
        table: Positions of the native grid in raster order over (t, h, w).
        native: The grid the teacher was trained on.
        size: The grid wanted.
    """
    if native == size:
        return table
    t, h, _ = native
    images = rearrange(table, "1 (t h w) c -> t c h w", t=t, h=h).float()
    if native[1:] != size[1:]:
        images = functional.interpolate(images, size=size[1:], mode="bicubic", align_corners=False)
    lines = rearrange(images, "t c h w -> (h w) c t")
    if t != size[0]:
        lines = functional.interpolate(lines, size=size[0], mode="linear", align_corners=False)
    return rearrange(lines, "p c t -> 1 (t p) c").to(table)
