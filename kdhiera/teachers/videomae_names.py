"""Original VideoMAE checkpoints (V1, V2, and those trained like them) in published names.

Their layout: `patch_embed.proj`, `blocks.N.norm1`, a fused `blocks.N.attn.qkv.weight` with
`q_bias` and `v_bias` beside it (keys have no bias), `blocks.N.attn.proj`, `mlp.fc1`,
`mlp.fc2`, then `norm`, or `fc_norm` after pooling. Pre-training checkpoints put all that
under `encoder.`, copies on the hub under `model.`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kdhiera.errors import UsageError

_MARK = re.compile(r"((?:\w+\.)*)blocks\.0\.attn\.qkv\.weight")
_RULES = (
    (r"patch_embed\.proj\.(\w+)", r"embeddings.patch_embeddings.projection.\1"),
    (r"blocks\.(\d+)\.norm1\.(\w+)", r"encoder.layer.\1.layernorm_before.\2"),
    (r"blocks\.(\d+)\.norm2\.(\w+)", r"encoder.layer.\1.layernorm_after.\2"),
    (r"blocks\.(\d+)\.attn\.([qv]_bias)", r"encoder.layer.\1.attention.attention.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"encoder.layer.\1.attention.output.dense.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"encoder.layer.\1.intermediate.dense.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"encoder.layer.\1.output.dense.\2"),
    (r"norm\.(\w+)", r"layernorm.\1"),
)
_QKV = re.compile(r"blocks\.(\d+)\.attn\.qkv\.weight")
_UNUSED = ("head.", "fc_norm.", "mask_token", "decoder", "pos_embed")
_HEADS_BY_WIDTH = {384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}  # VideoMAE's and V2's sizes


def is_original(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the original names."""
    return any(_MARK.fullmatch(name) for name in state)


def without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part of an original checkpoint, under plain names, heads left out."""
    marks = (_MARK.fullmatch(name) for name in state)
    prefix = next(mark[1] for mark in marks if mark)
    plain = {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }
    return {k: v for k, v in plain.items() if not k.startswith(_UNUSED)}


def learned_positions(state: Mapping[str, Tensor]) -> Tensor | None:
    """Learned positions `[1, n, c]` of an original checkpoint; most have a fixed table."""
    marks = (_MARK.fullmatch(name) for name in state)
    prefix = next(mark[1] for mark in marks if mark)
    return state.get(f"{prefix}pos_embed")


def settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of `without_prefix` say, under the names of `VideoMAEConfig`.

    Raises:
        UsageError: If the checkpoint lacks a part that says it.
    """
    try:
        width, _, tubelet, patch, _ = state["patch_embed.proj.weight"].shape
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError):
        raise UsageError(
            "the weights are named like VideoMAE's, but lack its patch embedding of videos or its "
            "MLPs: name a whole checkpoint"
        ) from None
    found: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": hidden,
        "tubelet_size": tubelet,
        "patch_size": patch,
        "num_hidden_layers": sum(_QKV.fullmatch(name) is not None for name in state),
        "qkv_bias": "blocks.0.attn.q_bias" in state,
        "layer_norm_eps": 1e-6,
        "use_mean_pooling": "norm.weight" not in state,
    }
    if width in _HEADS_BY_WIDTH:
        found["num_attention_heads"] = _HEADS_BY_WIDTH[width]
    return found


def in_published_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `without_prefix` under the names that transformers' copies have.

    Raises:
        UsageError: If one is unknown: another architecture (cosine attention, layer scale).
    """
    renamed: dict[str, Tensor] = {}
    unknown = []
    for name, value in state.items():
        fused = _QKV.fullmatch(name)
        if fused:
            parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
            where = f"encoder.layer.{fused[1]}.attention.attention"
            renamed |= {f"{where}.{part}.weight": weight for part, weight in parts}
            continue
        known = [(p, r) for p, r in _RULES if re.fullmatch(p, name)]
        if known:
            renamed[re.sub(*known[0], name)] = value
        else:
            unknown.append(name)
    if unknown:
        raise UsageError(
            f"the weights are named like VideoMAE's, but hold {len(unknown)} tensors that it does "
            f"not have, such as {unknown[0]}: this is another model, use kind: module"
        )
    return renamed
