import itertools
from contextlib import AbstractContextManager

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.hiera import Hiera
from torch.utils.flop_counter import FlopCounterMode

from kdhiera.config import StudentConfig
from kdhiera.errors import UsageError
from kdhiera.grid import Grid
from kdhiera.student.hiera import (
    SIZES,
    Student,
    build,
    default_taps,
    depths_of,
    hiera_args,
    normalise_pixels,
    set_fused_attention,
    tap_block,
)

NANO = StudentConfig(size="nano", drop_path=0.0)
GRID = Grid(num_frames=6, height=96, width=64)
ALL_TAPS = ("block:1", "block:2", "block:3", "stage3.mid", "stage3.end", "stage4.end")


def random_clips(grid: Grid, b: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (b, grid.num_frames, grid.height, grid.width, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def random_units(grid: Grid, b: int, k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(grid.num_units, generator=generator)[:k].sort()[0] for _ in range(b)]
    return torch.stack(rows)


def pixels_of(grid: Grid, clips: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    cubes = grid.frames_to_units(clips)
    return torch.stack([cube[row] for cube, row in zip(cubes, units, strict=True)])


def keep_mask(grid: Grid, units: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(units), grid.num_units, dtype=torch.bool).scatter(1, units, True)


def to_timm(clips: torch.Tensor) -> torch.Tensor:
    return normalise_pixels(clips).permute(0, 4, 1, 2, 3)


@torch.no_grad()
def assert_equals_timm(grid: Grid, units: torch.Tensor, clips: torch.Tensor) -> None:
    """fp32, to rounding: 1e-5 of values of order 1."""
    backbone = build(NANO, grid, seed=3)
    student = Student(backbone, grid, ALL_TAPS).eval()
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
    student = Student(build(NANO, GRID, seed=0), GRID, ALL_TAPS).eval()
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
    student = Student(ours, GRID)
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
    student = Student(finetuned, GRID).eval()
    assert student.tap_shape("stage4.end") == (1, student.num_features)
    clips = random_clips(GRID, 1)
    torch.testing.assert_close(student.features(clips), finetuned(to_timm(clips)))


@torch.no_grad()
def test_pooled_features() -> None:
    student = Student(build(NANO, GRID, seed=1), GRID).eval()
    clips = random_clips(GRID, 2)
    wanted = student.backbone(to_timm(clips))
    torch.testing.assert_close(student.features(clips), wanted, atol=1e-5, rtol=1e-4)
    every = torch.arange(GRID.num_units).expand(2, -1)
    tokens = student(pixels_of(GRID, clips, every), every)["stage4.end"]
    by_slot = []
    for slot in range(GRID.slots):
        first = slot * GRID.units_per_slot
        mean = tokens[:, first : first + GRID.units_per_slot].mean((1, 2))
        by_slot.append(student.backbone.head.norm(mean))
    found = student.features(clips, pool="slots")
    torch.testing.assert_close(found, torch.cat(by_slot, 1), atol=1e-5, rtol=1e-4)


def test_forward_compiles_into_one_graph() -> None:
    student = Student(build(NANO, GRID, seed=1), GRID, ALL_TAPS).eval()
    units = random_units(GRID, 2, 5)
    pixels = pixels_of(GRID, random_clips(GRID, 2), units)
    compiled = torch.compile(student, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(
            compiled(pixels, units)["stage4.end"], student(pixels, units)["stage4.end"]
        )


@torch.no_grad()
def test_plain_attention_equals_the_fused_one() -> None:
    student = Student(build(NANO, GRID, seed=1), GRID).eval()
    clips = random_clips(GRID, 2)
    set_fused_attention(student.backbone, True)
    fused = student.features(clips)
    set_fused_attention(student.backbone, False)
    torch.testing.assert_close(student.features(clips), fused, atol=1e-5, rtol=1e-4)


def test_only_visible_units_are_embedded() -> None:
    """Work grows with the visible units and stops at the last tap."""

    def flops(k: int, taps: tuple[str, ...]) -> int:
        student = Student(build(NANO, GRID, seed=1), GRID, taps).eval()
        units = random_units(GRID, 1, k)
        pixels = pixels_of(GRID, random_clips(GRID, 1), units)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            student(pixels, units)
        return int(counter.get_total_flops())

    stage1 = ("block:1",)
    assert flops(6, stage1) == 6 * flops(1, stage1)
    assert flops(6, ("stage3.end",)) < flops(6, ("stage4.end",))


def test_building_is_a_function_of_the_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(11)
    wanted = torch.rand(3)
    torch.manual_seed(11)
    first, again, other = (build(NANO, GRID, seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.rand(3), wanted)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


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


def test_rows_that_are_padded_or_out_of_order_are_no_units() -> None:
    """Rows of different counts can only come padded, and would be mixed without a word."""
    student = Student(build(NANO, GRID, seed=1), GRID).eval()
    units = random_units(GRID, 2, 5)
    pixels = pixels_of(GRID, random_clips(GRID, 2), units)
    for place, value in ((-1, -1), (-1, int(units[1, -2])), (0, GRID.num_units), (2, 0)):
        wrong = units.clone()
        wrong[1, place] = value
        with pytest.raises(RuntimeError, match="the same count in each, none padded"):
            student(pixels, wrong)
    with pytest.raises(
        ValueError, match=r"pixels of \(2, 5\) .* do not belong to units of \(2, 4\)"
    ):
        student(pixels, units[:, :4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_changes_no_bit(dtype: torch.dtype) -> None:
    """Drop-path draws the same again when blocks are computed again."""
    units = random_units(GRID, 4, 5)
    pixels = pixels_of(GRID, random_clips(GRID, 4), units)
    results, kept = [], []
    for again in (False, True):
        backbone = build(StudentConfig(size="nano", drop_path=0.5), GRID, seed=1)
        student = Student(backbone, GRID, ALL_TAPS, grad_checkpointing=again).train()
        sizes: list[int] = []
        with torch.random.fork_rng(devices=[]), saved_bytes(sizes):
            torch.manual_seed(3)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not torch.float32):
                out = student(pixels, units)
        torch.stack([value.float().square().mean() for value in out.values()]).sum().backward()
        results.append((out, {n: p.grad for n, p in student.named_parameters()}))
        kept.append(sum(sizes))
    (plain, gradients), (out, other) = results
    assert all(torch.equal(plain[tap], out[tap]) for tap in ALL_TAPS)
    for name, gradient in gradients.items():
        same = other[name] is None if gradient is None else torch.equal(gradient, other[name])
        assert same, name
    assert kept[1] < kept[0] / 3


def saved_bytes(sizes: list[int]) -> AbstractContextManager[None]:
    """Counts what the backward pass keeps."""

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)


def test_normalised_pixels_are_imagenet_ones() -> None:
    clips = random_clips(GRID, 1)
    mean, std = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
    wanted = (clips.double() / 255 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(normalise_pixels(clips).double(), wanted, atol=1e-6, rtol=1e-6)
