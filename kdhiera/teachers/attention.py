"""Attention of a teacher's block, only as much of it as scores need.

Queries and keys are made again from what enters the attention, in float32 and outside
autocast: the kernels that teachers run with give no attention back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

QUERY_CHUNK = 128  # query rows at once: 16 clips x 12 heads x 128 x 1568 keys are 154 MB

Pair = tuple[Float[Tensor, "n heads r d"], Float[Tensor, "n heads m d"]]
QueriesAndKeys = Callable[[slice], Pair]
"""Scaled queries of some tokens and the keys of all, prefix tokens first."""


def linear_heads(
    tokens: Float[Tensor, "n m c"], weight: Tensor, bias: Tensor | None, *, num_heads: int
) -> Float[Tensor, "n heads m d"]:
    """Project in float32 and split into heads."""
    bias = None if bias is None else bias.float()
    projected = nn.functional.linear(tokens, weight.float(), bias)
    return rearrange(projected, "n m (h d) -> n h m d", h=num_heads)


def cls_attention(
    queries_and_keys: QueriesAndKeys, *, num_prefix: int, heads: Sequence[int] | None
) -> Float[Tensor, "n p"]:
    """Softmax attention from the class token to the patches, mean over heads.

    Only that one row is computed (q of the class token, K of all), never the full map.
    UMT (arXiv:2303.16058) and MaskAlign (arXiv:2211.08887) keep the row of the last block
    as well.

    Args:
        queries_and_keys: The class token is token 0.
        num_prefix: Class and register tokens at the front, dropped after the softmax.
        heads: Heads that count; None means all.

    Returns:
        Non-negative float32 rows over the patches, not normalised.
    """
    queries, keys = (_of_heads(part, heads) for part in queries_and_keys(slice(0, 1)))
    row: Tensor = (queries @ keys.transpose(-1, -2)).softmax(-1)[:, :, 0]
    return row.mean(1)[:, num_prefix:]


def received_attention(
    queries_and_keys: QueriesAndKeys, *, num_prefix: int, heads: Sequence[int] | None
) -> Float[Tensor, "n p"]:
    """Attention that a patch receives, mean over the patches that attend and over heads.

    It stands in for the class token's row in teachers that have none, or none that was
    trained. The map is made `QUERY_CHUNK` rows at a time and summed as it comes.

    Args:
        queries_and_keys: Prefix tokens first.
        num_prefix: Prefix tokens: they neither ask nor are counted, but take their share
            of the softmax.
        heads: Heads that count; None means all.

    Returns:
        Non-negative float32 rows over the patches, not normalised.
    """
    asked = queries_and_keys(slice(num_prefix, None))
    queries, keys = (_of_heads(part, heads) for part in asked)
    n, num_heads, num_queries, _ = queries.shape
    received = keys.new_zeros(n, keys.shape[2])
    for start in range(0, num_queries, QUERY_CHUNK):
        rows = queries[:, :, start : start + QUERY_CHUNK]
        received += (rows @ keys.transpose(-1, -2)).softmax(-1).sum((1, 2))
    return received[:, num_prefix:] / (num_heads * num_queries)


def _of_heads(
    values: Float[Tensor, "n all m d"], heads: Sequence[int] | None
) -> Float[Tensor, "n heads m d"]:
    return values if heads is None else values[:, list(heads)]
