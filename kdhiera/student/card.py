"""The model card of an export: what it is, what made it, and code that loads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_CARD = """---
library_name: timm
license: other
tags: [video, feature-extraction, distillation, kdhiera]
---
# {name}

A {size} {model} ({parameters:,} parameters) for clips of {num_frames} frames,
{height} x {width} px, pre-trained by distillation with kdhiera {version}. It returns
{num_features} pooled features a clip.

```python
import kdhiera  # tells timm what `{architecture}` is
import timm
import torch

model = timm.create_model("local-dir:.", pretrained=True).eval()  # this folder

{pixels}
with torch.no_grad():
    features = model(pixels)  # [1, {num_features}]
```

`num_classes=10` puts a fresh classifier on it, `features_only=True` returns the features of its
{stages}. Without kdhiera, timm and safetensors do:

```python
import json

import torch
from safetensors.torch import load_file
from {module} import {class_name}

with open("config.json") as file:
    config = json.load(file)
model = {class_name}(**config["model_args"])
model.load_state_dict(load_file("model.safetensors"))
model.eval()

{pixels}
with torch.no_grad():
    features = model(pixels)
```

{note} The final norm was not trained.
"""

_PIXELS = """clips = torch.zeros(1, {num_frames}, {height}, {width}, 3, dtype=torch.uint8)  # RGB
mean, std = torch.tensor({mean}), torch.tensor({std})
{layout}"""

_HIERA = {
    "model": "Hiera",
    "stages": "four stages, `[b, c, t, y, x]`",
    "layout": "pixels = ((clips / 255 - mean) / std).permute(0, 4, 1, 2, 3)",
    "note": """The same weights load with `q_pool=3`, Hiera's own setting for fine-tuning; pooled
features of the two differ, and these were pre-trained with `q_pool={q_pool}`, which is the default
here.""",
}

_VIT = {
    "model": "plain ViT",
    "stages": "last blocks",
    "layout": """pixels = ((clips / 255 - mean) / std).unflatten(1, (-1, 2))  # slots of two frames
pixels = pixels.permute(0, 2, 5, 1, 3, 4).flatten(3, 4).flatten(1, 2)  # one tall image""",
    "note": """Two frames are the six channels of a patch; slots of two frames are stacked into one
image. The position embedding is fixed: sines and cosines along time, height and width.""",
}


def model_card(content: Mapping[str, Any], *, measured: str = "") -> str:
    """Markdown whose code runs in the folder of the export.

    Args:
        content: Of the export's `config.json`.
        measured: What an evaluation found, in Markdown; empty if there was none.
    """
    words = _VIT if content["kind"] == "vit" else _HIERA
    module, _, class_name = content["class"].rpartition(".")
    clip, origin = content["clip"], content["provenance"]
    pixels = _PIXELS.format(
        **clip,
        mean=content["pixels"]["mean"],
        std=content["pixels"]["std"],
        layout=words["layout"],
    )
    sections = [
        _CARD.format(
            **clip,
            name=content["name"],
            size=content["size"],
            model=words["model"],
            stages=words["stages"],
            parameters=content["parameters"],
            num_features=content["num_features"],
            architecture=content["architecture"],
            version=origin["kdhiera"],
            module=module,
            class_name=class_name,
            pixels=pixels,
            note=words["note"].format(q_pool=content["model_args"].get("q_pool")),
        ),
        _teachers(origin.get("teachers", {})),
        _data(origin.get("data", {})),
        "## Measured\n\n" + (measured or "Not evaluated yet: `kdhiera evaluate CONFIG`.\n"),
        _licences(origin),
        f"## Everything that decided it\n\n```json\n{json.dumps(origin, indent=2)}\n```\n",
    ]
    return "\n".join(section for section in sections if section)


def _teachers(teachers: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        f"| {name} | {t['model']} | {', '.join(t['layers'])} | {t['weight']:g} | "
        f"{t['weights'] or '-'} | {(t['weights_sha256'] or '-')[:16]} |\n"
        for name, t in teachers.items()
    ]
    head = "| teacher | model | layers | weight of its loss | weights | sha256 begins |\n"
    return f"## Teachers\n\n{head}|---|---|---|---|---|---|\n{''.join(lines)}" if lines else ""


def _data(data: Mapping[str, Any]) -> str:
    if not data:
        return ""
    shards = "\n".join(f"- `{shard}`" for shard in data["shards"])
    return (
        f"## Data\n\n{shards}\n\nTrained on {data['coverage']}, for {data['steps']:,} steps of "
        f"{data['batch_size']} clips, under {data['masks']}.\n"
    )


def _licences(origin: Mapping[str, Any]) -> str:
    """Of what it was made from, which whoever passes it on has to look at."""
    found = {f"teacher {name}": t["licence"] for name, t in origin.get("teachers", {}).items()}
    if "data" in origin:
        found["data"] = origin["data"]["licence"]
    lines = "".join(
        f"- {what}: {licence or 'not stated in the run (`licence` in its config)'}\n"
        for what, licence in found.items()
    )
    return (
        "## Licences\n\nkdhiera is Apache-2.0. These weights were made from other weights and from "
        "videos, and what may be done with them depends on theirs:\n\n" + (lines or "- unknown\n")
    )
