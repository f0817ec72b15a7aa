"""What an evaluation found, as values: shared by what measures and what reports."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Bool
from pydantic import TypeAdapter, ValidationError

from kdhiera.errors import DamagedError
from kdhiera.storage import atomic_file

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with the bounds of its 95 % interval.

    Args:
        value: Point estimate on the data as they are.
        low: Lower bound.
        high: Upper bound.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Control:
    """A check of the labelled task itself.

    Args:
        name: What the classifier was given, in plain words.
        accuracy: What it reached.
        chance: What guessing reaches.
        num_clips: Test clips.
        expected: `chance` if the task is only honest when this is at chance; `above` if
            it only measures something when this is above.
    """

    name: str
    accuracy: Interval
    chance: float
    num_clips: int
    expected: Literal["chance", "above"]

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Control:
        """From plain values."""
        return cls(**{**row, "accuracy": Interval(**row["accuracy"])})

    @property
    def holds(self) -> bool:
        """Whether the interval agrees with what is expected."""
        if self.expected == "above":
            return self.accuracy.low > self.chance
        return self.accuracy.low <= self.chance <= self.accuracy.high


@dataclass(frozen=True, kw_only=True)
class Result:
    """Accuracy of one readout of one set of frozen features on one label.

    Args:
        label: What is predicted, such as `direction`.
        features: Whose features, such as `distilled student`.
        readout: How a clip's features became one vector, such as `mean` or `slots`.
        method: What predicted from it, such as `k-NN` or `linear probe`.
        accuracy: Share of test clips predicted rightly, 0..1; mean over seeds.
        top5: Share whose class is among the five of highest score; None where there are no
            more than five classes.
        chance: Accuracy that guessing reaches.
        num_clips: Test clips.
        labels_per_class: Training clips of each class that were learnt from; None means all.
        num_seeds: Times that it was measured; 1 where no seed changes it.
        std: Standard deviation (n - 1) of the accuracy over the seeds; None for one seed.
    """

    label: str
    features: str
    readout: str
    method: str
    accuracy: Interval
    top5: Interval | None = None
    chance: float
    num_clips: int
    labels_per_class: int | None = None
    num_seeds: int = 1
    std: float | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Paired difference in accuracy of two sets of features on the same test clips.

    Args:
        label: What is predicted.
        features: Whose features.
        baseline: Whose features they are compared with.
        readout: How a clip's features became one vector.
        method: What predicted from it.
        difference: Accuracy of `features` minus accuracy of `baseline`.
        num_clips: Test clips.
        labels_per_class: Training clips of each class that both learnt from; None means all.
    """

    label: str
    features: str
    baseline: str
    readout: str
    method: str
    difference: Interval
    num_clips: int
    labels_per_class: int | None = None


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What was measured: a key.

    Args:
        label: What is predicted.
        features: Whose features, or which model was trained.
        readout: How a clip's features became one vector.
        method: What predicted from it.
        labels_per_class: Training clips of each class that were learnt from; None means all.
    """

    label: str
    features: str
    readout: str
    method: str
    labels_per_class: int | None


@dataclass(frozen=True, kw_only=True)
class ClassCount:
    """How often the test clips of a class were classified rightly.

    Args:
        name: The label's value.
        correct: Clips classified rightly, summed over seeds.
        total: Clips, times seeds.
    """

    name: str
    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share of the clips that were right."""
        return self.correct / self.total


@dataclass(frozen=True, kw_only=True)
class PerClass:
    """Accuracy class by class; classes without test clips are left out.

    Args:
        measure: What was measured.
        num_seeds: Times that it was measured; counts are sums over these.
        classes: In the order of their names.
    """

    measure: Measure
    num_seeds: int
    classes: tuple[ClassCount, ...]


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """Which test clips were classified right: what paired comparisons between runs need.

    Args:
        uids: Test clips.
        groups: By group label, its value of every clip.
        known: By label, whether training showed the clip's value; other clips count for
            nothing.
        right: By measure and seed, in the order of the seeds; False where not known.
        validation: Accuracy on the validation split, mean over seeds.
    """

    uids: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]]
    known: Mapping[str, Bool[np.ndarray, " n"]]
    right: Mapping[Measure, Bool[np.ndarray, "seeds n"]]
    validation: Mapping[Measure, float]


def save_outcomes(path: Path, outcomes: Outcomes) -> None:
    """Write outcomes as one npz file, whole or not at all."""
    facts = {
        "uids": outcomes.uids,
        "groups": {name: list(values) for name, values in outcomes.groups.items()},
        "known": list(outcomes.known),
        "measures": [asdict(m) | {"validation": outcomes.validation[m]} for m in outcomes.right],
    }
    arrays = {f"known{i}": known for i, known in enumerate(outcomes.known.values())}
    arrays |= {f"right{i}": right for i, right in enumerate(outcomes.right.values())}
    with atomic_file(path) as file:
        np.savez_compressed(
            file,
            facts=np.frombuffer(json.dumps(facts).encode(), np.uint8),
            **arrays,  # type: ignore[arg-type]
        )


def load_outcomes(path: Path) -> Outcomes:
    """Outcomes from what `save_outcomes` wrote.

    Raises:
        DamagedError: If the file is missing or damaged.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            facts = json.loads(stored["facts"].tobytes())
            validation = [values.pop("validation") for values in facts["measures"]]
            measures = [Measure(**values) for values in facts["measures"]]
            return Outcomes(
                uids=tuple(facts["uids"]),
                groups={name: tuple(values) for name, values in facts["groups"].items()},
                known={name: stored[f"known{i}"] for i, name in enumerate(facts["known"])},
                right={m: stored[f"right{i}"] for i, m in enumerate(measures)},
                validation=dict(zip(measures, validation, strict=True)),
            )
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DamagedError(
            f"{path} holds no outcomes of an evaluation ({type(error).__name__}): evaluate again"
        ) from error


def to_json(records: Iterable[Result | Comparison]) -> list[dict[str, Any]]:
    """Records as JSON values; `results_from_json` and `comparisons_from_json` read them back."""
    return [asdict(record) for record in records]


def results_from_json(values: object) -> tuple[Result, ...]:
    """Results from what `to_json` gave.

    Raises:
        DamagedError: If the values are not a list of results.
    """
    return _from_json(TypeAdapter(tuple[Result, ...]), values)


def comparisons_from_json(values: object) -> tuple[Comparison, ...]:
    """Comparisons from what `to_json` gave.

    Raises:
        DamagedError: If the values are not a list of comparisons.
    """
    return _from_json(TypeAdapter(tuple[Comparison, ...]), values)


def _from_json(adapter: TypeAdapter[T], values: object) -> T:
    try:
        return adapter.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DamagedError(
            f"these are no evaluation results: `{where}`: {first['msg']}; evaluate again"
        ) from None


def per_class_to_json(tables: Iterable[PerClass]) -> list[dict[str, Any]]:
    """Per-class tables as JSON values; `per_class_from_json` reads them back."""
    return [
        asdict(table.measure)
        | {"num_seeds": table.num_seeds}
        | {"classes": [asdict(row) | {"accuracy": row.accuracy} for row in table.classes]}
        for table in tables
    ]


def per_class_from_json(values: Any) -> tuple[PerClass, ...]:
    """Per-class tables from what `per_class_to_json` gave.

    Raises:
        DamagedError: If the values are not that.
    """
    if not isinstance(values, list) or not all(isinstance(v, dict) for v in values):
        raise DamagedError("these are no per-class tables: evaluate again")
    tables = [
        {
            "measure": {k: v for k, v in value.items() if k not in ("num_seeds", "classes")},
            "num_seeds": value.get("num_seeds"),
            "classes": [
                {k: v for k, v in row.items() if k != "accuracy"}
                for row in value.get("classes", ())
            ],
        }
        for value in values
    ]
    return _from_json(TypeAdapter(tuple[PerClass, ...]), tables)
