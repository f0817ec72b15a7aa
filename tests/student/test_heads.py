from dataclasses import replace

import pytest
import torch
from torch import nn

from kdhiera.errors import UsageError
from kdhiera.student.heads import Head, HeadSpec, build_heads
from kdhiera.training.optim import parameter_groups


def spec(tokens: int, **changes: object) -> HeadSpec:
    return replace(HeadSpec(tap="block:1", tokens=tokens, width_in=6, width_out=10), **changes)


def test_a_head_is_layer_norm_and_a_linear_map() -> None:
    head = build_heads({"image/9": spec(4)}, seed=0)["image/9"]
    x = torch.randn(2, 3, 4, 6)
    wanted = nn.functional.layer_norm(x, (6,)) @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(head(x), wanted)
    assert head.linear.bias.abs().max() == 0


@pytest.mark.parametrize("side", [4, 8])
def test_a_finer_tap_is_pooled_to_the_four_quarters_of_its_unit(side: int) -> None:
    head = Head(spec(side * side))
    x = torch.randn(2, 3, side * side, 6)
    half = side // 2
    for n, (top, left) in enumerate([(0, 0), (0, half), (half, 0), (half, half)]):
        patch = x.view(2, 3, side, side, 6)[:, :, top : top + half, left : left + half]
        pooled = torch.einsum("bkyxc,dcyx->bkd", patch, head.pool.conv.weight) + head.pool.conv.bias
        wanted = head.linear(head.norm(pooled))
        torch.testing.assert_close(head(x)[:, :, n], wanted, atol=1e-5, rtol=1e-4)


def test_an_mlp_head_has_one_hidden_layer_as_wide_as_the_wider_end() -> None:
    head = Head(spec(4, kind="mlp"))
    x = torch.randn(2, 3, 4, 6)
    normed = nn.functional.layer_norm(x, (6,))
    inner = nn.functional.gelu(normed @ head.hidden.weight.T + head.hidden.bias)
    assert inner.shape[-1] == 10
    torch.testing.assert_close(head(x), inner @ head.linear.weight.T + head.linear.bias)


UNITS = torch.arange(6).reshape(2, 3)


def test_heads_read_their_taps() -> None:
    heads = build_heads({"image/9": spec(4), "video/3": spec(4, tap="block:2")}, seed=0)
    taps = {"block:1": torch.randn(2, 3, 4, 6), "block:2": torch.randn(2, 3, 4, 6)}
    found = heads(taps, UNITS, UNITS)
    assert found.keys() == {"image/9", "video/3"}
    assert torch.equal(found["image/9"], heads["image/9"](taps["block:1"]))
    assert torch.equal(found["video/3"], heads["video/3"](taps["block:2"]))


def mixed() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    specs = {
        "image/9": spec(4),
        "image/12": spec(4, tap="block:2", width_in=12),
        "video/3": spec(16, tap="block:0", width_in=5, width_out=7),
    }
    generator = torch.Generator().manual_seed(0)
    taps = {
        one.tap: torch.randn(2, 3, one.tokens, one.width_in, generator=generator)
        for one in specs.values()
    }
    return build_heads(specs, seed=0, mix_width=8), taps


def test_a_mix_is_the_weighted_sum_of_all_taps() -> None:
    """MaskAlign's learned mixing, slowly: one weight a (target, tap), equal at the start."""
    heads, taps = mixed()
    aligned = []
    for tap, (pool, norm, linear) in zip(
        ("block:0", "block:1", "block:2"), heads["aligner"].maps, strict=True
    ):
        aligned.append(linear(norm(pool(taps[tap]))))
        assert aligned[-1].shape == (2, 3, 4, 8)
    found = heads(taps, UNITS, UNITS)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "image/9": (2, 3, 4, 10), "image/12": (2, 3, 4, 10), "video/3": (2, 3, 4, 7)
    }  # fmt: skip
    for name in found:
        mean = torch.stack(aligned).mean(0)
        torch.testing.assert_close(found[name], heads[name].head(mean))
    with torch.no_grad():
        heads["image/9"].mix.copy_(torch.tensor([0.5, -1.0, 2.0]))
    mix = 0.5 * aligned[0] - aligned[1] + 2 * aligned[2]
    torch.testing.assert_close(heads(taps, UNITS, UNITS)["image/9"], heads["image/9"].head(mix))
    torch.testing.assert_close(heads(taps, UNITS, UNITS)["image/12"], found["image/12"])


def test_mixing_weights_learn_without_decay() -> None:
    heads, taps = mixed()
    heads(taps, UNITS, UNITS)["video/3"].square().sum().backward()
    gradient = heads["video/3"].mix.grad
    assert gradient is not None
    assert gradient.abs().min() > 0
    _, spared = parameter_groups([heads], weight_decay=0.1)
    assert any(parameter is heads["video/3"].mix for parameter in spared["params"])


@pytest.mark.parametrize("mix_width", [None, 8])
def test_a_coarser_tap_is_refused(mix_width: int | None) -> None:
    with pytest.raises(UsageError, match="q_pool=2"):
        build_heads({"image/9": spec(1)}, seed=0, mix_width=mix_width)


def test_heads_are_a_function_of_the_seed() -> None:
    torch.manual_seed(4)
    wanted = torch.rand(2)
    torch.manual_seed(4)
    a, b = (build_heads({"image/9": spec(4)}, seed=7)["image/9"] for _ in range(2))
    assert torch.equal(torch.rand(2), wanted)
    assert torch.equal(a.linear.weight, b.linear.weight)
