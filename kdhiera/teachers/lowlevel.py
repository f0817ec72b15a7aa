"""Targets without weights: normalised pixels and histograms of oriented gradients.

Both look at the first frame of every tubelet at the student's own resolution, patch by
patch, in float32, and are cached like any other teacher. Under the `visible` objective
they are nearly the student's input: a degenerate control. Their use is `masked`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from einops import rearrange, reduce
from jaxtyping import Float, UInt8
from torch import Tensor

from kdhiera.config import TeacherConfig
from kdhiera.errors import UsageError
from kdhiera.grid import TOKEN_PX, TUBELET_FRAMES, Grid
from kdhiera.teachers.base import TeacherOutput, state_sha256
from kdhiera.teachers.scores import ScoreChoice, refuse_scores

LAYER = "patch"
_EPSILON_PIXELS = 1e-6
HOG_BINS = 9
HOG_CELL_PX = 8
HOG_CLIP = 0.2
_EPSILON_HOG = 1e-5


class LowLevelTeacher:
    """A deterministic function of the patches; see `Teacher`."""

    def __init__(self, kind: str, *, identity: Mapping[str, object]) -> None:
        self.identity = identity
        self.weights_sha256 = state_sha256({})
        self._kind = kind

    def check(self, layers: Sequence[str], score_source: str | None) -> None:
        """See `Teacher.check`."""
        for layer in layers:
            if layer != LAYER:
                raise UsageError(
                    f"teacher layer {layer!r} does not exist: a teacher of kind {self._kind} has "
                    f"the layer `{LAYER}` only"
                )
        refuse_scores(f"a teacher of kind {self._kind}", score_source)

    @torch.inference_mode()
    def __call__(
        self, clips: UInt8[Tensor, "b f y x 3"], layers: Sequence[str], score_source: str | None
    ) -> TeacherOutput:
        """See `Teacher.__call__`."""
        self.check(layers, score_source)
        features = {LAYER: _TARGETS[self._kind](clips[:, ::TUBELET_FRAMES])} if layers else {}
        return TeacherOutput(features=features, scores=None)


def build_lowlevel_teacher(
    config: TeacherConfig,
    *,
    grid: Grid,
    device: torch.device,
    dtype: torch.dtype,
    choice: ScoreChoice,
) -> LowLevelTeacher:
    """Build the teacher of kind `pixels` or `hog`; there is nothing to load.

    Args:
        config: Its kind.
        grid: Has no say: patches are the tokens.
        device: Has no say: it runs where the clips are.
        dtype: Has no say: it computes in float32.
        choice: Has no say: there are no scores.
    """
    return LowLevelTeacher(config.kind, identity={"kind": config.kind, **_IDENTITY[config.kind]})


def pixel_targets(frames: UInt8[Tensor, "b t y x 3"]) -> Float[Tensor, "b t h w 768"]:
    """Pixels of every patch, normalised by the patch's own mean and variance.

    As in MAE (arXiv:2111.06377, "normalized pixels") and, for video, in Hiera's MAE, which
    predicts one frame a token (arXiv:2306.00989): (x - mean) / sqrt(var + 1e-6) over all
    768 values, var with Bessel's correction.

    Args:
        frames: First frames of the tubelets.

    Returns:
        Values in the order (y, x, colour) within a patch.
    """
    patches = rearrange(
        frames.float() / 255.0, "b t (h p) (w q) c -> b t h w (p q c)", p=TOKEN_PX, q=TOKEN_PX
    )
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + _EPSILON_PIXELS).sqrt()


def hog_targets(frames: UInt8[Tensor, "b t y x 3"]) -> Float[Tensor, "b t h w 108"]:
    """Histograms of oriented gradients of every patch, each colour for itself.

    Dalal and Triggs (CVPR 2005): central differences (0 at the frame's edge), 9 unsigned
    orientations of 20 degrees, each pixel voting with its gradient's length for one of
    them, cells of 8 px; a patch is one block of 2 x 2 cells, normalised by L2-Hys. Colours
    stay apart as in MaskFeat (arXiv:2112.09133), which normalises single cells instead.

    Args:
        frames: First frames of the tubelets.

    Returns:
        Values in the order (colour, cell row, cell column, orientation).
    """
    images = rearrange(frames.float(), "b t y x c -> b t c y x")
    down, right = torch.zeros_like(images), torch.zeros_like(images)
    down[..., 1:-1, :] = images[..., 2:, :] - images[..., :-2, :]
    right[..., 1:-1] = images[..., 2:] - images[..., :-2]
    length, sector = torch.hypot(down, right), _orientation(down, right)
    cells = torch.stack([_cells(length * (sector == bin)) for bin in range(HOG_BINS)], dim=-1)
    blocks = _unit(_unit(rearrange(cells, "b t h w c n o -> b t h w c (n o)")).clamp_max(HOG_CLIP))
    return rearrange(blocks, "b t h w c n -> b t h w (c n)")


def _cells(votes: Float[Tensor, "b t 3 y x"]) -> Float[Tensor, "b t h w 3 4"]:
    """Mean vote of every cell, by patch."""
    return reduce(
        votes,
        "b t c (h i p) (w j q) -> b t h w c (i j)",
        "mean",
        i=TOKEN_PX // HOG_CELL_PX,
        j=TOKEN_PX // HOG_CELL_PX,
        p=HOG_CELL_PX,
        q=HOG_CELL_PX,
    )


def _orientation(down: Tensor, right: Tensor) -> Tensor:
    """Number of the 20-degree sector of an unsigned direction, 0..8.

    Directions are turned into the upper half plane by their signs first: a horizontal
    gradient has angle 0 exactly, never a rounded pi in the last sector.
    """
    flipped = (down < 0) | ((down == 0) & (right < 0))
    sign = torch.where(flipped, -1.0, 1.0)
    angle = torch.atan2(down * sign, right * sign)  # 0 <= angle < pi
    return (angle * (HOG_BINS / math.pi)).long().clamp(0, HOG_BINS - 1)


def _unit(values: Tensor) -> Tensor:
    return values / (values.square().sum(-1, keepdim=True) + _EPSILON_HOG**2).sqrt()


_TARGETS = {"pixels": pixel_targets, "hog": hog_targets}
_IDENTITY: Mapping[str, Mapping[str, object]] = {
    "pixels": {"frames": "first of every tubelet", "normalised": "patch"},
    "hog": {
        "frames": "first of every tubelet",
        "orientations": HOG_BINS,
        "cell_px": HOG_CELL_PX,
        "block": "patch, L2-Hys",
    },
}
