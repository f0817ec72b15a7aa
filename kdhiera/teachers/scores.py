"""Where masks are drawn from: a score for every token, by named sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kdhiera.errors import UsageError
from kdhiera.teachers.attention import (
    QueriesAndKeys,
    cls_attention,
    received_attention,
)

ATTENTION_SOURCES = {"cls_attention": cls_attention, "received_attention": received_attention}
SCORE_SOURCES = (*ATTENTION_SOURCES, "feature_norm")


@dataclass(frozen=True, kw_only=True)
class ScoreChoice:
    """Which part of a teacher scores are read from.

    Args:
        layer: A layer's name; None means the last block.
        heads: Attention heads, from 0; None means all.
    """

    layer: str | None = None
    heads: tuple[int, ...] | None = None

    def as_options(self) -> dict[str, object]:
        """What was chosen, for factories and identities: what was not is left out."""
        chosen: Mapping[str, object] = {
            "score_layer": self.layer,
            "score_heads": None if self.heads is None else list(self.heads),
        }
        return {name: value for name, value in chosen.items() if value is not None}


def attention_scores(
    source: str, queries_and_keys: QueriesAndKeys, *, num_prefix: int, heads: Sequence[int] | None
) -> Float[Tensor, "n p"]:
    """Unnormalised scores of the patches by one of `ATTENTION_SOURCES`."""
    return ATTENTION_SOURCES[source](queries_and_keys, num_prefix=num_prefix, heads=heads)


def feature_norm(features: Float[Tensor, "*n p c"]) -> Float[Tensor, "*n p"]:
    """Length of every token's feature, in float32."""
    norm: Tensor = torch.linalg.vector_norm(features.float(), dim=-1)
    return norm


def normalised(scores: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
    """Scale every row to sum 1; a row of zeros says nothing and becomes uniform."""
    total = scores.sum(-1, keepdim=True)
    uniform = scores.new_full((), 1.0 / scores.shape[-1])
    return torch.where(total == 0, uniform, scores / total)


def refuse_scores(name: str, source: str | None) -> None:
    """What a teacher without scores answers to a source.

    Raises:
        UsageError: If there is a source.
    """
    if source is not None:
        raise UsageError(
            f"{name} gives no scores, got score source {source!r}: take the scores from another "
            "teacher (`scores.teacher`), or set scores.source=uniform"
        )
