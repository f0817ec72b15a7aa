"""Resampling of positions against scipy and torch, family by family."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch.nn import functional

from kdhiera.errors import UsageError
from kdhiera.teachers.positions import (
    Resampling,
    grid_side,
    resample_positions,
    resample_table,
    timm_resampling,
)


def table(count: int, width: int = 8) -> torch.Tensor:
    return torch.randn(1, count, width, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("size", [(14, 14), (4, 4), (9, 5)])
def test_siglips_is_the_linear_zoom_of_big_vision(size: tuple[int, int]):
    """`scipy.ndimage.zoom(grid, (new / old, new / old, 1), order=1)`, corners kept."""
    positions = table(7 * 7)
    zoom = (size[0] / 7, size[1] / 7, 1)
    expected = scipy.ndimage.zoom(positions[0].reshape(7, 7, 8).numpy(), zoom, order=1)
    found = resample_positions(
        positions, num_prefix=0, size=size, resampling=Resampling.BILINEAR_CORNERS
    )
    np.testing.assert_allclose(found[0].numpy(), expected.reshape(-1, 8), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("resampling", "antialias"), [("bicubic", False), ("bicubic-antialias", 1)]
)
def test_bicubic_with_and_without_antialiasing(resampling: str, antialias: bool):
    positions = table(5 + 8 * 8)
    found = resample_positions(
        positions, num_prefix=5, size=(4, 6), resampling=Resampling(resampling)
    )
    grid = positions[:, 5:].reshape(1, 8, 8, 8).permute(0, 3, 1, 2)
    expected = functional.interpolate(grid, (4, 6), mode="bicubic", antialias=bool(antialias))
    torch.testing.assert_close(found[:, 5:], expected.flatten(2).transpose(1, 2))
    assert torch.equal(found[:, :5], positions[:, :5])


def test_the_own_grid_stays_untouched():
    positions = table(1 + 36)
    for resampling in (r for r in Resampling if r is not Resampling.NONE):
        same = resample_positions(positions, num_prefix=1, size=(6, 6), resampling=resampling)
        assert torch.equal(same, positions)
    assert torch.equal(resample_table(table(36), native=(4, 3, 3), size=(4, 3, 3)), table(36))


def test_as_many_tokens_in_another_shape_are_another_grid():
    positions = table(36)
    wide = resample_positions(positions, num_prefix=0, size=(4, 9))
    assert wide.shape == positions.shape
    assert not torch.allclose(wide, positions, atol=0.1)


def test_a_table_that_is_linear_stays_linear_in_time():
    """Slots 0..7 of values t become the midpoints 0.5, 2.5, 4.5, 6.5 of four slots."""
    t = torch.arange(8.0).repeat_interleave(9).reshape(1, 72, 1)
    found = resample_table(t, native=(8, 3, 3), size=(4, 3, 3)).reshape(4, 9)
    assert torch.equal(found, torch.tensor([0.5, 2.5, 4.5, 6.5])[:, None].expand(4, 9))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("vit_small_patch14_dinov2", "bicubic"),
        ("vit_small_patch14_dinov2.lvd142m", "bicubic"),
        ("vit_small_patch14_reg4_dinov2.lvd142m", "bicubic-antialias"),
        ("vit_base_patch16_224.mae", "bicubic"),
        ("vit_base_patch16_224.dino", "bicubic"),
        ("vit_base_patch16_clip_224.openai", "bicubic-antialias"),
        ("vit_base_patch16_clip_quickgelu_224", "bicubic-antialias"),
        ("vit_base_patch16_siglip_224.v2_webli", "bilinear-corners"),
        ("eva02_base_patch16_clip_224", "bicubic"),
    ],
)
def test_a_familys_rule(model: str, expected: str):
    assert timm_resampling(model) == expected


def test_what_is_no_square_is_refused():
    assert grid_side(table(1 + 49), num_prefix=1) == 7
    for count, prefix in [(50, 0), (3, 5), (5, 5)]:
        with pytest.raises(UsageError, match="no square grid"):
            grid_side(table(count), num_prefix=prefix)
