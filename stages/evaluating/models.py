"""The models of an evaluation: the run's own student, random students, pooled teachers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Int

from kdhiera.config import RunConfig
from kdhiera.devices import resolve_device, resolve_precision
from kdhiera.evaluation.scores import Scored
from kdhiera.featurize import Featurizer
from kdhiera.progress import Progress
from kdhiera.stages.assemble import exported_student, featurizer_of
from kdhiera.stages.evaluating.finetuning import finetuned, training_policy
from kdhiera.stages.evaluating.frozen import FrozenModel, Model, student_model, teacher_model
from kdhiera.stages.evaluating.jobs import TrainedModel
from kdhiera.stages.evaluating.labelled import Splits, Task, settings_of
from kdhiera.storage import file_sha256
from kdhiera.student.base import Student
from kdhiera.student.build import build_student
from kdhiera.teachers.base import state_sha256

STUDENT = "distilled student"
RANDOM = "random student"
SCRATCH = "supervised from scratch"
FROZEN_METHODS = frozenset({"knn", "linear", "attentive"})


def frozen_models(config: RunConfig, export: Path) -> list[FrozenModel]:
    """The student, a random one a seed, and the teachers.

    Students are left out where only fine-tuning is asked for. Teachers are loaded here, as
    their identity comes with their weights.

    Args:
        config: The run.
        export: Its exported student.
    """
    settings = settings_of(config)
    device = resolve_device(config.train.device)
    models = []
    if FROZEN_METHODS & set(settings.methods):
        models.append(
            FrozenModel(
                name=STUDENT,
                seed=None,
                identity={
                    "student": file_sha256(export / "model.safetensors"),
                    "q_pool": settings.q_pool,
                },
                distilled=True,
                has_tokens=True,
                load=lambda: student_model(
                    exported_student(config, export, q_pool=settings.q_pool), device
                ),
            )
        )
        models += [
            FrozenModel(
                name=RANDOM,
                seed=seed,
                identity=_random_identity(config, q_pool=settings.q_pool, seed=seed),
                distilled=False,
                has_tokens=True,
                load=partial(_random_model, config, seed),
            )
            for seed in settings.seeds
        ]
    featurizer = featurizer_of(config, device=device)
    return models + [_teacher(config, featurizer, name) for name in config.teachers]


def trained_models(config: RunConfig, export: Path, *, progress: Progress) -> list[TrainedModel]:
    """Students to fine-tune: the run's own and one from scratch for every seed.

    Args:
        config: The run.
        export: Its exported student.
        progress: Where progress is shown.
    """
    settings = settings_of(config)
    recipe = settings.finetune
    if "finetune" not in settings.methods:
        return []
    common = {
        "recipe": recipe.model_dump(mode="json", exclude={"scratch_layer_decay"}),
        "precision": str(resolve_precision(recipe.precision, resolve_device(config.train.device))),
        "views": repr(training_policy(config)),
    }

    def fresh(seed: int) -> Student:
        return _random_student(config, q_pool=recipe.q_pool, seed=seed, drop_path=recipe.drop_path)

    def distilled(_: int) -> Student:
        return exported_student(config, export, q_pool=recipe.q_pool, drop_path=recipe.drop_path)

    def model(
        name: str,
        start: Callable[[int], Student],
        weights: Mapping[str, object],
        layer_decay: float,
        seed: int,
    ) -> TrainedModel:
        def run(splits: Splits, task: Task, rows: Int[np.ndarray, " k"]) -> Scored:
            return finetuned(
                config,
                start(seed),
                splits,
                task,
                rows,
                layer_decay=layer_decay,
                seed=seed,
                progress=progress,
                description=f"{name}, {task.label}",
            )

        identity = {**common, **weights, "layer_decay": layer_decay, "seed": seed}
        return TrainedModel(
            name=name, seed=seed, identity=identity, distilled=name == STUDENT, run=run
        )

    weights = {"student": file_sha256(export / "model.safetensors")}
    found = [
        model(STUDENT, distilled, weights, recipe.layer_decay, seed) for seed in settings.seeds
    ]
    for seed in settings.seeds:
        identity = _random_identity(config, q_pool=recipe.q_pool, seed=seed)
        found.append(model(SCRATCH, fresh, identity, recipe.scratch_layer_decay, seed))
    return found


def weights_identity(weights: str | None) -> object:
    """Hashes of a teacher's weight files, before it is loaded."""
    if weights is None:
        return None
    path = Path(weights)
    if path.is_dir():
        return {file.name: file_sha256(file) for file in sorted(path.iterdir()) if file.is_file()}
    return file_sha256(path) if path.is_file() else None


def _random_student(
    config: RunConfig, *, q_pool: int, seed: int, drop_path: float = 0.0
) -> Student:
    like = config.student.model_copy(update={"drop_path": drop_path})
    return build_student(like, config.clip.grid, q_pool=q_pool, seed=seed)


def _random_identity(config: RunConfig, *, q_pool: int, seed: int) -> dict[str, object]:
    """By the weights themselves: what a seed gives may change with the libraries."""
    student = _random_student(config, q_pool=q_pool, seed=seed)
    return {"student": state_sha256(student.backbone.state_dict()), "q_pool": q_pool}


def _random_model(config: RunConfig, seed: int) -> Model:
    student = _random_student(config, q_pool=settings_of(config).q_pool, seed=seed)
    return student_model(student, resolve_device(config.train.device))


def _teacher(config: RunConfig, featurizer: Featurizer, name: str) -> FrozenModel:
    teacher, layer = featurizer.teachers[name], config.teachers[name].layers[-1]
    return FrozenModel(
        name=f"{name} teacher",
        seed=None,
        identity={
            "teacher": dict(teacher.identity),
            "weights": teacher.weights_sha256,
            "layer": layer,
            "precision": str(resolve_precision(config.teachers[name].precision, featurizer.device)),
        },
        distilled=False,
        has_tokens=False,
        load=lambda: teacher_model(featurizer, name, layer),
    )
