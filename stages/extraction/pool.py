"""Where extraction's parts are worked on: in this process, or by Ray actors.

A task is idempotent: the cache decides what of it is still missing, so trying again
after any failure is always right.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kdhiera.config import RunConfig
from kdhiera.devices import resolve_device
from kdhiera.errors import DamagedError, KdhieraError, StoppedError, UsageError
from kdhiera.machine import num_cpus
from kdhiera.stages.extraction.worker import PartExtractor, PartResult, Task
from kdhiera.stages.ray_session import ray_session

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
STOP_SECONDS = 30.0

OnCounts = Callable[[int, int], None]  # rows and bad rows done so far, failed tries included


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a task ended.

    Args:
        task: The task.
        result: What it came to; None if it was given up.
        error: Why it was given up; empty otherwise.
    """

    task: Task
    result: PartResult | None
    error: str = ""


def run_here(
    config: RunConfig, tasks: Sequence[Task], *, on_counts: OnCounts, stop: threading.Event
) -> Iterator[Outcome]:
    """Work on the tasks one by one in this process."""
    extractor = PartExtractor(config, stop=stop, on_counts=on_counts)
    try:
        for task in tasks:
            error = ""
            for _ in range(config.extract.max_attempts):
                try:
                    yield Outcome(task=task, result=extractor.run(task))
                    break
                except Exception as caught:
                    error = _retryable(caught)
                    logger.warning("%s failed: %s", task.name, error)
            else:
                yield Outcome(task=task, result=None, error=error)
    finally:
        extractor.close()


def run_on_ray(
    config: RunConfig, tasks: Sequence[Task], *, on_counts: OnCounts, stop: threading.Event
) -> Iterator[Outcome]:
    """Work on the tasks with a pool of Ray actors.

    A dead, hung or failing actor is replaced and its task tried again, at most
    `extract.max_attempts` times; the other tasks go on.
    """
    with ray_session(config.ray):
        _require_room(config, _num_fitting(config))
        pool = _Pool(config, num_tasks=len(tasks), on_counts=on_counts)
        try:
            yield from pool.run(tasks, stop)
        finally:
            pool.close()


def _uses_gpu(config: RunConfig) -> bool:
    return resolve_device(config.extract.device).type == "cuda"


def num_workers(config: RunConfig) -> int:
    """Workers that extraction will have if there are parts enough; joins a cluster to know.

    Raises:
        UsageError: If the cluster cannot be reached, or no worker fits.
    """
    if not config.ray.enabled:
        return 1
    if config.ray.address is None:
        _require_room(config, here := num_here(config))
        return min(config.extract.num_actors or here, here)
    with ray_session(config.ray):
        _require_room(config, fitting := _num_fitting(config))
        return min(config.extract.num_actors or fitting, fitting)


def num_here(config: RunConfig) -> int:
    """Actors that this machine has room for."""
    return _fitting(config, cpus=num_cpus(), gpus=torch.cuda.device_count())


def _num_fitting(config: RunConfig) -> int:
    """Actors that the cluster has room for."""
    import ray

    have = ray.cluster_resources()
    return _fitting(config, cpus=have.get("CPU", 0), gpus=have.get("GPU", 0))


def _fitting(config: RunConfig, *, cpus: float, gpus: float) -> int:
    by_cpu = int(cpus // config.extract.cpus_per_actor)
    return min(by_cpu, int(gpus)) if _uses_gpu(config) else by_cpu


def _require_room(config: RunConfig, fitting: int) -> None:
    if fitting < 1:
        kind = " and a GPU" if _uses_gpu(config) else ""
        raise UsageError(
            f"no actor fits the Ray cluster: one needs {config.extract.cpus_per_actor} CPUs{kind}; "
            "lower extract.cpus_per_actor, or correct extract.device"
        )


class _Actor:
    """Runs inside a Ray worker; `counters` and `stop` answer while `run` works."""

    def __init__(self, config_json: str, folder: str) -> None:
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        if Path(folder).is_dir():
            os.chdir(folder)  # relative paths mean what they meant to the driver
        self._stop = threading.Event()
        self._counts = (0, 0)
        self._changed = time.monotonic()
        self._config = RunConfig.model_validate_json(config_json)
        self._extractor: PartExtractor | None = None

    def _count(self, rows: int, bad: int) -> None:
        self._counts = (rows, bad)
        self._changed = time.monotonic()

    def run(self, task: Task) -> PartResult:
        self._changed = time.monotonic()
        if self._extractor is None:  # Ray gives the caller a task's own errors, not __init__'s
            self._extractor = PartExtractor(self._config, stop=self._stop, on_counts=self._count)
        return self._extractor.run(task)

    def counters(self) -> tuple[int, int, float]:
        return (*self._counts, time.monotonic() - self._changed)

    def stop(self) -> None:
        self._stop.set()


@dataclass(kw_only=True)
class _Try:
    actor: Any
    task: Task
    number: int
    moved: float = field(default_factory=time.monotonic)
    answered: bool = False  # its actor has room and has started


class _Pool:
    def __init__(self, config: RunConfig, *, num_tasks: int, on_counts: OnCounts) -> None:
        import ray

        self._ray = ray
        self._config = config
        self._on_counts = on_counts
        fitting = _num_fitting(config)
        self._size = min(config.extract.num_actors or fitting, fitting, num_tasks)
        self._actor_class = ray.remote(
            num_cpus=config.extract.cpus_per_actor,
            num_gpus=1 if _uses_gpu(config) else 0,
            max_concurrency=3,
        )(_Actor)
        self._idle: list[Any] = []
        self._running: dict[Any, _Try] = {}
        self._counts: dict[Any, tuple[int, int]] = {}
        self._size_now = 0

    def run(self, tasks: Sequence[Task], stop: threading.Event) -> Iterator[Outcome]:
        waiting = collections.deque((task, 1) for task in tasks)
        while waiting or self._running:
            while waiting and (self._idle or self._size_now < self._size):
                task, number = waiting.popleft()
                self._give(task, number)
            done, _ = self._ray.wait(list(self._running), timeout=POLL_SECONDS)
            for ref in done:
                this = self._running.pop(ref)
                try:
                    result = self._ray.get(ref)
                except Exception as caught:
                    error = _retryable(caught)
                    logger.warning("%s failed (try %d): %s", this.task.name, this.number, error)
                    self._end(this.actor)
                    if this.number < self._config.extract.max_attempts:
                        waiting.append((this.task, this.number + 1))
                    else:
                        yield Outcome(task=this.task, result=None, error=error)
                else:
                    self._idle.append(this.actor)
                    with contextlib.suppress(self._ray.exceptions.RayError):
                        self._counts[this.actor] = self._ray.get(this.actor.counters.remote())[:2]
                    yield Outcome(task=this.task, result=result)
            if self._running:
                self._watch()
                self._hand_over()
            self._on_counts(*(sum(c[i] for c in self._counts.values()) for i in (0, 1)))
            if stop.is_set():
                self._stop_all()
                raise StoppedError("stopped: run the same command again to go on")

    def close(self) -> None:
        for actor in [*self._idle, *(t.actor for t in self._running.values())]:
            self._ray.kill(actor)

    def _give(self, task: Task, number: int) -> None:
        """Have a task worked on, by an idle actor or a new one."""
        actor = self._idle.pop() if self._idle else self._new_actor()
        self._running[actor.run.remote(task)] = _Try(actor=actor, task=task, number=number)

    def _hand_over(self) -> None:
        """Give idle actors the tasks of actors that have not started.

        After a node is lost the cluster may have no room for another actor, ever.
        """
        for ref, this in list(self._running.items()):
            if self._idle and not this.answered:
                del self._running[ref]
                self._end(this.actor)
                self._give(this.task, this.number)

    def _new_actor(self) -> Any:
        self._size_now += 1
        return self._actor_class.remote(self._config.model_dump_json(), str(Path.cwd()))

    def _end(self, actor: Any) -> None:
        self._size_now -= 1
        self._ray.kill(actor)

    def _watch(self) -> None:
        """Refresh counts; kill actors that have not moved for `stall_seconds`.

        A killed actor's task ends with an error and is tried again like any other.
        """
        asked = {t.actor.counters.remote(): t for t in self._running.values()}
        answered, _ = self._ray.wait(list(asked), num_returns=len(asked), timeout=POLL_SECONDS)
        now = time.monotonic()
        for ref in answered:
            with contextlib.suppress(self._ray.exceptions.RayError):
                rows, bad, idle = self._ray.get(ref)
                self._counts[asked[ref].actor] = (rows, bad)
                asked[ref].moved = now - idle
                asked[ref].answered = True
        for this in asked.values():
            if now - this.moved > self._config.extract.stall_seconds:
                logger.warning("%s hangs: its actor is replaced", this.task.name)
                self._ray.kill(this.actor)

    def _stop_all(self) -> None:
        for this in self._running.values():
            this.actor.stop.remote()
        self._ray.wait(list(self._running), num_returns=len(self._running), timeout=STOP_SECONDS)


def _retryable(error: Exception) -> str:
    """One line of reason; an error that another try cannot mend is raised again."""
    error = getattr(error, "cause", None) or error  # what a Ray worker raised, not its traceback
    if isinstance(error, KdhieraError) and not isinstance(error, DamagedError):
        raise error from None
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1][:300]}"
