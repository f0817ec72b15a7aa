"""Teachers that are a chain of transformer blocks, whichever library they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from kdhiera.errors import UsageError
from kdhiera.grid import Grid
from kdhiera.teachers.attention import Pair
from kdhiera.teachers.base import TeacherOutput
from kdhiera.teachers.frames import Frames
from kdhiera.teachers.scores import (
    ATTENTION_SOURCES,
    SCORE_SOURCES,
    ScoreChoice,
    attention_scores,
    feature_norm,
    normalised,
)


@runtime_checkable
class Backbone(Protocol):
    """A frozen model taken apart: embedding, blocks, final norm.

    Attributes:
        name: What messages call it.
        num_blocks: Blocks in the chain.
        num_heads: Attention heads of a block.
        num_prefix: Class and register tokens in front of the patches.
        has_cls: Whether token 0 is a class token.
        norm: The norm after the last block; None if the model has none that acts on tokens.
        gives_attention: Whether `queries_and_keys` knows this model's attention.
    """

    name: str
    num_blocks: int
    num_heads: int
    num_prefix: int
    has_cls: bool
    norm: nn.Module | None
    gives_attention: bool

    def embed(self, pixels: Float[Tensor, "*n 3 h w"]) -> tuple[Float[Tensor, "n m c"], Any]:
        """Tokens that enter the first block, and what blocks need beside them."""
        ...

    def run_block(
        self, number: int, tokens: Float[Tensor, "n m c"], beside: Any
    ) -> Float[Tensor, "n m c"]:
        """Tokens after block `number` (from 1)."""
        ...

    def queries_and_keys(
        self, number: int, tokens: Float[Tensor, "n m c"], beside: Any, rows: slice
    ) -> Pair:
        """Scaled queries of `rows` and all keys of block `number`, in float32.

        Args:
            number: The block, from 1.
            tokens: What enters the block.
            beside: What `embed` gave.
            rows: Tokens whose queries are wanted.
        """
        ...


class TransformerTeacher:
    """A frozen chain of blocks bound to a token grid; see `Teacher`.

    It stops at the last block that a layer or the scores need.
    """

    def __init__(
        self,
        backbone: Backbone,
        frames: Frames,
        *,
        device: torch.device,
        dtype: torch.dtype,
        choice: ScoreChoice,
        identity: Mapping[str, object],
        weights_sha256: str,
    ) -> None:
        self.identity = identity
        self.weights_sha256 = weights_sha256
        self._backbone = backbone
        self._frames = frames
        self._device = device
        self._dtype = dtype
        self._choice = choice

    def check(self, layers: Sequence[str], score_source: str | None) -> None:
        """See `Teacher.check`."""
        for layer in layers:
            self._check_layer(layer)
        if score_source is None:
            return
        name = self._backbone.name
        if score_source not in SCORE_SOURCES:
            raise UsageError(
                f"score source {score_source!r} is unknown: {name} has {self._sources()}; or set "
                "scores.source=uniform"
            )
        if score_source == "cls_attention" and not self._backbone.has_cls:
            raise UsageError(
                f"score source cls_attention needs a class token, which {name} does not have: it "
                f"has {self._sources()}; or take the scores from another teacher"
            )
        if score_source in ATTENTION_SOURCES and not self._backbone.gives_attention:
            raise UsageError(
                f"score source {score_source} does not know the attention of {name}: it has "
                f"{self._sources()}; or take the scores from another teacher"
            )
        self._check_choice(score_source)

    def _check_layer(self, layer: str) -> None:
        depth, normed = self._backbone.num_blocks, self._backbone.norm is not None
        is_block = layer.isdecimal() and 1 <= int(layer) <= depth
        if is_block or (layer == "norm" and normed):
            return
        found = f"{self._backbone.name} has layers 1 to {depth}"
        if layer == "norm":
            raise UsageError(
                f"teacher layer 'norm' does not exist: {found} and no final norm that acts on "
                "tokens"
            )
        raise UsageError(
            f"teacher layer {layer!r} does not exist: {found}{' and `norm`' if normed else ''}"
        )

    def _check_choice(self, source: str) -> None:
        layer, heads = self._choice.layer, self._choice.heads or ()
        if layer is not None:
            try:
                self._check_layer(layer)
            except UsageError as error:
                raise UsageError(f"scores.layer: {error}") from None
            if layer == "norm" and source in ATTENTION_SOURCES:
                raise UsageError(
                    f"scores.layer must be a block for {source}, got 'norm': name one of 1 to "
                    f"{self._backbone.num_blocks}"
                )
        if heads and max(heads) >= self._backbone.num_heads:
            raise UsageError(
                f"scores.heads names head {max(heads)}, but {self._backbone.name} has heads 0 to "
                f"{self._backbone.num_heads - 1}"
            )

    def _sources(self) -> str:
        lacking: set[str] = set()
        if not self._backbone.has_cls:
            lacking.add("cls_attention")
        if not self._backbone.gives_attention:
            lacking.update(ATTENTION_SOURCES)
        return " and ".join(s for s in SCORE_SOURCES if s not in lacking)

    @torch.inference_mode()
    def __call__(
        self, clips: UInt8[Tensor, "b f y x 3"], layers: Sequence[str], score_source: str | None
    ) -> TeacherOutput:
        """See `Teacher.__call__`."""
        attends = self._attending_block(score_source)
        wanted = [*layers]
        if score_source == "feature_norm":
            wanted.append(self._choice.layer or str(self._backbone.num_blocks))
        depths = {self._depth_of(layer) for layer in wanted}
        last = max([*depths, attends - 1], default=0)
        kept: dict[int, Tensor] = {}
        scores = None
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            tokens, beside = self._backbone.embed(self._frames(clips))
            tokens = tokens.float()  # the sums of blocks stay float32 whatever blocks compute in
            for number in range(1, last + 2):
                if number == attends:
                    scores = self._attention(str(score_source), number, tokens, beside)
                if number > last:
                    break
                tokens = self._backbone.run_block(number, tokens, beside)
                if number in depths:
                    kept[number] = tokens[:, self._backbone.num_prefix :]
            features = {
                layer: self._frames.to_grid(self._feature(layer, kept), num_clips=len(clips))
                for layer in wanted
            }
        if score_source == "feature_norm":
            grid = features[wanted[-1]]
            scores = feature_norm(rearrange(grid, "b t h w c -> b (t h w) c"))
        if scores is not None:
            slots = normalised(self._frames.to_slots(scores))
            scores = self._frames.to_grid(
                rearrange(slots, "n p -> n p 1"), num_clips=len(clips)
            ).squeeze(-1)
        return TeacherOutput(features={name: features[name] for name in layers}, scores=scores)

    def _attending_block(self, source: str | None) -> int:
        """The block whose attention gives scores; 0 if none does."""
        if source not in ATTENTION_SOURCES:
            return 0
        return int(self._choice.layer or self._backbone.num_blocks)

    def _depth_of(self, layer: str) -> int:
        return self._backbone.num_blocks if layer == "norm" else int(layer)

    def _feature(self, layer: str, kept: Mapping[int, Tensor]) -> Float[Tensor, "n m c"]:
        tokens = kept[self._depth_of(layer)]
        if layer == "norm":
            assert self._backbone.norm is not None, "checked when the teacher was built"
            tokens = self._backbone.norm(tokens)
        return tokens.float()

    def _attention(
        self, source: str, number: int, tokens: Float[Tensor, "n m c"], beside: Any
    ) -> Float[Tensor, "n p"]:
        with torch.autocast(self._device.type, enabled=False):
            return attention_scores(
                source,
                lambda rows: self._backbone.queries_and_keys(number, tokens.float(), beside, rows),
                num_prefix=self._backbone.num_prefix,
                heads=self._choice.heads,
            )


def input_size(grid: Grid, patch: tuple[int, int]) -> tuple[int, int]:
    """Pixels that put a teacher's patches on the student's tokens."""
    return grid.tokens[1] * patch[0], grid.tokens[2] * patch[1]
