"""Many students over one cache: `kdhiera ablate`.

    ablation.yaml -> runs -> coverage of all -> Ray tasks -> a record a run -> report.md
                                |                  |              |
                 refused before anything starts    |      kept: never run again
                                          a failure stops no other

A run is a Ray task with its CPUs and GPUs. Its worker distills and evaluates in the
run's own folder and gives back a record; the driver keeps records and writes the report.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdhiera.ablation.page import shown_measures, write_ablation_report
from kdhiera.ablation.records import RunRecord, load_record, record_path, save_record
from kdhiera.ablation.tables import ranked, variant_table
from kdhiera.config.ablation import AblationConfig, PlannedRun, load_ablation
from kdhiera.errors import (
    DamagedError,
    IncompleteError,
    KdhieraError,
    StoppedError,
    UsageError,
)
from kdhiera.progress import Progress, counted
from kdhiera.report.tables import to_text
from kdhiera.stages.ablating.checks import check_metrics, check_runs
from kdhiera.stages.ablating.trial import run_trial, trial_identity
from kdhiera.stages.ray_session import ray_session
from kdhiera.stopping import stop_on_signals
from kdhiera.training.metrics import read_metrics

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0
STOP_SECONDS = 60.0
WORKER_RETRIES = 2  # of a run whose worker was killed; it goes on from its checkpoint
STOPPED = "stopped: the same command goes on with the runs that are left"


@dataclass(frozen=True, kw_only=True)
class AblatePlan:
    """What an ablation will do.

    Args:
        runs: All of them.
        done: Names of those whose record is there.
        steps: Of every other run, by name.
    """

    runs: tuple[PlannedRun, ...]
    done: tuple[str, ...]
    steps: Mapping[str, int]

    def describe(self) -> str:
        """For people."""
        todo: dict[tuple[str, int], list[str]] = {}
        for run in self.runs:
            if run.name in self.steps:
                todo.setdefault((run.variant, self.steps[run.name]), []).append(str(run.seed))
        width = max((len(variant) for variant, _ in todo), default=0)
        lines = [
            f"  {variant:<{width}}  {steps:,} steps, seed {', '.join(seeds)}"
            for (variant, steps), seeds in todo.items()
        ]
        head = f"{counted(len(self.runs), 'run')}, {len(self.done)} done, {len(self.steps)} to do"
        return "\n".join([head, *lines])


@dataclass(frozen=True, kw_only=True)
class AblateSummary:
    """What an ablation came to.

    Args:
        finished: Records there are.
        failures: Why runs failed, by name.
        report: Path of `report.md`; None for a dry run.
        table: The result for people.
    """

    finished: int
    failures: Mapping[str, str]
    report: str | None
    table: str

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "finished": self.finished,
            "failures": dict(self.failures),
            "report": self.report,
        }

    def describe(self) -> str:
        """For people."""
        lines = [self.table] if self.table else []
        lines += [f"failed    {name}: {why}" for name, why in self.failures.items()]
        lines.append(f"report    {self.report}" if self.report else "nothing was started")
        return "\n".join(lines)


def ablate(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    progress: Progress,
    overwrite: bool = False,
    dry_run: bool = False,
    on_plan: Callable[[AblatePlan], None] = lambda plan: None,
) -> AblateSummary:
    """Run what is missing of an ablation, and write its report.

    Args:
        path: The ablation's YAML file.
        overrides: Dotted assignments to it.
        progress: Where progress is shown.
        overwrite: Throw away runs of other settings that lie in the runs' folders.
        dry_run: Check and plan only.
        on_plan: Told the plan before anything starts.

    Raises:
        UsageError: If a variant or a metric is wrong; MismatchError: if the cache does not cover
            a variant, or a folder holds a run of other settings. All such variants are named,
            and nothing was started.
        IncompleteError: If runs failed; the others are done and in the report.
        StoppedError: After SIGTERM or SIGINT; what is done is in the report, and the same
            command goes on.
    """
    config, runs = load_ablation(path, overrides)
    folder = Path(config.run_dir)
    keep = _records_folder(config)
    check_metrics(config, runs)
    done = kept_records(config, runs)
    todo = [run for run in runs if run.name not in done]
    with _warnings_only():
        steps = check_runs(todo, overwrite=overwrite)
    on_plan(AblatePlan(runs=runs, done=tuple(done), steps=steps))
    failures: dict[str, str] = {}
    stopped: StoppedError | None = None
    if not dry_run and todo:
        work = _Work(config=config, steps=steps, baselines=folder / "baselines", again=overwrite)
        try:
            for run, outcome in work.results(todo, progress):
                if isinstance(outcome, RunRecord):
                    save_record(keep, outcome)
                    done[run.name] = outcome
                else:
                    failures[run.name] = outcome
                    logger.warning("%s failed: %s", run.name, outcome)
        except StoppedError as error:
            stopped = error
    records = [done[run.name] for run in runs if run.name in done]
    report = None
    if not dry_run:
        folder.mkdir(parents=True, exist_ok=True)
        report = str(write_ablation_report(folder, config, records, failures, expected=len(runs)))
    summary = AblateSummary(
        finished=len(records), failures=failures, report=report, table=_table(config, records)
    )
    if stopped is not None:
        raise stopped
    if failures:
        raise IncompleteError(
            f"{summary.describe()}\n{counted(len(failures), 'run')} of {len(runs)} failed; the "
            "same command tries only these again",
            result=summary,
        )
    return summary


def _table(config: AblationConfig, records: Sequence[RunRecord]) -> str:
    measures = shown_measures(config, records)
    if not measures:
        return ""
    order = ranked(tuple(config.changes), records, measures[0])
    # The chosen metric alone: with more of them a line does not fit a terminal.
    return to_text(variant_table(order, config.baseline_name, records, measures[:1]))


def _records_folder(config: AblationConfig) -> Path:
    return Path(config.records) if config.records else Path(config.run_dir) / "records"


def kept_records(config: AblationConfig, runs: Sequence[PlannedRun]) -> dict[str, RunRecord]:
    """Records that are there and of the same settings, by name of run."""
    folder = _records_folder(config)
    kept: dict[str, RunRecord] = {}
    stale: list[str] = []
    for run in runs:
        path = record_path(folder, run.variant, run.seed)
        if not path.is_file():
            continue
        try:
            record = load_record(path)
        except DamagedError as error:
            logger.warning("%s", error)
            continue
        if record.identity == trial_identity(run):
            kept[run.name] = record
        else:
            stale.append(run.name)
    if stale:
        logger.warning(
            "%s recorded with other settings, to be run again: %s",
            counted(len(stale), "run"),
            ", ".join(stale),
        )
    return kept


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What all runs of an ablation share.

    Args:
        config: The ablation.
        steps: Of every run, by name.
        baselines: Folder of features that no run trains.
        again: Throw other runs in the same folders away.
    """

    config: AblationConfig
    steps: Mapping[str, int]
    baselines: Path
    again: bool

    def results(
        self, runs: Sequence[PlannedRun], progress: Progress
    ) -> Iterator[tuple[PlannedRun, RunRecord | str]]:
        """Every run with its record, or with why there is none, as they end."""
        bar = progress.start("ablate", sum(self.steps[run.name] for run in runs), "steps")
        progress.advance(bar, 0, runs=f"0/{len(runs)}")
        ray = runs[0].config.ray
        with stop_on_signals() as stop:
            if not ray.enabled:
                yield from self._here(runs, progress, bar, stop)
            else:
                with ray_session(ray):
                    yield from self._on_ray(runs, progress, bar, stop)
        progress.finish(bar)

    def _here(
        self, runs: Sequence[PlannedRun], progress: Progress, bar: int, stop: threading.Event
    ) -> Iterator[tuple[PlannedRun, RunRecord | str]]:
        for i, run in enumerate(runs):
            if stop.is_set():
                raise StoppedError(STOPPED)
            try:
                with _warnings_only():
                    outcome: RunRecord | str = run_trial(
                        run, baselines=self.baselines, overwrite=self.again
                    )
            except StoppedError:
                raise StoppedError(STOPPED) from None
            except Exception as error:
                outcome = _reason(error, run)
            yield run, outcome
            progress.advance(bar, self.steps[run.name], runs=f"{i + 1}/{len(runs)}")

    def _on_ray(
        self, runs: Sequence[PlannedRun], progress: Progress, bar: int, stop: threading.Event
    ) -> Iterator[tuple[PlannedRun, RunRecord | str]]:
        import ray

        self._require_room(ray.cluster_resources())
        task = ray.remote(
            num_cpus=self.config.cpus, num_gpus=self.config.gpus, max_retries=WORKER_RETRIES
        )(_work)
        arguments = (str(Path.cwd()), str(self.baselines), self.again, self.config.cpus)
        running = {
            task.remote(run.variant, run.seed, run.config.model_dump_json(), *arguments): run
            for run in runs
        }
        seen = dict.fromkeys(self.steps, 0)
        while running:
            ready, _ = ray.wait(list(running), timeout=POLL_SECONDS)
            for reference in ready:
                run = running.pop(reference)
                try:
                    outcome: RunRecord | str = ray.get(reference)
                except Exception as error:
                    outcome = _reason(getattr(error, "cause", None) or error, run)
                yield run, outcome
                left = max(0, self.steps[run.name] - seen.pop(run.name))
                progress.advance(bar, left, runs=f"{len(runs) - len(running)}/{len(runs)}")
            for run in running.values():
                now = _steps_done(run)
                progress.advance(bar, max(0, now - seen[run.name]))
                seen[run.name] = max(now, seen[run.name])
            if running and stop.is_set():
                for reference in running:
                    ray.cancel(reference)
                ray.wait(list(running), num_returns=len(running), timeout=STOP_SECONDS)
                raise StoppedError(STOPPED)

    def _require_room(self, have: Mapping[str, float]) -> None:
        if have.get("CPU", 0) < self.config.cpus or have.get("GPU", 0) < self.config.gpus:
            raise UsageError(
                f"no run fits the Ray cluster: one asks for {self.config.cpus} CPUs and "
                f"{self.config.gpus:g} GPUs, and there are {have.get('CPU', 0):g} and "
                f"{have.get('GPU', 0):g}; lower `cpus` or `gpus`"
            )


def _work(
    variant: str, seed: int, config: str, folder: str, baselines: str, again: bool, cpus: int
) -> RunRecord:
    """A run, inside a Ray worker."""
    import torch

    from kdhiera.config import RunConfig

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if Path(folder).is_dir():
        os.chdir(folder)  # relative paths mean what they meant to the driver
    torch.set_num_threads(cpus)
    run = PlannedRun(variant=variant, seed=seed, config=RunConfig.model_validate_json(config))
    return run_trial(run, baselines=Path(baselines), overwrite=again)


def _steps_done(run: PlannedRun) -> int:
    lines = read_metrics(Path(run.config.run_dir))
    return int(lines[-1]["step"]) if lines else 0


@contextmanager
def _warnings_only() -> Iterator[None]:
    """What every run tells about itself is no news of many runs."""
    ours = logging.getLogger("kdhiera")
    before = ours.level
    ours.setLevel(logging.WARNING)
    try:
        yield
    finally:
        ours.setLevel(before)


def _reason(error: BaseException, run: PlannedRun) -> str:
    """One line; where a user could mend nothing, the log has the traceback."""
    if isinstance(error, KdhieraError):
        return " ".join(str(error).split())
    logger.error("%s failed", run.name, exc_info=error)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1][:300]}"
