"""Stage 3: how good the frozen student is on held-out labelled clips.

Beside it always stand the same student at random weights and the pooled teachers, so
that a number means something. Clips are decoded once and every model sees the same ones.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8

from kdhiera.cache.fingerprint import fingerprint
from kdhiera.config import EvaluateConfig, RunConfig
from kdhiera.data.patterns import expand
from kdhiera.data.sandbox import Sandbox
from kdhiera.data.shards import ShardIndex, index_shards
from kdhiera.devices import resolve_device
from kdhiera.errors import UsageError
from kdhiera.evaluation.bootstrap import bootstrap_difference, bootstrap_interval
from kdhiera.evaluation.knn import knn_predict
from kdhiera.evaluation.probe import linear_probe
from kdhiera.featurize import Featurizer
from kdhiera.progress import Progress
from kdhiera.report.tables import percent, result_table, to_text
from kdhiera.results import Comparison, Result, comparisons_from_json, results_from_json, to_json
from kdhiera.stages.assemble import decode_limits, exported_student, featurizer_of
from kdhiera.stages.clips import ClipBatch, clip_batches
from kdhiera.storage import atomic_file, file_sha256, write_atomic
from kdhiera.student.base import Student
from kdhiera.student.build import build_student
from kdhiera.views import CropPolicy, FramePolicy, ViewPolicy

logger = logging.getLogger(__name__)

STUDENT = "distilled student"
RANDOM = "random student"
READOUTS = ("mean", "slots")
SPLITS = ("train", "validation", "test")

Features = dict[str, Float[np.ndarray, "b c"]]  # by readout
Model = Callable[[UInt8[np.ndarray, "b f y x 3"]], Features]


@dataclass(frozen=True, kw_only=True)
class EvaluateSummary:
    """What evaluation found.

    Args:
        results: Accuracies.
        comparisons: The student against its random twin, on the same clips.
        num_clips: Clips by split.
        num_groups: What intervals were resampled over.
        path: JSON file that holds all this.
        features: npz file with the pooled features, `SPLIT|MODEL|READOUT`, and `SPLIT|uids`.
    """

    results: tuple[Result, ...]
    comparisons: tuple[Comparison, ...]
    num_clips: Mapping[str, int]
    num_groups: Mapping[str, int]
    path: str
    features: str

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def describe(self) -> str:
        """For people."""
        lines = [to_text(result_table(self.results)), ""]
        lines += [
            f"{c.label}, {c.method} ({c.readout}): {c.features} minus {c.baseline} "
            f"{percent(c.difference, signed=True)}"
            for c in self.comparisons
        ]
        clips = ", ".join(f"{n} {split}" for split, n in self.num_clips.items())
        return "\n".join([*lines, "", f"clips: {clips}", f"saved: {self.path}"])


@dataclass(frozen=True, kw_only=True)
class _Split:
    uids: Sequence[str]
    features: Mapping[str, Features]
    labels: Sequence[Mapping[str, Any]]


def evaluate(config: RunConfig, *, progress: Progress) -> EvaluateSummary:
    """Measure the run's exported student; the same evaluation is not done twice.

    Args:
        config: The run, with an `evaluate` section.
        progress: Where progress is shown.

    Raises:
        UsageError: If there is no student yet, no evaluate section, no labelled clips.
    """
    settings = _settings(config)
    folder = Path(config.run_dir)
    export = folder / "export"
    if not (export / "model.safetensors").is_file():
        raise UsageError(
            f"no trained student in {export}: run `kdhiera distill` with this config first"
        )
    path = folder / "evaluation.json"
    shards = {name: index_shards(expand(getattr(settings, name))) for name in SPLITS}
    want = _fingerprint(config, settings, shards, export)
    models = _models(config, export)
    features = folder / "features.npz"
    done = _earlier(path, features, want)
    if done is not None:
        logger.info("this student was evaluated before: results are those of %s", path)
        return done
    splits = _read_splits(config, settings, shards, models, progress)
    results, comparisons = [], []
    for label in _labels(settings, splits):
        found, compared = _measure(settings, splits, label)
        results += found
        comparisons += compared
    summary = EvaluateSummary(
        results=tuple(results),
        comparisons=tuple(comparisons),
        num_clips={name: len(split.labels) for name, split in splits.items()},
        num_groups={
            g: len({str(row.get(g)) for row in splits["test"].labels}) for g in settings.groups
        },
        path=str(path),
        features=str(features),
    )
    _save_features(features, splits)
    document = {
        "fingerprint": want,
        "results": to_json(summary.results),
        "comparisons": to_json(summary.comparisons),
        "num_clips": summary.num_clips,
        "num_groups": summary.num_groups,
    }
    write_atomic(path, (json.dumps(document, indent=1) + "\n").encode())
    return summary


def evaluation_policy(config: RunConfig) -> ViewPolicy:
    """The middle of every video, whole frame: no randomness."""
    stride = _settings(config).frame_stride
    return ViewPolicy(
        num_frames=config.clip.num_frames,
        height=config.clip.height,
        width=config.clip.width,
        frames=FramePolicy.DENSE_CENTER,
        frame_stride=stride,
        crop=CropPolicy.CENTER,
        crop_scale=(1.0, 1.0),
        crop_ratio=(1.0, 1.0),
        flip=False,
        allow_short=config.views.allow_short,
        seed=0,
    )


def _settings(config: RunConfig) -> EvaluateConfig:
    if config.evaluate is None:
        raise UsageError("the config has no `evaluate` section: name labelled shards there")
    return config.evaluate


def _models(config: RunConfig, export: Path) -> dict[str, Model]:
    device = resolve_device(config.train.device)
    grid = config.clip.grid
    seed = _settings(config).seed
    students = {
        STUDENT: exported_student(config, export),
        RANDOM: build_student(config.student, grid, seed=seed),
    }
    models: dict[str, Model] = {
        name: _student_model(student.to(device).eval(), device)
        for name, student in students.items()
    }
    featurizer = featurizer_of(config, device=device)
    for name, teacher in config.teachers.items():
        models[f"{name} teacher"] = _teacher_model(featurizer, name, teacher.layers[-1])
    return models


def _student_model(student: Student, device: torch.device) -> Model:
    @torch.inference_mode()
    def run(clips: UInt8[np.ndarray, "b f y x 3"]) -> Features:
        tokens = student.dense(torch.from_numpy(clips).to(device))
        return {
            "mean": student.pool(tokens, "mean").float().cpu().numpy(),
            "slots": student.pool(tokens, "slots").float().cpu().numpy(),
        }

    return run


def _teacher_model(featurizer: Featurizer, name: str, layer: str) -> Model:
    def run(clips: UInt8[np.ndarray, "b f y x 3"]) -> Features:
        output = featurizer.teach(clips, layers={name: (layer,)}, with_scores=False)
        tokens = output[name].features[layer].float()
        return {
            "mean": tokens.mean((1, 2, 3)).cpu().numpy(),
            "slots": tokens.mean((2, 3)).flatten(1).cpu().numpy(),
        }

    return run


def _read_splits(
    config: RunConfig,
    settings: EvaluateConfig,
    indices: Mapping[str, Sequence[ShardIndex]],
    models: Mapping[str, Model],
    progress: Progress,
) -> dict[str, _Split]:
    total = sum(len(shard.samples) for shards in indices.values() for shard in shards)
    bar = progress.start("evaluate", total, "clips")
    device = resolve_device(config.train.device)
    # On CPUs a batch a core with one thread each is faster than one batch with all of them.
    workers = 1 if device.type == "cuda" else os.cpu_count() or 1
    start = (lambda: None) if device.type == "cuda" else partial(torch.set_num_threads, 1)
    splits = {}
    with (
        Sandbox(decode_limits(config.decode), num_children=workers) as sandbox,
        ThreadPoolExecutor(workers, initializer=start) as pool,
    ):
        for split, shards in indices.items():
            batches = clip_batches(
                config,
                shards,
                policy=evaluation_policy(config),
                sandbox=sandbox,
                batch_size=settings.batch_size,
            )
            found: list[tuple[ClipBatch, dict[str, Features]]] = []
            for batch, features in _mapped(pool, partial(_run_models, models), batches, workers):
                found.append((batch, features))
                progress.advance(bar, len(batch.uids))
            if not found:
                paths = ", ".join(shard.path for shard in shards)
                raise UsageError(f"evaluate.{split} has no clip that decodes: {paths}")
            splits[split] = _Split(
                uids=[uid for batch, _ in found for uid in batch.uids],
                labels=[labels for batch, _ in found for labels in batch.labels],
                features={
                    m: {r: np.concatenate([f[m][r] for _, f in found]) for r in READOUTS}
                    for m in models
                },
            )
    progress.finish(bar)
    return splits


def _run_models(models: Mapping[str, Model], batch: ClipBatch) -> dict[str, Features]:
    return {name: model(batch.frames) for name, model in models.items()}


def _mapped(
    pool: ThreadPoolExecutor,
    function: Callable[[ClipBatch], dict[str, Features]],
    batches: Iterable[ClipBatch],
    ahead: int,
) -> Iterator[tuple[ClipBatch, dict[str, Features]]]:
    """Like `pool.map`, in order, but no more than `ahead` batches are held."""
    waiting: deque[tuple[ClipBatch, Future[dict[str, Features]]]] = deque()
    for batch in batches:
        waiting.append((batch, pool.submit(function, batch)))
        if len(waiting) > ahead:
            first, result = waiting.popleft()
            yield first, result.result()
    for first, result in waiting:
        yield first, result.result()


def _labels(settings: EvaluateConfig, splits: Mapping[str, _Split]) -> tuple[str, ...]:
    found = {name for row in splits["train"].labels for name in row}
    wanted = settings.labels or tuple(sorted(found - set(settings.groups)))
    missing = [name for name in (*wanted, *settings.groups) if name not in found]
    if missing or not wanted:
        raise UsageError(
            f"the clips of evaluate.train have no label {', '.join(missing) or 'at all'}; they "
            f"have: {', '.join(sorted(found)) or 'none'}"
        )
    return wanted


def _measure(
    settings: EvaluateConfig, splits: Mapping[str, _Split], label: str
) -> tuple[list[Result], list[Comparison]]:
    """All models, methods and readouts on one label."""
    classes = sorted({str(row[label]) for row in splits["train"].labels if label in row})
    numbers = {name: i for i, name in enumerate(classes)}
    known = {s: np.array([str(r.get(label)) in numbers for r in splits[s].labels]) for s in SPLITS}
    truth = {
        s: np.array(
            [numbers[str(r[label])] for r, k in zip(splits[s].labels, known[s], strict=True) if k]
        )
        for s in SPLITS
    }
    if not len(truth["test"]) or not len(truth["validation"]):
        raise UsageError(f"no test or validation clip has a value of `{label}` seen in training")
    groups = [
        np.array(
            [str(r.get(g)) for r, k in zip(splits["test"].labels, known["test"], strict=True) if k]
        )
        for g in settings.groups
    ] or [np.arange(len(truth["test"]))]
    results: list[Result] = []
    right: dict[tuple[str, str, str], Bool[np.ndarray, " n"]] = {}
    for model in splits["train"].features:
        for readout in READOUTS:
            arrays = {s: splits[s].features[model][readout][known[s]] for s in SPLITS}
            for method, predicted in _predict(settings, arrays, truth, len(classes)):
                correct = predicted == truth["test"]
                right[method, readout, model] = correct
                accuracy = bootstrap_interval(
                    correct, groups, resamples=settings.resamples, seed=settings.seed
                )
                results.append(
                    Result(
                        label=label,
                        features=model,
                        readout=readout,
                        method=method,
                        accuracy=accuracy,
                        chance=float(np.bincount(truth["test"]).max() / len(truth["test"])),
                        num_clips=len(correct),
                    )
                )
    comparisons = [
        Comparison(
            label=label,
            features=STUDENT,
            baseline=RANDOM,
            readout=readout,
            method=method,
            difference=bootstrap_difference(
                correct,
                right[method, readout, RANDOM],
                groups,
                resamples=settings.resamples,
                seed=settings.seed,
            ),
            num_clips=len(correct),
        )
        for (method, readout, model), correct in right.items()
        if model == STUDENT
    ]
    return results, comparisons


def _predict(
    settings: EvaluateConfig,
    arrays: Mapping[str, Float[np.ndarray, "n c"]],
    truth: Mapping[str, Int[np.ndarray, " n"]],
    num_classes: int,
) -> list[tuple[str, Int[np.ndarray, " n"]]]:
    votes = knn_predict(
        arrays["train"],
        truth["train"],
        arrays["test"],
        neighbours=min(settings.neighbours, len(truth["train"])),
        temperature=settings.temperature,
        num_classes=num_classes,
    )
    probe = linear_probe(
        arrays["train"],
        truth["train"],
        arrays["validation"],
        truth["validation"],
        arrays["test"],
    )
    return [("k-NN", np.asarray(votes).argmax(1)), ("linear probe", probe.predictions)]


def _fingerprint(
    config: RunConfig,
    settings: EvaluateConfig,
    shards: Mapping[str, Sequence[ShardIndex]],
    export: Path,
) -> str:
    """Of all that decides the results: the weights, the clips, the settings."""
    weights = file_sha256(export / "model.safetensors")
    return fingerprint(
        {
            "weights": weights,
            "shards": [shard.shard_id for split in SPLITS for shard in shards[split]],
            "settings": settings.model_dump(mode="json"),
            "clip": config.clip.model_dump(mode="json"),
            "allow_short": config.views.allow_short,
            "decode": config.decode.model_dump(mode="json"),
            "extensions": list(config.data.video_extensions),
            "teacher_weights": {
                name: file_sha256(Path(t.weights)) if t.weights else ""
                for name, t in config.teachers.items()
            },
            "student": config.student.model_dump(mode="json"),
            "teachers": {k: t.model_dump(mode="json") for k, t in config.teachers.items()},
        }
    )


def _save_features(path: Path, splits: Mapping[str, _Split]) -> None:
    arrays: dict[str, np.ndarray] = {}
    for name, split in splits.items():
        arrays[f"{name}|uids"] = np.array(split.uids)
        for model, readouts in split.features.items():
            for readout, values in readouts.items():
                arrays[f"{name}|{model}|{readout}"] = values
    with atomic_file(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _earlier(path: Path, features: Path, want: str) -> EvaluateSummary | None:
    if not path.is_file() or not features.is_file():
        return None
    try:
        document = json.loads(path.read_text())
    except ValueError:
        return None
    if document.get("fingerprint") != want:
        return None
    return EvaluateSummary(
        results=results_from_json(document["results"]),
        comparisons=comparisons_from_json(document["comparisons"]),
        num_clips=document["num_clips"],
        num_groups=document["num_groups"],
        path=str(path),
        features=str(features),
    )
