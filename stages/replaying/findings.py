"""What making one sample of a cache again came to, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdhiera.cache.layout import PartId
from kdhiera.data.clip import shown


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing that was done, and what it gave.

    Args:
        name: `stored`, `shard`, `sample`, `look`, `decode` or `teachers`.
        same: Whether it came out as it is stored; None where that says nothing.
        lines: For people.
        values: The same as plain values.
        seconds: Wall time.
    """

    name: str
    same: bool | None
    lines: tuple[str, ...]
    values: Mapping[str, Any]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RowReplay:
    """One row made again.

    Args:
        part: Shard and view.
        uid: Identity of the sample.
        steps: In their order; what could not be reached is not there.
    """

    part: PartId
    uid: str
    steps: tuple[Step, ...]

    @property
    def same(self) -> bool:
        """Whether all came out as it is stored."""
        reached = {step.name for step in self.steps}
        return "decode" in reached and all(step.same is not False for step in self.steps)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        steps = {
            step.name: {"same": step.same, "seconds": step.seconds, **step.values}
            for step in self.steps
        }
        return {
            "shard": self.part.shard_id,
            "view": self.part.view,
            "uid": self.uid,
            "same": self.same,
            "steps": steps,
        }

    def describe(self) -> str:
        """For people."""
        lines = [f"row       {shown(self.uid)} view {self.part.view}"]
        for step in self.steps:
            for number, line in enumerate(step.lines):
                lines.append(f"{step.name if number == 0 else '':<10}{line}")
        what = "came out as it is stored" if self.same else "did not come out as it is stored"
        if self.same and any(step.name == "teachers" and step.same is None for step in self.steps):
            what += ", as far as it was compared: no column was"
        return "\n".join([*lines, f"result    {what}"])


@dataclass(frozen=True, kw_only=True)
class KeyReplay:
    """All rows of a sample made again.

    Args:
        cache: Folder or address.
        key: As it was asked for.
        rows: In sorted order of shards and views.
    """

    cache: str
    key: str
    rows: tuple[RowReplay, ...]

    @property
    def same(self) -> bool:
        """Whether all of them came out as they are stored."""
        return all(row.same for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        rows = [row.to_json() for row in self.rows]
        return {"cache": self.cache, "key": self.key, "same": self.same, "rows": rows}

    def describe(self) -> str:
        """For people."""
        return "\n\n".join(row.describe() for row in self.rows)
