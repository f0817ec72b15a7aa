import pytest
import torch
from torch import nn

from kdhiera.errors import UsageError
from kdhiera.student.heads import Head, HeadSpec, build_heads


def spec(tokens: int) -> HeadSpec:
    return HeadSpec(tap="block:1", tokens=tokens, width_in=6, width_out=10)


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
        pooled = torch.einsum("bkyxc,dcyx->bkd", patch, head.pool.weight) + head.pool.bias
        wanted = head.linear(head.norm(pooled))
        torch.testing.assert_close(head(x)[:, :, n], wanted, atol=1e-5, rtol=1e-4)


def test_a_coarser_tap_is_refused() -> None:
    with pytest.raises(UsageError, match="q_pool=2"):
        Head(spec(1))


def test_heads_are_a_function_of_the_seed() -> None:
    torch.manual_seed(4)
    wanted = torch.rand(2)
    torch.manual_seed(4)
    a, b = (build_heads({"image/9": spec(4)}, seed=7)["image/9"] for _ in range(2))
    assert torch.equal(torch.rand(2), wanted)
    assert torch.equal(a.linear.weight, b.linear.weight)
