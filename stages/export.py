"""A run's student for others: for timm with a model card, or as the original Hiera loads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import column_id
from kdhiera.config import RunConfig
from kdhiera.errors import UsageError
from kdhiera.report.tables import result_table, to_markdown
from kdhiera.results import results_from_json
from kdhiera.stages.assemble import exported_student
from kdhiera.storage import file_sha256
from kdhiera.student.export import WEIGHTS, export, export_hiera, read_config
from kdhiera.student.hiera import HieraStudent

EVALUATION = "evaluation.json"  # in a run folder; says which weights it is of


def provenance_of(
    config: RunConfig, *, coverage: str, steps: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What an export says of where its weights come from, as plain values.

    Args:
        config: The run.
        coverage: What it trained on, in words.
        steps: Optimiser steps.
        settings: All that decided the weights.
    """
    cache = Cache.open(config.cache.dir) if config.cache.mode == "cached" else None
    teachers = {}
    for name, layers in config.objective_layers.items():
        teacher = config.teachers[name]
        column = column_id(name, layers[0], config.cache.encoding)
        made_by = (cache.columns.identity(column) if cache else None) or {}
        teachers[name] = {
            "kind": teacher.kind,
            "model": teacher.model or teacher.factory or teacher.kind,
            "weights": teacher.weights and Path(teacher.weights).name,
            "weights_sha256": made_by.get("weights_sha256"),
            "layers": list(layers),
            "weight": teacher.weight,
            "licence": teacher.licence,
        }
    data = {
        "shards": list(config.data.shards),
        "licence": config.data.licence,
        "coverage": coverage,
        "views": config.views.num,
        "steps": steps,
        "batch_size": config.train.batch_size,
        "masks": ", then ".join(
            f"{spec.strategy} masks at ratio {spec.ratio:g}" for spec in config.mask_schedule.phases
        ),
    }
    return {"teachers": teachers, "data": data, "settings": dict(settings)}


def export_timm(config: RunConfig, out: Path | None = None) -> Path:
    """Write the export of a finished run once more, its card with what was measured meanwhile.

    Args:
        config: The run.
        out: The folder; None is `export/` in the run folder.

    Returns:
        The folder.

    Raises:
        UsageError: If the run has no student yet, or `out` is a file.
        MismatchError: If the run's student is not the config's.
        DamagedError: If the run's export cannot be read.
    """
    source = _exported(config)
    folder = out or source
    if folder.is_file():
        raise UsageError(f"--out {folder} is a file: name the folder to write")
    student = exported_student(config, source)
    export(
        student,
        config.student,
        folder,
        name=config.name,
        provenance=read_config(source)["provenance"],
        measured=measured(Path(config.run_dir)),
    )
    return folder


def export_original(config: RunConfig, out: Path | None = None) -> Path:
    """Write the student of a finished run as a checkpoint of the original Hiera.

    Args:
        config: The run.
        out: The `.pth` file; None is `export/hiera.pth` in the run folder.

    Returns:
        What was written.

    Raises:
        UsageError: If the run has no student yet, or one that is no Hiera, or `out` is a folder.
        MismatchError: If the run's student is not the config's.
        DamagedError: If the run's export cannot be read.
    """
    source = _exported(config)
    file = out or source / "hiera.pth"
    if file.is_dir():
        raise UsageError(f"--out {file} is a folder: name the .pth file to write")
    student = exported_student(config, source)
    if not isinstance(student, HieraStudent):
        raise UsageError(
            f"--to hiera: the student is a plain ViT (student.kind={student.kind}), which the "
            f"original Hiera cannot load; {source} holds it as timm loads it"
        )
    export_hiera(student, file)
    return file


def measured(run_dir: Path) -> str:
    """What the run's evaluation found, in Markdown; empty if these weights were not evaluated."""
    document, weights = run_dir / EVALUATION, run_dir / "export" / WEIGHTS
    if not document.is_file():
        return ""
    try:
        found = json.loads(document.read_text())
    except ValueError:
        return ""  # `evaluate` measures again
    if found.get("weights") != file_sha256(weights):
        return ""
    table = to_markdown(result_table(results_from_json(found["results"])))
    return f"{table}\nIn brackets: 95 % bootstrap intervals.\n"


def _exported(config: RunConfig) -> Path:
    folder = Path(config.run_dir) / "export"
    if not folder.is_dir():
        raise UsageError(f"{config.run_dir} holds no student: run `kdhiera distill` first")
    return folder
