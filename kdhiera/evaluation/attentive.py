"""Attentive probe: a learned query looks at frozen tokens, as V-JEPA and SALT evaluate.

One cross-attention block (Bardes et al. 2024, arXiv:2404.08471, Sec. 4 and App. D): a
learned query attends to the layer-normalised tokens of the last block, a residual and an
MLP follow, then a linear classifier. Only this is trained.

With a single query q the keys need not be computed. The score of token x in head h is

    q_h . (K_h x + b_h) = (K_h^T q_h) . x + (q_h . b_h)

and the last term is the same for all tokens, which softmax does not see. The values are
linear too: sum_i a_i (V_h x_i + b) = V_h (sum_i a_i x_i) + b. So a clip of n tokens costs
n c per head and not n c^2, and the result is that of `torch.nn.MultiheadAttention`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from kdhiera.config.evaluation import AttentiveConfig
from kdhiera.errors import UsageError
from kdhiera.evaluation.scores import Scored, mean_over_views
from kdhiera.schedule import Schedule
from kdhiera.views import stable_key

WARMUP_SHARE = 0.1
MLP_RATIO = 4
STATISTICS_CLIPS = 256  # read at once


class AttentivePooler(nn.Module):
    """One query's cross-attention block and a classifier.

    Args:
        width: Channels of the tokens.
        heads: Attention heads.
        num_classes: Classes.
        generator: Draws the weights.

    Raises:
        UsageError: If the heads do not divide the width.
    """

    def __init__(
        self, width: int, heads: int, num_classes: int, *, generator: torch.Generator
    ) -> None:
        super().__init__()
        check_heads(width, heads)
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(width))
        with torch.random.fork_rng(devices=[]):  # torch draws weights that are drawn again below
            self.norm_tokens = nn.LayerNorm(width)
            self.project_query = nn.Linear(width, width)
            self.keys = nn.Parameter(torch.zeros(width, width))  # without a bias: see above
            self.values = nn.Linear(width, width)
            self.project_out = nn.Linear(width, width)
            self.norm_query = nn.LayerNorm(width)
            self.expand = nn.Linear(width, MLP_RATIO * width)
            self.reduce = nn.Linear(MLP_RATIO * width, width)
            self.classify = nn.Linear(width, num_classes)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 or name == "query":
                nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def attend(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b c"]:
        """What the query gathers from normalised tokens; multi-head attention of one query."""
        width = tokens.shape[-1]
        split = (self.heads, width // self.heads)
        query = self.project_query(self.query).view(split)
        looks_for = torch.einsum("hd,hdc->hc", query, self.keys.view(*split, width))
        attention = (tokens @ looks_for.T / math.sqrt(split[1])).softmax(1)
        gathered = torch.einsum("bnh,bnc->bhc", attention, tokens)
        values = torch.einsum("bhc,hdc->bhd", gathered, self.values.weight.view(*split, width))
        attended: Tensor = self.project_out(values.flatten(1) + self.values.bias)
        return attended

    def forward(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b classes"]:
        """Logits of clips from their tokens."""
        query = self.query + self.attend(self.norm_tokens(tokens))
        query = query + self.reduce(F.gelu(self.expand(self.norm_query(query))))
        logits: Tensor = self.classify(query)
        return logits


def check_heads(width: int, heads: int) -> None:
    """Raise `UsageError` if the heads do not divide the width."""
    if width % heads:
        raise UsageError(
            f"evaluate.attentive.heads is {heads}, which does not divide the student's width of "
            f"{width}: choose a divisor"
        )


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Frozen tokens of some clips, which may lie on disk.

    Args:
        values: Of all clips of a split.
        rows: Clips that are meant.
    """

    values: np.ndarray  # [clips, views, tokens, width], float16; a memory map has no jaxtyping
    rows: Int[np.ndarray, " n"]


@dataclass(frozen=True, kw_only=True)
class _Scale:
    mean: Tensor
    deviation: Tensor

    def __call__(self, values: np.ndarray) -> Tensor:
        """Standardised tokens on the device, `[rows * views, tokens, width]`."""
        tokens = torch.from_numpy(np.ascontiguousarray(values)).to(self.mean.device)
        return (tokens.flatten(0, 1).float() - self.mean) / self.deviation


def attentive_probe(
    train: Tokens,
    train_labels: Int[np.ndarray, " n"],
    validation: Tokens,
    validation_labels: Int[np.ndarray, " v"],
    test: Tokens,
    *,
    num_classes: int,
    settings: AttentiveConfig,
    seed: int,
    device: torch.device,
) -> Scored:
    """Train a probe with every learning rate; the validation split chooses among them.

    Tokens are standardised channel by channel with the training clips' mean and deviation.
    AdamW, linear warm-up over a tenth of the steps, cosine to zero. Weights and order follow
    from the seed alone. Ties go to the learning rate named first.

    Args:
        train: Learnt from, one view a clip.
        train_labels: Class numbers.
        validation: Chooses and nothing else, one view a clip.
        validation_labels: Class numbers.
        test: What is scored, in all its views.
        num_classes: Classes.
        settings: Heads, steps, learning rates.
        seed: Decides weights and order.
        device: Where it computes.

    Returns:
        Mean softmax probabilities over the views of each test clip.

    Raises:
        UsageError: If the heads do not divide the width, or there are fewer than two classes.
    """
    if len(np.unique(train_labels)) < 2:
        raise UsageError(
            "an attentive probe needs at least two classes in the training split: check "
            "evaluate.train"
        )
    scale = _statistics(train, device)
    best: tuple[float, AttentivePooler] | None = None
    for lr in settings.lrs:
        pooler = _trained(
            train, train_labels, scale, num_classes=num_classes, lr=lr, settings=settings, seed=seed
        )
        scores = _scores(pooler, validation, scale, settings.batch_size)
        accuracy = float(np.mean(scores.argmax(1) == validation_labels))
        if best is None or accuracy > best[0]:
            best = accuracy, pooler
    assert best is not None
    return Scored(
        test=_scores(best[1], test, scale, settings.batch_size), validation_accuracy=best[0]
    )


def _trained(
    train: Tokens,
    labels: Int[np.ndarray, " n"],
    scale: _Scale,
    *,
    num_classes: int,
    lr: float,
    settings: AttentiveConfig,
    seed: int,
) -> AttentivePooler:
    device = scale.mean.device
    generator = torch.Generator().manual_seed(stable_key("attentive", seed) % 2**63)
    width = train.values.shape[-1]
    pooler = AttentivePooler(width, settings.heads, num_classes, generator=generator).to(device)
    decayed = [p for p in pooler.parameters() if p.ndim == 2]
    spared = [p for p in pooler.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay},
         {"params": spared, "weight_decay": 0.0}], lr=lr,
    )  # fmt: skip
    per_epoch = -(-len(labels) // settings.batch_size)
    num_steps = per_epoch * settings.epochs
    schedule = Schedule(
        peak=lr, final=0.0, warmup_steps=round(WARMUP_SHARE * num_steps), num_steps=num_steps
    )
    targets = torch.from_numpy(labels).to(device)
    for epoch in range(settings.epochs):
        order = torch.randperm(len(labels), generator=generator).numpy()
        for i, batch in enumerate(np.array_split(order, per_epoch)):
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr(epoch * per_epoch + i)
            logits = pooler(scale(train.values[train.rows[batch]]))
            loss = F.cross_entropy(logits, targets[torch.from_numpy(batch).to(device)])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return pooler


@torch.inference_mode()
def _scores(
    pooler: AttentivePooler, tokens: Tokens, scale: _Scale, batch_size: int
) -> Float[np.ndarray, "m classes"]:
    views = tokens.values.shape[1]
    parts = [
        pooler(scale(tokens.values[rows])).softmax(1).cpu().numpy()
        for rows in _chunks(tokens.rows, max(1, batch_size // views))
    ]
    return mean_over_views(np.concatenate(parts), views)


def _statistics(tokens: Tokens, device: torch.device) -> _Scale:
    """Mean and deviation of every channel, over clips and tokens; a constant one is left."""
    width = tokens.values.shape[-1]
    count, total, squares = 0, np.zeros(width), np.zeros(width)
    for rows in _chunks(tokens.rows, STATISTICS_CLIPS):
        values = tokens.values[rows].reshape(-1, width).astype(np.float64)
        count += len(values)
        total += values.sum(0)
        squares += (values**2).sum(0)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    deviation[deviation < 1e-6] = 1.0
    return _Scale(
        mean=torch.from_numpy(mean).float().to(device),
        deviation=torch.from_numpy(deviation).float().to(device),
    )


def _chunks(rows: Int[np.ndarray, " n"], size: int) -> Iterator[Int[np.ndarray, " k"]]:
    return (rows[i : i + size] for i in range(0, len(rows), size))
