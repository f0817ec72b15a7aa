"""Linear probe: logistic regression on frozen, standardised features."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from kdhiera.errors import UsageError

log = logging.getLogger(__name__)

# Decades. At 1e-5 a probe of a thousand clips hardly leaves the class frequencies.
INVERSE_PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What a probe predicts and how it was chosen.

    Args:
        scores: Probability of every class, 0 upwards, for every test clip.
        inverse_penalty: The C that was chosen.
        validation_accuracy: Its accuracy on the validation split, by which it was chosen.
        converged: Whether the optimiser reached its tolerance at that C.
    """

    scores: Float[np.ndarray, "m classes"]
    inverse_penalty: float
    validation_accuracy: float
    converged: bool

    @property
    def predictions(self) -> Int[np.ndarray, " m"]:
        """Class number of every test clip."""
        predictions: np.ndarray = self.scores.argmax(1)
        return predictions


def linear_probe(
    train_features: Float[np.ndarray, "n c"],
    train_labels: Int[np.ndarray, " n"],
    validation_features: Float[np.ndarray, "v c"],
    validation_labels: Int[np.ndarray, " v"],
    test_features: Float[np.ndarray, "m c"],
    *,
    inverse_penalties: Sequence[float] = INVERSE_PENALTIES,
    max_iterations: int = 2000,
) -> ProbeResult:
    """Fit on the training split with the penalty that is best on the validation split.

    Multinomial logistic regression, L2 penalty 1 / (2C) on the sum of squared weights, by
    L-BFGS. Features are standardised with the training split's mean and deviation. The
    validation split chooses C and nothing else: the reported model never learns from it.
    Ties go to the stronger penalty. Deterministic: no random numbers.

    Args:
        train_features: Any scale.
        train_labels: Class numbers; at least two classes.
        validation_features: Of other objects and backgrounds than the training split.
        validation_labels: Class numbers.
        test_features: What is predicted.
        inverse_penalties: Values of C to try.
        max_iterations: Of L-BFGS, for each C. Stopping there is reported, not hidden.

    Raises:
        UsageError: If the training split has a single class or a split is empty.
    """
    _check(train_labels, validation_labels)
    scaler = StandardScaler().fit(np.asarray(train_features, dtype=np.float64))
    train, validation, test = (
        scaler.transform(np.asarray(split, dtype=np.float64))
        for split in (train_features, validation_features, test_features)
    )
    best: ProbeResult | None = None
    # From the strongest penalty on, each fit starts from the solution before it.
    model = LogisticRegression(solver="lbfgs", tol=1e-4, max_iter=max_iterations, warm_start=True)
    for inverse_penalty in sorted(inverse_penalties):
        model.set_params(C=inverse_penalty)
        with warnings.catch_warnings():
            # Reported by `converged`; a warning would repeat it without naming C.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(train, train_labels)
        accuracy = float(np.mean(model.predict(validation) == validation_labels))
        if best is None or accuracy > best.validation_accuracy:
            best = ProbeResult(
                scores=_all_classes(model.predict_proba(test), model.classes_),
                inverse_penalty=inverse_penalty,
                validation_accuracy=accuracy,
                converged=int(np.max(model.n_iter_)) < max_iterations,
            )
    assert best is not None
    if not best.converged:
        log.warning(
            "the linear probe at C=%g stopped after %d iterations before it converged",
            best.inverse_penalty,
            max_iterations,
        )
    return best


def _all_classes(
    probabilities: Float[np.ndarray, "m seen"], seen: Int[np.ndarray, " seen"]
) -> Float[np.ndarray, "m classes"]:
    """A column for every class number up to the highest; 0 where training has no clip."""
    scores = np.zeros((len(probabilities), int(seen.max()) + 1))
    scores[:, seen] = probabilities
    return scores


def _check(train_labels: Int[np.ndarray, " n"], validation_labels: Int[np.ndarray, " v"]) -> None:
    if len(np.unique(train_labels)) < 2:
        raise UsageError(
            f"a linear probe needs at least two classes in the training split, got "
            f"{len(np.unique(train_labels))} in {len(train_labels)} clips: check evaluate.train"
        )
    if len(validation_labels) == 0:
        raise UsageError(
            "the validation split has no clip to choose the probe's penalty on: "
            "check evaluate.validation"
        )
