import itertools

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shown import GRID, keep_mask, pixels_of, random_clips, random_units
from timm.models.hiera import Hiera

from kdhiera.config import StudentConfig
from kdhiera.errors import UsageError
from kdhiera.grid import Grid
from kdhiera.student.base import normalise_pixels
from kdhiera.student.hiera import (
    SIZES,
    HieraStudent,
    build,
    default_taps,
    depths_of,
    hiera_args,
    tap_block,
)

NANO = StudentConfig(size="nano", drop_path=0.0)
ALL_TAPS = ("block:1", "block:2", "block:3", "stage3.mid", "stage3.end", "stage4.end")


def to_timm(clips: torch.Tensor) -> torch.Tensor:
    return normalise_pixels(clips).permute(0, 4, 1, 2, 3)


@torch.no_grad()
def assert_equals_timm(grid: Grid, units: torch.Tensor, clips: torch.Tensor) -> None:
    """fp32, to rounding: 1e-5 of values of order 1."""
    backbone = build(NANO, grid, seed=3)
    student = HieraStudent(backbone, grid, ALL_TAPS).eval()
    found = student(pixels_of(grid, clips, units), units)
    _, stages = backbone.forward_features(
        to_timm(clips), mask=keep_mask(grid, units), return_intermediates=True
    )
    ends = dict(zip(("block:1", "block:2", "stage3.end", "stage4.end"), stages, strict=True))
    assert depths_of(backbone)[:2] == (1, 1)
    for tap, wanted in ends.items():
        torch.testing.assert_close(found[tap], wanted.flatten(2, 4), atol=1e-5, rtol=1e-5)
    last = found["stage4.end"]
    assert last.shape == (*units.shape, 4, student.num_features)


@pytest.mark.parametrize("k", [1, 5, 18])
def test_masked_forward_equals_timm_on_the_whole_clip(k: int) -> None:
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
def test_what_hidden_units_hold_changes_nothing() -> None:
    student = HieraStudent(build(NANO, GRID, seed=0), GRID, ALL_TAPS).eval()
    units = random_units(GRID, 2, 6)
    clips, noise = random_clips(GRID, 2), random_clips(GRID, 2, seed=9)
    visible = keep_mask(GRID, units)[:, :, None, None, None, None]
    cubes = torch.where(visible, GRID.frames_to_units(clips), GRID.frames_to_units(noise))
    noisy = GRID.units_to_frames(cubes)
    found = student(pixels_of(GRID, clips, units), units)
    backbone = student.backbone
    mask = keep_mask(GRID, units)
    _, wanted = backbone.forward_features(to_timm(noisy), mask=mask, return_intermediates=True)
    torch.testing.assert_close(found["stage4.end"], wanted[-1].flatten(2, 4), atol=1e-5, rtol=1e-5)


def test_gradients_equal_timm() -> None:
    ours, theirs = build(NANO, GRID, seed=5), build(NANO, GRID, seed=5)
    units, clips = random_units(GRID, 2, 4), random_clips(GRID, 2)
    student = HieraStudent(ours, GRID)
    student(pixels_of(GRID, clips, units), units)["stage4.end"].square().sum().backward()
    mask = keep_mask(GRID, units)
    theirs.forward_features(to_timm(clips), mask=mask).square().sum().backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            scale = b.grad.abs().max().item()
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5 * scale + 1e-7, rtol=1e-4)


@torch.no_grad()
def test_q_pool_3_takes_the_same_weights_strictly() -> None:
    pretrained = build(NANO, GRID, seed=1)
    finetuned = build(NANO, GRID, q_pool=3, seed=2)
    finetuned.load_state_dict(pretrained.state_dict())
    student = HieraStudent(finetuned, GRID).eval()
    assert student.tap_shape("stage4.end") == (1, student.num_features)
    clips = random_clips(GRID, 1)
    torch.testing.assert_close(student.features(clips), finetuned(to_timm(clips)))


@pytest.mark.parametrize("size", ["tiny", "small", "base", "base_plus", "large", "huge"])
def test_sizes_are_the_official_ones(size: str) -> None:
    with torch.device("meta"):
        official = timm.create_model(f"hiera_{size}_224")
        ours = Hiera(**hiera_args(StudentConfig(size=size), GRID))
    assert set(SIZES) >= {size}
    for a, b in zip(ours.blocks, official.blocks, strict=True):
        assert (a.attn.dim_out, a.attn.heads) == (b.attn.dim_out, b.attn.heads)
        assert a.attn.use_mask_unit_attn == b.attn.use_mask_unit_attn


def test_default_taps() -> None:
    depths = (2, 3, 16, 3)
    assert default_taps(1, depths) == ("stage4.end",)
    assert default_taps(2, depths) == ("stage3.end", "stage4.end")
    assert default_taps(3, depths) == ("stage3.mid", "stage3.end", "stage4.end")
    for number in range(4, 12):
        blocks = [tap_block(tap, depths) for tap in default_taps(number, depths)]
        assert blocks[-1] == 24
        assert blocks[0] > 5
        steps = [b - a for a, b in itertools.pairwise(blocks)]
        assert max(steps) - min(steps) <= 1


def test_taps_count_blocks_done() -> None:
    depths = (2, 3, 16, 3)
    blocks = [tap_block(t, depths) for t in ("stage3.mid", "stage3.end", "stage4.end", "block:7")]
    assert blocks == [13, 21, 24, 7]


def test_every_backbone_stage_has_a_middle_and_an_end() -> None:
    depths = (2, 3, 16, 3)
    taps = [f"stage{number}.{place}" for number in (1, 2, 3, 4) for place in ("mid", "end")]
    assert [tap_block(tap, depths) for tap in taps] == [1, 2, 4, 5, 13, 21, 23, 24]


@pytest.mark.parametrize(
    "tap",
    ["stage5.end", "stage0.end", "stage3.start", "block:0", "block:25", "block:x", "", "stage3"],
)
def test_a_tap_that_does_not_exist_is_refused_with_those_that_do(tap: str) -> None:
    with pytest.raises(UsageError, match=r"stage1.mid, stage1.end, ... stage4.end, or block:1 to"):
        tap_block(tap, (2, 3, 16, 3))
