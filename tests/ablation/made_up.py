"""Records of runs that never were, with clips that share objects and backgrounds."""

from collections.abc import Sequence

import numpy as np

from kdhiera.ablation.records import CurvePoint, RunRecord
from kdhiera.results import Measure, Outcomes

NUM_CLIPS = 30
PROBE = Measure(
    label="direction",
    features="distilled student",
    readout="mean",
    method="linear probe",
    labels_per_class=None,
)


def record(
    variant: str = "base",
    seed: int = 0,
    *,
    share: float = 0.5,
    measures: Sequence[Measure] = (PROBE,),
    order: Sequence[int] | None = None,
    groups: bool = True,
    validation: float | None = None,
) -> RunRecord:
    """A record of drawn outcomes.

    Args:
        variant: Its name.
        seed: Its seed.
        share: Of the clips that are right.
        measures: All of one label.
        order: Of the clips; None is the order of their numbers.
        groups: Whether the clips share objects and backgrounds.
        validation: Accuracy on the validation split; None is `share`.
    """
    rng = np.random.default_rng([len(variant), *variant.encode(), seed])
    order = np.arange(NUM_CLIPS) if order is None else np.asarray(order)
    known = {m.label: np.arange(NUM_CLIPS) % 10 != 3 for m in measures}
    right = {m: (rng.random((1, NUM_CLIPS)) < share) & known[m.label] for m in measures}
    shared = {
        "object": [f"o{i % 7}" for i in range(NUM_CLIPS)],
        "background": [f"b{i % 5}" for i in range(NUM_CLIPS)],
    }
    return RunRecord(
        variant=variant,
        seed=seed,
        identity="same",
        outcomes=Outcomes(
            uids=tuple(f"clip{i:02}" for i in order),
            groups={k: tuple(v[i] for i in order) for k, v in shared.items()} if groups else {},
            known={label: mask[order] for label, mask in known.items()},
            right={m: rows[:, order] for m, rows in right.items()},
            validation=dict.fromkeys(measures, share if validation is None else validation),
        ),
        curve=tuple(CurvePoint(step=s, loss=2 / s, explained=1 - 2 / s) for s in (1, 2, 4, 8)),
        steps=8,
        seconds=12.5,
        clip_macs=2_000_000_000,
    )
