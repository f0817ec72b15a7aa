"""Weights under the names of the original Hiera repository, in and out.

timm's Hiera has the original's parameters; a few names differ:

| original (facebookresearch/hiera)                  | timm                       |
|----------------------------------------------------|----------------------------|
| `patch_embed.* pos_embed_* blocks.*`               | the same                   |
| `norm.*`                                           | `head.norm.*`              |
| `head.projection.*` (classifier)                   | `head.fc.*`; not loaded    |
| `encoder_norm.* multi_scale_fusion_heads.*`        | masked autoencoders' own;  |
| `mask_token decoder_*`                             | not loaded                 |

A checkpoint nests its state dict under `model_state`. A masked autoencoder's
`encoder_norm` comes after its fusion heads, so it is no norm of the last block: `head.norm`
starts fresh, as when the original loads such a file into its encoder.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from kdhiera.errors import UsageError
from kdhiera.grid import UNIT_PX, Grid
from kdhiera.storage import file_sha256
from kdhiera.student.hiera import SIZES
from kdhiera.student.vit import is_vit

logger = logging.getLogger(__name__)

STATE = "model_state"
CLIP = "clip"  # frames, height and width, in files that we write
_NESTED = (STATE, "model", "state_dict")
_LEFT_OUT = (
    "head.projection.", "head.fc.", "encoder_norm.", "multi_scale_fusion_heads.", "mask_token",
    "decoder_",
)  # fmt: skip
_TOKEN_PX = 4  # of the student's own tokens
_WINDOW = UNIT_PX // _TOKEN_PX


def official_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A timm Hiera's state dict under the original's names."""
    renamed = {}
    for name, value in state.items():
        if name.startswith("head.norm."):
            name = name.removeprefix("head.")
        elif name.startswith("head.fc."):
            name = "head.projection." + name.removeprefix("head.fc.")
        renamed[name] = value
    return renamed


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a student takes from an original state dict (or timm's own), under timm's names."""
    renamed = {}
    for name, value in state.items():
        if not name.startswith(_LEFT_OUT):
            renamed["head." + name if name.startswith("norm.") else name] = value
    return renamed


def load_init(backbone: Any, path: str, grid: Grid) -> None:
    """Load a checkpoint into a Hiera; what was left out or resampled is logged.

    Position embeddings of another clip size are resampled; see `resample_positions`.

    Args:
        backbone: timm Hiera for clips of `grid`; keeps its own norm where a masked autoencoder
            has none.
        path: An original Hiera *video* checkpoint (`.pth`, `.safetensors`), supervised or
            masked autoencoder; or an export of a student, the folder or its weights.
        grid: Clip geometry of the backbone.

    Raises:
        UsageError: If the file is missing, cannot be read, or holds another model.
    """
    file = weights_file(path)
    found, clip = read_weights(file)
    state = timm_names(found)
    _check_video(state, path)
    own = backbone.state_dict()
    left_out = sorted({name.partition(".")[0] for name in found if name.startswith(_LEFT_OUT)})
    if left_out:
        logger.info("student.init %s: not loaded: %s", path, ", ".join(left_out))
    if not any(name.startswith("head.norm.") for name in state):
        logger.info("student.init %s: no norm after the last block; it starts fresh", path)
        state |= {name: own[name] for name in own if name.startswith("head.norm.")}
    _check_architecture(state, own, path)
    _fit_positions(state, grid, clip, file)
    _check_shapes(state, own, path)
    backbone.load_state_dict({name: value.float() for name, value in state.items()})
    logger.info("student.init %s: the student starts from these weights", path)


def weights_file(path: str) -> Path:
    """The file that `student.init` names.

    Raises:
        UsageError: If there is none.
    """
    file = Path(path)
    if (file / "model.safetensors").is_file():
        return file / "model.safetensors"
    if not file.is_file():
        raise UsageError(
            f"no weights at student.init={path}: name a Hiera video checkpoint (.pth or "
            ".safetensors) or the export folder of a run"
        )
    return file


def weights_sha256(path: str) -> str:
    """Of the file that `student.init` names; raises `UsageError` if there is none."""
    return file_sha256(weights_file(path))


def resample_positions(
    positions: Float[Tensor, "h w c"], size: tuple[int, int]
) -> Float[Tensor, "y x c"]:
    """A spatial position embedding on another grid of student tokens.

    Attention of the first backbone stages sees windows of 8 x 8 tokens, so what is learnt
    holds a pattern that repeats with the window, and stretching that would misplace it
    against the windows (arXiv:2311.05613). So the pattern (the mean over windows of what a
    smooth field through the windows' means leaves) is kept as it is, and the rest is
    resampled bicubically, antialiased.

    Args:
        positions: Sides multiples of 8.
        size: Tokens (down, across) of the new grid, multiples of 8.
    """
    field = rearrange(positions, "h w c -> 1 c h w").float()
    means = F.avg_pool2d(field, _WINDOW)
    smooth = F.interpolate(means, field.shape[-2:], mode="bicubic", align_corners=False)
    windows = {"p": _WINDOW, "q": _WINDOW}
    pattern = reduce(field - smooth, "1 c (y p) (x q) -> 1 c p q", "mean", **windows)
    rest = field - _tile(pattern, field.shape[-2:])
    fitted = F.interpolate(rest, size, mode="bicubic", align_corners=False, antialias=True)
    return rearrange(fitted + _tile(pattern, size), "1 c y x -> y x c")


def _tile(pattern: Tensor, size: tuple[int, ...]) -> Tensor:
    return pattern.repeat(1, 1, size[0] // _WINDOW, size[1] // _WINDOW)


def _fit_positions(
    state: dict[str, Tensor], grid: Grid, clip: Mapping[str, int] | None, file: Path
) -> None:
    """Resample both position embeddings of `state` where they are for another clip size."""
    target = grid.height // _TOKEN_PX, grid.width // _TOKEN_PX
    source = _source_size(state["pos_embed_spatial"].shape[1], clip, target, file)
    if source != target:
        spatial = rearrange(state["pos_embed_spatial"], "1 (h w) c -> h w c", h=source[0])
        fitted = resample_positions(spatial, target)
        state["pos_embed_spatial"] = rearrange(fitted, "h w c -> 1 (h w) c")
        logger.info(
            "student.init %s: position embeddings resampled from %d x %d to %d x %d tokens",
            file, *source, *target,
        )  # fmt: skip
    slots = state["pos_embed_temporal"].shape[1]
    if slots != grid.slots:
        temporal = rearrange(state["pos_embed_temporal"].float(), "1 t c -> 1 c t")
        fitted = F.interpolate(temporal, grid.slots, mode="linear", align_corners=False)
        state["pos_embed_temporal"] = rearrange(fitted, "1 c t -> 1 t c")
        logger.info(
            "student.init %s: position embeddings resampled from %d to %d slots of time",
            file, slots, grid.slots,
        )  # fmt: skip


def _source_size(
    tokens: int, clip: Mapping[str, int] | None, target: tuple[int, int], file: Path
) -> tuple[int, int]:
    """Tokens (down, across) that a spatial embedding is for.

    Exports say so; the original's own checkpoints do not, and are for square clips.
    """
    if clip is not None:
        return clip["height"] // _TOKEN_PX, clip["width"] // _TOKEN_PX
    side = math.isqrt(tokens)
    if side * side == tokens and side % _WINDOW == 0:
        return side, side
    if tokens == target[0] * target[1]:
        logger.warning(
            "student.init %s: nothing says which grid its %d spatial positions are; taken as "
            "%d x %d, the student's",
            file, tokens, *target,
        )  # fmt: skip
        return target
    raise UsageError(
        f"student.init={file}: {tokens} spatial positions are no square of mask units, and "
        "nothing says which grid they are: name the export folder that the weights come from"
    )


def read_weights(file: Path) -> tuple[dict[str, Tensor], Mapping[str, int] | None]:
    """A state dict as it is in the file, and the clip size if something says which.

    Raises:
        UsageError: If the file cannot be read or holds no state dict.
    """
    config = file.with_name("config.json")
    try:
        if file.suffix == ".safetensors":
            clip = json.loads(config.read_text()).get(CLIP) if config.is_file() else None
            return load_file(file), clip
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise errors of zip, pickle and safetensors
        raise UsageError(
            f"student.init={file} cannot be read ({type(error).__name__}): it must be a whole "
            ".safetensors file, or a .pth file that holds tensors only"
        ) from error
    clip = state.get(CLIP) if isinstance(state, Mapping) else None
    for key in _NESTED:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UsageError(f"student.init={file} is no state dict of tensors")
    return dict(state), clip


def _check_video(state: Mapping[str, Tensor], path: str) -> None:
    patch = state.get("patch_embed.proj.weight")
    if patch is None or "blocks.0.attn.qkv.weight" not in state:
        raise UsageError(
            f"student.init={path} is no Hiera: it has {', '.join(sorted(state)[:3])} ..."
        )
    if is_vit(state):
        raise UsageError(
            f"student.init={path} holds a plain ViT, and the student is a Hiera: set "
            "student.kind=vit, or name the weights of a Hiera"
        )
    if patch.ndim != 5 or "pos_embed_spatial" not in state or "pos_embed_temporal" not in state:
        raise UsageError(
            f"student.init={path} is an image Hiera: name a video checkpoint, such as "
            "mae_hiera_base_16x224.pth"
        )


def _check_architecture(state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str) -> None:
    """Same width and depths, and no parameter too many or too few."""
    has, wanted = _describe(state), _describe(own)
    if has != wanted:
        raise UsageError(
            f"student.init={path} holds a Hiera of {_name(has)}, and the student is one of "
            f"{_name(wanted)}: set student.size to the checkpoint's"
        )
    unknown, missing = sorted(state.keys() - own.keys()), sorted(own.keys() - state.keys())
    if unknown or missing:
        raise UsageError(
            f"student.init={path} is no video Hiera as kdhiera builds it: "
            f"unknown {unknown[:3]}, missing {missing[:3]}"
        )


def _check_shapes(state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str) -> None:
    for name, value in own.items():
        if state[name].shape != value.shape:
            raise UsageError(
                f"student.init={path}: {name} has shape {tuple(state[name].shape)}, and the "
                f"student's is {tuple(value.shape)}"
            )


def _describe(state: Mapping[str, Tensor]) -> tuple[int, tuple[int, ...]]:
    """Width of the patch embedding and blocks of the backbone stages."""
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    starts = [0, *(i for i in range(depth) if f"blocks.{i}.proj.weight" in state), depth]
    stages = tuple(later - earlier for earlier, later in pairwise(starts))
    return state["patch_embed.proj.weight"].shape[0], stages


def _name(described: tuple[int, tuple[int, ...]]) -> str:
    width, stages = described
    for name, size in SIZES.items():
        if (size["embed_dim"], size["stages"]) == described:
            return f"size {name}"
    return f"width {width} and backbone stages {list(stages)}"
