"""Image teachers through timm: Vision Transformers with or without class token.

DINO, DINOv2 (with or without registers), DINOv3, MAE, CLIP, SigLIP and their kin: timm's
`VisionTransformer` and `Eva` (rotary positions).
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float
from timm.layers import apply_rot_embed_cat
from timm.layers.attention import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Attention, Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from kdhiera.config import TeacherConfig
from kdhiera.errors import UsageError
from kdhiera.grid import Grid
from kdhiera.teachers.attention import Pair, linear_heads
from kdhiera.teachers.base import state_sha256
from kdhiera.teachers.compiling import compile_blocks
from kdhiera.teachers.frames import Frames
from kdhiera.teachers.positions import (
    Resampling,
    grid_side,
    resample_positions,
    timm_resampling,
)
from kdhiera.teachers.scores import ScoreChoice
from kdhiera.teachers.transformer import TransformerTeacher, input_size
from kdhiera.teachers.weights import HubRepository, load_weights, read_json, read_state, source_of

logger = logging.getLogger(__name__)

# Parts that no token feature needs: they may be there or not.
_HEADS = ("head", "fc_norm.", "attn_pool.", "decoder", "mask_token")
_PRE_NORM, _POST_NORM = (Block, EvaBlock), (ResPostBlock, EvaBlockPostNorm)


class TimmBackbone:
    """A timm `VisionTransformer` or `Eva` taken apart; see `Backbone`."""

    def __init__(self, model: nn.Module, *, name: str, compile_how: bool | str) -> None:
        blocks = list(model.blocks)  # type: ignore[arg-type]
        self.name = name
        self.num_blocks = len(blocks)
        self.num_prefix: int = model.num_prefix_tokens  # type: ignore[assignment]
        self.has_cls = model.cls_token is not None
        self.norm: nn.Module | None = None
        if not isinstance(model.norm, nn.Identity):
            self.norm = model.norm  # type: ignore[assignment]
        attention = getattr(blocks[0], "attn", None)
        self.num_heads = int(getattr(attention, "num_heads", 0))
        self.gives_attention = all(_is_known(block) for block in blocks)
        self.blocks = blocks
        self._model: Any = model
        self._run = compile_blocks(blocks, compile_how)

    def embed(self, pixels: Float[Tensor, "n 3 y x"]) -> tuple[Float[Tensor, "n m c"], Any]:
        """See `Backbone.embed`; beside the tokens go the rotary tables, if any."""
        model = self._model
        tokens = model.patch_embed(pixels)
        if isinstance(model, Eva):
            tokens, rope = model._pos_embed(tokens)
            return model.norm_pre(tokens), rope
        return model.norm_pre(model._pos_embed(tokens)), None

    def run_block(
        self, number: int, tokens: Float[Tensor, "n m c"], beside: Any
    ) -> Float[Tensor, "n m c"]:
        """See `Backbone.run_block`."""
        rope = self._rope(number, beside)
        extra = {} if rope is None else {"rope": rope}
        result: Tensor = self._run[number - 1](tokens, **extra)
        return result

    def queries_and_keys(
        self, number: int, tokens: Float[Tensor, "n m c"], beside: Any, rows: slice
    ) -> Pair:
        """See `Backbone.queries_and_keys`."""
        block: Any = self.blocks[number - 1]
        attention = block.attn
        entering = block.norm1(tokens) if isinstance(block, _PRE_NORM) else tokens
        heads: int = attention.num_heads
        (q_weight, q_bias), (k_weight, k_bias) = _projections(attention)
        rope = self._rope(number, beside)
        asked = entering if rope is not None else entering[:, rows]
        queries = attention.q_norm(linear_heads(asked, q_weight, q_bias, num_heads=heads))
        keys = attention.k_norm(linear_heads(entering, k_weight, k_bias, num_heads=heads))
        if rope is not None:
            queries = _rotated(attention, queries, rope)[:, :, rows]
            keys = _rotated(attention, keys, rope)
        return queries * attention.scale, keys

    def _rope(self, number: int, beside: Any) -> Tensor | None:
        """Rotary table of a block: `mixed` tables have one a block."""
        if beside is None:
            return None
        table: Tensor = beside[number - 1] if getattr(self._model, "rope_mixed", False) else beside
        return table


def build_timm_teacher(
    config: TeacherConfig,
    *,
    grid: Grid,
    device: torch.device,
    dtype: torch.dtype,
    choice: ScoreChoice,
) -> TransformerTeacher:
    """Build a timm teacher whose patches fall on the student's tokens.

    Args:
        config: With `model` a timm name, `weights` a file, a folder, or None for timm's
            hub, and `options` for timm's constructor.
        grid: The student's grid.
        device: Where it runs.
        dtype: float32, or bfloat16 for autocast.
        choice: What scores are read from.

    Raises:
        UsageError: If the model or its weights are not to be had, or do not fit.
    """
    name = str(config.model)
    native = _skeleton(name, config.options)
    published: dict[str, Any] = dict(native.pretrained_cfg)
    state = load_weights(config.weights) if config.weights else _hub_state(name, published)
    folder = _folder_settings(config, name)
    state = _in_timms_names(name, config.options, native, state, source=_source(config, name))
    size = input_size(grid, native.patch_embed.patch_size)
    model = timm.create_model(
        name, pretrained=False, num_classes=0, img_size=size, **config.options
    )
    resampling = timm_resampling(name) if model.pos_embed is not None else Resampling.NONE
    model.load_state_dict(_on_grid(model, state, resampling, name=name), strict=False)
    mean = config.mean or folder.get("mean") or published["mean"]
    std = config.std or folder.get("std") or published["std"]
    if config.weights is not None and not folder and config.mean is None:
        _warn_of_tags(name, mean=mean)
    identity: dict[str, object] = {
        "kind": "timm",
        "model": name,
        "input_px": list(size),
        "resize": "bicubic-antialias",
        "position_grid": resampling.value,
        "frames": "first of every tubelet",
    }
    if config.options:
        identity["options"] = dict(config.options)
    if tuple(mean) != tuple(published["mean"]) or tuple(std) != tuple(published["std"]):
        identity |= {"mean": list(mean), "std": list(std)}
    model = model.eval().requires_grad_(False).to(device)
    return TransformerTeacher(
        TimmBackbone(model, name=name, compile_how=config.compile),
        Frames(grid, size=size, mean=mean, std=std, video=False, device=device),
        device=device,
        dtype=dtype,
        choice=choice,
        identity=identity,
        weights_sha256=state_sha256(state),
    )


def _skeleton(
    name: str, options: Mapping[str, Any], img_size: tuple[int, int] | None = None
) -> Any:
    """The model without memory for its weights, at its native size or another."""
    plain = name.split(".")[0]
    if not timm.is_model(plain):
        near = timm.list_models(f"*{plain.split('_patch')[0]}*")[:5]
        hint = f"; near: {', '.join(near)}" if near else ""
        raise UsageError(f"timm has no model {name!r}{hint}")
    sized = {} if img_size is None else {"img_size": img_size}
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, num_classes=0, **sized, **options)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        with_options = f" with teachers.<name>.options {dict(options)}" if options else ""
        raise UsageError(
            f"timm cannot make {name}{with_options} ({type(error).__name__}: {error}): correct the "
            "name, its tag or the options"
        ) from None
    if not isinstance(model, VisionTransformer | Eva):
        raise UsageError(
            f"{name} is not a Vision Transformer that kdhiera takes apart "
            f"({type(model).__name__}): choose a timm VisionTransformer or Eva, or use kind: module"
        )
    return model


def _hub_state(name: str, published: Mapping[str, Any]) -> dict[str, Tensor]:
    repository = published.get("hf_hub_id")
    if not repository:
        raise UsageError(
            f"timm publishes no weights of {name} on the hub: name a file in "
            "`teachers.<name>.weights`"
        )
    source = HubRepository(str(repository))
    file = published.get("hf_hub_filename")
    if not file:
        return read_state(source)
    path = source.file(str(file))
    if path is None:
        raise source.lacks(str(file))
    return load_weights(str(path))


def _folder_settings(config: TeacherConfig, name: str) -> dict[str, Any]:
    """What a folder in timm's layout says of its own preprocessing."""
    if config.weights is None or not Path(config.weights).is_dir():
        return {}
    settings = read_json(source_of(config.weights), "config.json") or {}
    architecture = settings.get("architecture", name.split(".")[0])
    if architecture != name.split(".")[0]:
        raise UsageError(
            f"{config.weights} holds weights of {architecture}, but teachers.<name>.model is "
            f"{name}: name the weights' own model"
        )
    published = settings.get("pretrained_cfg", {})
    return {key: published[key] for key in ("mean", "std") if key in published}


def _source(config: TeacherConfig, name: str) -> str:
    return config.weights or f"timm's hub for {name}"


def _in_timms_names(
    name: str,
    options: Mapping[str, Any],
    native: Any,
    state: Mapping[str, Tensor],
    *,
    source: str,
) -> dict[str, Tensor]:
    """The tensors that features need, under timm's names, positions still untouched.

    Original checkpoints (DINO's, DINOv2's, MAE's, OpenAI's and open_clip's, ...) are
    renamed by timm's own filter. That one would resample what differs in size, so it is
    given a skeleton of the checkpoint's own grid, and patches of another size are refused.

    Raises:
        UsageError: If tensors are missing, left over, or of another shape.
    """
    patches = [
        v for k, v in state.items() if k.endswith(("patch_embed.proj.weight", "conv1.weight"))
    ]
    patch = tuple(native.patch_embed.patch_size)
    if len(patches) == 1 and patches[0].ndim == 4 and tuple(patches[0].shape[2:]) != patch:
        raise UsageError(
            f"the weights in {source} do not fit timm's {name}: their patches are "
            f"{tuple(patches[0].shape[2:])} px, the model's {patch}; name the weights' own model"
        )
    skeleton = _skeleton(name, options, _own_size(native, state))
    rename = getattr(sys.modules[type(skeleton).__module__], "checkpoint_filter_fn", None)
    assert rename is not None, f"timm's {type(skeleton).__module__} has no filter"
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # timm prints what it passes over
            renamed: dict[str, Tensor] = rename(dict(state), skeleton)
    except (KeyError, RuntimeError, AttributeError, ValueError, AssertionError) as error:
        raise UsageError(
            f"the weights in {source} do not fit timm's {name} ({type(error).__name__}: {error}): "
            "name the weights' own model"
        ) from None
    own = {k: v for k, v in skeleton.state_dict().items() if not k.startswith(_HEADS)}
    fitted = {k: v for k, v in renamed.items() if not k.startswith(_HEADS)}
    problems = [f"{k} is missing" for k in sorted(own.keys() - fitted.keys())]
    problems += [f"{k} is left over" for k in sorted(fitted.keys() - own.keys())]
    problems += [
        f"{k} is {tuple(fitted[k].shape)} for {tuple(own[k].shape)}"
        for k in own.keys() & fitted.keys()
        if fitted[k].shape != own[k].shape
    ]
    if problems:
        raise UsageError(
            f"the weights in {source} do not fit timm's {name}: {len(problems)} tensors differ, "
            f"such as {problems[0]}; name the weights' own model"
        )
    return fitted


def _own_size(native: Any, state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Pixels of the square grid that the checkpoint's positions are for; None if unknown."""
    found = [k for k in state if k.endswith(("pos_embed", "positional_embedding"))]
    visual = [k for k in found if "visual" in k] or found  # CLIP has a text tower as well
    if native.pos_embed is None or len(visual) != 1:
        return None
    count = state[visual[0]].shape[-2]
    for num_prefix in (0, 1, native.num_prefix_tokens):
        side = math.isqrt(count - num_prefix)
        if side * side == count - num_prefix:
            return side * native.patch_embed.patch_size[0], side * native.patch_embed.patch_size[1]
    return None


def _on_grid(
    model: Any, state: Mapping[str, Tensor], resampling: Resampling, *, name: str
) -> dict[str, Tensor]:
    """The state with its positions on the model's grid."""
    fitted = dict(state)
    if model.pos_embed is None:
        return fitted
    num_prefix = 0 if model.no_embed_class else int(model.num_prefix_tokens)
    size: tuple[int, int] = model.patch_embed.grid_size
    positions = fitted["pos_embed"]
    side = grid_side(positions, num_prefix=num_prefix)
    if (side, side) != size:
        fitted["pos_embed"] = resample_positions(
            positions, num_prefix=num_prefix, size=size, resampling=resampling
        )
        logger.info(
            "%s: position grid resampled from %d x %d to %d x %d (%s)",
            name,
            side,
            side,
            *size,
            resampling.value,
        )
    return fitted


def _warn_of_tags(name: str, *, mean: Sequence[float]) -> None:
    """One architecture, several training recipes: say so where the recipe decides the colours."""
    if "." in name:
        return
    tags = timm.list_pretrained(f"{name}.*")
    means = {tuple(timm.get_pretrained_cfg(tag).mean) for tag in tags}
    if len(means) > 1:
        logger.warning(
            "%s: weights from a file, normalised with mean %s of timm's default tag; if they are "
            "of another one, name it (%s) or set mean and std",
            name,
            tuple(mean),
            ", ".join(tags[:4]),
        )


def _is_known(block: nn.Module) -> bool:
    """Whether `queries_and_keys` does what the block's attention does."""
    attention = getattr(block, "attn", None)
    if not isinstance(block, _PRE_NORM + _POST_NORM):
        return False
    # Grouped queries share keys; differential attention is another class.
    return (
        type(attention) in (Attention, AttentionRope, EvaAttention)
        and getattr(attention, "num_kv_groups", 1) == 1
    )


def _projections(
    attention: Any,
) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """Weight and bias of queries and of keys, fused or not."""
    if attention.qkv is None:
        q, k = attention.q_proj, attention.k_proj
        return (q.weight, q.bias), (k.weight, k.bias)
    weight, bias = attention.qkv.weight, attention.qkv.bias
    width = weight.shape[0] // 3
    biases = (None, None) if bias is None else (bias[:width], bias[width : 2 * width])
    if getattr(attention, "q_bias", None) is not None:
        biases = (attention.q_bias, None)  # EVA's keys have none
    return (weight[:width], biases[0]), (weight[width : 2 * width], biases[1])


def _rotated(
    attention: Any, values: Float[Tensor, "n heads m d"], rope: Tensor
) -> Float[Tensor, "n heads m d"]:
    """Turn the patches' queries or keys by their positions; prefix tokens stay."""
    prefix = attention.num_prefix_tokens
    half = getattr(attention, "rotate_half", False)
    turned = apply_rot_embed_cat(values[:, :, prefix:], rope.float(), half=half)
    return torch.cat([values[:, :, :prefix], turned], dim=2)
