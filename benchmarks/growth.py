"""Figure 10: adding one layer to a finished cache against extracting everything again.

On one CPU, part by part, the steps taken in turn: everything, everything but a layer, that layer
alone. Its share is what the arithmetic asks for: decoding and the layer's own teacher, against
decoding and both teachers.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import publish
from kdhiera.config import RunConfig, load
from kdhiera.data.clip import Clip, ClipRequest
from kdhiera.data.ordered import decode_samples
from kdhiera.data.patterns import expand
from kdhiera.data.sandbox import Sandbox
from kdhiera.data.shards import ShardIndex, index_shard, read_shard
from kdhiera.featurize import Featurizer
from kdhiera.progress import make_progress
from kdhiera.stages.assemble import columns_of, decode_limits, featurizer_of
from kdhiera.stages.extract_teachers import extract
from kdhiera.stages.extraction.plan import identify
from kdhiera.stages.extraction.worker import PartExtractor, PartTask

ROUNDS = 5
NUM_CLIPS = 48
TEACHER, LAYER = "image", "12"


def run() -> None:
    """Time whole parts, parts without a layer and that layer, and the arithmetic alone."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        everything = load("configs/demo.yaml", [f"cache.dir={folder}/all", "ray.enabled=false"])
        shard = expand(everything.data.shards)[-1]
        everything = everything.model_copy(
            update={"data": everything.data.model_copy(update={"shards": (shard,)})}
        )
        index = index_shard(shard)
        _measure(Path(folder), everything, replace(index, samples=index.samples[:NUM_CLIPS]))


def _measure(folder: Path, everything: RunConfig, index: ShardIndex) -> None:
    grown = everything.model_copy(
        update={"cache": everything.cache.model_copy(update={"dir": f"{folder}/grown"})}
    )
    configs = {"everything": everything, "but a layer": _without_layer(grown), "a layer": grown}
    with make_progress() as progress:  # makes the caches, and view 0 of the shard
        for name in ("everything", "but a layer", "a layer"):
            one = configs[name].views.model_copy(update={"num": 1})
            extract(configs[name].model_copy(update={"views": one}), progress=progress)
    configs = {name: identify(config).config for name, config in configs.items()}
    extractors = {
        name: PartExtractor(config, stop=threading.Event(), on_counts=lambda *_: None)
        for name, config in configs.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*configs, "decoding alone")}
    featurizer = featurizer_of(configs["everything"], device=torch.device("cpu"))
    try:
        for view in range(1, ROUNDS + 1):
            for name, config in configs.items():
                task = PartTask(
                    shard=index, view=view, base=name != "a layer", columns=columns_of(config)
                )
                began = time.perf_counter()
                extractors[name].run(task)
                seconds[name].append(time.perf_counter() - began)
            clips, decoding = decode_alone(everything, index, view)
            seconds["decoding alone"].append(decoding)
            for name, layers in _layers(everything).items():
                taken = _teach(featurizer, clips, layers, everything.extract.batch_size)
                seconds.setdefault(f"{name} alone", []).append(taken)
    finally:
        for extractor in extractors.values():
            extractor.close()
    median = {name: statistics.median(samples) for name, samples in seconds.items()}
    ratio = median["a layer"] / median["everything"]
    teachers = median["its teacher alone"], median["both teachers alone"]
    share = (median["decoding alone"] + teachers[0]) / (median["decoding alone"] + teachers[1])
    publish(
        "growth",
        {f"{name}, {len(index.samples)} clips": samples for name, samples in seconds.items()},
        {
            "a layer / everything": ratio,
            "its teacher's share": share,
            "a layer / its share of everything": ratio / share,
        },
    )


def _without_layer(config: RunConfig) -> RunConfig:
    teacher = config.teachers[TEACHER]
    fewer = teacher.model_copy(update={"layers": tuple(n for n in teacher.layers if n != LAYER)})
    return config.model_copy(update={"teachers": {**config.teachers, TEACHER: fewer}})


def _layers(config: RunConfig) -> dict[str, Mapping[str, Sequence[str]]]:
    both = {name: teacher.layers for name, teacher in config.teachers.items()}
    return {"its teacher": {TEACHER: [LAYER]}, "both teachers": both}


def decode_alone(config: RunConfig, index: ShardIndex, view: int) -> tuple[np.ndarray, float]:
    """Good clips of a shard and the seconds that one child took to decode them."""
    with Sandbox(decode_limits(config.decode), num_children=1) as sandbox:
        samples = list(read_shard(index, video_extensions=config.data.video_extensions))
        wanted = [
            (s, ClipRequest(uid=s.uid, view=view, policy=config.view_policy)) for s in samples
        ]
        for _ in decode_samples(sandbox, wanted[:1], in_flight=1):  # the child has started
            pass
        began = time.perf_counter()
        clips = [
            outcome.frames
            for _, outcome in decode_samples(sandbox, wanted, in_flight=8)
            if isinstance(outcome, Clip)
        ]
        return np.stack(clips), time.perf_counter() - began


def _teach(
    featurizer: Featurizer,
    clips: np.ndarray,
    layers: Mapping[str, Sequence[str]],
    batch_size: int,
) -> float:
    """Seconds of the teachers' forward passes; scores only where all of a row is made."""
    began = time.perf_counter()
    for part in np.array_split(clips, -(-len(clips) // batch_size)):
        featurizer.teach(part, layers=layers, with_scores=len(layers) > 1)
    return time.perf_counter() - began
