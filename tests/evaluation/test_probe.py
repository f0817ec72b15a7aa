import logging

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax

from kdhiera.errors import UsageError
from kdhiera.evaluation.probe import INVERSE_PENALTIES, linear_probe


def _problem(seed, *, num_features=12, noise=1.0):
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(num_features, 3))
    scale = rng.uniform(0.01, 100, size=num_features)
    splits = []
    for count in (200, 100, 150):
        x = rng.normal(size=(count, num_features))
        labels = (x @ weights + noise * rng.gumbel(size=(count, 3))).argmax(1)
        splits += [x * scale + 5 * scale, labels]
    return splits


def _newton_free_reference(x, labels, inverse_penalty):
    """Penalised multinomial likelihood by scipy, gradient by finite differences."""
    x = np.hstack([x, np.ones((len(x), 1))])

    def cost(flat):
        w = flat.reshape(x.shape[1], 3)
        fit = log_softmax(x @ w, axis=1)[np.arange(len(x)), labels].sum()
        return -fit * inverse_penalty + 0.5 * (w[:-1] ** 2).sum()

    return minimize(cost, np.zeros(x.shape[1] * 3), method="BFGS").x.reshape(-1, 3)


def test_predicts_what_the_penalised_likelihood_does():
    x, labels, vx, vlabels, tx, _ = _problem(0, num_features=4)
    got = linear_probe(x, labels, vx, vlabels, tx, inverse_penalties=[0.05])
    mean, deviation = x.mean(0), x.std(0)
    weights = _newton_free_reference((x - mean) / deviation, labels, 0.05)
    logits = np.hstack([(tx - mean) / deviation, np.ones((len(tx), 1))]) @ weights
    margin = np.sort(logits, axis=1)
    clear = margin[:, -1] - margin[:, -2] > 0.02  # of what either optimiser's tolerance allows
    assert clear.mean() > 0.9
    assert (got.predictions == logits.argmax(1))[clear].all()
    assert got.converged


def test_the_validation_split_chooses_the_penalty():
    x, labels, vx, vlabels, tx, tlabels = _problem(1)
    single = [
        linear_probe(x, labels, vx, vlabels, tx, inverse_penalties=[c]) for c in INVERSE_PENALTIES
    ]
    accuracies = [result.validation_accuracy for result in single]
    got = linear_probe(x, labels, vx, vlabels, tx)
    assert got.validation_accuracy == max(accuracies)
    assert got.inverse_penalty == INVERSE_PENALTIES[int(np.argmax(accuracies))]
    assert (got.predictions == tlabels).mean() > 0.7


def test_the_validation_split_is_not_learnt_from():
    x, labels, vx, vlabels, tx, _ = _problem(2)
    flipped = linear_probe(x, labels, vx, (vlabels + 1) % 3, tx, inverse_penalties=[0.1])
    got = linear_probe(x, labels, vx, vlabels, tx, inverse_penalties=[0.1])
    assert (got.predictions == flipped.predictions).all()


def test_scale_and_offset_of_features_do_not_matter():
    x, labels, vx, vlabels, tx, _ = _problem(3)
    a = linear_probe(x, labels, vx, vlabels, tx)
    b = linear_probe(7 * x - 3, labels, 7 * vx - 3, vlabels, 7 * tx - 3)
    assert a.inverse_penalty == b.inverse_penalty
    assert (a.predictions == b.predictions).mean() > 0.99


def test_constant_features_and_unseen_classes_do_no_harm():
    x, labels, vx, vlabels, tx, _ = _problem(4)
    x, vx, tx = (np.hstack([part, np.full((len(part), 2), 3.0)]) for part in (x, vx, tx))
    got = linear_probe(x, np.where(labels == 2, 1, labels), vx, vlabels, tx)
    assert set(got.predictions) == {0, 1}


def test_an_unfinished_fit_is_reported(caplog):
    x, labels, vx, vlabels, tx, _ = _problem(5)
    with caplog.at_level(logging.WARNING):
        got = linear_probe(x, labels, vx, vlabels, tx, inverse_penalties=[100.0], max_iterations=2)
    assert not got.converged
    assert "C=100 stopped after 2 iterations" in caplog.text


def test_refuses_what_it_cannot_learn_from():
    x, labels, vx, vlabels, tx, _ = _problem(6)
    with pytest.raises(UsageError, match="at least two classes"):
        linear_probe(x, np.zeros_like(labels), vx, vlabels, tx)
    with pytest.raises(UsageError, match="validation split has no clip"):
        linear_probe(x, labels, vx[:0], vlabels[:0], tx)
