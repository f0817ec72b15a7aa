"""Jobs give the scores that their methods give, averaged over the views of a clip."""

import numpy as np
import pytest
import torch

from kdhiera.config import EvaluateConfig
from kdhiera.evaluation.knn import knn_predict
from kdhiera.evaluation.probe import linear_probe
from kdhiera.stages.evaluating.frozen import Features, FrozenModel
from kdhiera.stages.evaluating.jobs import jobs
from kdhiera.stages.evaluating.labelled import UNKNOWN, Split, tasks

SIZES = {"train": 60, "validation": 20, "test": 15}
VIEWS = 4
SETTINGS = EvaluateConfig(
    train="a", validation="b", test="c", labels=("kind",), methods=("knn", "linear"), neighbours=7
)


@pytest.fixture
def splits():
    rng = np.random.default_rng(0)
    made = {}
    for name, size in SIZES.items():
        kinds = rng.integers(3, size=size)
        labels = [{"kind": f"kind {kind}"} for kind in kinds]
        labels[3] = {"other": 1} if name != "test" else {"kind": "never trained"}
        made[name] = Split(places=[], uids=[f"{name}/{i}" for i in range(size)], labels=labels)
    return made


@pytest.fixture
def features():
    rng = np.random.default_rng(1)
    pooled = {
        s: rng.normal(size=(n, VIEWS if s == "test" else 1, 6)).astype(np.float32)
        for s, n in SIZES.items()
    }
    return {"model": Features(pooled={"mean": pooled, "slots": pooled}, tokens=None)}


def planned(splits, settings=SETTINGS, **clips):
    model = FrozenModel(
        name="model", seed=None, identity={}, distilled=False, has_tokens=False,
        load=lambda: None,
    )  # fmt: skip
    named = tasks(settings, splits)
    cpu = torch.device("cpu")
    return list(jobs(settings, splits, named, [model], [], clips=clips, device=cpu))


def test_scores_are_means_over_views(splits, features):
    (task,) = tasks(SETTINGS, splits)
    assert task.truth["test"][3] == task.truth["train"][3] == UNKNOWN
    pooled = features["model"].pooled["mean"]
    known = {s: np.delete(pooled[s], 3, axis=0) for s in SIZES}
    truth = {s: np.delete(task.truth[s], 3) for s in SIZES}
    train, validation = known["train"][:, 0], known["validation"][:, 0]
    found = {
        job.measure.method: job.compute(features)
        for job in planned(splits)
        if job.measure.readout == "mean"
    }
    votes, probabilities = [], []
    for view in range(VIEWS):
        test = known["test"][:, view]
        votes.append(
            knn_predict(train, truth["train"], test, neighbours=7, temperature=0.07, num_classes=3)
        )
        probe = linear_probe(train, truth["train"], validation, truth["validation"], test)
        probabilities.append(probe.scores)
    np.testing.assert_allclose(found["k-NN"].test, np.mean(votes, axis=0), atol=1e-6)
    np.testing.assert_allclose(found["linear probe"].test, np.mean(probabilities, axis=0))
    assert found["linear probe"].validation_accuracy == probe.validation_accuracy
    shares = knn_predict(
        train, truth["train"], validation, neighbours=7, temperature=0.07, num_classes=3
    )
    right = shares.argmax(1) == truth["validation"]
    assert found["k-NN"].validation_accuracy == right.mean()


def test_fewer_labels_are_learnt_from_and_drawn_by_every_seed(splits, features):
    settings = SETTINGS.model_copy(update={"labels_per_class": (2,), "seeds": (0, 1, 2)})
    found = [job for job in planned(splits, settings) if job.measure.readout == "mean"]
    whole = [job for job in found if job.measure.labels_per_class is None]
    fewer = [job for job in found if job.measure.labels_per_class == 2]
    assert [job.measure.method for job in whole] == ["k-NN", "linear probe"]
    assert len(fewer) == 3 * 2
    assert len({str(job.identity) for job in found}) == len(found)
    (votes, again, _) = (j.compute(features).test for j in fewer if j.measure.method == "k-NN")
    assert ((votes > 0).sum(1) <= 6).all()  # six neighbours in all
    assert (votes != again).any()


def test_the_identity_of_scores_covers_clips_and_labels(splits):
    first = planned(splits)[0].identity
    labels = [*splits["test"].labels]
    labels[0], labels[1] = {"kind": "kind 0"}, {"kind": "kind 1"}
    changed = {**splits, "test": Split(places=[], uids=splits["test"].uids, labels=labels)}
    fewer = SETTINGS.model_copy(update={"neighbours": 6})
    assert planned(changed)[0].identity != first
    assert planned(splits, test_views=[3, 1])[0].identity != first
    assert planned(splits, fewer)[0].identity != first
    assert planned(splits)[0].identity == first
