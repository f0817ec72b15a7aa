"""Colours of the student's clips varied; teachers and cache know nothing of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from kdhiera.views import stable_uniforms

LUMA = (0.2989, 0.587, 0.114)  # of R, G and B in a grey value: ITU-R BT.601


def jitter(
    pixels: UInt8[Tensor, "b k 2 32 32 3"],
    samples: Sequence[int],
    strength: float,
    *,
    seed: int,
    step: int,
) -> UInt8[Tensor, "b k 2 32 32 3"]:
    """Brightness, then contrast, then saturation of every clip, scaled by random factors.

    Each factor f is even in [1 - strength, 1 + strength] and mixes the clip with black, with
    the mean grey of its visible units, and with its own grey values: f x + (1 - f) reference,
    within 0..255. One draw holds for all units and frames of a clip. It is a function of seed,
    step and sample: where a sample stands in the batch, or on which device, does not matter.

    Args:
        pixels: RGB of the visible units.
        samples: Sample numbers of the clips.
        strength: In 0..1.
        seed: Of the run.
        step: Number of the step.
    """
    drawn = np.stack([stable_uniforms(3, "jitter", seed, step, s) for s in samples])
    factors = torch.from_numpy(1 + strength * (2 * drawn - 1)).float().to(pixels.device)
    brightness, contrast, saturation = factors.T.reshape(3, -1, 1, 1, 1, 1, 1)
    found = _mix(pixels.float(), pixels.new_zeros((), dtype=torch.float32), brightness)
    found = _mix(found, _grey(found).mean((1, 2, 3, 4, 5), keepdim=True), contrast)
    found = _mix(found, _grey(found), saturation)
    return found.round().to(torch.uint8)


def _mix(pixels: Tensor, reference: Tensor, factor: Tensor) -> Tensor:
    return (factor * pixels + (1 - factor) * reference).clamp(0, 255)


def _grey(pixels: Tensor) -> Tensor:
    return (pixels * pixels.new_tensor(LUMA)).sum(-1, keepdim=True)
