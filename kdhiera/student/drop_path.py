"""Drop-path whose draws can be made elsewhere: for all clips of a step, whoever holds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from timm.layers.drop import DropPath
from torch import Tensor, nn


class GivenDropPath(nn.Module):
    """timm's drop-path (stochastic depth, arXiv:1603.09382), drawn ahead if wanted.

    Args:
        rate: Chance that a clip goes round the branch.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.given: Float[Tensor, " b"] | None = None

    def draw(self, num_clips: int, device: torch.device) -> Float[Tensor, " b"]:
        """What the branch of every clip is multiplied by: 0, or 1 / (1 - rate)."""
        kept = 1 - self.rate
        drawn = torch.empty(num_clips, device=device).bernoulli_(kept)
        return drawn / kept if kept else drawn

    def forward(self, x: Float[Tensor, "b *shape c"]) -> Float[Tensor, "b *shape c"]:
        """Drop the branch of some clips; in evaluation of none."""
        if not self.training:
            return x
        factors = self.draw(len(x), x.device) if self.given is None else self.given
        return x * factors.to(x.dtype).view(-1, *(1,) * (x.ndim - 1))


def give_drop_paths(module: nn.Module) -> list[GivenDropPath]:
    """Put ours in the place of timm's, everywhere below a module.

    Returns:
        Them, in the order in which a forward pass comes to them.
    """
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, DropPath):
                setattr(parent, name, GivenDropPath(child.drop_prob))
    return [each for each in module.modules() if isinstance(each, GivenDropPath)]


@contextmanager
def given(paths: Sequence[GivenDropPath], factors: Sequence[Float[Tensor, " b"]]) -> Iterator[None]:
    """Within the block drop-path multiplies by these factors and draws nothing."""
    for path, each in zip(paths, factors, strict=True):
        path.given = each
    try:
        yield
    finally:
        for path in paths:
            path.given = None
