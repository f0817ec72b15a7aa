"""What a run measures, line by line in `metrics.jsonl` and as TensorBoard curves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.writer import SummaryWriter

from kdhiera.storage import write_atomic

FILE = "metrics.jsonl"


class MetricLog:
    """Writes metrics; use within `with`.

    Lines after the step a run goes on from are dropped first, so that no step is listed
    twice; so is a last line that was cut off.

    Args:
        folder: The run's folder; holds `metrics.jsonl` and `tensorboard/`.
        steps_done: Steps the run goes on from.
    """

    def __init__(self, folder: Path, *, steps_done: int) -> None:
        self._path = folder / FILE
        kept = [line for line in read_metrics(folder) if line["step"] <= steps_done]
        write_atomic(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = self._path.open("a", encoding="utf-8")
        self._curves = SummaryWriter(str(folder / "tensorboard"), purge_step=steps_done + 1)

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._curves.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line and one point of every curve.

        Args:
            step: Steps done, counted from 1.
            values: By name; a `/` groups curves.
        """
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._curves.add_scalar(name, value, step)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of a run's `metrics.jsonl` in order; empty if there is none.

    Args:
        folder: The run's folder.
    """
    path = folder / FILE
    if not path.exists():
        return []
    whole, _, _cut = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]
