"""Attention of a teacher's last block, only as much of it as scores need."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


class LastAttentionInput:
    """Keep what enters a block's attention during one forward pass.

    Args:
        block: A timm transformer block with an `attn` module.
        enabled: Off keeps nothing and costs nothing.
    """

    def __init__(self, block: nn.Module, *, enabled: bool) -> None:
        self._attention: nn.Module = block.attn  # type: ignore[assignment]
        self._enabled = enabled
        self._value: Tensor | None = None
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    @property
    def value(self) -> Float[Tensor, "b n c"]:
        """Normalised tokens as they entered the attention."""
        assert self._value is not None, "the block has not run"
        return self._value

    def __enter__(self) -> LastAttentionInput:
        if self._enabled:
            self._hook = self._attention.register_forward_pre_hook(self._keep)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _keep(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._value = args[0]


def cls_attention(
    block: nn.Module, tokens: Float[Tensor, "b n c"], *, num_prefix: int
) -> Float[Tensor, "b m"]:
    """Softmax attention from the class token to the patches, mean over heads.

    Only that one row is computed (q of the class token, K of all), never the full map.
    Prefix tokens are dropped, then a row sums to 1 (UMT, arXiv:2303.16058; MaskAlign,
    arXiv:2211.08887, keep the row of the last block as well).

    Args:
        block: A timm block whose `attn` has a fused `qkv`.
        tokens: Normalised tokens that enter the attention, class token first.
        num_prefix: Class and register tokens at the front.

    Returns:
        Non-negative float32 rows over the patches, each summing to 1.
    """
    attention: Any = block.attn
    width = tokens.shape[-1]
    weight, bias = attention.qkv.weight.float(), attention.qkv.bias
    heads = attention.num_heads
    with torch.autocast(tokens.device.type, enabled=False):
        x = tokens.float()
        q = nn.functional.linear(x[:, :1], weight[:width], _part(bias, 0, width))
        k = nn.functional.linear(x, weight[width : 2 * width], _part(bias, 1, width))
        q = attention.q_norm(rearrange(q, "b n (h d) -> b h n d", h=heads))
        k = attention.k_norm(rearrange(k, "b n (h d) -> b h n d", h=heads))
        row: Tensor = ((q * attention.scale) @ k.transpose(-1, -2)).softmax(-1)[:, :, 0]
    patches = row.mean(1)[:, num_prefix:]
    return patches / patches.sum(-1, keepdim=True)


def _part(bias: Tensor | None, index: int, width: int) -> Tensor | None:
    return None if bias is None else bias[index * width : (index + 1) * width].float()
