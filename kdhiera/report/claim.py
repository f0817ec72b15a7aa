"""The claim that a single run can test: does what was distilled beat where it began?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kdhiera.report.tables import Table, escape_markdown, percent, to_markdown
from kdhiera.results import Comparison, Result


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Frozen features of a student beside the same student at random weights, by one measure.

    Args:
        student: Accuracy of the student.
        random: Accuracy of the random one.
        difference: Paired, on the same test clips.
    """

    student: Result
    random: Result
    difference: Comparison

    @property
    def apart(self) -> bool:
        """Whether the intervals of the two do not touch, the student's above."""
        return self.student.accuracy.low > self.random.accuracy.high

    @property
    def verdict(self) -> str:
        """In words."""
        if self.apart:
            return "better, intervals apart"
        if self.difference.difference.low > 0:
            return "better, paired; intervals overlap"
        return "worse" if self.difference.difference.high < 0 else "not told apart"


def claims(results: Sequence[Result], comparisons: Sequence[Comparison]) -> tuple[Claim, ...]:
    """One for every comparison of frozen features on all labels whose sides were reported."""
    accuracies = {_key(r, r.features): r for r in results}
    sides = (
        (c, accuracies.get(_key(c, c.features)), accuracies.get(_key(c, c.baseline)))
        for c in comparisons
    )
    return tuple(
        Claim(student=student, random=random, difference=c)
        for c, student, random in sides
        if student and random and c.labels_per_class is None and c.method != "fine-tuning"
    )


def claim_table(found: Sequence[Claim]) -> Table:
    """A row a claim."""
    return Table(
        headers=("label", "measured by", "distilled", "random", "difference", "verdict"),
        rows=tuple(
            (
                c.student.label,
                f"{c.student.method}, {c.student.readout}",
                percent(c.student.accuracy),
                percent(c.random.accuracy),
                percent(c.difference.difference, signed=True),
                c.verdict,
            )
            for c in found
        ),
        numeric=frozenset({2, 3, 4}),
    )


def claim_lines(found: Sequence[Claim]) -> Iterator[str]:
    """One sentence a label: by which measures the student is clearly ahead, or that it is not."""
    for label in dict.fromkeys(c.student.label for c in found):
        own = [c for c in found if c.student.label == label]
        apart = [f"{c.student.method} ({c.student.readout})" for c in own if c.apart]
        if apart:
            yield f"{label}: intervals apart by {', '.join(apart)}"
        else:
            yield (
                f"{label}: distilled and random cannot be separated by their intervals in this run"
            )


def claim_blocks(found: Sequence[Claim]) -> list[str]:
    """The section of a report."""
    if not found:
        return []
    return [
        "## Does distillation beat a random student?",
        "\n".join(f"- {escape_markdown(line)}." for line in claim_lines(found)),
        to_markdown(claim_table(found)),
    ]


def _key(found: Result | Comparison, features: str) -> tuple[str, str, str, str, int | None]:
    return found.label, features, found.readout, found.method, found.labels_per_class
