"""Fewer labels: how much a method needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from kdhiera.errors import UsageError
from kdhiera.views import stable_uniforms


def labelled_subset(
    uids: Sequence[str],
    classes: Int[np.ndarray, " n"],
    *,
    per_class: int,
    names: Sequence[str],
    label: str,
    seed: int,
) -> Int[np.ndarray, " k"]:
    """So many training clips of each class.

    Every clip has a rank that the seed and its uid decide, and the first ones of each class
    are taken: fewer labels are a part of more, on every machine and in any order of the clips.

    Args:
        uids: Training clips.
        classes: Their class numbers, 0 upwards.
        per_class: Clips of each class, at least 1.
        names: Of the classes, by number.
        label: What is predicted; labels are drawn independently of one another.
        seed: Decides the draw.

    Returns:
        Rows of the clips, ascending.

    Raises:
        UsageError: If a class has fewer clips.
    """
    ranks = np.array([stable_uniforms(1, "labels", seed, label, uid)[0] for uid in uids])
    chosen = []
    for number, name in enumerate(names):
        members = np.flatnonzero(classes == number)
        if len(members) < per_class:
            raise UsageError(
                f"evaluate.labels_per_class asks for {per_class} clips of every class, but "
                f"`{name}` of label `{label}` has {len(members)} in training: ask for no more"
            )
        chosen.append(members[np.argsort(ranks[members], kind="stable")[:per_class]])
    return np.sort(np.concatenate(chosen))
