"""Masks are priorities: every strategy shows the units of highest priority.

    priority(u) = a * log score(u) + g(u)

with Gumbel noise g from a stable hash of (seed, sample, view, draw). The k units of
highest priority are then k draws without replacement with probabilities in proportion
to score**a (Gumbel-top-k, Kool et al. 2019, arXiv:1903.06059). Two facts follow that
the cache is built on: a mask is a pure function of config and sample, so none is ever
stored; and a higher mask ratio shows a subset of what a lower one shows.

| strategy         | a | noise                     | source                               |
|------------------|---|---------------------------|--------------------------------------|
| attention        | 1 | a unit                    | UMT's multinomial, arXiv:2303.16058  |
| attention-topk   | 1 | none                      |                                      |
| random           | 0 | a unit                    | Hiera MAE, arXiv:2306.00989          |
| tube             | 0 | a position, all slots     | VideoMAE, arXiv:2203.12602           |
| attention-tube   | 1 | a position, all slots     | scores averaged over slots           |

Priorities are float64 on the CPU, from float32 scores: float32 arithmetic on two
libraries already disagrees once in about two million slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from kdhiera.views import stable_uniforms

SCORE_FLOOR = 1e-12


class Strategy(StrEnum):
    """Which units a mask prefers; see the module's table."""

    ATTENTION = "attention"
    ATTENTION_TOPK = "attention-topk"
    RANDOM = "random"
    TUBE = "tube"
    ATTENTION_TUBE = "attention-tube"

    @property
    def uses_scores(self) -> bool:
        """Whether the teacher's scores decide (a = 1)."""
        return self not in (Strategy.RANDOM, Strategy.TUBE)

    @property
    def is_tube(self) -> bool:
        """Whether all slots show the same positions."""
        return self in (Strategy.TUBE, Strategy.ATTENTION_TUBE)


class Scope(StrEnum):
    """Where the k units of highest priority are taken from."""

    SLOT = "slot"  # k from every slot
    CLIP = "clip"  # slots * k from the whole clip


@dataclass(frozen=True, kw_only=True)
class MaskSpec:
    """How one mask is drawn.

    Args:
        strategy: Which units are preferred.
        scope: Where the visible units are taken from.
        ratio: Share of units hidden, 0 <= ratio < 1.
        seed: Any integer.
    """

    strategy: Strategy
    scope: Scope
    ratio: float
    seed: int


def num_visible(ratio: float, units_per_slot: int) -> int:
    """Units shown per slot: `max(1, round((1 - ratio) * units_per_slot))`."""
    return max(1, round((1.0 - ratio) * units_per_slot))


def priorities(
    spec: MaskSpec, scores: Float[np.ndarray, "slots units"], *, uid: str, view: int, draw: int
) -> Float64[np.ndarray, "slots units"]:
    """Priority of every unit of one clip; larger is shown first.

    Args:
        spec: Strategy and seed (ratio and scope play no part).
        scores: Non-negative scores of the units; floored at 1e-12.
        uid: Identity of the sample.
        view: View number.
        draw: Draw number.
    """
    slots, units = scores.shape
    total = np.zeros((slots, units))
    if spec.strategy.uses_scores:
        values = scores.astype(np.float64)
        if spec.strategy.is_tube:
            values = np.broadcast_to(values.mean(0), values.shape)
        total = total + np.log(np.maximum(values, SCORE_FLOOR))
    if spec.strategy is Strategy.ATTENTION_TOPK:
        return total
    if spec.strategy.is_tube:
        uniform = stable_uniforms(units, "tube", spec.seed, uid, view, draw)[None, :]
    else:
        uniform = stable_uniforms(slots * units, "unit", spec.seed, uid, view, draw)
        uniform = uniform.reshape(slots, units)
    return np.asarray(total - np.log(-np.log(uniform)))


def visible_units(
    priority: Float[np.ndarray, "slots units"], *, ratio: float, scope: Scope
) -> Int[np.ndarray, " k"]:
    """Unit numbers of the highest priorities, ascending.

    Args:
        priority: Larger is shown first; ties go to the lower unit number.
        ratio: Share of units hidden.
        scope: Highest of every slot, or of the clip (then `slots * num_visible` units).

    Returns:
        Raster unit numbers, `slots * num_visible(ratio)` of them.
    """
    slots, units = priority.shape
    k = num_visible(ratio, units)
    if scope is Scope.CLIP:
        order = np.argsort(-priority.reshape(-1), kind="stable")[: slots * k]
        return np.sort(order)
    order = np.argsort(-priority, axis=1, kind="stable")[:, :k]
    return np.sort((order + np.arange(slots)[:, None] * units).reshape(-1))


def draw_mask(
    spec: MaskSpec, scores: Float[np.ndarray, "slots units"], *, uid: str, view: int, draw: int
) -> Int[np.ndarray, " k"]:
    """Visible units of one clip under one draw: `visible_units` of its `priorities`."""
    priority = priorities(spec, scores, uid=uid, view=view, draw=draw)
    return visible_units(priority, ratio=spec.ratio, scope=spec.scope)


@dataclass(frozen=True, kw_only=True)
class MaskPlan:
    """What training may ever show, and so what a cache must keep.

    Args:
        strategies: Strategies that may be used.
        scope: Scope of all of them.
        ratio: The lowest mask ratio that may be used; higher ones show subsets.
        draws: Draws 0 .. draws-1 may be used.
        seed: Mask seed.
        keep_all: Keep every unit whatever the strategies say.
    """

    strategies: tuple[Strategy, ...]
    scope: Scope
    ratio: float
    draws: int
    seed: int
    keep_all: bool

    def max_kept(self, slots: int, units_per_slot: int) -> int:
        """Bound on the kept units of a row, `K`."""
        everything = slots * units_per_slot
        if self.keep_all:
            return everything
        shown = slots * num_visible(self.ratio, units_per_slot)
        masks = sum(1 if s is Strategy.ATTENTION_TOPK else self.draws for s in self.strategies)
        return min(everything, masks * shown)

    def kept_units(
        self, scores: Float[np.ndarray, "slots units"], *, uid: str, view: int
    ) -> Int[np.ndarray, " kept"]:
        """Union over strategies and draws of the units that some mask shows, ascending."""
        slots, units = scores.shape
        if self.keep_all:
            return np.arange(slots * units)
        specs = (
            MaskSpec(strategy=s, scope=self.scope, ratio=self.ratio, seed=self.seed)
            for s in self.strategies
        )
        shown = [
            draw_mask(spec, scores, uid=uid, view=view, draw=draw)
            for spec in specs
            for draw in range(1 if spec.strategy is Strategy.ATTENTION_TOPK else self.draws)
        ]
        return np.unique(np.concatenate(shown))

    def lacks(self, spec: MaskSpec, *, draws: int) -> tuple[str, ...]:
        """What a run asks for that this plan does not cover; empty if it is covered.

        Args:
            spec: The run's masks.
            draws: Draws 0 .. draws-1 are used.
        """
        if self.keep_all:
            return ()
        gaps: list[str] = []
        if spec.strategy not in self.strategies:
            gaps.append(f"strategy {spec.strategy} (planned: {', '.join(self.strategies)})")
        if spec.scope is not self.scope:
            gaps.append(f"scope {spec.scope} (planned: {self.scope})")
        if spec.ratio < self.ratio - 1e-9:
            gaps.append(f"ratio {spec.ratio:g} (planned: {self.ratio:g} and above)")
        if spec.seed != self.seed:
            gaps.append(f"mask seed {spec.seed} (planned: {self.seed})")
        if draws > self.draws:
            gaps.append(f"{draws} draws (planned: {self.draws})")
        return tuple(gaps)


def to_keep_mask(
    visible: Sequence[Int[np.ndarray, " k"]] | Int[np.ndarray, "b k"], num_units: int
) -> Bool[np.ndarray, "b units"]:
    """Boolean form of visible unit numbers: True where the student sees the unit."""
    mask = np.zeros((len(visible), num_units), dtype=bool)
    for row, units in zip(mask, visible, strict=True):
        row[units] = True
    return mask
