"""The image teacher of the demo: what its scores cost, and what another position grid would."""

from __future__ import annotations

import math
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import av
import numpy as np
import torch
from torch import Tensor

from benchmarks.report import publish
from kdhiera.config import load
from kdhiera.grid import Grid
from kdhiera.teachers import timm_image
from kdhiera.teachers.base import Teacher, TeacherOutput
from kdhiera.teachers.build import build_teacher
from kdhiera.teachers.positions import Resampling, timm_resampling
from kdhiera.teachers.scores import SCORE_SOURCES

GRID = Grid(num_frames=4, height=128, width=128)
CLIPS = 4
RUNS = 7


def run() -> None:
    """CPU seconds of features and scores; score sources and position rules on real clips."""
    torch.set_num_threads(1)
    clips = _clips(Path("demo-data/shards/test-000000.tar"))
    teacher = _teacher(timm_resampling)
    layers = ["6", "9", "12"]
    seconds = {
        "layers 6, 9, 12": _timed(lambda: teacher(clips, layers, None)),
        "layer 6 alone": _timed(lambda: teacher(clips, ["6"], None)),
        **{
            f"layers 6, 9, 12 and {source}": _timed(partial(teacher, clips, layers, source))
            for source in SCORE_SOURCES
        },
        "cls_attention alone": _timed(lambda: teacher(clips, [], "cls_attention")),
    }
    publish("teachers", seconds, _sources(teacher, clips) | _rules(teacher, clips))


def _sources(teacher: Teacher, clips: Tensor) -> dict[str, float]:
    maps = {s: _scores(teacher(clips, [], s)).flatten(2).double() for s in SCORE_SOURCES}
    figures = {"entropy of a uniform slot": math.log(GRID.tokens[1] * GRID.tokens[2])}
    for source, scores in maps.items():
        entropy = -(scores * scores.log()).sum(-1).mean()
        pair = torch.stack([scores.flatten(), maps["cls_attention"].flatten()])
        figures |= {
            f"{source}: entropy": float(entropy),
            f"{source}: largest share": float(scores.amax(-1).mean()),
            f"{source}: correlation with cls_attention": float(torch.corrcoef(pair)[0, 1]),
        }
    return figures


def _rules(teacher: Teacher, clips: Tensor) -> dict[str, float]:
    right = teacher(clips, ["6", "12"], "cls_attention")
    figures: dict[str, float] = {}
    for rule in (Resampling.BICUBIC_ANTIALIASED, Resampling.BILINEAR_CORNERS):
        other = _teacher(partial(_always, rule))(clips, ["6", "12"], "cls_attention")
        for layer, feature in right.features.items():
            difference = other.features[layer] - feature
            spread = (feature - feature.mean((0, 1, 2, 3))).square().sum()
            figures |= {
                f"{rule}: largest difference, block {layer}": float(difference.abs().max()),
                f"{rule}: share of variance, block {layer}": float(
                    difference.square().sum() / spread
                ),
            }
        pair = torch.stack([_scores(other).flatten(), _scores(right).flatten()])
        figures[f"{rule}: correlation of scores"] = float(torch.corrcoef(pair)[0, 1])
    return figures


def _teacher(rule: Callable[[str], Resampling]) -> Teacher:
    """The demo's image teacher in fp32, its positions resampled by `rule`."""
    config = load("configs/demo.yaml").teachers["image"].model_copy(update={"precision": "fp32"})
    with mock.patch.object(timm_image, "timm_resampling", rule):
        return build_teacher(config, grid=GRID, device=torch.device("cpu"))


def _always(rule: Resampling, _: str) -> Resampling:
    return rule


def _scores(output: TeacherOutput) -> Tensor:
    assert output.scores is not None, "a source of scores was named"
    return output.scores


def _clips(shard: Path) -> Tensor:
    """The first frames of the shard's first videos, cut to the grid."""
    clips: list[np.ndarray] = []
    with tarfile.open(shard) as tar:
        for member in tar:
            if member.name.endswith(".mp4") and len(clips) < CLIPS:
                with av.open(tar.extractfile(member), "r") as video:
                    frames = [f.to_ndarray(format="rgb24") for f in video.decode(video=0)]
                clips.append(np.stack(frames[: GRID.num_frames])[:, : GRID.height, : GRID.width])
    return torch.from_numpy(np.stack(clips))


def _timed(work: Callable[[], object]) -> list[float]:
    work()
    samples = []
    for _ in range(RUNS):
        began = time.process_time()
        work()
        samples.append(time.process_time() - began)
    return samples
