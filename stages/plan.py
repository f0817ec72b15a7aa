"""Before spending: clips, bytes, hours and free space, from a measured trial of a few clips.

On a CPU a worker's decoding, teachers and storing share its cores, and their times add up; on
a GPU they go on side by side, and the slowest counts.
"""

from __future__ import annotations

import heapq
import math
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kdhiera.addresses import scheme_of, without_file_scheme
from kdhiera.cache.encoding import ENCODINGS
from kdhiera.cache.fingerprint import mask_plan_of
from kdhiera.config import RunConfig
from kdhiera.config.videos import ViewsConfig
from kdhiera.devices import resolve_device, threads
from kdhiera.errors import UsageError
from kdhiera.featurize import Featurizer
from kdhiera.progress import Progress
from kdhiera.stages.assemble import columns_of, featurizer_of
from kdhiera.stages.extract_teachers import committed
from kdhiera.stages.extraction.plan import ExtractPlan, look_at, make_plan
from kdhiera.stages.extraction.pool import num_here, num_workers
from kdhiera.stages.extraction.worker import PartTask
from kdhiera.stages.planning.figures import (
    Alternative,
    Extraction,
    PlannedBytes,
    PlannedTeacher,
    RunPlan,
    Space,
    Training,
)
from kdhiera.stages.planning.stored import Stored, store_clips
from kdhiera.stages.planning.times import (
    Decoded,
    Fleet,
    Work,
    decode_clips,
    teacher_macs,
    time_features,
    time_steps,
    time_teacher,
)
from kdhiera.student.macs import visible_macs
from kdhiera.training.loop import num_steps

LEAST_CLIPS = 4


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """What the trial gave, and who will do the rest.

    Args:
        fleet: Who extracts.
        featurizer: The run's teachers, on a worker's device.
        decoded: Clips.
        stored: What they take in a cache.
    """

    fleet: Fleet
    featurizer: Featurizer
    decoded: Decoded
    stored: Stored

    @property
    def decode_seconds(self) -> float:
        """To read and decode a clip, with all workers at it."""
        return self.fleet.each(self.decoded.seconds)

    @property
    def store_seconds(self) -> float:
        """To store a clip, with all workers at it."""
        if self.fleet.on_cpu:
            return self.stored.cpu_seconds / (self.fleet.cpus * self.fleet.workers)
        return self.stored.wall_seconds / self.fleet.workers


def plan_run(config: RunConfig, *, progress: Progress, num_clips: int = 32) -> RunPlan:
    """Try a few clips and say what all of them will take; writes nothing that stays.

    Args:
        config: The run.
        progress: Where progress is shown.
        num_clips: Clips of the trial, spread over the shards, at least 4.

    Raises:
        UsageError: If shards, weights or layers are not there, too few clips decode, or training
            would be refused.
        MismatchError: If the cache was made for another config.
    """
    usual_threads = torch.get_num_threads()
    began = time.perf_counter()
    found = look_at(config)
    start_seconds = time.perf_counter() - began
    config, shards = found.identities.config, found.shards.found
    extract = make_plan(config, found.cache, shards)
    num_samples = sum(len(shard.samples) for shard in shards)
    num_steps(config.train, num_samples)  # what training would refuse is said before the trial
    fleet = _fleet(config)
    decoded = decode_clips(config, shards, fleet, num_clips=num_clips, progress=progress)
    if len(decoded.clips) < LEAST_CLIPS:
        raise UsageError(
            f"{len(decoded.clips)} of {decoded.tried} clips that were tried decode, and the plan "
            f"needs {LEAST_CLIPS}: correct data.shards, views or decode, or raise --clips"
        )
    with tempfile.TemporaryDirectory(prefix="kdhiera-plan-") as name, threads(fleet.cpus):
        base = found.cache.identity if found.cache else dict(found.identities.base)
        began = time.perf_counter()
        featurizer = featurizer_of(config, device=fleet.device, plan=mask_plan_of(base))
        start_seconds += time.perf_counter() - began  # the command loads teachers, then its workers
        stored = store_clips(
            config,
            found.identities,
            base,
            featurizer,
            decoded.clips,
            folder=Path(name),
            progress=progress,
        )
        measured = _Measured(fleet=fleet, featurizer=featurizer, decoded=decoded, stored=stored)
        bar = progress.start("time", 3, "passes")
        extraction = _extraction(
            config, extract, measured, num_samples=num_samples, start_seconds=start_seconds
        )
        progress.advance(bar)
        with threads(config.train.num_threads or usual_threads):
            teach_seconds = _live_seconds(config, measured)
            progress.advance(bar)
            own = {"dir": str(stored.own), "mode": "cached"}
            trial = {"cache": config.cache.model_copy(update=own), "views": _one_view(config)}
            step_seconds = time_steps(config.model_copy(update=trial))
            progress.advance(bar)
        progress.finish(bar)
    good = len(decoded.clips) / decoded.tried
    clips = good * num_samples * config.views.num
    keeps_all = featurizer.plan.keep_all
    bytes_ = _planned_bytes(config, extract, stored, keeps_all=keeps_all, good=good, clips=clips)
    return RunPlan(
        name=config.name,
        extract=extract,
        encoding=config.cache.encoding,
        keep="all" if keeps_all else "plan",
        num_shards=len(shards),
        num_samples=num_samples,
        num_views=config.views.num,
        tried=decoded.tried,
        good=len(decoded.clips),
        there_bytes=committed(config, found.cache, shards)[1],
        bytes=bytes_,
        extraction=extraction,
        space=_space(config, fleet, extract, sum(part.missing_bytes for part in bytes_)),
        training=_training(
            config,
            step_seconds,
            num_samples=int(good * num_samples),
            live=(measured.decode_seconds * fleet.workers, teach_seconds),
            extraction_seconds=extraction.seconds,
        ),
        alternatives=tuple(
            Alternative(
                encoding=encoding,
                keep="all" if keep_all else "plan",
                clip_bytes=stored.clips[encoding, keep_all].total,
                whole_bytes=stored.clips[encoding, keep_all].total * clips
                + stored.part_bytes * extract.num_parts,
            )
            for encoding in ENCODINGS
            for keep_all in (False, True)
        ),
        problems=found.shards.problems,
    )


def _fleet(config: RunConfig) -> Fleet:
    workers = num_workers(config)
    device = resolve_device(config.extract.device)
    # Of the GPUs here one is timed: they have little in common to wait for.
    here = min(workers, max(1, num_here(config))) if device.type == "cpu" else 1
    cpus = config.extract.cpus_per_actor
    return Fleet(
        device=device,
        workers=workers,
        here=here,
        cpus=cpus,
        children=config.decode.num_children or cpus,
    )


def _one_view(config: RunConfig) -> ViewsConfig:
    return config.views.model_copy(update={"num": 1})


def _extraction(
    config: RunConfig,
    extract: ExtractPlan,
    measured: _Measured,
    *,
    num_samples: int,
    start_seconds: float,
) -> Extraction:
    """Time teachers and kinds of work, and add up what is missing."""
    fleet, clips = measured.fleet, measured.decoded.clips
    everything = Work(base=True, layers=tuple(columns_of(config).values()))
    kinds = {_work_of(part) for part in extract.parts}
    timings = {
        work: time_features(measured.featurizer, clips, work, fleet)
        for work in {everything, *kinds}
    }
    teach = {work: fleet.each(timing.seconds) for work, timing in timings.items()}
    cpu_share = timings[everything].cpu_share if fleet.on_cpu else 1.0
    store_seconds = measured.store_seconds / cpu_share

    def clip_seconds(work: Work) -> float:
        """A clip, with all workers at it."""
        one = measured.stored.clips[config.cache.encoding, measured.featurizer.plan.keep_all]
        stored = sum(one.layers[key] for key in work.layers)
        stored += sum(one.base.values()) if work.base else 0.0
        store = store_seconds * stored / one.total
        together = (measured.decode_seconds, teach[work], store)
        return sum(together) if fleet.on_cpu else max(together)

    seconds = makespan(
        [
            len(part.shard.samples) * clip_seconds(_work_of(part)) * fleet.workers
            for part in extract.parts
        ],
        fleet.workers,
    )
    if extract.bases is not None:  # one worker, and nothing is stored
        a_clip = (measured.decode_seconds + teach[everything]) * fleet.workers
        seconds += extract.bases.num_rows * a_clip
    return Extraction(
        device=str(fleet.device),
        workers=fleet.workers,
        start_seconds=start_seconds,
        seconds=start_seconds + seconds if extract.parts else 0.0,
        view_seconds=clip_seconds(everything) * num_samples,
        decode_seconds=measured.decode_seconds,
        store_seconds=store_seconds,
        cpu_share=cpu_share,
        teachers=tuple(
            PlannedTeacher(
                name=name,
                seconds=fleet.each(
                    time_teacher(measured.featurizer, clips, name, teacher.layers, fleet)
                ),
                macs=teacher_macs(measured.featurizer, clips[0][1], name, teacher.layers),
            )
            for name, teacher in config.teachers.items()
        ),
    )


def _work_of(part: PartTask) -> Work:
    return Work(base=part.base, layers=tuple(part.columns.values()))


def makespan(seconds: Sequence[float], workers: int) -> float:
    """When the last of some tasks is done, if whoever is free takes the next one.

    Args:
        seconds: Of each task, in the order in which they are taken.
        workers: How many work, at least 1.
    """
    free_at = [0.0] * workers
    for task in seconds:
        heapq.heapreplace(free_at, free_at[0] + task)
    return max(free_at)


def _live_seconds(config: RunConfig, measured: _Measured) -> float:
    """Seconds of a clip through the teachers of the objective in the training process."""
    layers = tuple((t, layer) for t, found in config.objective_layers.items() for layer in found)
    alone = replace(measured.fleet, workers=1, here=1)
    work = Work(base=True, layers=layers)
    return time_features(measured.featurizer, measured.decoded.clips, work, alone).seconds


def _training(
    config: RunConfig,
    step_seconds: Mapping[float, float],
    *,
    num_samples: int,
    live: tuple[float, float],
    extraction_seconds: float,
) -> Training:
    """Add up steps and epochs.

    Args:
        config: The run.
        step_seconds: Of a step from the cache, by mask ratio.
        num_samples: Samples that can be trained on.
        live: Seconds to decode a clip and to teach it, in the training process.
        extraction_seconds: What is missing in the cache takes.
    """
    steps = num_steps(config.train, num_samples)
    device = resolve_device(config.train.device)
    batch, steps_per_epoch = config.train.batch_size, num_samples // config.train.batch_size
    step = sum(step_seconds.values()) / len(step_seconds)
    decode, teach = live[0] * batch, live[1] * batch
    live_step = decode + teach + step if device.type == "cpu" else teach + max(decode, step)
    saved = steps_per_epoch * (live_step - step)
    return Training(
        device=str(device),
        steps=steps,
        step_seconds=step_seconds,
        seconds=steps * step,
        epochs=steps / steps_per_epoch,
        cached_epoch_seconds=steps_per_epoch * step,
        live_epoch_seconds=steps_per_epoch * live_step,
        clip_macs={
            spec.ratio: visible_macs(config.student, config.clip.grid, spec.ratio)
            for spec in config.mask_schedule.phases
        },
        break_even_epochs=math.ceil(extraction_seconds / saved),
    )


def _planned_bytes(
    config: RunConfig,
    extract: ExtractPlan,
    stored: Stored,
    *,
    keeps_all: bool,
    good: float,
    clips: float,
) -> tuple[PlannedBytes, ...]:
    """Arrays and columns, with what is missing of each."""
    one = stored.clips[config.cache.encoding, keeps_all]
    rows = [part for part in extract.parts if part.base]
    found = [
        PlannedBytes(
            name=name,
            clip_bytes=clip_bytes,
            whole_bytes=clip_bytes * clips,
            missing_bytes=clip_bytes * good * _num_samples(rows),
        )
        for name, clip_bytes in one.base.items()
    ]
    for column, key in columns_of(config).items():
        clip_bytes = one.layers[key]
        lack = [part for part in extract.parts if column in part.columns]
        found.append(
            PlannedBytes(
                name=column,
                clip_bytes=clip_bytes,
                whole_bytes=clip_bytes * clips,
                missing_bytes=clip_bytes * good * _num_samples(lack),
            )
        )
    found.append(
        PlannedBytes(
            name="statistics",
            clip_bytes=stored.part_bytes * extract.num_parts / clips,
            whole_bytes=stored.part_bytes * extract.num_parts,
            missing_bytes=stored.part_bytes * len(extract.parts),
        )
    )
    return tuple(found)


def _num_samples(parts: Sequence[PartTask]) -> int:
    return sum(len(part.shard.samples) for part in parts)


def _space(config: RunConfig, fleet: Fleet, extract: ExtractPlan, missing: float) -> Space:
    """Room on the cache's disk; before a bucket, for the parts that lie in TMPDIR at once."""
    url = config.cache.dir
    if scheme_of(url) in ("", "file:"):
        folder, needed = Path(without_file_scheme(url)).absolute(), missing
    else:
        folder = Path(tempfile.gettempdir())
        largest = max((len(part.shard.samples) for part in extract.parts), default=0)
        needed = missing * largest * fleet.here / max(1, extract.num_clips)
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    return Space(folder=str(there), free_bytes=free, needed_bytes=needed)
