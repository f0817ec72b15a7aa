import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from kdhiera.errors import UsageError
from kdhiera.evaluation import knn
from kdhiera.evaluation.knn import knn_predict


def _slow(train, labels, test, *, neighbours, temperature, num_classes):
    scores = np.zeros((len(test), num_classes))
    for row, x in zip(scores, test, strict=True):
        similarity = [np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y) for y in train]
        for i in sorted(range(len(train)), key=lambda i: -similarity[i])[:neighbours]:
            row[labels[i]] += np.exp(similarity[i] / temperature)
        row /= row.sum()
    return scores


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    neighbours=st.integers(1, 30),
    temperature=st.sampled_from([0.02, 0.07, 1.0]),
)
def test_equals_the_slow_formula(seed, neighbours, temperature):
    rng = np.random.default_rng(seed)
    train, test = rng.normal(size=(30, 5)), rng.normal(size=(7, 5))
    labels = rng.integers(4, size=30)
    options = {"neighbours": neighbours, "temperature": temperature, "num_classes": 4}
    got = knn_predict(train, labels, test, **options)
    np.testing.assert_allclose(got, _slow(train, labels, test, **options), atol=1e-4)


def test_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(300, 16)), rng.normal(size=(80, 16))
    labels = rng.integers(6, size=300)
    reference = KNeighborsClassifier(
        n_neighbors=20,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / 0.07),
    ).fit(train, labels)
    got = knn_predict(train, labels, test, neighbours=20, temperature=0.07, num_classes=6)
    np.testing.assert_allclose(got, reference.predict_proba(test), atol=1e-4)
    assert (got.argmax(1) == reference.predict(test)).all()


def test_chunks_change_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    data = rng.normal(size=(40, 8)), rng.integers(3, size=40), rng.normal(size=(23, 8))
    options = {"neighbours": 5, "temperature": 0.07, "num_classes": 3}
    whole = knn_predict(*data, **options)
    monkeypatch.setattr(knn, "CHUNK_SIMILARITIES", 40 * 4)
    np.testing.assert_allclose(knn_predict(*data, **options), whole, atol=1e-6)


def test_only_directions_count_and_tensors_do_as_well_as_arrays():
    rng = np.random.default_rng(2)
    train, labels, test = (
        rng.normal(size=(40, 8)),
        rng.integers(3, size=40),
        rng.normal(size=(9, 8)),
    )
    options = {"neighbours": 7, "temperature": 0.07, "num_classes": 3}
    scales = rng.uniform(0.1, 100, size=(40, 1))
    scaled = knn_predict(
        torch.from_numpy(train * scales),
        torch.from_numpy(labels),
        torch.from_numpy(3.0 * test),
        **options,
    )
    np.testing.assert_allclose(scaled, knn_predict(train, labels, test, **options), atol=1e-5)


def test_rows_sum_to_one_at_a_temperature_whose_exponentials_overflow():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(20, 4))
    got = knn_predict(
        x, rng.integers(3, size=20), x, neighbours=5, temperature=0.001, num_classes=5
    )
    np.testing.assert_allclose(got.sum(1), 1, rtol=1e-5)
    assert (got[:, 3:] == 0).all()  # classes that training never showed


def test_a_zero_vector_is_like_nothing():
    got = knn_predict(
        np.eye(2), np.array([0, 1]), np.zeros((1, 2)), neighbours=2, temperature=0.1, num_classes=2
    )
    np.testing.assert_allclose(got, [[0.5, 0.5]])


@pytest.mark.parametrize("neighbours", [0, 4])
def test_too_many_neighbours_are_refused(neighbours):
    with pytest.raises(UsageError, match=rf"neighbours is {neighbours}, but there are 3 training"):
        knn_predict(
            np.eye(3), np.arange(3), np.eye(3), neighbours=neighbours, temperature=1, num_classes=3
        )
