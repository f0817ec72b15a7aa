"""Distillation by the workers of Ray Train's `TorchTrainer`, started anew when one dies."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdhiera.config import RunConfig
from kdhiera.errors import KdhieraError, UsageError
from kdhiera.progress import Progress
from kdhiera.stages.distill import DistillSummary, clear, distill, locked, preflight
from kdhiera.stages.ray_session import ray_session
from kdhiera.stopping import stop_on_signals
from kdhiera.training.ranks import BACKENDS, RankLostError, joined

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5


def distill_on_ray(
    config: RunConfig, *, progress: Progress, resume: bool = False, overwrite: bool = False
) -> DistillSummary:
    """Distill with `train.num_workers` workers on Ray; see `distill`.

    Workers see the cache and the run folder at the paths that this process sees them at.

    Raises:
        UsageError: If the cluster has no room for the workers.
        KdhieraError: If workers died more than `train.max_failures` times.
    """
    folder = Path(config.run_dir)
    if resume and not (folder / "checkpoints").is_dir():
        raise UsageError(f"--resume: there is no checkpoint in {folder}")
    preflight(_on_cpu(config))
    if overwrite:
        with locked(folder):
            clear(folder)
    # a worker without a GPU of its own would see those of all
    workers = config if config.train.use_gpu else _on_cpu(config)
    with ray_session(config.ray), stop_on_signals() as stop:
        _require_room(config)
        return _fit(workers, progress, stop)


def _on_cpu(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"device": "cpu"})})


def _require_room(config: RunConfig) -> None:
    import ray

    train, have = config.train, ray.cluster_resources()
    need = {"CPU": train.num_workers * _num_cpus(config)}
    if train.use_gpu:
        need["GPU"] = train.num_workers
    for kind, count in need.items():
        if have.get(kind, 0) < count:
            raise UsageError(
                f"{train.num_workers} workers need {count} {kind}s and the Ray cluster has "
                f"{have.get(kind, 0):g}: lower train.num_workers or train.num_threads"
            )


def _num_cpus(config: RunConfig) -> int:
    return max(1, config.train.num_threads)


def _fit(config: RunConfig, progress: Progress, stop: threading.Event) -> DistillSummary:
    import ray
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as TrainerConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    train = config.train
    hub = ray.remote(num_cpus=0)(_Hub).remote()
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "config": config.model_dump_json(),
            "folder": str(Path.cwd()),
            "hub": hub,
        },
        torch_config=TorchConfig(backend=BACKENDS["cuda" if train.use_gpu else "cpu"]),
        scaling_config=ScalingConfig(
            num_workers=train.num_workers,
            use_gpu=train.use_gpu,
            resources_per_worker={"CPU": _num_cpus(config)} | ({"GPU": 1} if train.use_gpu else {}),
        ),
        run_config=TrainerConfig(
            name="distill",
            storage_path=str(Path(config.run_dir).absolute() / "ray"),
            failure_config=FailureConfig(max_failures=train.max_failures),
        ),
    )
    with ThreadPoolExecutor(1) as pool:  # the main thread hears of signals
        fitting = pool.submit(trainer.fit)
        _watch(fitting, hub, progress, stop)
    outcome = ray.get(hub.outcome.remote())
    if isinstance(outcome, KdhieraError):
        raise outcome
    failure = fitting.exception()
    if failure is not None:
        lines = str(failure).strip().splitlines() or [type(failure).__name__]
        raise KdhieraError(
            f"workers died more than train.max_failures={train.max_failures} times (last: "
            f"{lines[-1][:300]}): run the same command again, it goes on from the newest checkpoint"
        ) from failure
    assert isinstance(outcome, DistillSummary), "the first rank tells before it returns"
    return outcome


def _watch(fitting: Future[Any], hub: Any, progress: Progress, stop: threading.Event) -> None:
    """Show what the workers do, and hand a signal on to them."""
    import ray

    task, shown, asked = None, 0, False
    while not fitting.done():
        wait([fitting], timeout=POLL_SECONDS)
        if stop.is_set() and not asked:
            asked = bool(ray.get(hub.ask_to_stop.remote()))
        state: _State = ray.get(hub.state.remote())
        if state.total and task is None:
            task = progress.start("distill", state.total, "steps")
        if task is not None:
            progress.advance(task, state.done - shown, **state.fields)
            shown = state.done
    if task is not None:
        progress.finish(task)


@dataclass(frozen=True, kw_only=True)
class _State:
    """How far the workers are; `done` falls when they start anew."""

    total: int = 0
    done: int = 0
    fields: dict[str, object]


class _Hub:
    """An actor where driver and workers meet; it outlives workers that die."""

    def __init__(self) -> None:
        self._stop = asyncio.Event()
        self._state = _State(fields={})
        self._outcome: DistillSummary | KdhieraError | None = None

    async def ask_to_stop(self) -> bool:
        self._stop.set()
        return True

    async def asked_to_stop(self) -> None:
        await self._stop.wait()

    async def show(self, state: _State) -> None:
        self._state = state

    async def state(self) -> _State:
        return self._state

    async def tell(self, outcome: DistillSummary | KdhieraError) -> None:
        self._outcome = outcome

    async def outcome(self) -> DistillSummary | KdhieraError | None:
        return self._outcome


class _HubProgress:
    """A rank's progress, shown where the driver looks."""

    def __init__(self, hub: Any) -> None:
        self._hub = hub
        self._state = _State(fields={})

    def start(self, description: str, total: int | None, unit: str) -> int:
        """See `Progress.start`."""
        self._state = _State(total=total or 0, fields={})
        return 0

    def advance(self, task: int, n: int = 1, **fields: object) -> None:
        """See `Progress.advance`."""
        now = self._state
        self._state = _State(total=now.total, done=now.done + n, fields={**now.fields, **fields})
        self._hub.show.remote(self._state)

    def finish(self, task: int) -> None:
        """See `Progress.finish`."""


class _NoProgress(_HubProgress):
    """Of the other ranks."""

    def advance(self, task: int, n: int = 1, **fields: object) -> None:
        """Say nothing."""


def _work(settings: dict[str, Any]) -> None:
    """A worker, in a thread of a Ray Train process: one rank of a run.

    What a user must mend is told to the driver and is no failure: starting anew would not help.
    """
    import ray

    hub = settings["hub"]
    if Path(settings["folder"]).is_dir():
        os.chdir(settings["folder"])  # relative paths mean what they meant to the driver
    config = RunConfig.model_validate_json(settings["config"])
    stop = threading.Event()
    threading.Thread(target=_listen, args=(hub, stop), daemon=True).start()
    with joined(config.train.device) as ranks:
        progress = _HubProgress(hub) if ranks.is_first else _NoProgress(hub)
        try:
            summary = distill(config, progress=progress, ranks=ranks, stop=stop)
        except RankLostError:
            if ray.get(hub.outcome.remote()) is None:
                raise
            return  # the other told why it left
        except KdhieraError as error:
            ray.get(hub.tell.remote(error))
            return
        if ranks.is_first:
            ray.get(hub.tell.remote(summary))


def _listen(hub: Any, stop: threading.Event) -> None:
    import ray

    ray.get(hub.asked_to_stop.remote())
    stop.set()
