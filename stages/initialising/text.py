"""The text of a config: every number with the reason why it is what it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from kdhiera.grid import UNIT_PX
from kdhiera.progress import counted
from kdhiera.stages.initialising.fit import Fit, Seen, Teachers, describe_videos, learnt_of
from kdhiera.stages.packing.order import EXTENSIONS

DEMO_TEACHERS = Path("demo-data/teachers")


def write_config(
    name: str,
    shards: Mapping[str, Sequence[str]],
    seen: Seen,
    fit: Fit,
    teachers: Teachers,
) -> str:
    """The config's text.

    Args:
        name: Of the run.
        shards: Patterns by use: splits, or all as one.
        seen: What they hold.
        fit: What follows.
        teachers: What it is written for.
    """
    videos = "\n".join(f"#   {line}" for line in describe_videos(seen))
    size, learnt = fit.size, learnt_of(shards)
    short = "true # frames repeat in them" if fit.allow_short else "false"
    blocks = [
        f"# Written by `kdhiera init` after a look at {counted(seen.num_shards, 'shard')} with "
        f"{counted(seen.num_samples, 'sample')}:\n{videos}\n"
        "# `kdhiera config show FILE` prints all settings; `train.epochs=100` behind a command\n"
        "# overrides one.\n"
        f"name: {name}\nrun_dir: runs/{name}\n",
        "data:\n"
        f"  shards: {_yaml(learnt)}\n"
        + (
            f"  video_extensions: {_yaml((*EXTENSIONS, *seen.extensions))}\n"
            if seen.extensions
            else ""
        ),
        f"# Height and width are multiples of {UNIT_PX}; crops of the videos are scaled to them.\n"
        f"clip: {{num_frames: {fit.num_frames}, height: {size}, width: {size}}}\n",
        "views:\n"
        f"  num: {fit.num_views} # views of every video that are cached and shown in turn\n"
        f"  frame_stride: {fit.frame_stride} # a clip spans {fit.span_seconds:.1f} s; "
        f"{100 * fit.share_long_enough:.0f} % of the videos are as long\n"
        f"  allow_short: {short}\n"
        "  crop: random_resized\n"
        "  crop_scale: [0.5, 1.0]\n"
        "  flip: false # true mirrors every second view: not where left and right mean something\n",
        _TEACHERS[teachers],
        "scores: {teacher: image, source: cls_attention} # what masks are drawn from\n",
        "masks: {strategies: [attention], ratio: 0.8, draws: 2} # what training may show\n",
        f"cache: {{dir: caches/{name}, encoding: int8}} # a folder, or s3://bucket/prefix\n",
        _training(fit, teachers),
    ]
    if seen.classes and {"validation", "test"} <= shards.keys():
        blocks.append(
            "evaluate: # of the frozen student, beside a random one and the teachers\n"
            f"  train: {_yaml(shards['train'])}\n"
            f"  validation: {_yaml(shards['validation'])}\n"
            f"  test: {_yaml(shards['test'])}\n"
            f"  labels: {json.dumps(seen.classes)}\n"
            f"  frame_stride: {fit.frame_stride}\n"
        )
    return "\n".join(blocks)


def _yaml(values: Sequence[str]) -> str:
    """A list, or a single value as itself; JSON is YAML."""
    return json.dumps(list(values) if len(values) != 1 else values[0])


def _training(fit: Fit, teachers: Teachers) -> str:
    small = teachers is Teachers.DEMO
    lines = [
        "student: {size: nano, drop_path: 0.0}" if small else "student: {size: base}",
        "",
        "train:",
        f"  epochs: {fit.epochs}",
        f"  batch_size: {fit.batch_size} # clips of a step; at most as many as there are videos",
        f"  lr: {'6.0e-3' if small else '1.5e-4'} # for 256 clips, scaled with the batch size",
        f"  warmup_epochs: {3 if small else 40}",
        *(["  save_every: 5", "  clip_grad: 3.0"] if small else []),
    ]
    return "\n".join(lines) + "\n"


_TEACHERS = {
    Teachers.DEMO: f"""\
teachers: # the demo's: `python -m kdhiera.demo` makes these files (docs/assets.md)
  image: # a ViT-S/14 of DINOv2's architecture
    kind: timm
    model: vit_small_patch14_dinov2
    weights: {DEMO_TEACHERS}/image-vits14.safetensors
    layers: [6, 9, 12] # after 6, 9 and 12 blocks
  video: # TransNetV2, trained on shot transitions
    kind: module
    factory: kdhiera.demo.teachers:transnetv2
    weights: {DEMO_TEACHERS}/transnetv2.pth
    options: {{source: {DEMO_TEACHERS}/transnetv2_pytorch.py}}
    layers: [2, 3]
""",
    Teachers.BASE: """\
teachers: # docs/teachers.md: others, and how to bring weights to a machine without a network
  image: # DINOv2
    kind: timm
    model: vit_base_patch14_dinov2.lvd142m
    # weights: /models/dinov2-base # a file or folder; without it the hub is asked
    layers: [6, 9, 12] # after 6, 9 and 12 blocks
  video: # VideoMAE; pip install 'kdhiera[teachers]'
    kind: transformers
    model: MCG-NJU/videomae-base
    # weights: /models/videomae-base # a file or folder; without it the hub is asked
    layers: [6, 9, 12]
""",
}
