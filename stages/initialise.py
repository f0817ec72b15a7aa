"""A config fit for somebody's own shards: some videos are looked at, the rest follows.

The text is written with comments that say why each number is what it is, so that it can be
changed by someone who reads it.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from kdhiera.addresses import scheme_of
from kdhiera.config import DecodeConfig
from kdhiera.config.loading import parse_run
from kdhiera.data.clip import Look, LookRequest, VideoInfo, shown
from kdhiera.data.folders import TABLES, extension_of
from kdhiera.data.patterns import expand
from kdhiera.data.sandbox import Sandbox
from kdhiera.data.shards import ShardIndex, index_shards, read_sample
from kdhiera.errors import UsageError
from kdhiera.progress import Progress, counted
from kdhiera.stages.assemble import decode_limits
from kdhiera.stages.clips import labels_at, spread
from kdhiera.stages.initialising.fit import Fit, Seen, Teachers, describe_videos, fit_to, learnt_of
from kdhiera.stages.initialising.text import DEMO_TEACHERS, write_config
from kdhiera.stages.packing.order import EXTENSIONS, REST, WHOLE
from kdhiera.storage import write_atomic

PROBED = 32
MORE_EXTENSIONS = ("ts", "m2ts", "mts", "flv", "ogv", "wmv", "asf", "3gp")
SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
_LABELLED = 500
_NAME = re.compile(r"[^A-Za-z0-9_-]+")


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
    fit = fit_to(seen, teachers)
    relative = not any(os.path.isabs(pattern) for pattern in patterns)
    named = {use: _globs(files, relative=relative) for use, files in shards.items()}
    if WHOLE in named:
        named = {WHOLE: patterns}
    name = _NAME.sub("-", file.stem).strip("-")[:40] or "videos"
    name = name if name[0].isalpha() else f"run-{name}"[:40]
    text = write_config(name, named, seen, fit, teachers)
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
    looks: list[VideoInfo] = []
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
            look = sandbox.look(sample.video, LookRequest(indices=())).result()
            failure = look.failure if isinstance(look, Look) else look
            if failure is not None:
                failures.append(f"{shown(sample.key)}: {failure.message}")
            elif isinstance(look, Look) and look.info is not None:
                looks.append(look.info)
    progress.finish(bar)
    if not looks:
        first = f" ({failures[0]})" if failures else ""
        raise UsageError(
            f"none of {counted(len(picked), 'sample')} that were looked at has a video that can be "
            f"read{first}: pack the videos anew with `kdhiera pack`, which lists what is wrong"
        )
    return Seen(
        num_samples=len(places),
        num_learnt=sum(len(shard.samples) for shard in learnt_of(indices)),
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
            f"labels ({', '.join(map(shown, seen.classes))}), but not the three splits of an "
            "evaluation: pack with --split validation=0.1 --split test=0.1, and the config gets an "
            "`evaluate` section"
        )
