"""The model card of an export: what it is, and code that loads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kdhiera import __version__
from kdhiera.student.base import Student
from kdhiera.student.vit import VitStudent

_CARD = """# {name}

A {size} {model} ({parameters:,} parameters) for clips of {num_frames} frames,
{height} x {width} px, pre-trained by distillation with kdhiera {version}. It returns {width_out}
pooled features a clip.

```python
import json

import torch
from safetensors.torch import load_file
from {module} import {architecture}

with open("config.json") as file:
    config = json.load(file)
model = {architecture}(**config["model_args"])
model.load_state_dict(load_file("model.safetensors"))
model.eval()

clips = torch.zeros(1, {num_frames}, {height}, {width}, 3, dtype=torch.uint8)  # RGB
mean, std = torch.tensor(config["pixels"]["mean"]), torch.tensor(config["pixels"]["std"])
{pixels}
with torch.no_grad():
    features = model(pixels)  # [1, {width_out}]
```

{note} The final norm was not trained.

## Made from

```json
{provenance}
```
"""

_HIERA = {
    "model": "Hiera",
    "module": "timm.models.hiera",
    "architecture": "Hiera",
    "pixels": "pixels = ((clips / 255 - mean) / std).permute(0, 4, 1, 2, 3)",
    "note": """The same weights load with `q_pool=3`, Hiera's own setting for fine-tuning; pooled
features of the two differ, and these were pre-trained with `q_pool={q_pool}`.""",
}

_VIT = {
    "model": "plain ViT",
    "module": "timm.models.vision_transformer",
    "architecture": "VisionTransformer",
    "pixels": """pixels = ((clips / 255 - mean) / std).unflatten(1, (-1, 2))  # slots of two frames
pixels = pixels.permute(0, 2, 5, 1, 3, 4).flatten(3, 4).flatten(1, 2)  # one tall image""",
    "note": """Two frames are the six channels of a patch; slots of two frames are stacked into one
image. The position embedding is fixed: sines and cosines along time, height and width.""",
}


def model_card(
    student: Student, *, name: str, size: str, parameters: int, provenance: Mapping[str, Any]
) -> str:
    """Markdown whose code runs in the folder of the export.

    Args:
        student: What is exported.
        name: Title.
        size: Its named size.
        parameters: How many it has.
        provenance: JSON values that say where the weights come from.
    """
    words = _VIT if isinstance(student, VitStudent) else _HIERA
    grid = student.grid
    values = {
        **words,
        "note": words["note"].format(q_pool=getattr(student.backbone, "q_pool", None)),
    }
    return _CARD.format(
        **values,
        name=name,
        size=size,
        parameters=parameters,
        num_frames=grid.num_frames,
        height=grid.height,
        width=grid.width,
        version=__version__,
        width_out=student.num_features,
        provenance=json.dumps(provenance, indent=2),
    )
