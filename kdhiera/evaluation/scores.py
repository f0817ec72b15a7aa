"""Class scores: what every method gives, and what accuracies come from.

A test clip may be seen in several views. Each view gives scores over the classes, a
clip's are their mean:

    features [m, views, ...] -> scores [m * views, classes] -> [m, classes] -> top-1, top-5
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

TOP = 5


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a method gives after it has learnt.

    Args:
        test: Scores of the test clips: probabilities or shares of votes.
        validation_accuracy: Accuracy on the validation split.
    """

    test: Float[np.ndarray, "m classes"]
    validation_accuracy: float


def mean_over_views(
    scores: Float[np.ndarray, "rows classes"], num_views: int
) -> Float[np.ndarray, "m classes"]:
    """Scores of clips from those of their views.

    Args:
        scores: The views of a clip follow one another.
        num_views: Views of a clip.
    """
    mean: np.ndarray = scores.reshape(-1, num_views, scores.shape[1]).mean(1)
    return mean


def top_right(
    scores: Float[np.ndarray, "m classes"], truth: Int[np.ndarray, " m"], top: int
) -> Bool[np.ndarray, " m"]:
    """Whether a clip's class is among the `top` of highest score; ties go to lower numbers.

    Args:
        scores: Of every class.
        truth: Class numbers.
        top: 1 asks whether the prediction is right.
    """
    best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    right: np.ndarray = (best == truth[:, None]).any(1)
    return right
