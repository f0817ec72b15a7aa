"""Photometric jitter against torchvision's adjustments."""

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from kdhiera.training.jitter import jitter
from kdhiera.views import stable_uniforms

SEED, STEP = 3, 7


def some_pixels(b: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (b, 5, 2, 32, 32, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("strength", [0.2, 0.8])
def test_it_is_torchvisions_brightness_contrast_and_saturation(strength: float) -> None:
    pixels, samples = some_pixels(), [4, 0, 9]
    found = jitter(pixels, samples, strength, seed=SEED, step=STEP)
    for row, sample in enumerate(samples):
        factors = 1 + strength * (2 * stable_uniforms(3, "jitter", SEED, STEP, sample) - 1)
        image = pixels[row].float().reshape(-1, 32, 3).permute(2, 0, 1) / 255  # one tall picture
        image = tv.adjust_brightness(image, factors[0])
        image = tv.adjust_contrast(image, factors[1])
        image = tv.adjust_saturation(image, factors[2])
        wanted = (255 * image).permute(1, 2, 0).reshape(pixels[row].shape)
        assert (found[row].float() - wanted).abs().max() < 0.51  # rounded to whole values


def test_a_draw_belongs_to_sample_and_step() -> None:
    pixels = some_pixels(1).expand(3, -1, -1, -1, -1, -1)
    first = jitter(pixels, [4, 0, 9], 0.5, seed=SEED, step=STEP)
    turned = jitter(pixels, [9, 4, 0], 0.5, seed=SEED, step=STEP)
    assert torch.equal(first, turned[[1, 2, 0]])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, jitter(pixels, [4, 0, 9], 0.5, seed=SEED, step=STEP + 1))
    assert not torch.equal(first, jitter(pixels, [4, 0, 9], 0.5, seed=SEED + 1, step=STEP))
