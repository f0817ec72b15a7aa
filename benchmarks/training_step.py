"""Figure 2: a training step fed from the cache against the same step on a batch in memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

from benchmarks.report import publish
from kdhiera.config import RunConfig, load
from kdhiera.devices import resolve_device, resolve_precision
from kdhiera.stages.distill import BLOCK_ROWS, student_of
from kdhiera.stages.distillation.source import Opened, open_cache
from kdhiera.training.batches import Batch, Prefetcher, batches
from kdhiera.training.optim import build_schedule
from kdhiera.training.step import Learner

ROUNDS, STEPS = 5, 10


def run() -> None:
    """Time steps from the cache and on one batch, in turn."""
    config = load("configs/demo.yaml")
    opened = open_cache(config)
    device = resolve_device(config.train.device)
    learner, ahead = learner_of(config, opened), batches_of(config, opened)
    cached, memory, waited = [], [], []
    with Prefetcher(ahead, depth=config.train.prefetch) as ready:
        source = iter(ready)
        held = next(source).map(lambda t: t.to(device))
        learner.step(held, measure=False)
        for _ in range(ROUNDS):
            wait = 0.0
            began = time.perf_counter()
            for _ in range(STEPS):
                asked = time.perf_counter()
                batch = next(source)
                wait += time.perf_counter() - asked
                learner.step(batch.map(lambda t: t.to(device)), measure=False)
            cached.append((time.perf_counter() - began) / STEPS)
            waited.append(wait / STEPS)
            began = time.perf_counter()
            for _ in range(STEPS):
                learner.step(held, measure=False)
            memory.append((time.perf_counter() - began) / STEPS)
    publish(
        "training_step",
        {"step from the cache": cached, "same step in memory": memory, "waiting for data": waited},
        {
            "cache / memory": statistics.median(cached) / statistics.median(memory),
            "data_wait": statistics.median(waited) / statistics.median(cached),
            "clips/s": config.train.batch_size / statistics.median(cached),
        },
    )


def learner_of(config: RunConfig, opened: Opened) -> Learner:
    """A fresh learner of what was opened."""
    student, heads, specs = student_of(config, opened)
    device = resolve_device(config.train.device)
    return Learner(
        student=student,
        heads=heads,
        targets=specs,
        objective=config.objective,
        config=config.train,
        schedule=build_schedule(config.train, 1000),
        device=device,
        dtype=resolve_precision(config.train.precision, device),
    )


def batches_of(config: RunConfig, opened: Opened) -> Iterator[Batch]:
    """Its batches from the first step on."""
    return batches(
        opened.source,
        config.mask_schedule,
        first_step=0,
        num_steps=1000,
        batch_size=config.train.batch_size,
        num_views=config.views.num,
        seed=0,
        block=BLOCK_ROWS,
    )
