import numpy as np
from sklearn.metrics import top_k_accuracy_score

from kdhiera.evaluation.scores import mean_over_views, top_right


def test_scores_of_a_clip_are_the_mean_of_its_views():
    scores = np.random.default_rng(0).random((12, 7))
    wanted = [scores[3 * clip : 3 * clip + 3].mean(0) for clip in range(4)]
    np.testing.assert_allclose(mean_over_views(scores, 3), wanted)
    assert (mean_over_views(scores, 1) == scores).all()


def test_top_k_is_scikit_learns():
    rng = np.random.default_rng(1)
    scores, truth = rng.random((200, 9)), rng.integers(9, size=200)
    for top in (1, 3, 5):
        wanted = top_k_accuracy_score(truth, scores, k=top, labels=np.arange(9))
        assert top_right(scores, truth, top).mean() == wanted
    assert (top_right(scores, truth, 1) == (scores.argmax(1) == truth)).all()


def test_ties_go_to_lower_numbers():
    scores = np.zeros((1, 8))
    assert [bool(top_right(scores, np.array([c]), 5)[0]) for c in range(8)] == [True] * 5 + [
        False
    ] * 3
