"""A trained student as three files that timm and safetensors alone can load.

config.json         architecture and arguments for timm, clip size, pixels, where it comes from
model.safetensors   its weights, float32
README.md           the model card: how to load it, what made it, what it was measured at

After `import kdhiera`, `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it; without
kdhiera the timm class that `config.json` names does.

`export_hiera` writes one file that the original Hiera loads instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from timm.models.hiera import Hiera
from timm.models.vision_transformer import VisionTransformer

from kdhiera import __version__
from kdhiera.config import StudentConfig
from kdhiera.errors import DamagedError, UsageError
from kdhiera.grid import Grid
from kdhiera.storage import atomic_file, write_atomic
from kdhiera.student.base import IMAGENET_MEAN, IMAGENET_STD, Student
from kdhiera.student.card import model_card
from kdhiera.student.hiera import HieraStudent, hiera_args
from kdhiera.student.official import CLIP, STATE, official_names
from kdhiera.student.timm_models import hiera_cfg, hiera_name, vit_cfg, vit_name
from kdhiera.student.vit import VitStudent, vit_args

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"

# how the normalised clip `[b, f, y, x, c]` is laid out for the backbone, f: frames of a slot
_HIERA_PIXELS = "b c t h w"
_VIT_PIXELS = "b (f c) (t h) w"


def export(
    student: Student,
    config: StudentConfig,
    folder: Path,
    *,
    name: str,
    provenance: Mapping[str, Any],
    measured: str = "",
) -> None:
    """Write a student's backbone for others to load.

    Args:
        student: Trained or not.
        config: What it was built from.
        folder: Created if needed; files of an earlier export are replaced.
        name: Title of the model card.
        provenance: JSON values that say where the weights come from (teachers, data, run).
        measured: What an evaluation of them found, in Markdown; empty if there was none.
    """
    grid = student.grid
    folder.mkdir(parents=True, exist_ok=True)
    state = student.backbone.state_dict()
    weights = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    content = {
        "kind": student.kind,
        **_built_as(student, config),
        CLIP: _clip(grid),
        "size": config.size,
        "name": name,
        "num_features": student.num_features,
        "parameters": sum(value.numel() for value in weights.values()),
        "provenance": {"kdhiera": __version__, **provenance},
    }
    write_atomic(folder / WEIGHTS, save(weights))
    _write_text(folder / CONFIG, json.dumps(content, indent=2) + "\n")
    _write_text(folder / CARD, model_card(content, measured=measured))


def export_hiera(student: HieraStudent, path: Path) -> None:
    """Write a student's backbone as a checkpoint of the original Hiera.

    The names are the original's (`kdhiera.student.official`), nested under `model_state`, with
    the clip size beside them. A
    `hiera.Hiera` of the same size and clips, with `q_pool=2`, loads it with `strict=False`: all it
    misses is its classifier `head.projection`.

    Args:
        student: Trained or not.
        path: The `.pth` file; its folder is created if needed.
    """
    state = official_names(student.backbone.state_dict())
    weights = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        torch.save({STATE: weights, CLIP: _clip(student.grid)}, file)


def load_exported(
    folder: Path, *, q_pool: int | None = None, drop_path: float | None = None
) -> Student:
    """A student from an export, all weights matched by name and shape.

    Args:
        folder: Where `export` wrote.
        q_pool: 3 for fine-tuning as Hiera does; None keeps what pre-training used. A plain ViT
            pools no queries and ignores it.
        drop_path: Rate of the last block; None keeps what pre-training used.

    Returns:
        In evaluation mode on the CPU, read after its last block; its `backbone` is the timm
        model.

    Raises:
        UsageError: If a file is missing.
        DamagedError: If a file cannot be read, or weights and config do not belong together.
    """
    content = read_config(folder)
    try:
        student = _empty(content, Grid(**content[CLIP]), q_pool, drop_path)
        student.backbone.load_state_dict(load((folder / WEIGHTS).read_bytes()))
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise _damaged(folder, error) from error
    return student.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """What the `config.json` of an export says.

    Args:
        folder: Where `export` wrote.

    Raises:
        UsageError: If a file is missing.
        DamagedError: If it is no JSON.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UsageError(
                f"no {name} in {folder}: name the `export` folder of a run (it holds "
                f"{CONFIG} and {WEIGHTS})"
            )
    try:
        content: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise _damaged(folder, error) from error
    return content


def _damaged(folder: Path, error: Exception) -> DamagedError:
    reason = " ".join(str(error).split())[:200]
    return DamagedError(
        f"the export in {folder} cannot be loaded ({reason}): run `kdhiera distill` "
        "again, which exports the run from its last checkpoint"
    )


def _write_text(path: Path, text: str) -> None:
    write_atomic(path, text.encode())


def _built_as(student: Student, config: StudentConfig) -> dict[str, Any]:
    """The timm class, its arguments and its pixels."""
    pixels = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    if isinstance(student, VitStudent):
        return {
            "architecture": vit_name(config.size),
            "class": "timm.models.vision_transformer.VisionTransformer",
            "pretrained_cfg": vit_cfg(student.grid),
            "model_args": vit_args(config, student.grid),
            "pixels": {"layout": _VIT_PIXELS, **pixels},
        }
    return {
        "architecture": hiera_name(config.size),
        "class": "timm.models.hiera.Hiera",
        "pretrained_cfg": hiera_cfg(student.grid),
        "model_args": hiera_args(config, student.grid, q_pool=student.backbone.q_pool),
        "pixels": {"layout": _HIERA_PIXELS, **pixels},
    }


def _empty(
    content: Mapping[str, Any], grid: Grid, q_pool: int | None, drop_path: float | None
) -> Student:
    """What `_built_as` described, without its weights."""
    arguments = dict(content["model_args"])
    if drop_path is not None:
        arguments["drop_path_rate"] = drop_path
    kind = content.get("kind", "hiera")  # the first exports named none
    if kind == "vit":
        backbone = VisionTransformer(**arguments)
        backbone.pos_embed.requires_grad_(False)  # fixed, as `vit.build` makes it
        return VitStudent(backbone, grid)
    if kind != "hiera":
        raise ValueError(f"unknown kind of student {kind!r}")
    if q_pool is not None:
        arguments["q_pool"] = q_pool
    return HieraStudent(Hiera(**arguments), grid)


def _clip(grid: Grid) -> dict[str, int]:
    return {"num_frames": grid.num_frames, "height": grid.height, "width": grid.width}
