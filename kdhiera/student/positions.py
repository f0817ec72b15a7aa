"""Fixed position embeddings, of decoders and of the plain ViT."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdhiera.grid import Grid

_LONGEST = 10_000.0  # of the wavelengths of positions, over 2 pi, in tokens


def positions(grid: Grid, width: int) -> Float[Tensor, "u 4 c"]:
    """Sines and cosines of a token's place along time, height and width.

    A sixth of the channels each, of wavelengths in geometric progression (arXiv:1706.03762,
    section 3.5, along three axes); channels that six does not divide stay zero.

    Args:
        grid: Clip geometry.
        width: Channels.
    """
    count = width // 6
    rates = _LONGEST ** (-torch.arange(count, dtype=torch.float64) / count)
    places = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64) for n in grid.tokens), indexing="ij"
    )
    angles = [place[..., None] * rates for place in places]
    waves = torch.cat([wave(a) for a in angles for wave in (torch.sin, torch.cos)], dim=-1)
    padded = nn.functional.pad(waves, (0, width - waves.shape[-1]))
    units: Tensor = grid.tokens_to_units(padded[None])[0].float()
    return units
