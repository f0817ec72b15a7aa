"""The plain ViT student against timm's, on the whole clip laid out as one tall image."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shown import GRID, keep_mask, pixels_of, random_clips, random_units
from torch import Tensor
from torch.nn import functional as F

from kdhiera.config import StudentConfig
from kdhiera.errors import UsageError
from kdhiera.grid import Grid
from kdhiera.student.base import normalise_pixels
from kdhiera.student.vit import SIZES, VitStudent, build, default_taps

NANO = StudentConfig(kind="vit", size="nano", drop_path=0.0)
TAPS = ("block:1", "block:4", "block:7")


def to_timm(clips: Tensor) -> Tensor:
    """Frames of a slot as channels, slots below one another, written without einops."""
    x = normalise_pixels(clips).permute(0, 1, 4, 2, 3)
    slots = [torch.cat([x[:, t], x[:, t + 1]], dim=1) for t in range(0, x.shape[1], 2)]
    return torch.cat(slots, dim=2)


def seen_tokens(grid: Grid, units: Tensor) -> Tensor:
    """Raster-wise over the token grid, True where a unit is visible."""
    seen = keep_mask(grid, units)[..., None, None].expand(-1, -1, 4, 1)
    return grid.units_to_tokens(seen).flatten(1)


def by_unit(grid: Grid, tokens: Tensor, units: Tensor) -> Tensor:
    whole = grid.tokens_to_units(tokens.unflatten(1, grid.tokens))
    return torch.stack([row[shown] for row, shown in zip(whole, units, strict=True)])


@torch.no_grad()
def assert_equals_timm(grid: Grid, units: Tensor, clips: Tensor) -> None:
    """fp32, to rounding: 1e-5 of values of order 1."""
    backbone = build(NANO, grid, seed=3)
    student = VitStudent(backbone, grid, TAPS).eval()
    found = student(pixels_of(grid, clips, units), units)
    tokens = backbone.patch_embed(to_timm(clips)) + backbone.pos_embed
    only = torch.zeros(len(units), 1, 1, tokens.shape[1])
    only.masked_fill_(~seen_tokens(grid, units)[:, None, None], -math.inf)
    for number, block in enumerate(backbone.blocks, 1):
        tokens = block(tokens, attn_mask=only)
        if f"block:{number}" in TAPS:
            wanted = by_unit(grid, tokens, units)
            torch.testing.assert_close(found[f"block:{number}"], wanted, atol=1e-5, rtol=1e-5)
    assert found["block:7"].std() > 0.1


@pytest.mark.parametrize("k", [1, 5, 18])
def test_masked_forward_equals_timm_with_attention_to_visible_tokens(k: int) -> None:
    assert_equals_timm(GRID, random_units(GRID, 3, k), random_clips(GRID, 3))


@settings(max_examples=15, deadline=None)
@given(
    slots=st.integers(1, 4),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    seed=st.integers(0, 10**6),
    share=st.floats(0.05, 1.0),
)
def test_masked_forward_equals_timm_for_any_grid(
    slots: int, rows: int, columns: int, seed: int, share: float
) -> None:
    grid = Grid(num_frames=2 * slots, height=32 * rows, width=32 * columns)
    k = max(1, round(share * grid.num_units))
    assert_equals_timm(grid, random_units(grid, 2, k, seed), random_clips(grid, 2, seed))


@torch.no_grad()
def test_whole_clips_equal_timm() -> None:
    student = VitStudent(build(NANO, GRID, seed=3), GRID).eval()
    clips = random_clips(GRID, 2)
    x = to_timm(clips)
    tokens = student.backbone.forward_features(x).unflatten(1, GRID.tokens)
    torch.testing.assert_close(student.dense(clips), tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(student.features(clips), student.backbone(x), atol=1e-5, rtol=1e-4)


def test_gradients_equal_timm() -> None:
    ours, theirs = build(NANO, GRID, seed=5), build(NANO, GRID, seed=5)
    clips = random_clips(GRID, 2)
    VitStudent(ours, GRID).dense(clips).square().mean().backward()
    theirs.forward_features(to_timm(clips)).square().mean().backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            scale = b.grad.abs().max().item()
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5 * scale + 1e-8, rtol=1e-4)


@torch.no_grad()
def test_a_unit_is_embedded_from_its_own_pixels() -> None:
    """The first block's attention replaced by nothing: no token knows of another."""
    student = VitStudent(build(NANO, GRID, seed=0), GRID, ("block:1",)).eval()
    student.backbone.blocks[0].attn.proj.weight.zero_()
    units = random_units(GRID, 1, 6)
    pixels = pixels_of(GRID, random_clips(GRID, 1), units)
    other = pixels.clone()
    other[0, 2] = 255 - other[0, 2]
    before, after = student(pixels, units)["block:1"], student(other, units)["block:1"]
    changed = (before - after).abs().amax((0, 2, 3)) > 0
    assert changed.tolist() == [False, False, True, False, False, False]


def test_positions_are_fixed_and_told_by_their_place() -> None:
    """Sines and cosines: equal for equal places, whatever the seed and the clip size."""
    small, large = Grid(num_frames=4, height=64, width=96), Grid(num_frames=8, height=96, width=128)
    a, b = build(NANO, small, seed=0), build(NANO, large, seed=1)
    assert not a.pos_embed.requires_grad
    cut = b.pos_embed.unflatten(1, large.tokens)[:, :2, :4, :6]
    assert torch.equal(a.pos_embed.unflatten(1, small.tokens), cut)
    one = F.normalize(a.pos_embed[0], dim=-1) @ F.normalize(a.pos_embed[0], dim=-1).T
    assert one.fill_diagonal_(0).max() < 0.999


def test_default_taps_are_fractions_of_the_depth() -> None:
    assert default_taps(1, 12) == ("block:12",)
    assert default_taps(2, 12) == ("block:9", "block:12")
    assert default_taps(3, 12) == ("block:6", "block:9", "block:12")
    assert default_taps(4, 12) == ("block:3", "block:6", "block:9", "block:12")
    assert default_taps(6, 12) == tuple(f"block:{n}" for n in (2, 4, 6, 8, 10, 12))
    assert default_taps(3, 7) == ("block:4", "block:6", "block:7")


def test_backbone_stages_are_a_hieras() -> None:
    with pytest.raises(
        UsageError,
        match=r"^there is no tap `stage3.end`: a plain ViT has no backbone stages, use block:1 to "
        r"block:7$",
    ):
        VitStudent(build(NANO, GRID, seed=0), GRID, ("stage3.end",))


def test_sizes_are_those_of_the_config_and_divide_into_heads() -> None:
    assert set(SIZES) == set(StudentConfig.model_fields["size"].annotation.__args__)
    assert all(size["width"] % 64 == 0 for size in SIZES.values())
