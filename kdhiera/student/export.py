"""A trained student as three files that timm and safetensors alone can load.

config.json         arguments of `timm.models.hiera.Hiera`, clip size, pixel scaling
model.safetensors   its weights, float32
README.md           what it is and how to load it

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

from kdhiera import __version__
from kdhiera.config import StudentConfig
from kdhiera.errors import DamagedError, UsageError
from kdhiera.grid import Grid
from kdhiera.storage import atomic_file, write_atomic
from kdhiera.student.hiera import IMAGENET_MEAN, IMAGENET_STD, Student, hiera_args
from kdhiera.student.official import CLIP, STATE, official_names

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"

_CARD = """# {name}

A {size} Hiera ({parameters:,} parameters) for clips of {num_frames} frames, {height} x {width} px,
pre-trained by distillation with kdhiera {version}. It returns {width_out} pooled features a clip.

```python
import json

import torch
from safetensors.torch import load_file
from timm.models.hiera import Hiera

with open("config.json") as file:
    config = json.load(file)
model = Hiera(**config["model_args"])
model.load_state_dict(load_file("model.safetensors"))
model.eval()

clips = torch.zeros(1, {num_frames}, {height}, {width}, 3, dtype=torch.uint8)  # RGB
mean, std = torch.tensor(config["pixels"]["mean"]), torch.tensor(config["pixels"]["std"])
pixels = ((clips / 255 - mean) / std).permute(0, 4, 1, 2, 3)
with torch.no_grad():
    features = model(pixels)  # [1, {width_out}]
```

The same weights load with `q_pool=3`, Hiera's own setting for fine-tuning; pooled features of the
two differ, and these were pre-trained with `q_pool={q_pool}`. The final norm was not trained.

## Made from

```json
{provenance}
```
"""


def export(
    student: Student,
    config: StudentConfig,
    folder: Path,
    *,
    name: str,
    provenance: Mapping[str, Any],
) -> None:
    """Write a student's backbone for others to load.

    Args:
        student: Trained or not.
        config: What it was built from.
        folder: Created if needed; files of an earlier export are replaced.
        name: Title of the model card.
        provenance: JSON values that say where the weights come from (teachers, data, run).
    """
    backbone, grid = student.backbone, student.grid
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().cpu().contiguous() for k, v in backbone.state_dict().items()}
    content = {
        "architecture": "timm.models.hiera.Hiera",
        "model_args": hiera_args(config, grid, q_pool=backbone.q_pool),
        CLIP: _clip(grid),
        "pixels": {"layout": "b c t h w", "mean": IMAGENET_MEAN, "std": IMAGENET_STD},
        "size": config.size,
        "provenance": {"kdhiera": __version__, **provenance},
    }
    card = _CARD.format(
        name=name,
        size=config.size,
        parameters=sum(value.numel() for value in weights.values()),
        num_frames=grid.num_frames,
        height=grid.height,
        width=grid.width,
        version=__version__,
        width_out=student.num_features,
        q_pool=backbone.q_pool,
        provenance=json.dumps(content["provenance"], indent=2),
    )
    write_atomic(folder / WEIGHTS, save(weights))
    write_atomic(folder / CONFIG, (json.dumps(content, indent=2) + "\n").encode())
    write_atomic(folder / CARD, card.encode())


def export_hiera(student: Student, path: Path) -> None:
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
        q_pool: 3 for fine-tuning as Hiera does; None keeps what pre-training used.
        drop_path: Rate of the last block; None keeps what pre-training used.

    Returns:
        In evaluation mode on the CPU, read at `stage4.end`; its `backbone` is the timm
        Hiera.

    Raises:
        UsageError: If a file is missing.
        DamagedError: If a file cannot be read, or weights and config do not belong together.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UsageError(
                f"no {name} in {folder}: name the `export` folder of a run (it holds "
                f"{CONFIG} and {WEIGHTS})"
            )
    try:
        content = json.loads((folder / CONFIG).read_text())
        arguments = dict(content["model_args"])
        grid = Grid(**content[CLIP])
        if q_pool is not None:
            arguments["q_pool"] = q_pool
        if drop_path is not None:
            arguments["drop_path_rate"] = drop_path
        backbone = Hiera(**arguments)
        backbone.load_state_dict(load((folder / WEIGHTS).read_bytes()))
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DamagedError(
            f"the export in {folder} cannot be loaded ({reason}): export the run again"
        ) from error
    return Student(backbone, grid).eval()


def _clip(grid: Grid) -> dict[str, int]:
    return {"num_frames": grid.num_frames, "height": grid.height, "width": grid.width}
