"""From the scores of all jobs to accuracies, differences, classes and outcomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool

from kdhiera.config import EvaluateConfig
from kdhiera.evaluation.bootstrap import bootstrap_difference, bootstrap_interval
from kdhiera.evaluation.scores import TOP, Scored, top_right
from kdhiera.results import ClassCount, Comparison, Interval, Measure, Outcomes, PerClass, Result
from kdhiera.stages.evaluating.jobs import Job
from kdhiera.stages.evaluating.labelled import UNKNOWN, Splits, Task


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that an evaluation found.

    Args:
        results: Accuracies.
        comparisons: Paired differences, those that `pairs` names.
        per_class: By measure, class by class.
        outcomes: Clip by clip.
    """

    results: tuple[Result, ...]
    comparisons: tuple[Comparison, ...]
    per_class: tuple[PerClass, ...]
    outcomes: Outcomes


def put_together(
    settings: EvaluateConfig,
    splits: Splits,
    done: Sequence[tuple[Job, Scored]],
    *,
    pairs: Mapping[str, Sequence[str]],
) -> Findings:
    """Accuracies with their intervals from the scores of all jobs.

    Args:
        settings: Groups and seeds.
        splits: The clips.
        done: Jobs with their scores; those of a measure in the order of their seeds.
        pairs: Whose features are compared with whose.
    """
    by_measure: dict[Measure, list[Scored]] = {}
    tasks: dict[str, Task] = {}
    for job, scored in done:
        by_measure.setdefault(job.measure, []).append(scored)
        tasks[job.measure.label] = job.task
    labels = splits["test"].labels
    groups = {g: tuple(str(row.get(g)) for row in labels) for g in settings.groups}
    right = {m: _right(found, tasks[m.label], top=1) for m, found in by_measure.items()}
    statistics = _Statistics(settings=settings, groups=groups)
    results, per_class, comparisons = [], [], []
    for measure, found in by_measure.items():
        task = tasks[measure.label]
        top5 = _right(found, task, top=TOP)
        results.append(statistics.result(measure, task, right[measure], top5))
        per_class.append(_per_class(measure, task, right[measure]))
        for features in pairs.get(measure.features, ()):
            other = replace(measure, features=features)
            if other in right:
                comparisons.append(
                    statistics.comparison(measure, other, task, right[measure], right[other])
                )
    num_seeds = len(settings.seeds)
    outcomes = Outcomes(
        uids=tuple(splits["test"].uids),
        groups=groups,
        known={label: task.truth["test"] != UNKNOWN for label, task in tasks.items()},
        right={
            m: _everywhere(tasks[m.label], np.broadcast_to(r, (num_seeds, r.shape[1])))
            for m, r in right.items()
        },
        validation={
            m: float(np.mean([scored.validation_accuracy for scored in found]))
            for m, found in by_measure.items()
        },
    )
    return Findings(
        results=tuple(results),
        comparisons=tuple(comparisons),
        per_class=tuple(per_class),
        outcomes=outcomes,
    )


def _right(found: Sequence[Scored], task: Task, *, top: int) -> Bool[np.ndarray, "seeds m"]:
    truth = task.known_truth("test")
    return np.stack([top_right(scored.test, truth, top) for scored in found])


def _everywhere(task: Task, right: Bool[np.ndarray, "seeds m"]) -> Bool[np.ndarray, "seeds n"]:
    """Over all test clips; False where the class is not known."""
    full = np.zeros((len(right), len(task.truth["test"])), bool)
    full[:, task.rows("test")] = right
    return full


def _per_class(measure: Measure, task: Task, right: Bool[np.ndarray, "seeds m"]) -> PerClass:
    truth = task.known_truth("test")
    return PerClass(
        measure=measure,
        num_seeds=len(right),
        classes=tuple(
            ClassCount(name=name, correct=int(mine.sum()), total=int(mine.size))
            for number, name in enumerate(task.classes)
            if (mine := right[:, truth == number]).size
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Statistics:
    """Intervals over groups of clips and, where there are several, seeds."""

    settings: EvaluateConfig
    groups: Mapping[str, tuple[str, ...]]

    def result(
        self,
        measure: Measure,
        task: Task,
        right: Bool[np.ndarray, "seeds m"],
        top5: Bool[np.ndarray, "seeds m"],
    ) -> Result:
        truth = task.known_truth("test")
        accuracies = right.mean(1)
        factors = self._factors(task, right.shape)
        return Result(
            label=measure.label,
            features=measure.features,
            readout=measure.readout,
            method=measure.method,
            accuracy=self._interval(right, factors),
            top5=self._interval(top5, factors) if len(task.classes) > TOP else None,
            chance=float(np.bincount(truth).max() / len(truth)),
            num_clips=len(truth),
            labels_per_class=measure.labels_per_class,
            num_seeds=len(right),
            std=float(accuracies.std(ddof=1)) if len(right) > 1 else None,
        )

    def comparison(
        self,
        measure: Measure,
        baseline: Measure,
        task: Task,
        right: Bool[np.ndarray, "s m"],
        other: Bool[np.ndarray, "r m"],
    ) -> Comparison:
        right, other = np.broadcast_arrays(right, other)
        return Comparison(
            label=measure.label,
            features=measure.features,
            baseline=baseline.features,
            readout=measure.readout,
            method=measure.method,
            difference=bootstrap_difference(
                right.ravel(),
                other.ravel(),
                self._factors(task, right.shape),
                resamples=self.settings.resamples,
                seed=self.settings.seeds[0],
            ),
            num_clips=right.shape[1],
            labels_per_class=measure.labels_per_class,
        )

    def _factors(self, task: Task, shape: tuple[int, ...]) -> list[np.ndarray]:
        rows = task.rows("test")
        factors = [np.array(values)[rows] for values in self.groups.values()] or [rows]
        if shape[0] == 1:
            return factors
        seeds = np.repeat(np.arange(shape[0]), shape[1])
        return [*(np.tile(factor, shape[0]) for factor in factors), seeds]

    def _interval(self, right: np.ndarray, factors: Sequence[np.ndarray]) -> Interval:
        return bootstrap_interval(
            right.ravel(),
            factors,
            resamples=self.settings.resamples,
            seed=self.settings.seeds[0],
        )
