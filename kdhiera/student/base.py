"""What stages and training use of a student, whichever its architecture.

A base class and no Protocol: losses, optimiser and checkpoints need the `nn.Module`, which
no Protocol can ask for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdhiera.grid import Grid

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Kind = Literal["hiera", "vit"]
Pool = Literal["mean", "slots"]


class Student(nn.Module, ABC):
    """A backbone that is shown visible units and read at taps.

    Args:
        backbone: A timm model with `blocks` and `num_features`.
        grid: Clip geometry the backbone was built for.
        taps: Names of the taps that `forward` returns; none: `last_tap`.
        grad_checkpointing: Compute blocks again in the backward pass instead of keeping what
            they computed; drop-path draws the same again.

    Raises:
        UsageError: If a tap does not exist.
    """

    kind: ClassVar[Kind]

    def __init__(
        self,
        backbone: Any,
        grid: Grid,
        taps: Sequence[str] = (),
        *,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.grad_checkpointing = grad_checkpointing
        self.grid = grid
        self.taps = {tap: self.tap_block(tap) for tap in taps or (self.last_tap,)}
        scale, shift = _pixel_scaling()
        self.register_buffer("pixel_scale", scale, persistent=False)
        self.register_buffer("pixel_shift", shift, persistent=False)

    @property
    @abstractmethod
    def last_tap(self) -> str:
        """The tap after all blocks."""

    @abstractmethod
    def tap_block(self, tap: str) -> int:
        """Blocks done when a tap is read (1-based, as with teacher layers).

        Raises:
            UsageError: If there is no such tap; the message says which there are.
        """

    @abstractmethod
    def tap_shape(self, tap: str) -> tuple[int, int]:
        """Tokens a unit and width at a tap."""

    @abstractmethod
    def dense(
        self, clips: UInt8[Tensor, "b f y x 3"] | Float[Tensor, "b f y x 3"]
    ) -> Float[Tensor, "b t h w c"]:
        """Tokens of whole clips (RGB, 0..255) after the last block, on their grid."""

    @abstractmethod
    def _embed(self, pixels: Tensor, units: Tensor) -> Tensor:
        """Tokens that enter the first block, from normalised pixels of the visible units."""

    @abstractmethod
    def _by_unit(self, tokens: Tensor, block: int, units: Tensor) -> Tensor:
        """Tokens after block number `block` (from 0) as `[b, k, n, c]`, raster order in a unit."""

    @abstractmethod
    def _final_norm(self, pooled: Tensor) -> Tensor:
        """The backbone's last norm."""

    @property
    def num_features(self) -> int:
        """Width after the last block."""
        return int(self.backbone.num_features)

    @property
    def num_blocks(self) -> int:
        """Blocks of the backbone."""
        return len(self.backbone.blocks)

    def block_name(self, number: int) -> str:
        """What people call block `number` (from 1)."""
        return f"block {number}"

    def forward(
        self, pixels: UInt8[Tensor, "b k 2 32 32 3"], units: Int[Tensor, "b k"]
    ) -> dict[str, Float[Tensor, "b k n c"]]:
        """Features of the visible units at the taps, independent of what the others hold.

        Args:
            pixels: RGB of the visible units.
            units: Their numbers, ascending and distinct in every row; the same count in
                every row.

        Returns:
            By tap: tokens of every unit in raster order.

        Raises:
            ValueError: If pixels and units do not belong together.
            RuntimeError: If a row is padded, repeats a unit or is out of order; on a CUDA device
                that is a device-side assertion.
        """
        self._check(pixels, units)
        tokens = self._embed(self._normalise(pixels), units)
        wanted = set(self.taps.values())
        by_block: dict[int, Tensor] = {}
        for index, block in enumerate(self.backbone.blocks[: max(wanted)]):
            tokens = self._run(block, tokens)
            if index + 1 in wanted:
                by_block[index + 1] = self._by_unit(tokens, index, units)
        return {tap: by_block[block] for tap, block in self.taps.items()}

    def features(
        self, clips: UInt8[Tensor, "b f y x 3"], *, pool: Pool = "mean"
    ) -> Float[Tensor, "b c"]:
        """Pooled features of whole clips, for frozen evaluation.

        Args:
            clips: RGB clips of the student's grid.
            pool: `mean` over all tokens of the last block, then the backbone's final norm
                (what timm's own forward returns without a classifier);
                `slots` does so within every slot and concatenates the slots in order, so
                that a readout can tell a movement from its reverse.

        Returns:
            Width `num_features` for `mean`, `slots` times that for `slots`.
        """
        return self.pool(self.dense(clips), pool)

    def pool(self, tokens: Float[Tensor, "b t h w c"], pool: Pool) -> Float[Tensor, "b d"]:
        """Pool what `dense` gives; see `features`."""
        axes = (1, 2, 3) if pool == "mean" else (2, 3)
        return self._final_norm(tokens.mean(axes)).flatten(1)

    def _check(self, pixels: Tensor, units: Tensor) -> None:
        """Rows of different counts can only come padded; a padded row would mix silently."""
        if pixels.shape[:2] != units.shape:
            raise ValueError(
                f"pixels of {tuple(pixels.shape[:2])} (clips, units) do not belong to units of "
                f"{tuple(units.shape)}"
            )
        ascending = (units.diff(dim=1) > 0).all()
        inside = (units[:, 0] >= 0).all() & (units[:, -1] < self.grid.num_units).all()
        torch._assert_async(  # no wait for the device
            ascending & inside,
            "units must ascend without repeats in every row, the same count in each, none padded",
        )

    def _run(self, block: nn.Module, tokens: Tensor) -> Tensor:
        if self.grad_checkpointing:
            again: Tensor = checkpoint(block, tokens, use_reentrant=False)
            return again
        done: Tensor = block(tokens)
        return done

    def _normalise(self, pixels: Tensor) -> Tensor:
        """`normalise_pixels` with constants that are on the device already."""
        scale, shift = self.get_buffer("pixel_scale"), self.get_buffer("pixel_shift")
        return torch.addcmul(shift, pixels.float(), scale)


def normalise_pixels(pixels: UInt8[Tensor, "*any 3"]) -> Float[Tensor, "*any 3"]:
    """RGB bytes to what the student sees: scaled to 0..1, ImageNet mean and deviation."""
    scale, shift = (constant.to(pixels.device) for constant in _pixel_scaling())
    return torch.addcmul(shift, pixels.float(), scale)


def set_fused_attention(module: nn.Module, fused: bool) -> None:
    """Choose between torch's fused attention and plain matrix products; same result.

    The fused kernel's backward pass is slow in bf16 on CPUs: a training step of the nano
    Hiera on 64 clips of 12 visible units took 1013 ms of CPU time with it and 655 ms
    with plain products (AVX512-BF16 and AMX, torch 2.14).

    Args:
        module: With attention of timm's anywhere inside.
        fused: Whether it calls `scaled_dot_product_attention`.
    """
    part: Any
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused


def block_number(tap: str, num_blocks: int) -> int | None:
    """The N of a tap `block:N`; None for any other, or if there are not so many blocks."""
    prefix, _, number = tap.partition(":")
    if prefix == "block" and number.isdecimal() and 1 <= int(number) <= num_blocks:
        return int(number)
    return None


def _pixel_scaling() -> tuple[Tensor, Tensor]:
    """Per channel (1 / (255 std), -mean / std)."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return 1 / (255.0 * std), -mean / std
