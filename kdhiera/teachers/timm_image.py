"""Image teachers through timm: any Vision Transformer with a class token or without.

The teacher sees the first frame of every tubelet (Hiera's temporal convolution, kernel 3,
stride 2, padding 1, centres token t on frame 2t), resized so that its own patch size
gives the student's token grid: patch 14 sees 14 px where the student sees 16.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from kdhiera.config import TeacherConfig
from kdhiera.errors import UsageError
from kdhiera.grid import TUBELET_FRAMES, Grid
from kdhiera.teachers.attention import LastAttentionInput, cls_attention
from kdhiera.teachers.base import TeacherOutput, load_weights, state_sha256

logger = logging.getLogger(__name__)

SCORE_SOURCES = ("cls_attention",)


class TimmImageTeacher:
    """A frozen timm Vision Transformer bound to a token grid; see `Teacher`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        grid: Grid,
        device: torch.device,
        dtype: torch.dtype,
        identity: Mapping[str, object],
        weights_sha256: str,
    ) -> None:
        self.identity = identity
        self.weights_sha256 = weights_sha256
        self._model = model.eval().requires_grad_(False).to(device)
        self._grid = grid
        self._device = device
        self._dtype = dtype
        self._depth = len(_blocks(model))
        config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        self._mean = torch.tensor(config["mean"], device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(config["std"], device=device).view(1, 3, 1, 1)
        self._input_px: tuple[int, int] = model.patch_embed.img_size  # type: ignore[assignment,union-attr]

    def check(self, layers: Sequence[str], score_source: str | None) -> None:
        """See `Teacher.check`."""
        for layer in layers:
            if layer != "norm" and not (layer.isdecimal() and 1 <= int(layer) <= self._depth):
                raise UsageError(
                    f"teacher layer {layer!r} does not exist: {self.identity['model']} has layers "
                    f"1 to {self._depth} and `norm`"
                )
        if score_source is None:
            return
        if score_source not in SCORE_SOURCES:
            raise UsageError(
                f"score source {score_source!r} is unknown for a timm teacher: use "
                f"{' or '.join(SCORE_SOURCES)}, or `uniform`"
            )
        if not getattr(self._model, "has_class_token", False):
            raise UsageError(
                f"score source cls_attention needs a class token, which {self.identity['model']} "
                "does not have: use another teacher for the scores, or `uniform`"
            )

    @torch.inference_mode()
    def __call__(
        self, clips: UInt8[Tensor, "b f y x 3"], layers: Sequence[str], score_source: str | None
    ) -> TeacherOutput:
        """See `Teacher.__call__`."""
        b = clips.shape[0]
        h = self._grid.tokens[1]
        images = rearrange(clips[:, ::TUBELET_FRAMES], "b t y x c -> (b t) c y x")
        deepest = self._depth if score_source or "norm" in layers else max(map(int, layers))
        wanted = sorted({*(int(n) for n in layers if n != "norm"), deepest})
        with (
            torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32),
            LastAttentionInput(_blocks(self._model)[-1], enabled=score_source is not None) as last,
        ):
            grids: list[Tensor] = self._model.forward_intermediates(  # type: ignore[operator]
                self._preprocess(images),
                indices=[n - 1 for n in wanted],
                output_fmt="NLC",
                stop_early=True,
                intermediates_only=True,
            )
            features = {
                str(n): rearrange(grid, "(b t) (h w) c -> b t h w c", b=b, h=h)
                for n, grid in zip(wanted, grids, strict=True)
                if str(n) in layers
            }
            if "norm" in layers:
                normed = self._model.norm(grids[-1])  # type: ignore[operator]
                features["norm"] = rearrange(normed, "(b t) (h w) c -> b t h w c", b=b, h=h)
        scores = None
        if score_source is not None:
            prefix = int(self._model.num_prefix_tokens)  # type: ignore[arg-type]
            attention = cls_attention(_blocks(self._model)[-1], last.value, num_prefix=prefix)
            scores = rearrange(attention, "(b t) (h w) -> b t h w", b=b, h=h)
        return TeacherOutput(features=features, scores=scores)

    def _preprocess(self, images: UInt8[Tensor, "n 3 y x"]) -> Float[Tensor, "n 3 h w"]:
        values = images.float() / 255.0
        if values.shape[-2:] != self._input_px:
            values = functional.interpolate(
                values, size=self._input_px, mode="bicubic", antialias=True
            ).clamp(0.0, 1.0)
        return (values - self._mean) / self._std


def build_timm_teacher(
    config: TeacherConfig, *, grid: Grid, device: torch.device, dtype: torch.dtype
) -> TimmImageTeacher:
    """Build a timm teacher whose patches fall on the student's tokens.

    Args:
        config: With `model` a timm name and `weights` a file, or None for timm's hub.
        grid: The student's grid.
        device: Where it runs.
        dtype: float32, or bfloat16 for autocast.

    Raises:
        UsageError: If the model or its weights are not to be had, or do not fit.
    """
    name = str(config.model)
    if not timm.is_model(name.split(".")[0]):
        near = timm.list_models(f"*{name.split('.')[0].split('_patch')[0]}*")[:5]
        hint = f"; near: {', '.join(near)}" if near else ""
        raise UsageError(f"timm has no model {name!r}{hint}")
    with torch.device("meta"):
        native = timm.create_model(name, pretrained=False, num_classes=0)
    _blocks(native)
    if not hasattr(native, "patch_embed"):
        raise UsageError(f"{name} is not a Vision Transformer: choose a timm ViT")
    patch = native.patch_embed.patch_size
    size = (grid.tokens[1] * patch[0], grid.tokens[2] * patch[1])
    state = load_weights(config.weights) if config.weights else _hub_state(name)
    model = timm.create_model(name, pretrained=False, num_classes=0, img_size=size)
    _load(model, state, name=name, source=config.weights or f"timm hub {name}")
    return TimmImageTeacher(
        model,
        grid=grid,
        device=device,
        dtype=dtype,
        identity={
            "kind": "timm",
            "model": name,
            "input_px": list(size),
            "resize": "bicubic-antialias",
            "position_grid": "bicubic",
            "frames": "first of every tubelet",
        },
        weights_sha256=state_sha256(state),
    )


def _blocks(model: nn.Module) -> nn.Sequential:
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential) or not hasattr(model, "forward_intermediates"):
        raise UsageError(
            f"{type(model).__name__} is not a Vision Transformer with blocks: choose a timm ViT"
        )
    return blocks


def _hub_state(name: str) -> dict[str, Tensor]:
    try:
        return dict(timm.create_model(name, pretrained=True, num_classes=0).state_dict())
    except Exception as error:  # the hub client raises errors of several libraries
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"the weights of {name} could not be fetched from the hub ({reason[0][:200]}): "
            "download them elsewhere and name the file in `teachers.<name>.weights`"
        ) from error


def _load(model: nn.Module, state: Mapping[str, Tensor], *, name: str, source: str) -> None:
    """Strict load, with the position grid resampled to the model's own."""
    own = model.state_dict()
    fitted = {key: value for key, value in state.items() if not key.startswith("head.")}
    positions = fitted.get("pos_embed")
    if positions is not None and positions.shape != own["pos_embed"].shape:
        prefix = positions.shape[1] - _square(positions.shape[1]) ** 2
        size = model.patch_embed.grid_size  # type: ignore[union-attr]
        fitted["pos_embed"] = resample_positions(
            positions,
            num_prefix=prefix,
            size=size,  # type: ignore[arg-type]
        )
        logger.info(
            "%s: position grid resampled from %d x %d to %d x %d",
            name,
            *(2 * (_square(positions.shape[1]),)),
            *size,  # type: ignore[misc]
        )
    problems = sorted(set(own) ^ set(fitted)) or [
        f"{k} {tuple(fitted[k].shape)} for {tuple(own[k].shape)}"
        for k in own
        if fitted[k].shape != own[k].shape
    ]
    if problems:
        raise UsageError(
            f"the weights in {source} do not fit timm's {name}: {len(problems)} tensors differ, "
            f"such as {problems[0]}"
        )
    model.load_state_dict(fitted, strict=True)


def _square(count: int) -> int:
    return int(count**0.5)


def resample_positions(
    positions: Float[Tensor, "1 n c"], *, num_prefix: int, size: tuple[int, int]
) -> Float[Tensor, "1 m c"]:
    """Resample a square position grid to `size`, prefix tokens kept.

    Bicubic without antialiasing, as DINOv2 was trained and as transformers' Dinov2 does;
    timm's own resampling antialiases, which moves features by up to about 1.

    Args:
        positions: Prefix positions, then a square grid in raster order.
        num_prefix: Class and register positions at the front.
        size: Rows and columns wanted.
    """
    prefix, grid = positions[:, :num_prefix], positions[:, num_prefix:]
    side = _square(grid.shape[1])
    image = rearrange(grid, "1 (h w) c -> 1 c h w", h=side).float()
    resized = functional.interpolate(image, size=size, mode="bicubic", align_corners=False)
    return torch.cat([prefix, rearrange(resized, "1 c h w -> 1 (h w) c").to(prefix)], dim=1)
