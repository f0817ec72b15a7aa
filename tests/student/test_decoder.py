"""Decoders against MAE's arrangement, on the whole grid, written out."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdhiera.errors import UsageError
from kdhiera.grid import Grid
from kdhiera.masking import hidden_units
from kdhiera.student.decoder import Decoder, DecoderSpec, build_decoders
from kdhiera.student.positions import positions

GRID = Grid(num_frames=4, height=64, width=96)  # 2 slots of 2 x 3 units
SPEC = DecoderSpec(
    taps={"stage3.end": (4, 12), "stage4.end": (16, 20)},
    targets={"image/9": 7, "image/12": 5},
    width=128,
    depth=2,
)
UNITS = torch.tensor([[0, 5, 7], [1, 2, 11]])
HIDDEN = torch.from_numpy(hidden_units(UNITS.numpy(), GRID.num_units))


def decoder(seed: int = 0) -> Decoder:
    """With weights of size, so that nothing is near zero by its initialisation."""
    made = build_decoders({"image": SPEC}, GRID, seed=seed)["image"]
    assert isinstance(made, Decoder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


def some_taps() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        tap: torch.randn(2, 3, tokens, width, generator=generator)
        for tap, (tokens, width) in SPEC.taps.items()
    }


def test_positions_are_sines_along_each_axis() -> None:
    found = positions(GRID, 128)
    assert found.shape == (GRID.num_units, 4, 128)
    slot, y, x = 1, 3, 2  # a token of the 2 x 4 x 6 grid: unit (1, 1, 1), its lower left token
    vector = found[1 * 6 + 1 * 3 + 1, 2]
    for axis, place in enumerate((slot, y, x)):
        for i in range(21):
            angle = place / 10_000 ** (i / 21)
            assert vector[42 * axis + i] == pytest.approx(math.sin(angle), abs=1e-6)
            assert vector[42 * axis + 21 + i] == pytest.approx(math.cos(angle), abs=1e-6)
    assert vector[126:].tolist() == [0, 0]
    assert len(found.flatten(0, 1).unique(dim=0)) == GRID.num_units * 4


def attention(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """One pre-norm transformer block of two heads, as the formula stands."""
    state = {name: value.detach() for name, value in block.named_parameters()}

    def linear(name: str, values: torch.Tensor) -> torch.Tensor:
        return values @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, values: torch.Tensor) -> torch.Tensor:
        shifted = values - values.mean(-1, keepdim=True)
        scaled = shifted / (shifted.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    q, k, v = linear("attn.qkv", norm("norm1", x)).chunk(3, dim=-1)
    seen = []
    for head in range(2):
        part = slice(64 * head, 64 * head + 64)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 8).softmax(-1)
        seen.append(weights @ v[..., part])
    x = x + linear("attn.proj", torch.cat(seen, -1))
    inner = F.gelu(linear("mlp.fc1", norm("norm2", x)))
    return x + linear("mlp.fc2", inner)


def test_a_decoder_is_mae_on_the_whole_grid() -> None:
    """Mask tokens everywhere, what was seen put in its place, all decoded, hidden ones read."""
    model, taps = decoder(), some_taps()
    found = model(taps, UNITS, HIDDEN)
    seen = torch.zeros(2, 3, 4, 128)
    for tap, module in zip(model.aligner.taps, model.aligner.maps, strict=True):
        seen = seen + module(taps[tap])
    grid = model.mask.detach().expand(2, GRID.num_units, 4, 128).clone()
    for row in range(2):
        for place, unit in enumerate(UNITS[row]):
            grid[row, unit] = seen[row, place]
    x = (grid + positions(GRID, 128)).reshape(2, -1, 128)
    for block in model.blocks:
        x = attention(block, x)
    decoded = x.reshape(2, GRID.num_units, 4, 128)
    for name, head in model.heads.items():
        for row in range(2):
            wanted = head(decoded[row, HIDDEN[row]][None])[0]
            torch.testing.assert_close(found[name][row], wanted, rtol=1e-4, atol=1e-5)
    assert {name: tuple(p.shape) for name, p in found.items()} == {
        "image/9": (2, 9, 4, 7),
        "image/12": (2, 9, 4, 5),
    }


def test_every_tap_and_the_mask_learn() -> None:
    model = decoder()
    taps = {tap: values.requires_grad_() for tap, values in some_taps().items()}
    found = model(taps, UNITS, HIDDEN)
    sum(values.square().sum() for values in found.values()).backward()
    grads = [*(p.grad for p in model.parameters()), *(t.grad for t in taps.values())]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_teachers_have_decoders_of_their_own() -> None:
    video = DecoderSpec(taps={"stage4.end": (16, 20)}, targets={"video/3": 9}, width=64, depth=1)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    both = build_decoders({"image": SPEC, "video": video}, GRID, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    found = both(some_taps(), UNITS, HIDDEN)
    assert found.keys() == {"image/9", "image/12", "video/3"}
    again = build_decoders({"image": SPEC, "video": video}, GRID, seed=3)
    states = both.state_dict(), again.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not any("positions" in name for name in states[0])


def test_a_tap_that_is_too_coarse_is_refused() -> None:
    coarse = DecoderSpec(taps={"stage4.end": (1, 20)}, targets={"image/9": 7}, width=64, depth=1)
    with pytest.raises(UsageError, match=r"tap `stage4\.end` has 1 token a mask unit"):
        build_decoders({"image": coarse}, GRID, seed=0)
