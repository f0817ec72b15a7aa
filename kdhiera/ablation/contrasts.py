"""Differences between variants: paired over clips and seeds, resampled by what clips share.

Two variants are compared on the same test clips under the same seeds. The differences
clip by clip are resampled by every factor that clips share (object, background) and by
seed, as in `kdhiera.evaluation.bootstrap`. One primary contrast a question is decided
on; Holm's step-down procedure (Holm 1979, Scandinavian Journal of Statistics 6(2),
65-70) keeps the chance of a single false claim among them below the level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from jaxtyping import Float, Shaped

from kdhiera.ablation.records import RunRecord
from kdhiera.config.ablation import ContrastConfig, MetricConfig, QuestionConfig
from kdhiera.evaluation.bootstrap import bootstrap_interval, bootstrap_means
from kdhiera.results import Interval, Measure

RESAMPLES = 4000
LEVEL = 0.05


class Verdict(StrEnum):
    """What a contrast shows."""

    BETTER = "better"
    WORSE = "worse"
    NOT_WORSE = "not worse"
    OPEN = "not told apart"
    NOT_RUN = "not run"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number over the seeds that were run.

    Args:
        value: With its interval over clips' groups and seeds.
        std: Standard deviation over seeds; None for one seed.
        seeds: Seeds it rests on.
    """

    value: Interval
    std: float | None
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """An answered contrast.

    Args:
        asked: What was asked.
        question: Title of its question.
        difference: None if one of its sides was not run.
        p_value: Two-sided, or one-sided against inferiority where there is a margin.
        adjusted: The same after Holm's correction, for primary contrasts.
    """

    asked: ContrastConfig
    question: str
    difference: Estimate | None
    p_value: float | None = None
    adjusted: float | None = None

    @property
    def verdict(self) -> Verdict:
        """By the corrected p-value for a primary contrast, by its own for others."""
        if self.difference is None or self.p_value is None:
            return Verdict.NOT_RUN
        p = self.p_value if self.adjusted is None else self.adjusted
        if self.asked.margin is not None:
            return Verdict.NOT_WORSE if p < LEVEL else Verdict.OPEN
        if p >= LEVEL:
            return Verdict.OPEN
        return Verdict.BETTER if self.difference.value.value > 0 else Verdict.WORSE


@dataclass(frozen=True, kw_only=True)
class _Clips:
    """Values of test clips over seeds, one after the other.

    Args:
        values: One a clip and seed.
        keys: `(seed, uid)` of each.
        groups: What clips share and the seed, by name, one a clip and seed.
    """

    values: Float[np.ndarray, " n"]
    keys: tuple[tuple[int, str], ...]
    groups: Mapping[str, Shaped[np.ndarray, " n"]]


def resolve(metric: MetricConfig, records: Sequence[RunRecord]) -> Measure | None:
    """The measure that a metric names, by what the records hold; None if none holds it."""
    found = [
        m
        for record in records
        for m in record.outcomes.right
        if (m.label, m.method, m.features, m.labels_per_class)
        == (metric.label, metric.method, metric.features, metric.labels_per_class)
        and metric.readout in (None, m.readout)
    ]
    return next((m for m in found if m.readout == "mean"), found[0] if found else None)


def estimate(
    records: Sequence[RunRecord], measure: Measure, *, of_validation: bool = False
) -> Estimate | None:
    """Accuracy of a variant over its seeds; None if no record holds the measure.

    Args:
        records: Of one variant.
        measure: What is asked for.
        of_validation: The validation split's, whose interval is its range over seeds.
    """
    having = [r for r in records if measure in r.outcomes.right]
    if not having:
        return None
    if of_validation:
        values = [r.outcomes.validation[measure] for r in having]
        interval = Interval(value=float(np.mean(values)), low=min(values), high=max(values))
    else:
        clips = _clips(having, measure)
        values = [float(clips.values[[k[0] == r.seed for k in clips.keys]].mean()) for r in having]
        interval = bootstrap_interval(
            clips.values, _factors(clips.groups), resamples=RESAMPLES, seed=0
        )
    return Estimate(
        value=interval,
        std=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        seeds=tuple(r.seed for r in having),
    )


def difference(
    records: Sequence[RunRecord],
    measure: Measure,
    against: Sequence[RunRecord],
    against_measure: Measure,
    *,
    margin: float | None = None,
) -> tuple[Estimate, float] | None:
    """Paired difference of two variants over the seeds and clips that both have.

    Args:
        records: Of one variant.
        measure: Of it.
        against: Of the other variant, or the same.
        against_measure: Of that.
        margin: Ask for non-inferiority.

    Returns:
        The difference and its p-value; None if there is no seed or clip in common.
    """
    one, other = _clips(records, measure), _clips(against, against_measure)
    place = {key: i for i, key in enumerate(other.keys)}
    rows = [i for i, key in enumerate(one.keys) if key in place]
    if not rows:
        return None
    values = one.values[rows] - other.values[[place[one.keys[i]] for i in rows]]
    factors = _factors({name: column[rows] for name, column in one.groups.items()})
    seeds = np.array([one.keys[i][0] for i in rows])
    each = [float(values[seeds == seed].mean()) for seed in np.unique(seeds)]
    means = bootstrap_means(values, factors, resamples=RESAMPLES, seed=0)
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    found = Estimate(
        value=Interval(value=float(values.mean()), low=float(low), high=float(high)),
        std=float(np.std(each, ddof=1)) if len(each) > 1 else None,
        seeds=tuple(int(seed) for seed in np.unique(seeds)),
    )
    return found, _p_value(means, margin)


def answer(
    questions: Sequence[QuestionConfig], records: Sequence[RunRecord]
) -> tuple[Contrast, ...]:
    """All contrasts of all questions, primary ones corrected by Holm's procedure."""
    contrasts = [
        _contrast(asked, question.title, records)
        for question in questions
        for asked in question.contrasts
    ]
    primary = [i for i, c in enumerate(contrasts) if c.asked.primary]
    # One that was not run yet counts, or a claim could fall when it is run.
    p_values = [1.0 if (p := contrasts[i].p_value) is None else p for i in primary]
    for i, p in zip(primary, holm(p_values), strict=True):
        if contrasts[i].p_value is not None:
            contrasts[i] = replace(contrasts[i], adjusted=p)
    return tuple(contrasts)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: the smallest times m, the next times m - 1, ..., never decreasing."""
    order = np.argsort(p_values, kind="stable")
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def _contrast(asked: ContrastConfig, question: str, records: Sequence[RunRecord]) -> Contrast:
    one = [r for r in records if r.variant == asked.variant]
    other = [r for r in records if r.variant == asked.against]
    measure = resolve(asked.metric, one)
    baseline = resolve(asked.against_metric or asked.metric, other)
    found = None
    if measure is not None and baseline is not None:
        found = difference(one, measure, other, baseline, margin=asked.margin)
    if found is None:
        return Contrast(asked=asked, question=question, difference=None)
    return Contrast(asked=asked, question=question, difference=found[0], p_value=found[1])


def _clips(records: Sequence[RunRecord], measure: Measure) -> _Clips:
    """What the records say of the clips whose label the measure knows."""
    values: list[float] = []
    keys: list[tuple[int, str]] = []
    groups: dict[str, list[str]] = {}
    for record in records:
        o = record.outcomes
        if measure not in o.right:
            continue
        for i in np.flatnonzero(o.known[measure.label]):
            values.append(float(o.right[measure][:, i].mean()))
            keys.append((record.seed, o.uids[i]))
            shared = o.groups or {"clip": o.uids}
            for name, column in {**shared, "seed": (str(record.seed),) * len(o.uids)}.items():
                groups.setdefault(name, []).append(column[i])
    return _Clips(
        values=np.array(values),
        keys=tuple(keys),
        groups={name: np.array(column) for name, column in groups.items()},
    )


def _factors(groups: Mapping[str, Shaped[np.ndarray, " n"]]) -> list[Shaped[np.ndarray, " n"]]:
    """Factors to resample; a single seed is none."""
    return [
        column for name, column in groups.items() if name != "seed" or len(np.unique(column)) > 1
    ]


def _p_value(means: Float[np.ndarray, " draws"], margin: float | None) -> float:
    """Share of the draws beyond what is to be excluded, never 0."""
    if margin is not None:
        return float((np.sum(means <= -margin) + 1) / (len(means) + 1))
    tail = min(np.sum(means <= 0), np.sum(means >= 0))
    return float(min(1.0, 2 * (tail + 1) / (len(means) + 1)))
