"""What can be refused of an ablation before its first run starts."""

from __future__ import annotations

from collections.abc import Sequence

from kdhiera.config.ablation import AblationConfig, PlannedRun
from kdhiera.data.patterns import expand
from kdhiera.errors import DamagedError, MismatchError, UsageError
from kdhiera.progress import counted
from kdhiera.stages.ablating.trial import check_folder
from kdhiera.stages.distill import preflight
from kdhiera.stages.evaluating.jobs import METHODS
from kdhiera.stages.evaluating.models import RANDOM, SCRATCH, STUDENT


def check_metrics(config: AblationConfig, runs: Sequence[PlannedRun]) -> None:
    """Refuse a metric that the runs will not measure: it would show when all are done.

    Raises:
        UsageError: With what the evaluation of the variant has instead.
    """
    asked = [("metric", config.baseline_name, config.metric)] if config.metric else []
    for question in config.questions:
        for c in question.contrasts:
            where = f"contrast `{c.name}`"
            asked.append((where, c.variant, c.metric))
            asked.append((where, c.against, c.against_metric or c.metric))
    of_variant = {run.variant: run.config for run in runs}
    for where, variant, metric in asked:
        run = of_variant[variant]
        assert run.evaluate is not None
        models = [STUDENT, RANDOM, SCRATCH, *(f"{name} teacher" for name in run.teachers)]
        amounts = [None, *run.evaluate.labels_per_class]
        for what, wanted, there in (
            ("label", metric.label, run.evaluate.labels or (metric.label,)),
            ("method", metric.method, [METHODS[name] for name in run.evaluate.methods]),
            ("features", metric.features, models),
            ("labels_per_class", metric.labels_per_class, amounts),
        ):
            if wanted not in there:
                raise UsageError(
                    f"{where} asks for {what} `{wanted}`, but the evaluation of variant "
                    f"{variant} has: {', '.join(map(str, there))}"
                )


def check_runs(runs: Sequence[PlannedRun], *, overwrite: bool) -> dict[str, int]:
    """Steps of every run, after all were asked for what could refuse them.

    Runs that differ in nothing but their seed are asked of the cache once.

    Args:
        runs: Those that are to start.
        overwrite: Whether runs of other settings in their folders may be thrown away.

    Returns:
        Optimiser steps by name of run.

    Raises:
        UsageError: If settings or labelled shards of a variant are wrong.
        MismatchError: If the cache does not cover a variant, or a folder holds another run.
    """
    steps: dict[str, int] = {}
    problems: dict[str, str] = {}
    refused = stale = False
    known: dict[str, int | str] = {}
    for run in runs:
        assert run.config.evaluate is not None
        train = run.config.train.model_copy(update={"seed": 0})
        evaluate = run.config.evaluate.model_copy(update={"seeds": (0,)})
        alike = run.config.model_copy(update={"train": train, "run_dir": "", "evaluate": evaluate})
        key = alike.model_dump_json()
        if key not in known:
            try:
                known[key] = _check(run)
            except (UsageError, MismatchError, DamagedError) as error:
                known[key] = str(error)
                refused = refused or isinstance(error, MismatchError)
        found = known[key]
        if isinstance(found, str):
            problems.setdefault(run.variant, found)
            continue
        steps[run.name] = found
        if not overwrite:
            try:
                check_folder(run.config)
            except MismatchError as error:
                # What differs is much the same for all: it is told once.
                told = f"{run.config.run_dir} holds a run with other settings, too"
                problems.setdefault(run.variant, told if stale else str(error))
                stale = refused = True
    if problems:
        lines = "\n".join(
            f"  {name}: " + why.replace("\n", "\n  ") for name, why in problems.items()
        )
        kind = MismatchError if refused else UsageError
        raise kind(
            f"{counted(len(problems), 'variant')} cannot run, so none was started:\n{lines}\n"
            "mend or remove what is named here, or extract what the cache lacks"
        )
    return steps


def _check(run: PlannedRun) -> int:
    settings = run.config.evaluate
    assert settings is not None
    for split in ("train", "validation", "test"):
        expand(getattr(settings, split))
    return preflight(run.config)
