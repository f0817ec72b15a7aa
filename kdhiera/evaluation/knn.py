"""Weighted k-nearest-neighbour vote on frozen features: no training, no tuning."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdhiera.errors import UsageError

CHUNK_SIMILARITIES = 1 << 24  # of test clips x train clips held at once: 64 MB


def knn_predict(
    train_features: Float[Tensor | np.ndarray, "n c"],
    train_labels: Int[Tensor | np.ndarray, " n"],
    test_features: Float[Tensor | np.ndarray, "m c"],
    *,
    neighbours: int,
    temperature: float,
    num_classes: int,
) -> Float[np.ndarray, "m classes"]:
    """Share of the neighbours' vote that every class gets.

    The `neighbours` training clips of highest cosine similarity s vote for their class
    with weight exp(s / temperature), as in Wu et al. 2018 (arXiv:1805.01978, Sec. 3.4)
    and DINO (arXiv:2104.14294). We divide by the sum of the weights, which changes no
    ranking and lets no exponential overflow.

    Args:
        train_features: Any scale; only directions count. A zero vector has similarity 0.
        train_labels: Class numbers, 0..num_classes-1.
        test_features: On the device that is to do the work.
        neighbours: k, 1..n.
        temperature: Above 0; small values trust the nearest most.
        num_classes: Classes, seen in training or not.

    Returns:
        Rows that sum to 1; `argmax(1)` is the prediction.

    Raises:
        UsageError: If there are fewer training clips than neighbours.
    """
    test = torch.as_tensor(test_features, dtype=torch.float32)
    train = torch.as_tensor(train_features, dtype=torch.float32, device=test.device)
    labels = torch.as_tensor(train_labels, dtype=torch.int64, device=test.device)
    if not 1 <= neighbours <= len(train):
        raise UsageError(
            f"evaluate.neighbours is {neighbours}, but there are {len(train)} training clips: "
            f"set it to 1..{len(train)}"
        )
    train = torch.nn.functional.normalize(train, dim=1)
    test = torch.nn.functional.normalize(test, dim=1)
    chunk = max(1, CHUNK_SIMILARITIES // len(train))
    scores = [
        _vote(test[i : i + chunk] @ train.T, labels, neighbours, temperature, num_classes)
        for i in range(0, len(test), chunk)
    ]
    return torch.cat(scores).cpu().numpy()


def _vote(
    similarity: Float[Tensor, "m n"],
    labels: Int[Tensor, " n"],
    neighbours: int,
    temperature: float,
    num_classes: int,
) -> Float[Tensor, "m classes"]:
    nearest = similarity.topk(neighbours, dim=1)
    weights = (nearest.values / temperature).softmax(1)
    votes = weights.new_zeros(len(similarity), num_classes)
    return votes.scatter_add_(1, labels[nearest.indices], weights)
