"""What an evaluation found, as values: shared by what measures and what reports."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from kdhiera.errors import DamagedError

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
class Result:
    """Accuracy of one readout of one set of frozen features on one label.

    Args:
        label: What is predicted, such as `direction`.
        features: Whose features, such as `distilled student`.
        readout: How a clip's features became one vector, such as `mean` or `slots`.
        method: What predicted from it, such as `k-NN` or `linear probe`.
        accuracy: Share of test clips predicted rightly, 0..1.
        chance: Accuracy that guessing reaches.
        num_clips: Test clips.
    """

    label: str
    features: str
    readout: str
    method: str
    accuracy: Interval
    chance: float
    num_clips: int


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
    """

    label: str
    features: str
    baseline: str
    readout: str
    method: str
    difference: Interval
    num_clips: int


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
