"""Models of Hugging Face transformers taken apart: VideoMAE, V-JEPA 2, Dinov2, ViT, ViT-MAE.

The library's own forward masks tokens at random (`ViTMAEModel`, even at ratio 0), gives
no attention with fast kernels, runs all blocks, and assumes square grids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdhiera.grid import Grid
from kdhiera.teachers.attention import Pair, linear_heads
from kdhiera.teachers.compiling import compile_blocks
from kdhiera.teachers.positions import Resampling

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Where a model of transformers keeps what is needed; paths are dotted.

    Args:
        model: Class of the model.
        config: Class of its configuration.
        prefix: What names begin with in checkpoints of larger models.
        video: Whether it sees all frames.
        blocks: The blocks, in the model.
        attention: The attention, in a block.
        entering: The norm in front of it, in a block.
        projections: Query and key projections, in the attention.
        patches: The patch embedding, in the model.
        norm: The final norm, in the model.
        resampling: How its kind resamples positions.
        colours: Mean and standard deviation where the checkpoint does not say.
    """

    model: str
    config: str
    prefix: str
    video: bool = False
    blocks: str = "layers"
    attention: str = "attention"
    entering: str = "layernorm_before"
    projections: tuple[str, str] = ("q_proj", "k_proj")
    patches: str = "embeddings.patch_embeddings"
    norm: str = "layernorm"
    resampling: Resampling = Resampling.BICUBIC
    colours: tuple[Sequence[float], Sequence[float]] = _IMAGENET


ARCHITECTURES: Mapping[str, Architecture] = {
    "videomae": Architecture(
        model="VideoMAEModel",
        config="VideoMAEConfig",
        prefix="videomae.",
        video=True,
        blocks="encoder.layer",
        attention="attention.attention",
        projections=("query", "key"),
    ),
    "vjepa2": Architecture(
        model="VJEPA2Model",
        config="VJEPA2Config",
        prefix="vjepa2.",
        video=True,
        blocks="encoder.layer",
        entering="norm1",
        projections=("query", "key"),
        patches="encoder.embeddings",
        norm="encoder.layernorm",
        resampling=Resampling.NONE,
    ),
    "dinov2": Architecture(
        model="Dinov2Model",
        config="Dinov2Config",
        prefix="dinov2.",
        blocks="encoder.layer",
        entering="norm1",
    ),
    "dinov2_with_registers": Architecture(
        model="Dinov2WithRegistersModel",
        config="Dinov2WithRegistersConfig",
        prefix="dinov2_with_registers.",
        blocks="encoder.layer",
        entering="norm1",
        resampling=Resampling.BICUBIC_ANTIALIASED,
    ),
    "vit": Architecture(model="ViTModel", config="ViTConfig", prefix="vit.", colours=_HALF),
    "vit_mae": Architecture(model="ViTMAEModel", config="ViTMAEConfig", prefix="vit."),
}


class TransformersBackbone:
    """A model of transformers taken apart; see `Backbone`.

    Args:
        model: The model, on its device.
        architecture: Where its parts are.
        name: What messages call it.
        grid: The student's token grid.
        positions: Positions on that grid, prefix first; None where they are rotary.
        compile_how: See `compile_blocks`.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        *,
        name: str,
        grid: Grid,
        positions: Tensor | None,
        compile_how: bool | str,
    ) -> None:
        self._architecture = architecture
        self.blocks: list[Any] = list(model.get_submodule(architecture.blocks).children())
        self._patches: Any = model.get_submodule(architecture.patches)
        embeddings: Any = getattr(model, "embeddings", None)
        self._cls: Tensor | None = getattr(embeddings, "cls_token", None)
        self._registers: Tensor | None = getattr(embeddings, "register_tokens", None)
        self._positions = positions
        self._token_numbers = None
        if positions is None:
            self._token_numbers = _number_tokens(self._attentions(), grid)
        self.name = name
        self.num_blocks = len(self.blocks)
        self.has_cls = self._cls is not None
        self.num_prefix = sum(
            token.shape[1] for token in (self._cls, self._registers) if token is not None
        )
        self.norm: nn.Module | None = _optional(model, architecture.norm)
        self.num_heads = int(next(self._attentions()).num_attention_heads)
        self.gives_attention = True
        self._run = compile_blocks(self.blocks, compile_how)

    def embed(self, pixels: Float[Tensor, "*n 3 h w"]) -> tuple[Float[Tensor, "n m c"], Any]:
        """See `Backbone.embed`; beside the tokens go their numbers, for rotary positions."""
        tokens: Tensor = self._patches(pixels)
        if self._cls is not None:
            tokens = torch.cat([self._cls.expand(len(tokens), -1, -1), tokens], dim=1)
        if self._positions is not None:
            tokens = tokens + self._positions
        if self._registers is not None:
            registers = self._registers.expand(len(tokens), -1, -1)
            tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)
        numbers = self._token_numbers
        return tokens, None if numbers is None else numbers.to(tokens.device)

    def run_block(
        self, number: int, tokens: Float[Tensor, "n m c"], beside: Any
    ) -> Float[Tensor, "n m c"]:
        """See `Backbone.run_block`."""
        extra = {} if beside is None else {"position_mask": beside}
        result = self._run[number - 1](tokens, **extra)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    def queries_and_keys(
        self, number: int, tokens: Float[Tensor, "n m c"], beside: Any, rows: slice
    ) -> Pair:
        """See `Backbone.queries_and_keys`."""
        block = self.blocks[number - 1]
        attention: Any = block.get_submodule(self._architecture.attention)
        entering = block.get_submodule(self._architecture.entering)(tokens)
        q, k = (getattr(attention, name) for name in self._architecture.projections)
        asked = entering if beside is not None else entering[:, rows]
        queries = linear_heads(asked, q.weight, q.bias, num_heads=self.num_heads)
        keys = linear_heads(entering, k.weight, k.bias, num_heads=self.num_heads)
        if beside is not None:
            places = attention.get_position_ids(entering, masks=beside)
            queries = attention.apply_rotary_embeddings(queries, places)[:, :, rows]
            keys = attention.apply_rotary_embeddings(keys, places)
        return queries * attention.scaling, keys

    def _attentions(self) -> Iterator[Any]:
        for block in self.blocks:
            yield block.get_submodule(self._architecture.attention)


def _number_tokens(attentions: Iterator[Any], grid: Grid) -> Tensor:
    """Raster numbers that V-JEPA 2's rotary positions are made from, `[1, n]`.

    It reads (t, y, x) from a token's number, taking the grid for square: on a wider one
    tokens are numbered as if rows went on. Positions are counted from 0 in steps of one
    token whatever the resolution, as V-JEPA 2 itself does.
    """
    slots, rows, columns = grid.tokens
    side = max(rows, columns)
    for attention in attentions:
        attention.grid_size = side
    t, y, x = (torch.arange(n) for n in (slots, rows, columns))
    numbers = (t[:, None, None] * side + y[:, None]) * side + x
    return numbers.reshape(1, -1)


def _optional(model: nn.Module, path: str) -> nn.Module | None:
    """A submodule that a configuration may leave out (`use_mean_pooling`)."""
    try:
        found: nn.Module | None = model.get_submodule(path)
    except AttributeError:
        return None
    return found
