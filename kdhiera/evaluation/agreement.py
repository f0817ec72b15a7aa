"""How far a student agrees with its teachers: what its heads predict, and linear CKA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from kdhiera.grid import TOKENS_PER_UNIT
from kdhiera.objective.losses import token_losses


@dataclass(kw_only=True)
class HeadFit:
    """How well one head predicts its targets, added up over batches.

    Args:
        kind: Loss; see `kdhiera.objective.losses.token_losses`.
        beta: Where smooth L1 turns linear.
        tokens: Tokens so far; the sums below are over them.
        loss: Of the predictions.
        constant_loss: Of the targets' mean as a prediction.
        cosines: Between predictions and targets.
        constant_cosines: Between the mean and the targets.
    """

    kind: str
    beta: float
    tokens: int = 0
    loss: float = 0.0
    constant_loss: float = 0.0
    cosines: float = 0.0
    constant_cosines: float = 0.0

    def add(
        self,
        predicted: Float[Tensor, "*tokens c"],
        target: Float[Tensor, "*tokens c"],
        mean: Float[Tensor, " c"],
    ) -> None:
        """Take in a batch.

        Args:
            predicted: What the head gives.
            target: What it should give.
            mean: Of the targets that training saw: the constant prediction to beat.
        """
        constant = mean.expand_as(target)
        self.tokens += target.numel() // target.shape[-1]
        self.loss += self._sum_losses(predicted, target)
        self.constant_loss += self._sum_losses(constant, target)
        self.cosines += float(F.cosine_similarity(predicted, target, dim=-1).double().sum())
        self.constant_cosines += float(F.cosine_similarity(constant, target, dim=-1).double().sum())

    @property
    def explained_variance(self) -> float:
        """1 - loss / loss of the mean: 0 is no better than a constant, 1 is perfect."""
        return 1.0 - self.loss / self.constant_loss

    @property
    def cosine(self) -> float:
        """Mean cosine of prediction and target."""
        return self.cosines / self.tokens

    @property
    def constant_cosine(self) -> float:
        """What the mean alone reaches, which may be much."""
        return self.constant_cosines / self.tokens

    def _sum_losses(self, predicted: Tensor, target: Tensor) -> float:
        return float(token_losses(predicted, target, self.kind, beta=self.beta).double().sum())


def unit_tokens(tokens: Float[Tensor, "b k n c"]) -> Float[Tensor, "b k 4 c"]:
    """Tokens of a mask unit averaged to the teachers' 2 x 2.

    Args:
        tokens: `n` tokens a unit in raster order, a square number of at least 4.
    """
    side = round(tokens.shape[2] ** 0.5)
    pooled: Tensor = rearrange(
        tokens,
        "b k (p y q x) c -> b k (p q) (y x) c",
        p=2, q=2, y=side // 2, x=side // 2,
    ).mean(3)  # fmt: skip
    assert pooled.shape[2] == TOKENS_PER_UNIT
    return pooled


def linear_cka(
    left: Sequence[Float[Tensor, "n _"]], right: Sequence[Float[Tensor, "n _"]]
) -> Float[np.ndarray, "i j"]:
    """Linear centred kernel alignment of every pair of two sets of representations.

    CKA(X, Y) = |Y'X|^2 / (|X'X| |Y'Y|) with centred columns and Frobenius norms: Kornblith
    et al. 2019 (arXiv:1905.00414), Eq. 3 and 4 with linear kernels, whose n x n matrices are
    never made. It does not change when either side is turned, mirrored or scaled. Estimated
    from few tokens it is too high: take many more than channels.

    Args:
        left: Features of the same n tokens by different layers, of any width.
        right: The same of other layers.

    Returns:
        Between 0 and 1; NaN where a layer says the same of every token.
    """
    xs, ys = ([_centred(features) for features in side] for side in (left, right))
    own_x, own_y = ([float((f.T @ f).norm()) for f in side] for side in (xs, ys))
    cka = np.full((len(xs), len(ys)), np.nan)
    for i, x in enumerate(xs):
        for j, y in enumerate(ys):
            if own_x[i] > 0 and own_y[j] > 0:
                cka[i, j] = float((y.T @ x).norm()) ** 2 / (own_x[i] * own_y[j])
    return cka


def _centred(features: Tensor) -> Tensor:
    """Without the mean token, in double precision; a constant channel is exactly 0."""
    exact = features.to(torch.float64)
    centred = exact - exact.mean(0)
    constant = (exact == exact[:1]).all(0)
    return centred.masked_fill(constant, 0.0)
