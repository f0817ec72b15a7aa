"""The training loop: from batches to a trained student, stopped and resumed exactly.

Nothing but the step number says where a run stands: order, masks, drop-path and learning
rate are pure functions of the seed and the step. A checkpoint taken after step n
therefore continues with the losses that the uninterrupted run has.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdhiera.config import ObjectiveConfig, TrainConfig
from kdhiera.devices import resolve_device, resolve_precision, threads
from kdhiera.errors import KdhieraError, MismatchError, StoppedError, UsageError
from kdhiera.masking import MaskSchedule
from kdhiera.objective.targets import TargetSpec
from kdhiera.progress import Progress
from kdhiera.stopping import stop_on_signals
from kdhiera.storage import atomic_file
from kdhiera.student.base import Student
from kdhiera.training import checkpoint
from kdhiera.training.batches import Batch, ClipSource, Prefetcher, batches
from kdhiera.training.metrics import MetricLog, read_metrics
from kdhiera.training.optim import build_schedule
from kdhiera.training.ranks import ALONE, Ranks
from kdhiera.training.step import Learner, NonFiniteError, Predictor, StepResult

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
REPLAY = "replay"


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """How a run went, over all its sittings.

    Args:
        steps: Steps done.
        clips: Clips shown, repeats counted.
        num_samples: Distinct clips' samples in an epoch's order.
        seconds: Time in the loop, of the logged sittings together.
        data_wait: Share of that time spent waiting for batches.
        first: Metrics of the first logged step.
        last: Metrics of the last logged step.
    """

    steps: int
    clips: int
    num_samples: int
    seconds: float
    data_wait: float
    first: Mapping[str, float]
    last: Mapping[str, float]

    def of(self, metric: str) -> dict[str, float]:
        """A metric's last value by target, such as `explained_variance`."""
        prefix = f"{metric}/"
        return {k.removeprefix(prefix): v for k, v in self.last.items() if k.startswith(prefix)}


def num_steps(config: TrainConfig, num_samples: int) -> int:
    """Steps of a whole run; the last partial batch of an epoch is left out.

    Raises:
        UsageError: If there are fewer samples than a batch needs.
    """
    if num_samples < config.batch_size:
        raise UsageError(
            f"train.batch_size is {config.batch_size}, but only {num_samples} clips can be trained "
            "on: lower it, or extract more clips"
        )
    steps = config.epochs * (num_samples // config.batch_size)
    return steps if config.max_steps is None else min(steps, config.max_steps)


def train(
    *,
    student: Student,
    heads: Predictor,
    targets: Sequence[TargetSpec],
    source: ClipSource,
    masks: MaskSchedule,
    num_views: int,
    objective: ObjectiveConfig,
    config: TrainConfig,
    run_dir: Path,
    identity: Mapping[str, Any],
    progress: Progress,
    block: int = 1,
    ranks: Ranks = ALONE,
    stop: threading.Event | None = None,
) -> TrainSummary:
    """Train a student, from its newest checkpoint if the run folder has one.

    All ranks call it alike; the first writes the run folder, which all of them see.

    Args:
        student: Fresh from its seed; trained in place.
        heads: What predicts the targets from its taps.
        targets: What trains the student.
        source: Where kept units are read.
        masks: How masks are drawn, and which units are predicted.
        num_views: Views that epochs go round.
        objective: Loss and normalisation.
        config: Optimisation.
        run_dir: Gets `checkpoints/`, `metrics.jsonl`, `tensorboard/`.
        identity: JSON values that decide the result (config, cache snapshot); a run folder
            made under another identity is refused.
        progress: Told of every step.
        block: See `epoch_order`.
        ranks: Who trains together.
        stop: Once it is set at any rank all stop, as on a signal; None listens to signals alone.

    Returns:
        What `metrics.jsonl` says of the whole run.

    Raises:
        UsageError: If ranks and parts cannot share a batch evenly.
        MismatchError: If the run folder belongs to another identity, or to another run at
            another rank.
        StoppedError: On SIGTERM or SIGINT at any rank, after the step in progress and a
            checkpoint.
        KdhieraError: If a loss or gradient is not finite; the batch is saved for replay.
        RankLostError: If another rank dies.
    """
    ranks.num_clips(config)
    device = resolve_device(config.device)
    dtype = resolve_precision(config.precision, device)
    steps = num_steps(config, source.num_samples)
    steps_per_epoch = source.num_samples // config.batch_size
    learner = Learner(
        student=student,
        heads=heads,
        targets=targets,
        objective=objective,
        config=config,
        schedule=build_schedule(config, steps),
        device=device,
        dtype=dtype,
        ranks=ranks,
    )
    run_dir.mkdir(parents=True, exist_ok=True)
    folder = run_dir / CHECKPOINTS
    window = _Window(targets)
    done = 0
    state = checkpoint.load_latest(folder)
    if state is not None:
        check_identity(identity, state["identity"], run_dir)
        learner.load_state_dict(state["learner"])
        window.load_state_dict(state["window"])
        done = state["step"]
        logger.info("resuming after step %d of %d", done, steps)
    ranks.check_alike("the runs", {**identity, "step": done})

    def save() -> None:
        content = {
            "identity": dict(identity),
            "step": done,
            "learner": learner.state_dict(),
            "window": window.state_dict(),
        }
        checkpoint.save(folder, content, step=done, keep_last=config.keep_last)

    ahead = batches(
        source,
        masks,
        first_step=done,
        num_steps=steps,
        batch_size=config.batch_size,
        num_views=num_views,
        seed=config.seed,
        block=block,
        rank=ranks.rank,
        num_ranks=ranks.size,
    )
    task = progress.start("distill", steps, "steps")
    progress.advance(task, done)
    with (
        threads(config.num_threads),
        stop_on_signals() as signalled,
        MetricLog(run_dir, steps_done=done) if ranks.is_first else nullcontext() as log,
        Prefetcher(ahead, depth=config.prefetch, pin_memory=device.type == "cuda") as ready,
    ):
        for batch, waited in _timed(ready):
            on_device = batch.map(lambda tensor: tensor.to(device, non_blocking=True))
            measure = done == 0 or (done + 1) % config.log_every == 0 or done + 1 == steps
            try:
                result = learner.step(on_device, measure=measure)
            except NonFiniteError as error:
                saved = _save_replay(run_dir / REPLAY, batch, ranks) if error.here else None
                named = " and ".join(str(path) for path in ranks.gather(saved) if path)
                raise KdhieraError(
                    f"step {done + 1}: {error}; no weight was changed by it. The batch is in "
                    f"{named} for replay; lower train.lr, set train.clip_grad, or try "
                    "train.precision=fp32"
                ) from error
            done += 1
            window.add(result, waited)
            if measure and log is not None:
                log.write(done, window.close(result, batch, done / steps_per_epoch))
            progress.advance(task, 1, **({"loss": f"{float(result.loss):.4f}"} if measure else {}))
            epoch_ends = done % (config.save_every * steps_per_epoch) == 0
            stopping = ranks.any(signalled.is_set() or (stop is not None and stop.is_set()))
            if stopping or epoch_ends or done == steps:
                ranks.first(save)
            if stopping and done < steps:
                raise StoppedError(
                    f"stopped after step {done} of {steps}; a checkpoint is in {folder}, and the "
                    "same command goes on from it"
                )
    progress.finish(task)
    return ranks.first(lambda: _summary(run_dir, config.batch_size, source.num_samples))


class _Window:
    """Sums since the last logged step; part of a checkpoint, so that lines come out alike.

    Times are not: they are of the sitting that writes the line.
    """

    def __init__(self, targets: Sequence[TargetSpec]) -> None:
        self._names = [spec.name for spec in targets]
        self._sums = torch.zeros(1 + len(targets), dtype=torch.float64)
        self._steps = 0
        self._clips = 0
        self._waited = 0.0
        self._opened = time.perf_counter()

    def add(self, result: StepResult, waited: float) -> None:
        values = [result.loss, *(result.losses[name] for name in self._names)]
        self._sums += torch.stack(values).double().cpu()
        self._steps += 1
        self._waited += waited

    def close(self, result: StepResult, batch: Batch, epochs: float) -> dict[str, float]:
        """One line of metrics; the next window begins."""
        now = time.perf_counter()
        seconds = now - self._opened
        means = (self._sums / self._steps).tolist()
        assert result.explained_variance is not None
        assert result.cosine is not None
        line: dict[str, float] = {
            "epoch": epochs,
            "view": batch.position.view,
            "draw": batch.position.draw,
            "loss": means[0],
            "lr": result.lr,
            "grad_norm": float(result.grad_norm),
            "seconds": seconds,
            "data_wait": self._waited / seconds,
        }
        for name, mean in zip(self._names, means[1:], strict=True):
            line[f"loss/{name}"] = mean
            line[f"explained_variance/{name}"] = float(result.explained_variance[name])
            line[f"cosine/{name}"] = float(result.cosine[name])
        self._sums.zero_()
        self._steps, self._waited, self._opened = 0, 0.0, now
        return line

    def state_dict(self) -> dict[str, int | Tensor]:
        return {"sums": self._sums.clone(), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums = state["sums"].clone()
        self._steps = state["steps"]


def _timed(source: Iterator[Batch] | Prefetcher) -> Iterator[tuple[Batch, float]]:
    """Batches with the seconds that each was waited for."""
    iterator = iter(source)
    while True:
        asked = time.perf_counter()
        batch = next(iterator, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - asked


def check_resumable(run_dir: Path, identity: Mapping[str, Any]) -> None:
    """Refuse a run folder whose newest checkpoint belongs to another run.

    Raises:
        MismatchError: With the settings that differ.
    """
    state = checkpoint.load_latest(run_dir / CHECKPOINTS)
    if state is not None:
        check_identity(identity, state["identity"], run_dir)


def check_identity(wanted: Mapping[str, Any], found: Mapping[str, Any], run_dir: Path) -> None:
    """Refuse to go on with another run's checkpoint."""
    lines = [
        f"  {key}: want {wanted.get(key)!r}, the run has {found.get(key)!r}"
        for key in sorted(wanted.keys() | found.keys())
        if wanted.get(key) != found.get(key)
    ]
    if lines:
        raise MismatchError(
            f"{run_dir} holds a run with other settings:\n" + "\n".join(lines) + "\n"
            "choose another run_dir, go back to these settings, or start again with --overwrite"
        )


def _save_replay(folder: Path, batch: Batch, ranks: Ranks) -> Path:
    """Keep a rank's batch as tensors and plain values."""
    folder.mkdir(parents=True, exist_ok=True)
    whose = "" if ranks.size == 1 else f"-rank-{ranks.rank}"
    path = folder / f"step-{batch.position.step:08d}{whose}.pt"
    content = {
        "position": asdict(batch.position),
        "samples": batch.samples,
        "units": batch.units,
        "target_units": batch.target_units,
        "pixels": batch.pixels,
        "columns": {name: dict(arrays) for name, arrays in batch.columns.items()},
    }
    with atomic_file(path) as file:
        torch.save(content, file)
    return path


def _summary(run_dir: Path, batch_size: int, num_samples: int) -> TrainSummary:
    lines = read_metrics(run_dir)
    seconds = sum(line["seconds"] for line in lines)
    return TrainSummary(
        steps=lines[-1]["step"],
        clips=lines[-1]["step"] * batch_size,
        num_samples=num_samples,
        seconds=seconds,
        data_wait=sum(line["data_wait"] * line["seconds"] for line in lines) / seconds,
        first=lines[0],
        last=lines[-1],
    )
