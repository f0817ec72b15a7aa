"""All layout arithmetic: clip, token grid, mask units.

A clip is `T x H x W` pixels. A token covers 2 frames x 16 x 16 px (a tubelet), a
mask unit 2 frames x 32 x 32 px, which is 2 x 2 tokens:

        one slot (2 frames)               one mask unit
    +-----+-----+-----+-----+
    | u0  | u1  | u2  | u3  |           +----+----+
    +-----+-----+-----+-----+           | n0 | n1 |   tokens, 16 px each
    | u4  | u5  | ...                   +----+----+
    +-----+-----+                       | n2 | n3 |
    slot 1 goes on with u(Y*X)          +----+----+

Units are numbered raster-wise over (slot, y, x); a unit's tokens raster-wise over
(y, x). That is the order in which Hiera returns a masked stage (arXiv:2306.00989). Every
regrouping here takes NumPy arrays and tensors alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from einops import rearrange
from jaxtyping import Float, Shaped

from kdhiera.errors import UsageError

TUBELET_FRAMES = 2
TOKEN_PX = 16
UNIT_PX = 32
TOKENS_PER_UNIT = 4


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The shape of a clip and everything that follows from it.

    Args:
        num_frames: Frames of a clip, even, at least 2.
        height: Pixels, a multiple of 32.
        width: Pixels, a multiple of 32.

    Raises:
        UsageError: If the sizes do not divide into mask units.
    """

    num_frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        problems = []
        if self.num_frames < TUBELET_FRAMES or self.num_frames % TUBELET_FRAMES:
            problems.append(
                f"clip.num_frames must be even and at least 2, got {self.num_frames}: "
                "a token covers 2 frames"
            )
        for name, size in (("height", self.height), ("width", self.width)):
            if size < UNIT_PX or size % UNIT_PX:
                lower = max(UNIT_PX, size // UNIT_PX * UNIT_PX)
                problems.append(
                    f"clip.{name} must be a multiple of {UNIT_PX} px (one mask unit), got {size}: "
                    f"use {lower} or {lower + UNIT_PX}"
                )
        if problems:
            raise UsageError("\n".join(problems))

    @property
    def slots(self) -> int:
        """Time indices of the token grid, `T / 2`."""
        return self.num_frames // TUBELET_FRAMES

    @property
    def tokens(self) -> tuple[int, int, int]:
        """Token grid `(slots, H / 16, W / 16)`."""
        return self.slots, self.height // TOKEN_PX, self.width // TOKEN_PX

    @property
    def units(self) -> tuple[int, int, int]:
        """Unit grid `(slots, H / 32, W / 32)`."""
        return self.slots, self.height // UNIT_PX, self.width // UNIT_PX

    @property
    def units_per_slot(self) -> int:
        """Mask units that share a time index."""
        return self.units[1] * self.units[2]

    @property
    def num_units(self) -> int:
        """Mask units of a clip."""
        return self.slots * self.units_per_slot

    def tokens_to_units(self, tokens: Shaped[Any, "b t h w c"]) -> Shaped[Any, "b u n c"]:
        """Regroup a token grid unit by unit, `[b, t, h, w, c]` to `[b, units, 4, c]`."""
        return rearrange(tokens, "b t (y p) (x q) c -> b (t y x) (p q) c", p=2, q=2)

    def units_to_tokens(self, units: Shaped[Any, "b u n c"]) -> Shaped[Any, "b t h w c"]:
        """Inverse of `tokens_to_units`."""
        t, y, x = self.units
        return rearrange(units, "b (t y x) (p q) c -> b t (y p) (x q) c", t=t, y=y, x=x, p=2, q=2)

    def pool_scores(self, scores: Float[Any, "b t h w"]) -> Float[Any, "b t s"]:
        """Mean score of every unit, `[b, slots, units_per_slot]`."""
        pooled = rearrange(scores, "b t (y p) (x q) -> b t (y x) (p q)", p=2, q=2)
        return pooled.mean(-1)

    def frames_to_units(self, frames: Shaped[Any, "b f h w 3"]) -> Shaped[Any, "b u 2 32 32 3"]:
        """Cut clips into unit cubes, `[b, T, H, W, 3]` to `[b, units, 2, 32, 32, 3]`."""
        return rearrange(
            frames,
            "b (t f) (y p) (x q) c -> b (t y x) f p q c",
            f=TUBELET_FRAMES,
            p=UNIT_PX,
            q=UNIT_PX,
        )

    def units_to_frames(self, units: Shaped[Any, "b u 2 32 32 3"]) -> Shaped[Any, "b f h w 3"]:
        """Inverse of `frames_to_units`."""
        t, y, x = self.units
        return rearrange(units, "b (t y x) f p q c -> b (t f) (y p) (x q) c", t=t, y=y, x=x)
