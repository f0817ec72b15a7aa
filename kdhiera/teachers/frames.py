"""What a teacher sees of a clip, and its tokens back on the student's grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from kdhiera.grid import TUBELET_FRAMES, Grid


class Frames:
    """Frames of a clip at a teacher's own size, normalised.

    An image teacher sees the first frame of every tubelet: Hiera's temporal convolution
    (kernel 3, stride 2, padding 1) centres token t on frame 2t. A video teacher sees all.

    Args:
        grid: The student's grid.
        size: Pixels that put the teacher's patches on the student's tokens: patch 14 sees
            14 px where the student sees 16.
        mean: Of the red, green and blue values 0..1.
        std: Their standard deviation.
        video: Whether all frames are seen.
        device: Where the teacher runs.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        video: bool,
        device: torch.device,
    ) -> None:
        self._grid = grid
        self._size = size
        self._video = video
        self._mean = torch.tensor(tuple(mean), device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(tuple(std), device=device).view(1, 3, 1, 1)

    def __call__(self, clips: UInt8[Tensor, "b f y x 3"]) -> Float[Tensor, "*n 3 h w"]:
        """Images `[b * slots, 3, h, w]`, or videos `[b, frames, 3, h, w]`."""
        seen = clips if self._video else clips[:, ::TUBELET_FRAMES]
        images = self._normalised(rearrange(seen, "b f y x c -> (b f) c y x"))
        return (
            rearrange(images, "(b f) c y x -> b f c y x", b=len(clips)) if self._video else images
        )

    def to_grid(
        self, tokens: Float[Tensor, "n m c"], *, num_clips: int
    ) -> Float[Tensor, "b t h w c"]:
        """Patch tokens as the model has them, on the student's token grid."""
        t, h, w = self._grid.tokens
        return rearrange(
            tokens.reshape(num_clips, t * h * w, -1), "b (t h w) c -> b t h w c", t=t, h=h, w=w
        )

    def to_slots(self, scores: Float[Tensor, "n m"]) -> Float[Tensor, "slots p"]:
        """Scores of patch tokens, one row a slot of a clip."""
        _, h, w = self._grid.tokens
        return scores.reshape(-1, h * w)

    def _normalised(self, images: UInt8[Tensor, "n 3 y x"]) -> Float[Tensor, "n 3 h w"]:
        values = images.float() / 255.0
        if values.shape[-2:] != self._size:
            values = functional.interpolate(
                values, size=self._size, mode="bicubic", antialias=True
            ).clamp(0.0, 1.0)
        return (values - self._mean) / self._std
