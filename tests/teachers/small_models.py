"""Small random models of every family, their weights on disk, and a direct use of each."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kdhiera.config import TeacherConfig
from kdhiera.grid import Grid
from kdhiera.teachers.base import Teacher
from kdhiera.teachers.build import build_teacher
from kdhiera.teachers.scores import ScoreChoice

CPU = torch.device("cpu")
GRID = Grid(num_frames=4, height=64, width=96)  # tokens 2 x 4 x 6: no two axes alike
SQUARE = Grid(num_frames=4, height=64, width=64)


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights large enough that attention is far from uniform and blocks matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            is_scale = value.ndim == 1 and name.endswith("weight")
            value.copy_(1 + 0.2 * noise if is_scale else 0.2 * noise)


def random_clips(count: int = 2, grid: Grid = GRID, seed: int = 0) -> Tensor:
    """Smooth random clips: neighbouring pixels are alike, as in videos."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 2, 4, 4, generator=generator)
    size = (grid.num_frames, grid.height, grid.width)
    fine = nn.functional.interpolate(coarse, size=size, mode="trilinear")
    noise = 0.1 * torch.rand(fine.shape, generator=generator)
    return ((0.9 * fine + noise) * 255).to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def as_images(clips: Tensor, size: tuple[int, int], mean: Any, std: Any) -> Tensor:
    """First frame of every tubelet, `[b * t, 3, h, w]`; written on its own."""
    frames = clips[:, 0::2].permute(0, 1, 4, 2, 3).flatten(0, 1).float() / 255
    if frames.shape[-2:] != size:
        frames = nn.functional.interpolate(frames, size, mode="bicubic", antialias=True)
    frames = frames.clamp(0, 1)
    return (frames - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def as_video(clips: Tensor, size: tuple[int, int], mean: Any, std: Any) -> Tensor:
    """All frames, `[b, f, 3, h, w]`."""
    frames = torch.stack([as_images(clips[:, i : i + 1], size, mean, std) for i in range(4)], 1)
    assert clips.shape[1] == 4
    return frames


def mean_scores(attention: Tensor, source: str, num_prefix: int, per_slot: int) -> Tensor:
    """Scores `[slots, p]` from full softmax maps `[n, heads, m, m]`, by the book."""
    maps = attention.double().mean(1)
    if source == "cls_attention":
        patches = maps[:, 0, num_prefix:]
    else:
        patches = maps[:, num_prefix:, num_prefix:].mean(1)
    slots = patches.reshape(-1, per_slot)
    return slots / slots.sum(1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A timm family at small size.

    Args:
        model: timm name.
        options: What makes it small.
        native: Pixels of the square images its saved weights are for.
        grid: The student's grid; with `native` it decides whether positions are resampled.
    """

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    native: int = 64
    grid: Grid = SQUARE

    @property
    def size(self) -> tuple[int, int]:
        with torch.device("meta"):
            model = timm.create_model(self.model, pretrained=False, **self.options)
        patch = model.patch_embed.patch_size[0]
        return self.grid.tokens[1] * patch, self.grid.tokens[2] * patch


SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 3}
TIMM_FAMILIES = {
    "dino": Family(model="vit_small_patch16_224.dino", options=SMALL),
    "dinov2": Family(model="vit_small_patch14_dinov2", options=SMALL, native=56),
    "dinov2-reg": Family(model="vit_small_patch14_reg4_dinov2", options=SMALL, native=56),
    "dinov3": Family(model="vit_small_patch16_dinov3", options=SMALL, grid=GRID),
    "mae": Family(model="vit_base_patch16_224.mae", options=SMALL),
    "clip": Family(model="vit_base_patch16_clip_quickgelu_224.openai", options=SMALL),
    "siglip": Family(model="vit_base_patch16_siglip_224.v2_webli", options=SMALL),
    "eva02": Family(model="eva02_tiny_patch14_224", options=SMALL, native=56),
    "rope-mixed": Family(model="vit_small_patch16_rope_mixed_224", options=SMALL),
    "deit-distilled": Family(model="deit_tiny_distilled_patch16_224", options=SMALL),
    "post-norm": Family(model="eva02_enormous_patch14_clip_224", options=SMALL, native=56),
}


def timm_model(family: Family, *, size: int | tuple[int, int] | None = None) -> nn.Module:
    """The small model with random weights, as timm makes it."""
    wanted = family.native if size is None else size
    model = timm.create_model(
        family.model, pretrained=False, num_classes=0, img_size=wanted, **family.options
    )
    randomise(model)
    return model.eval()


def timm_teacher(
    family: Family,
    folder: Path,
    *,
    layers: Any = ("1", "2", "3"),
    choice: ScoreChoice | None = None,
    **changes: Any,
) -> Teacher:
    """A teacher whose weights were saved by timm's own `state_dict`."""
    path = folder / "weights.safetensors"
    save_file(timm_model(family).state_dict(), path)
    values = {
        "kind": "timm",
        "model": family.model,
        "options": dict(family.options),
        "weights": str(path),
        "layers": list(layers),
        "precision": "fp32",
    }
    config = TeacherConfig.model_validate(values | changes)
    return build_teacher(config, grid=family.grid, device=CPU, choice=choice)


def watched(model: nn.Module, blocks: Any, run: Callable[[], Any]) -> tuple[list[Tensor], Any]:
    """Outputs of all blocks during `run`, and what it returned."""
    seen: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _i, out: seen.append(out)) for block in blocks]
    with torch.inference_mode():
        result = run()
    for hook in hooks:
        hook.remove()
    return seen, result


def full_attention_of_timm(model: Any, images: Tensor) -> list[Tensor]:
    """Softmax maps of every block, from timm's own unfused attention."""
    maps: list[Tensor] = []
    hooks = []
    for block in model.blocks:
        block.attn.fused_attn = False
        hooks.append(
            block.attn.attn_drop.register_forward_pre_hook(lambda _m, args: maps.append(args[0]))
        )
    with torch.inference_mode():
        model.forward_features(images)
    for hook, block in zip(hooks, model.blocks, strict=True):
        hook.remove()
        block.attn.fused_attn = True
    return maps


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))
