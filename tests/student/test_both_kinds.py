"""What every student keeps, whatever its kind; `Student` says it in words."""

from contextlib import AbstractContextManager

import pytest
import timm
import torch
from shown import GRID, pixels_of, random_clips, random_units
from torch.utils.flop_counter import FlopCounterMode

from kdhiera.config import StudentConfig
from kdhiera.errors import UsageError
from kdhiera.student.base import Student, normalise_pixels, set_fused_attention
from kdhiera.student.build import build_student, default_taps
from kdhiera.training.optim import parameter_groups

TAPS = {
    "hiera": ("block:1", "block:2", "stage3.mid", "stage3.end", "stage4.end"),
    "vit": ("block:1", "block:4", "block:7"),
}


def made(kind: str, taps: tuple[str, ...] = (), *, seed: int = 1, **changes: object) -> Student:
    values: dict[str, object] = {"kind": kind, "size": "nano", "drop_path": 0.0, **changes}
    return build_student(StudentConfig.model_validate(values), GRID, taps, seed=seed)


def shown(b: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    units = random_units(GRID, b, k)
    return pixels_of(GRID, random_clips(GRID, b), units), units


@pytest.mark.parametrize("kind", TAPS)
class TestStudent:
    @torch.no_grad()
    def test_taps_have_the_shapes_they_say(self, kind: str) -> None:
        student = made(kind, TAPS[kind]).eval()
        out = student(*shown(2, 5))
        assert tuple(out) == TAPS[kind]
        for tap, tokens in out.items():
            assert tokens.shape == (2, 5, *student.tap_shape(tap))
        assert student.tap_shape(student.last_tap) == (4, student.num_features)
        assert tuple(made(kind).taps) == (student.last_tap,)

    @torch.no_grad()
    def test_showing_every_unit_is_the_whole_clip(self, kind: str) -> None:
        student = made(kind).eval()
        every = torch.arange(GRID.num_units).expand(2, -1)
        clips = random_clips(GRID, 2)
        shown_all = student(pixels_of(GRID, clips, every), every)[student.last_tap]
        tokens = student.dense(clips)
        assert tokens.shape == (2, *GRID.tokens, student.num_features)
        torch.testing.assert_close(GRID.units_to_tokens(shown_all), tokens, atol=1e-5, rtol=1e-4)

    @torch.no_grad()
    def test_a_clip_does_not_depend_on_those_beside_it(self, kind: str) -> None:
        student = made(kind).eval()
        pixels, units = shown(3, 5)
        together = student(pixels, units)[student.last_tap]
        for row in range(3):
            alone = student(pixels[row : row + 1], units[row : row + 1])[student.last_tap]
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-4)

    @torch.no_grad()
    def test_slots_are_pooled_one_by_one(self, kind: str) -> None:
        student = made(kind).eval()
        clips = random_clips(GRID, 2)
        tokens = student.dense(clips)
        by_slot = [student.pool(tokens[:, t : t + 1], "mean") for t in range(GRID.slots)]
        found = student.features(clips, pool="slots")
        torch.testing.assert_close(found, torch.cat(by_slot, 1), atol=1e-5, rtol=1e-4)
        assert student.features(clips).shape == (2, student.num_features)

    def test_forward_compiles_into_one_graph(self, kind: str) -> None:
        student = made(kind, TAPS[kind]).eval()
        pixels, units = shown(2, 5)
        compiled = torch.compile(student, backend="eager", fullgraph=True)
        with torch.no_grad():
            wanted = student(pixels, units)[student.last_tap]
            found = compiled(pixels, units)[student.last_tap]
        assert torch.equal(found, wanted)

    @torch.no_grad()
    def test_plain_attention_equals_the_fused_one(self, kind: str) -> None:
        student = made(kind).eval()
        clips = random_clips(GRID, 2)
        set_fused_attention(student.backbone, True)
        fused = student.features(clips)
        set_fused_attention(student.backbone, False)
        torch.testing.assert_close(student.features(clips), fused, atol=1e-5, rtol=1e-4)

    def test_work_grows_with_the_visible_units_and_stops_at_the_last_tap(self, kind: str) -> None:
        def flops(k: int, *taps: str) -> int:
            student = made(kind, taps).eval()
            set_fused_attention(student, False)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                student(*shown(1, k))
            return int(counter.get_total_flops())

        first, last = TAPS[kind][0], TAPS[kind][-1]
        assert flops(1, first) < flops(6, first) < 7 * flops(1, first)
        assert flops(6, first) < flops(6, first, last)

    def test_building_is_a_function_of_the_seed_alone(self, kind: str) -> None:
        torch.manual_seed(11)
        wanted = torch.rand(3)
        torch.manual_seed(11)
        first, again, other = (made(kind, seed=s).state_dict() for s in (1, 1, 2))
        assert torch.equal(torch.rand(3), wanted)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert any(not torch.equal(first[name], other[name]) for name in first)

    def test_positions_and_norms_do_not_decay(self, kind: str) -> None:
        student = made(kind)
        decayed, _ = parameter_groups((student,), weight_decay=0.05)
        matrices = {n: p for n, p in student.named_parameters() if n.endswith("weight")}
        wanted = {id(p) for n, p in matrices.items() if "norm" not in n}
        assert {id(p) for p in decayed["params"]} == wanted

    def test_rows_that_are_padded_or_out_of_order_are_no_units(self, kind: str) -> None:
        """Rows of different counts can only come padded, and would be mixed without a word."""
        student = made(kind).eval()
        pixels, units = shown(2, 5)
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
    def test_gradient_checkpointing_changes_no_bit(self, kind: str, dtype: torch.dtype) -> None:
        """Drop-path draws the same again when blocks are computed again."""
        pixels, units = shown(4, 5)
        results, kept = [], []
        for again in (False, True):
            student = made(kind, TAPS[kind], drop_path=0.5).train()
            student.grad_checkpointing = again
            sizes: list[int] = []
            with torch.random.fork_rng(devices=[]), saved_bytes(sizes):
                torch.manual_seed(3)
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not torch.float32):
                    out = student(pixels, units)
            torch.stack([value.float().square().mean() for value in out.values()]).sum().backward()
            results.append((out, {n: p.grad for n, p in student.named_parameters()}))
            kept.append(sum(sizes))
        (plain, gradients), (out, other) = results
        assert all(torch.equal(plain[tap], out[tap]) for tap in TAPS[kind])
        for name, gradient in gradients.items():
            same = other[name] is None if gradient is None else torch.equal(gradient, other[name])
            assert same, name
        assert kept[1] < kept[0] / 3

    @torch.no_grad()
    def test_default_taps_match_the_targets(self, kind: str) -> None:
        config = StudentConfig.model_validate({"kind": kind, "size": "nano"})
        for number in range(1, 8):
            taps = default_taps(config, number)
            student = build_student(config, GRID, taps, seed=0)
            blocks = list(student.taps.values())
            assert len(taps) == number
            assert blocks == sorted(set(blocks))
            assert blocks[-1] == len(student.backbone.blocks)
            assert all(student.tap_shape(tap)[0] == 4 for tap in taps)

    @pytest.mark.parametrize("tap", ["stage5.end", "stage3", "block:0", "block:99", "block:x", ""])
    def test_a_tap_that_does_not_exist_is_refused(self, kind: str, tap: str) -> None:
        with pytest.raises(UsageError, match=f"there is no tap `{tap}`: .* block:1 to"):
            made(kind, (tap,))


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
