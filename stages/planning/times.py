"""Seconds of a clip: decoding, teachers, an optimiser step, as the run would do them here.

A CPU is timed with as many workers at it as extraction will have, for they share its caches
and its memory; of several GPUs one is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kdhiera.cache.rows import KeptRows
from kdhiera.config import RunConfig
from kdhiera.data.clip import Clip
from kdhiera.data.sandbox import Sandbox
from kdhiera.data.shards import Sample, ShardIndex
from kdhiera.devices import resolve_device, resolve_precision
from kdhiera.featurize import Featurizer, TargetKey
from kdhiera.masking import MaskSpec
from kdhiera.progress import Progress
from kdhiera.stages.assemble import decode_limits
from kdhiera.stages.clips import clips_at
from kdhiera.stages.distill import student_of
from kdhiera.stages.distillation.source import open_cache
from kdhiera.training.batches import ClipSource, Prefetcher, batches
from kdhiera.training.optim import build_schedule
from kdhiera.training.step import Learner

_ROUNDS = 3
_ENOUGH_SECONDS = 20.0  # no further round of a timing after that
_STEPS, _WARM_STEPS = 12, 2

Frames = UInt8[np.ndarray, "b f y x 3"]


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Who extracts.

    Args:
        device: What a worker computes on.
        workers: Workers of the run.
        here: Those of them that this machine is at the same time.
        cpus: CPUs of a worker.
        children: Decoding processes of a worker.
    """

    device: torch.device
    workers: int
    here: int
    cpus: int
    children: int

    @property
    def on_cpu(self) -> bool:
        """Whether teachers, decoding and storing share the same CPUs."""
        return self.device.type == "cpu"

    def each(self, seconds_here: float) -> float:
        """What a clip takes all workers, where those that are here take `seconds_here`."""
        return seconds_here * self.here / self.workers


@dataclass(frozen=True, kw_only=True)
class Work:
    """What extraction puts a clip through.

    Args:
        base: Whether its row is made too, which takes scores.
        layers: Layers that are wanted, as (teacher, layer).
    """

    base: bool
    layers: tuple[TargetKey, ...]

    @property
    def by_teacher(self) -> dict[str, list[str]]:
        """Layers by teacher."""
        found: dict[str, list[str]] = {}
        for teacher, layer in self.layers:
            found.setdefault(teacher, []).append(layer)
        return found


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What a clip takes those workers that are here.

    Args:
        seconds: By the clock, with all of them at it.
        cpu_share: CPU time of this process in that time, of all that the workers' CPUs had;
            small where other processes use them too.
    """

    seconds: float
    cpu_share: float


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Clips of the trial.

    Args:
        clips: Those that decode.
        tried: How many were asked for.
        seconds: To read and decode one again, with all children that are here at it.
    """

    clips: Sequence[tuple[Sample, Clip]]
    tried: int
    seconds: float


def decode_clips(
    config: RunConfig,
    shards: Sequence[ShardIndex],
    fleet: Fleet,
    *,
    num_clips: int,
    progress: Progress,
) -> Decoded:
    """Decode view 0 of samples spread over the shards, twice: the first time warms up.

    Args:
        config: The run.
        shards: Where samples are taken from, evenly.
        fleet: How many children decode.
        num_clips: Clips to try.
        progress: Where progress is shown.
    """
    places = [(shard, i) for shard in shards for i in range(len(shard.samples))]
    count = min(num_clips, len(places))
    wanted = [(places[i * len(places) // count], 0) for i in range(count)]
    children = fleet.children * fleet.here
    bar = progress.start("decode", 2 * count, "clips")
    clips: list[tuple[Sample, Clip]] = []
    seconds = 0.0
    with Sandbox(decode_limits(config.decode), num_children=children) as sandbox:
        for _ in range(2):
            clips.clear()
            began = time.perf_counter()
            for sample, outcome in clips_at(
                config,
                wanted,
                policy=config.view_policy,
                sandbox=sandbox,
                in_flight=2 * children,
            ):
                if isinstance(outcome, Clip):
                    clips.append((sample, outcome))
                progress.advance(bar)
            seconds = (time.perf_counter() - began) / count
    progress.finish(bar)
    return Decoded(clips=clips, tried=count, seconds=seconds)


def time_features(
    featurizer: Featurizer, clips: Sequence[tuple[Sample, Clip]], work: Work, fleet: Fleet
) -> Timing:
    """A clip through teachers, scores, masks and channel statistics.

    Args:
        featurizer: The run's teachers and masks.
        clips: What they are shown, over and over.
        work: What is wanted of them; without a base the units are given.
        fleet: Who works.
    """
    size = min(featurizer.batch_size, len(clips))
    uids = [sample.uid for sample, _ in clips[:size]]
    grid, plan = featurizer.grid, featurizer.plan
    kept = plan.max_kept(grid.slots, grid.units_per_slot)
    units = None if work.base else np.tile(np.arange(kept, dtype=np.int16), (size, 1))

    def one(frames: Frames) -> None:
        featurizer(frames, uids=uids, view=0, layers=work.by_teacher, units=units)

    return _timed(one, clips, size, fleet)


def time_teacher(
    featurizer: Featurizer,
    clips: Sequence[tuple[Sample, Clip]],
    name: str,
    layers: Sequence[str],
    fleet: Fleet,
) -> float:
    """Seconds of a clip through one teacher, with scores if they are its.

    Args:
        featurizer: The run's teachers.
        clips: What it is shown, over and over.
        name: Which teacher.
        layers: Its layers.
        fleet: Who works.
    """
    scores = _scores_of(featurizer, name)

    def one(frames: Frames) -> None:
        featurizer.teachers[name](torch.from_numpy(frames).to(fleet.device), layers, scores)

    return _timed(one, clips, min(featurizer.batch_size, len(clips)), fleet).seconds


def teacher_macs(featurizer: Featurizer, clip: Clip, name: str, layers: Sequence[str]) -> int:
    """Multiply-accumulates of a clip through one teacher, with scores if they are its.

    Convolutions, linear maps and both products of attention, as torch counts them.

    Args:
        featurizer: The run's teachers.
        clip: Any clip.
        name: Which teacher.
        layers: Its layers.
    """
    frames = torch.from_numpy(clip.frames[None]).to(featurizer.device)
    # the counter does not know every fused kernel of attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        featurizer.teachers[name](frames, layers, _scores_of(featurizer, name))
    return int(counter.get_total_flops()) // 2


def time_steps(config: RunConfig) -> dict[float, float]:
    """Seconds of an optimiser step by mask ratio, its batches read from a cache meanwhile.

    Args:
        config: The run, its cache being one of a few clips, which come again and again.

    Raises:
        UsageError: As `distill` does.
    """
    device = resolve_device(config.train.device)
    opened = open_cache(config)
    student, heads, specs = student_of(config, opened)
    learner = Learner(
        student=student,
        heads=heads,
        targets=specs,
        objective=config.objective,
        config=config.train,
        schedule=build_schedule(config.train, _STEPS),
        device=device,
        dtype=resolve_precision(config.train.precision, device),
    )
    source = _Repeated(few=opened.source, num_samples=_STEPS * config.train.batch_size)
    return {
        spec.ratio: _step_seconds(config, learner, source, spec)
        for spec in config.mask_schedule.phases
    }


@dataclass(frozen=True, kw_only=True)
class _Repeated:
    """A `ClipSource` that shows the samples of another again and again."""

    few: ClipSource
    num_samples: int

    def read(self, samples: Int[np.ndarray, " b"], *, view: int) -> KeptRows:
        return self.few.read(samples % self.few.num_samples, view=view)


def _step_seconds(config: RunConfig, learner: Learner, source: ClipSource, spec: MaskSpec) -> float:
    ahead = batches(
        source,
        replace(config.mask_schedule, phases=(spec,)),
        first_step=0,
        num_steps=_STEPS,
        batch_size=config.train.batch_size,
        num_views=1,
        seed=config.train.seed,
    )
    taken: list[float] = []
    pinned = learner.device.type == "cuda"
    with Prefetcher(ahead, depth=config.train.prefetch, pin_memory=pinned) as ready:
        began = time.perf_counter()
        for batch in ready:
            on_device = batch.map(lambda tensor: tensor.to(learner.device, non_blocking=True))
            learner.step(on_device, measure=False)
            _finish(learner.device)
            now = time.perf_counter()
            taken.append(now - began)
            began = now
            if len(taken) > _WARM_STEPS and sum(taken) > _ENOUGH_SECONDS:
                break
    return statistics.median(taken[_WARM_STEPS:])


def _timed(
    work: Callable[[Frames], None],
    clips: Sequence[tuple[Sample, Clip]],
    size: int,
    fleet: Fleet,
) -> Timing:
    """A clip, median over rounds in which every worker here has `size` clips."""
    frames = np.stack([clip.frames for _, clip in clips])
    shares = [
        np.take(frames, range(i * size, (i + 1) * size), axis=0, mode="wrap")
        for i in range(fleet.here)
    ]
    taken: list[float] = []
    busy = time.process_time()
    with ThreadPoolExecutor(
        fleet.here, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
    ) as pool:
        while len(taken) < _ROUNDS and sum(taken) < _ENOUGH_SECONDS:
            began = time.perf_counter()
            list(pool.map(work, shares))
            _finish(fleet.device)
            taken.append(time.perf_counter() - began)
    cpus = fleet.here * torch.get_num_threads()
    return Timing(
        seconds=statistics.median(taken) / (size * fleet.here),
        cpu_share=min(1.0, (time.process_time() - busy) / (sum(taken) * cpus)),
    )


def _scores_of(featurizer: Featurizer, name: str) -> str | None:
    scoring = name == featurizer.score_teacher and featurizer.score_source != "uniform"
    return featurizer.score_source if scoring else None


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
