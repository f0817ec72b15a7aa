"""Figure 1: extraction in steady state against its arithmetic, on one CPU.

One CPU, so that nothing overlaps for free: the floor is the teachers' forward alone plus
decoding alone, and what extraction adds is copying, masks, encoding, writing, committing.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import publish
from kdhiera.cache.commit import Cache
from kdhiera.config import RunConfig, load
from kdhiera.data.clip import Clip, ClipRequest
from kdhiera.data.ordered import decode_samples
from kdhiera.data.patterns import expand
from kdhiera.data.sandbox import Sandbox
from kdhiera.data.shards import ShardIndex, index_shard, read_shard
from kdhiera.progress import make_progress
from kdhiera.stages.assemble import columns_of, decode_limits, featurizer_of
from kdhiera.stages.extract_teachers import extract
from kdhiera.stages.extraction.worker import PartExtractor, PartTask

ROUNDS = 5
NUM_CLIPS = 48


def run() -> None:
    """Time whole parts, teachers alone and decoding alone, in turn."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = load(
            "configs/demo.yaml",
            [f"cache.dir={folder}/cache", "ray.enabled=false", "views.num=1000"],
        )
        _measure(config)


def _measure(config: RunConfig) -> None:
    index = index_shard(expand(config.data.shards)[-1])
    with make_progress() as progress:
        summary = extract(
            config.model_copy(
                update={
                    "data": config.data.model_copy(update={"shards": (index.path,)}),
                    "views": config.views.model_copy(update={"num": 1}),
                }
            ),
            progress=progress,
        )
    cache = Cache.open(Path(config.cache.dir))
    resolved = {
        name: t.model_copy(
            update={
                "precision": (cache.columns.identity(f"{name}.{t.layers[0]}.int8") or {})[
                    "precision"
                ]
            }
        )
        for name, t in config.teachers.items()
    }
    config = config.model_copy(update={"teachers": resolved})
    extractor = PartExtractor(config, stop=threading.Event(), on_counts=lambda *_: None)
    featurizer = featurizer_of(config, device=torch.device("cpu"))
    layers = {name: t.layers for name, t in config.teachers.items()}
    index = replace(index, samples=index.samples[:NUM_CLIPS])
    whole, teachers, decoding = [], [], []
    try:
        for view in range(1, ROUNDS + 1):
            task = PartTask(shard=index, view=view, base=True, columns=columns_of(config))
            began = time.perf_counter()
            extractor.run(task)
            whole.append(time.perf_counter() - began)
            clips, seconds = decode_part(config, index, view)
            decoding.append(seconds)
            began = time.perf_counter()
            for part in np.array_split(clips, -(-len(clips) // config.extract.batch_size)):
                featurizer.teach(part, layers=layers, with_scores=True)
            teachers.append(time.perf_counter() - began)
    finally:
        extractor.close()
    floor = statistics.median(teachers) + statistics.median(decoding)
    publish(
        "extraction",
        {
            f"one part, {len(index.samples)} clips": whole,
            "teachers' forward alone": teachers,
            "decoding alone": decoding,
        },
        {
            "part / (teachers + decoding)": statistics.median(whole) / floor,
            "clips/s on one CPU": len(index.samples) / statistics.median(whole),
            "bytes a clip view": summary.num_bytes / max(summary.rows["ok"], 1),
        },
    )


def decode_part(config: RunConfig, index: ShardIndex, view: int) -> tuple[np.ndarray, float]:
    """Clips of a view of a shard, and the seconds that one child took to decode them."""
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
