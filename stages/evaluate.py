"""Stage 3: how good the student is on held-out labelled clips, frozen and fine-tuned.

Beside it always stand the same student at random weights (frozen, or trained from scratch
on the same budget) and the pooled teachers, so that a number means something. Clips are
decoded once for all frozen models; whatever was computed before is not computed again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdhiera.cache.fingerprint import fingerprint
from kdhiera.config import EvaluateConfig, RunConfig
from kdhiera.data.patterns import expand
from kdhiera.data.shards import index_shards
from kdhiera.devices import resolve_device, threads
from kdhiera.errors import DamagedError, UsageError
from kdhiera.evaluation.attentive import check_heads
from kdhiera.evaluation.kept import Kept
from kdhiera.evaluation.scores import Scored
from kdhiera.progress import Progress
from kdhiera.report.tables import per_class_tables, percent, result_tables, to_text
from kdhiera.results import (
    Comparison,
    PerClass,
    Result,
    comparisons_from_json,
    load_outcomes,
    per_class_from_json,
    per_class_to_json,
    results_from_json,
    save_outcomes,
    to_json,
)
from kdhiera.stages.assemble import exported_student
from kdhiera.stages.environment import record_environment
from kdhiera.stages.evaluating.findings import put_together
from kdhiera.stages.evaluating.frozen import Features, FrozenModel, FrozenStage
from kdhiera.stages.evaluating.jobs import Job, jobs
from kdhiera.stages.evaluating.labelled import (
    SPLITS,
    Shards,
    Splits,
    clips_identity,
    evaluation_policy,
    settings_of,
    tasks,
)
from kdhiera.stages.evaluating.models import (
    RANDOM,
    SCRATCH,
    STUDENT,
    frozen_models,
    trained_models,
    weights_identity,
)
from kdhiera.stages.export import EVALUATION, export_timm
from kdhiera.storage import atomic_file, file_sha256, write_atomic

__all__ = ["EvaluateSummary", "evaluate", "evaluation_policy"]

logger = logging.getLogger(__name__)

TEXT_WIDTH = 100
SEEDS = "random seed"  # beside the groups that intervals are resampled over


@dataclass(frozen=True, kw_only=True)
class EvaluateSummary:
    """What evaluation found.

    Args:
        results: Accuracies.
        comparisons: The student against its random twin, on the same clips.
        per_class: Accuracy class by class, for every result.
        num_clips: Clips by split.
        num_groups: What intervals were resampled over.
        path: JSON file that holds all this.
        features: npz file with the pooled features, mean over the views of a clip:
            `SPLIT|MODEL|READOUT`, and `SPLIT|uids`.
        outcomes: npz file of `kdhiera.results.load_outcomes`: which clips were right.
    """

    results: tuple[Result, ...]
    comparisons: tuple[Comparison, ...]
    per_class: tuple[PerClass, ...]
    num_clips: Mapping[str, int]
    num_groups: Mapping[str, int]
    path: str
    features: str
    outcomes: str

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"per_class": per_class_to_json(self.per_class)}

    def describe(self) -> str:
        """For people."""
        blocks = [to_text(table) for table in result_tables(self.results, width=TEXT_WIDTH)]
        blocks += [
            f"{title}\n{to_text(table)}"
            for title, table in per_class_tables(self.per_class, self.comparisons)
        ]
        lines: dict[str, list[str]] = {}
        for c in self.comparisons:
            amount = f", {c.labels_per_class} labels a class" if c.labels_per_class else ""
            lines.setdefault(f"{c.features} minus {c.baseline}:", []).append(
                f"  {c.label}, {c.method} ({c.readout}{amount}): "
                f"{percent(c.difference, signed=True)}"
            )
        blocks += ["\n".join([pair, *shown, ""]) for pair, shown in lines.items()]
        groups = ", ".join(f"{name} ({n})" for name, n in self.num_groups.items()) or "clips"
        clips = ", ".join(f"{n} {split}" for split, n in self.num_clips.items())
        blocks.append(
            f"In brackets: 95 % bootstrap intervals over {groups}\n"
            f"clips: {clips}\nsaved: {self.path}"
        )
        return "\n".join(blocks)


def evaluate(
    config: RunConfig, *, progress: Progress, baselines: Path | None = None
) -> EvaluateSummary:
    """Measure the run's exported student; the same evaluation is not done twice.

    Args:
        config: The run, with an `evaluate` section.
        progress: Where progress is shown.
        baselines: Where features and scores of random students and teachers are kept, which
            runs may share, also at once; None means `baselines/` in the run folder.

    Raises:
        UsageError: If there is no student yet, no evaluate section, no labelled clips.
    """
    settings = settings_of(config)
    folder = Path(config.run_dir)
    export = folder / "export"
    if not (export / "model.safetensors").is_file():
        raise UsageError(
            f"no trained student in {export}: run `kdhiera distill` with this config first"
        )
    student = exported_student(config, export, q_pool=settings.q_pool)
    if "attentive" in settings.methods:
        check_heads(student.num_features, settings.attentive.heads)
    shards = {name: index_shards(expand(getattr(settings, name))) for name in SPLITS}
    want = _fingerprint(config, settings, shards, export)
    files = _Files(folder)
    done = files.earlier(want)
    if done is not None:
        logger.info("this student was evaluated before: results are those of %s", files.document)
        return done
    own, others = Kept(folder / "measured"), Kept(baselines or folder / "baselines")
    with threads(config.train.num_threads):
        splits, features, scored = _measured(config, shards, export, own, others, progress)
    record_environment(folder, "evaluate", device=resolve_device(config.train.device))
    found = put_together(settings, splits, scored, pairs={STUDENT: (RANDOM, SCRATCH)})
    num_groups = {name: len(set(values)) for name, values in found.outcomes.groups.items()}
    if len(settings.seeds) > 1:
        num_groups[SEEDS] = len(settings.seeds)
    summary = EvaluateSummary(
        results=found.results,
        comparisons=found.comparisons,
        per_class=found.per_class,
        num_clips={name: len(split.uids) for name, split in splits.items()},
        num_groups=num_groups,
        path=str(files.document),
        features=str(files.features),
        outcomes=str(files.outcomes),
    )
    _save_features(files.features, splits, features)
    save_outcomes(files.outcomes, found.outcomes)
    files.save(summary, want, weights=file_sha256(export / "model.safetensors"))
    export_timm(config)  # its card says what was measured
    return summary


def _measured(
    config: RunConfig,
    shards: Shards,
    export: Path,
    own: Kept,
    others: Kept,
    progress: Progress,
) -> tuple[Splits, dict[str, Features], list[tuple[Job, Scored]]]:
    """Clips, features of frozen models and the scores of all jobs."""
    settings = settings_of(config)
    device = resolve_device(config.train.device)
    frozen = frozen_models(config, export)
    trained = trained_models(config, export, progress=progress)
    clips = clips_identity(config, shards)

    def planned(splits: Splits) -> list[Job]:
        named = tasks(settings, splits)
        return list(jobs(settings, splits, named, frozen, trained, clips=clips, device=device))

    def wants_tokens(model: FrozenModel, splits: Splits) -> bool:
        return any(
            job.tokens_of == model.key and job.stored(own, others) is None
            for job in planned(splits)
        )

    stage = FrozenStage(
        config=config,
        shards=shards,
        own=own,
        baselines=others,
        spool=Path(config.run_dir),
        progress=progress,
    )
    splits, features = stage.run(frozen, wants_tokens=wants_tokens)
    plan = planned(splits)
    bar = progress.start("measure", len(plan), "measures")
    done = []
    for job in plan:
        scored = job.stored(own, others)
        if scored is None:
            scored = job.compute(features)
            job.save(scored, own, others)
        done.append((job, scored))
        progress.advance(bar)
    progress.finish(bar)
    return splits, features, done


def _fingerprint(config: RunConfig, settings: EvaluateConfig, shards: Shards, export: Path) -> str:
    """Of all that decides the results: the weights, the clips, the settings."""
    return fingerprint(
        {
            "weights": file_sha256(export / "model.safetensors"),
            "clips": clips_identity(config, shards),
            "settings": settings.model_dump(mode="json"),
            "teacher_weights": {
                name: weights_identity(t.weights) for name, t in config.teachers.items()
            },
            "student": config.student.model_dump(mode="json"),
            "teachers": {
                k: t.model_dump(mode="json", exclude={"licence"})
                for k, t in config.teachers.items()
            },
        }
    )


def _save_features(path: Path, splits: Splits, features: Mapping[str, Features]) -> None:
    arrays: dict[str, np.ndarray] = {}
    for name, split in splits.items():
        arrays[f"{name}|uids"] = np.array(split.uids)
        for model, of in features.items():
            for readout, pooled in of.pooled.items():
                arrays[f"{name}|{model}|{readout}"] = pooled[name].mean(1)
    with atomic_file(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


class _Files:
    """The files of an evaluation in a run folder."""

    def __init__(self, folder: Path) -> None:
        self.document = folder / EVALUATION
        self.features = folder / "features.npz"
        self.outcomes = folder / "outcomes.npz"

    def save(self, summary: EvaluateSummary, want: str, *, weights: str) -> None:
        document = {
            "fingerprint": want,
            "weights": weights,
            "results": to_json(summary.results),
            "comparisons": to_json(summary.comparisons),
            "per_class": per_class_to_json(summary.per_class),
            "num_clips": summary.num_clips,
            "num_groups": summary.num_groups,
        }
        write_atomic(self.document, (json.dumps(document, indent=1) + "\n").encode())

    def earlier(self, want: str) -> EvaluateSummary | None:
        """What was found before, if it was of the same and is whole."""
        if not self.document.is_file() or not self.features.is_file():
            return None
        try:
            document = json.loads(self.document.read_text())
            if document.get("fingerprint") != want:
                return None
            load_outcomes(self.outcomes)
        except (ValueError, DamagedError):
            return None
        return EvaluateSummary(
            results=results_from_json(document["results"]),
            comparisons=comparisons_from_json(document["comparisons"]),
            per_class=per_class_from_json(document["per_class"]),
            num_clips=document["num_clips"],
            num_groups=document["num_groups"],
            path=str(self.document),
            features=str(self.features),
            outcomes=str(self.outcomes),
        )
