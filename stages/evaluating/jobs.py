"""Every number of an evaluation: which there are, each computed once.

A job is one method on one model, label, number of labels and seed. It gives class scores
of the test clips, which are kept on disk by the fingerprint of all that decides them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Int

from kdhiera.config import EvaluateConfig
from kdhiera.evaluation.attentive import Tokens, attentive_probe
from kdhiera.evaluation.kept import Kept
from kdhiera.evaluation.knn import knn_predict
from kdhiera.evaluation.probe import linear_probe
from kdhiera.evaluation.scores import Scored, mean_over_views
from kdhiera.evaluation.subsets import labelled_subset
from kdhiera.results import Measure
from kdhiera.stages.evaluating.frozen import READOUTS, Features, FrozenModel
from kdhiera.stages.evaluating.labelled import Splits, Task, splits_digest

METHODS = {
    "knn": "k-NN",
    "linear": "linear probe",
    "attentive": "attentive probe",
    "finetune": "fine-tuning",
}

Rows = Int[np.ndarray, " k"]


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A student to fine-tune.

    Args:
        name: As in results.
        seed: Of its weights and of all that is drawn in fine-tuning.
        identity: JSON values that decide its scores, given clips, label and rows.
        distilled: Whether it starts from the run's own weights.
        run: Fine-tunes on the rows of a task.
    """

    name: str
    seed: int
    identity: Mapping[str, object]
    distilled: bool
    run: Callable[[Splits, Task, Rows], Scored]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One method on one model, label, number of labels and seed.

    Args:
        measure: What it belongs to, one job a seed.
        task: Its label.
        identity: JSON values that decide its scores.
        distilled: Whether it depends on the run's own weights.
        tokens_of: Key of the model whose tokens it needs.
        compute: Gives the scores from all models' features.
    """

    measure: Measure
    task: Task
    identity: Mapping[str, object]
    distilled: bool
    tokens_of: str | None
    compute: Callable[[Mapping[str, Features]], Scored]

    def stored(self, own: Kept, baselines: Kept) -> Scored | None:
        """Its scores, if they were computed before."""
        arrays = (own if self.distilled else baselines).load(self.identity)
        if arrays is None:
            return None
        return Scored(test=arrays["test"], validation_accuracy=float(arrays["validation_accuracy"]))

    def save(self, scored: Scored, own: Kept, baselines: Kept) -> None:
        """Keep its scores."""
        accuracy = np.array(scored.validation_accuracy)
        arrays = {"test": scored.test, "validation_accuracy": accuracy}
        (own if self.distilled else baselines).save(self.identity, arrays)


def jobs(
    settings: EvaluateConfig,
    splits: Splits,
    tasks: Sequence[Task],
    frozen: Sequence[FrozenModel],
    trained: Sequence[TrainedModel],
    *,
    clips: Mapping[str, object],
    device: torch.device,
) -> Iterator[Job]:
    """All jobs, in the order of the tables.

    What no seed changes (k-NN and the linear probe on given weights and all labels) is
    measured once. Pooled teachers are measured by k-NN and linear probe, by the latter alone
    if neither is asked for.

    Args:
        settings: What is measured.
        splits: The clips.
        tasks: The labels.
        frozen: Models whose features are measured.
        trained: Students that are fine-tuned.
        clips: JSON values that decide what the clips show.
        device: Where attentive probes compute.

    Raises:
        UsageError: If a class has fewer clips than `labels_per_class` asks for.
    """
    seen = {**clips, "digest": splits_digest(splits)}
    for task in tasks:
        for per_class in (None, *settings.labels_per_class):
            subsets = {seed: _rows(splits, task, per_class, seed) for seed in settings.seeds}
            plan = _Plan(
                settings=settings, splits=splits, clips=seen, task=task, per_class=per_class,
                device=device,
            )  # fmt: skip
            for model in frozen:
                for seed in settings.seeds if model.seed is None else (model.seed,):
                    drawn = per_class is not None or model.seed is not None
                    new = drawn or seed == settings.seeds[0]
                    yield from plan.frozen(model, subsets[seed], seed, pooled=new)
            for student in trained:
                yield plan.trained(student, subsets[student.seed])


@dataclass(frozen=True, kw_only=True)
class _Plan:
    settings: EvaluateConfig
    splits: Splits
    clips: Mapping[str, object]
    task: Task
    per_class: int | None
    device: torch.device

    def frozen(self, model: FrozenModel, rows: Rows, seed: int, *, pooled: bool) -> Iterator[Job]:
        """Jobs of a model; `pooled` is off where an earlier seed gives the same of these."""
        s = self.settings
        methods = s.methods if model.has_tokens else [m for m in s.methods if m in _POOLED]
        for method in methods or ["linear"]:
            if method in _POOLED and pooled:
                options: dict[str, object] = {}
                if method == "knn":
                    options = {"neighbours": s.neighbours, "temperature": s.temperature}
                for readout in READOUTS:
                    compute = partial(_pooled, s, self.task, rows, model.key, readout, method)
                    yield self._job(model, readout, method, rows, options, compute)
            elif method == "attentive":
                compute = partial(_attentive, s, self.task, rows, model.key, seed, self.device)
                options = {"seed": seed, **s.attentive.model_dump(mode="json")}
                yield self._job(
                    model, "tokens", method, rows, options, compute, tokens_of=model.key
                )

    def trained(self, student: TrainedModel, rows: Rows) -> Job:
        def compute(_: Mapping[str, Features]) -> Scored:
            return student.run(self.splits, self.task, rows)

        return self._job(student, "mean", "finetune", rows, {}, compute)

    def _job(
        self,
        model: FrozenModel | TrainedModel,
        readout: str,
        method: str,
        rows: Rows,
        options: Mapping[str, object],
        compute: Callable[[Mapping[str, Features]], Scored],
        *,
        tokens_of: str | None = None,
    ) -> Job:
        measure = Measure(
            label=self.task.label,
            features=model.name,
            readout=readout,
            method=METHODS[method],
            labels_per_class=self.per_class,
        )
        identity = {
            "what": "scores",
            "model": dict(model.identity),
            "clips": dict(self.clips),
            "label": self.task.label,
            "rows": None if self.per_class is None else rows.tolist(),
            "readout": readout,
            "method": method,
            "options": dict(options),
        }
        return Job(
            measure=measure,
            task=self.task,
            identity=identity,
            distilled=model.distilled,
            tokens_of=tokens_of,
            compute=compute,
        )


_POOLED = ("knn", "linear")


def _rows(splits: Splits, task: Task, per_class: int | None, seed: int) -> Rows:
    rows = task.rows("train")
    if per_class is None:
        return rows
    uids = [splits["train"].uids[i] for i in rows]
    chosen = labelled_subset(
        uids,
        task.known_truth("train"),
        per_class=per_class,
        names=task.classes,
        label=task.label,
        seed=seed,
    )
    subset: Rows = rows[chosen]
    return subset


def _pooled(
    settings: EvaluateConfig,
    task: Task,
    rows: Rows,
    key: str,
    readout: str,
    method: str,
    features: Mapping[str, Features],
) -> Scored:
    pooled = features[key].pooled[readout]
    train, validation = pooled["train"][rows, 0], pooled["validation"][task.rows("validation"), 0]
    test = pooled["test"][task.rows("test")]
    views = test.shape[1]
    rows_of_test = test.reshape(-1, test.shape[-1])
    labels, wanted = task.truth["train"][rows], task.known_truth("validation")
    if method == "linear":
        probe = linear_probe(train, labels, validation, wanted, rows_of_test)
        scores, accuracy = probe.scores, probe.validation_accuracy
    else:
        vote = partial(
            knn_predict,
            train,
            labels,
            neighbours=min(settings.neighbours, len(labels)),
            temperature=settings.temperature,
            num_classes=len(task.classes),
        )
        scores = vote(rows_of_test)
        accuracy = float((vote(validation).argmax(1) == wanted).mean())
    return Scored(test=mean_over_views(scores, views), validation_accuracy=accuracy)


def _attentive(
    settings: EvaluateConfig,
    task: Task,
    rows: Rows,
    key: str,
    seed: int,
    device: torch.device,
    features: Mapping[str, Features],
) -> Scored:
    tokens = features[key].tokens
    assert tokens is not None, "the tokens of a job that is not kept were wanted"
    return attentive_probe(
        Tokens(values=tokens["train"], rows=rows),
        task.truth["train"][rows],
        Tokens(values=tokens["validation"], rows=task.rows("validation")),
        task.known_truth("validation"),
        Tokens(values=tokens["test"], rows=task.rows("test")),
        num_classes=len(task.classes),
        settings=settings.attentive,
        seed=seed,
        device=device,
    )
