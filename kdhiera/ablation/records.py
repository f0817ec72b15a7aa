"""The record of a finished run: small, whole, enough for every table and every interval.

A record holds which test clips were classified right, not only how many: two records
answer a paired question about two variants years after their weights are gone.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from kdhiera.errors import DamagedError
from kdhiera.results import Measure, Outcomes
from kdhiera.storage import write_atomic


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A logged step of training.

    Args:
        step: Its number.
        loss: Total.
        explained: Mean of the targets' explained variances.
    """

    step: int
    loss: float
    explained: float


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What one run of an ablation came to.

    Args:
        variant: Name of the variant.
        seed: Its seed.
        identity: Hash of the settings that decide its result.
        outcomes: Which clips were right, by measure.
        curve: Of the loss.
        steps: Optimiser steps.
        seconds: Spent in them.
        clip_macs: Multiply-adds of the student in the forward pass of one training clip.
    """

    variant: str
    seed: int
    identity: str
    outcomes: Outcomes
    curve: tuple[CurvePoint, ...]
    steps: int
    seconds: float
    clip_macs: int


def record_path(folder: Path, variant: str, seed: int) -> Path:
    """Where the record of a run lies."""
    return folder / f"{variant}.seed-{seed}.json"


def save_record(folder: Path, record: RunRecord) -> None:
    """Write a record, whole or not at all."""
    outcomes = record.outcomes
    document = {
        "variant": record.variant,
        "seed": record.seed,
        "identity": record.identity,
        "steps": record.steps,
        "seconds": round(record.seconds, 1),
        "clip_macs": record.clip_macs,
        "curve": [[p.step, round(p.loss, 5), round(p.explained, 5)] for p in record.curve],
        "uids": list(outcomes.uids),
        "groups": {name: list(values) for name, values in outcomes.groups.items()},
        "known": {name: _packed(mask) for name, mask in outcomes.known.items()},
        "measures": [
            {
                **asdict(measure),
                "right": [_packed(row) for row in right],
                "validation": round(outcomes.validation[measure], 5),
            }
            for measure, right in outcomes.right.items()
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = record_path(folder, record.variant, record.seed)
    write_atomic(path, (json.dumps(document, indent=1) + "\n").encode())


def load_record(path: Path) -> RunRecord:
    """Read a record back.

    Raises:
        DamagedError: If the file is none.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        count = len(document["uids"])
        measures = {
            Measure(**{k: v for k, v in row.items() if k not in ("right", "validation")}): row
            for row in document["measures"]
        }
        return RunRecord(
            variant=document["variant"],
            seed=document["seed"],
            identity=document["identity"],
            outcomes=Outcomes(
                uids=tuple(document["uids"]),
                groups={name: tuple(values) for name, values in document["groups"].items()},
                known={name: _unpacked(bits, count) for name, bits in document["known"].items()},
                right={
                    measure: np.stack([_unpacked(bits, count) for bits in row["right"]])
                    for measure, row in measures.items()
                },
                validation={measure: row["validation"] for measure, row in measures.items()},
            ),
            curve=tuple(
                CurvePoint(step=step, loss=loss, explained=explained)
                for step, loss, explained in document["curve"]
            ),
            steps=document["steps"],
            seconds=document["seconds"],
            clip_macs=document["clip_macs"],
        )
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DamagedError(
            f"{path} is no record of a run ({type(error).__name__}: {error}): remove it, and the "
            "same command makes it again"
        ) from None


def mean_explained(line: Mapping[str, float]) -> float:
    """Mean of the targets' explained variances in a line of metrics."""
    values = [v for k, v in line.items() if k.startswith("explained_variance/")]
    return sum(values) / len(values)


def curve_of(lines: Sequence[Mapping[str, float]], *, points: int = 40) -> tuple[CurvePoint, ...]:
    """Lines of metrics as a curve, thinned evenly to about `points`, the last one kept."""
    every = max(1, round(len(lines) / points))
    kept = [*range(0, len(lines) - 1, every), len(lines) - 1]
    return tuple(
        CurvePoint(
            step=int(lines[i]["step"]), loss=lines[i]["loss"], explained=mean_explained(lines[i])
        )
        for i in kept
    )


def _packed(bits: Bool[np.ndarray, " n"]) -> str:
    return base64.b64encode(np.packbits(bits).tobytes()).decode()


def _unpacked(text: str, count: int) -> Bool[np.ndarray, " n"]:
    packed = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(packed) != (count + 7) // 8:
        raise ValueError(f"{len(packed)} bytes for {count} clips")
    return np.unpackbits(packed, count=count).astype(bool)
