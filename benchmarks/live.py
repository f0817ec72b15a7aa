"""Figure 3: a step with live teachers against a step from the cache, and the arithmetic of both.

On one CPU, so that nothing overlaps for free: there a live step is decoding, teachers and
student one after the other, and a cached step ought to be the student alone.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from benchmarks.extraction import decode_part
from benchmarks.report import publish
from benchmarks.training_step import batches_of, learner_of
from kdhiera.config import RunConfig, load
from kdhiera.data.patterns import expand
from kdhiera.data.shards import ShardIndex, index_shard
from kdhiera.stages.assemble import featurizer_of
from kdhiera.stages.distillation.source import Opened, open_source

ROUNDS = 5
RATIOS = (0.8, 0.9)
CPU = torch.device("cpu")


def run() -> None:
    """Time live steps, cached steps and their pieces in turn."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {}
    figures: dict[str, float] = {}
    for ratio in RATIOS:
        with contextlib.ExitStack() as stack:
            for name, samples in _measured(ratio, stack).items():
                seconds[f"ratio {ratio:g}: {name}"] = samples
        middle = {
            name: statistics.median(seconds[f"ratio {ratio:g}: {name}"])
            for name in ("live step", "cached step", "decoding", "teachers", "student")
        }
        measured = middle["live step"] / middle["cached step"]
        whole = middle["decoding"] + middle["teachers"] + middle["student"]
        arithmetic = whole / middle["student"]
        figures[f"ratio {ratio:g}: live / cached"] = measured
        figures[f"ratio {ratio:g}: (decoding + teachers + student) / student"] = arithmetic
        figures[f"ratio {ratio:g}: measured / arithmetic"] = measured / arithmetic
    publish("live", seconds, figures)


def _measured(ratio: float, stack: contextlib.ExitStack) -> dict[str, list[float]]:
    """Seconds of a step of `train.batch_size` clips, and of its pieces."""
    cached = load("configs/demo.yaml", [f"objective.ratio={ratio}"])
    shard = expand(cached.data.shards)[-1]  # a live run decodes all of its clips once at first
    live = load(
        "configs/demo.yaml",
        [f"objective.ratio={ratio}", "cache.mode=live", f"data.shards=[{shard}]"],
    )
    steps = {
        "live step": _steps(live, stack.enter_context(open_source(live, None))),
        "cached step": _steps(cached, stack.enter_context(open_source(cached, None))),
    }
    clips, _ = decode_part(cached, _index(cached, shard), 0)
    featurizer = featurizer_of(cached, device=CPU)
    layers = {name: teacher.layers for name, teacher in cached.teachers.items()}
    learner = learner_of(cached, stack.enter_context(open_source(cached, None)))
    held = next(iter(batches_of(cached, stack.enter_context(open_source(cached, None)))))

    def teach() -> None:
        for part in np.array_split(clips, -(-len(clips) // cached.extract.batch_size)):
            featurizer.teach(part, layers=layers, with_scores=True)

    pieces: dict[str, Callable[[], object]] = {
        **steps,
        "teachers": teach,
        "student": lambda: learner.step(held, measure=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*pieces, "decoding")}
    for piece in pieces.values():
        piece()
    for view in range(1, ROUNDS + 1):
        for name, piece in pieces.items():
            began = time.perf_counter()
            piece()
            seconds[name].append(time.perf_counter() - began)
        seconds["decoding"].append(decode_part(cached, _index(cached, shard), view)[1])
    return seconds


def _index(config: RunConfig, path: str) -> ShardIndex:
    """As many samples of a shard as a batch has."""
    index = index_shard(path)
    return replace(index, samples=index.samples[: config.train.batch_size])


def _steps(config: RunConfig, opened: Opened) -> Callable[[], object]:
    """One whole step a call: the batch is made, then learnt from."""
    learner, ahead = learner_of(config, opened), batches_of(config, opened)
    return lambda: learner.step(next(ahead), measure=False)
