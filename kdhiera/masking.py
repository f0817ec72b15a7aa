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
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int64

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


@dataclass(frozen=True, kw_only=True)
class MaskSchedule:
    """The masks of a training run, and which units are predicted under them.

    Args:
        phases: How masks are drawn in equal shares of the steps, one after the other.
        draws: Draws 0 .. draws-1 of a view are used in turn.
        predicts_hidden: The units that a mask hides are predicted, instead of those it shows.
    """

    phases: tuple[MaskSpec, ...]
    draws: int
    predicts_hidden: bool

    @property
    def widest(self) -> MaskSpec:
        """The phase that shows most: it shows all that the others show."""
        return min(self.phases, key=lambda spec: spec.ratio)

    def at(self, step: int, num_steps: int) -> MaskSpec:
        """How masks are drawn in step `step` of `num_steps`, counted from 0."""
        return self.phases[step * len(self.phases) // num_steps]


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


@dataclass(frozen=True, kw_only=True, order=True)
class PlannedMasks:
    """Masks of one strategy that training may use.

    Args:
        strategy: Which units are preferred.
        ratio: The lowest mask ratio; higher ones show subsets.
        draws: Draws 0 .. draws-1.
    """

    strategy: Strategy
    ratio: float
    draws: int

    @property
    def num_masks(self) -> int:
        """Different masks a clip: one where there is no noise."""
        return 1 if self.strategy is Strategy.ATTENTION_TOPK else self.draws

    def __str__(self) -> str:
        draws = f"{self.num_masks} draw{'s' if self.num_masks > 1 else ''}"
        return f"{self.strategy} at ratio {self.ratio:g} and above, {draws}"


@dataclass(frozen=True, kw_only=True)
class MaskPlan:
    """What training may ever show, and so what a cache must keep.

    Args:
        entries: Masks that may be used.
        scope: Scope of all of them.
        seed: Mask seed.
        keep_all: Keep every unit whatever the entries say.
    """

    entries: tuple[PlannedMasks, ...]
    scope: Scope
    seed: int
    keep_all: bool

    def canonical(self) -> MaskPlan:
        """The same plan without entries that another one contains, sorted."""
        entries = tuple(
            entry
            for entry in sorted(set(self.entries))
            if not any(other != entry and _contains(other, entry) for other in self.entries)
        )
        return replace(self, entries=entries)

    def max_kept(self, slots: int, units_per_slot: int) -> int:
        """Bound on the kept units of a row, `K`."""
        everything = slots * units_per_slot
        if self.keep_all:
            return everything
        shown = (e.num_masks * num_visible(e.ratio, units_per_slot) for e in self.entries)
        return min(everything, slots * sum(shown))

    def kept_units(
        self, scores: Float[np.ndarray, "slots units"], *, uid: str, view: int
    ) -> Int[np.ndarray, " kept"]:
        """Union over entries and draws of the units that some mask shows, ascending."""
        slots, units = scores.shape
        if self.keep_all:
            return np.arange(slots * units)
        shown = [
            draw_mask(
                MaskSpec(
                    strategy=entry.strategy, scope=self.scope, ratio=entry.ratio, seed=self.seed
                ),
                scores,
                uid=uid,
                view=view,
                draw=draw,
            )
            for entry in self.entries
            for draw in range(entry.num_masks)
        ]
        return np.unique(np.concatenate(shown))

    def lacks(self, spec: MaskSpec, *, draws: int, units_per_slot: int) -> tuple[str, ...]:
        """What a run asks for that this plan does not cover; empty if it is covered.

        Exact in the number of units shown, not in the ratio's digits: 0.795 and 0.8 of 49
        units are the same masks. Two strategies that happen to agree count as different.

        Args:
            spec: The run's masks.
            draws: Draws 0 .. draws-1 are used.
            units_per_slot: Units of a slot of the clip.
        """
        if self._keeps_every_unit(units_per_slot):
            return ()
        noisy = spec.strategy is not Strategy.ATTENTION_TOPK
        gaps: list[str] = []
        if spec.scope is not self.scope:
            gaps.append(f"scope {spec.scope} (planned: {self.scope})")
        if noisy and spec.seed != self.seed:
            gaps.append(f"mask seed {spec.seed} (planned: {self.seed})")
        same = [entry for entry in self.entries if entry.strategy is spec.strategy]
        if not same:
            planned = ", ".join(sorted({entry.strategy for entry in self.entries}))
            return (*gaps, f"strategy {spec.strategy} (planned: {planned})")
        wanted = num_visible(spec.ratio, units_per_slot)
        needed = draws if noisy else 1
        wide = [e for e in same if num_visible(e.ratio, units_per_slot) >= wanted]
        if not any(entry.num_masks >= needed for entry in wide):
            planned = "; ".join(str(entry) for entry in same)
            asked = f"{draws} draw{'s' if draws > 1 else ''}"
            gaps.append(f"{spec.strategy} at ratio {spec.ratio:g}, {asked} (planned: {planned})")
        return tuple(gaps)

    def lacks_schedule(self, schedule: MaskSchedule, *, units_per_slot: int) -> tuple[str, ...]:
        """What a training run asks for that this plan does not keep; empty if it is covered.

        Args:
            schedule: The run's masks.
            units_per_slot: Units of a slot of the clip.
        """
        hidden: tuple[str, ...] = ()
        if schedule.predicts_hidden and not self._keeps_every_unit(units_per_slot):
            hidden = ("every unit (masks.keep: all), since hidden ones are predicted",)
        draws = schedule.draws
        return hidden + self.lacks(schedule.widest, draws=draws, units_per_slot=units_per_slot)

    def lacks_plan(self, other: MaskPlan, *, units_per_slot: int) -> tuple[str, ...]:
        """What another plan may show that this one does not keep; empty if all is kept.

        Args:
            other: A plan.
            units_per_slot: Units of a slot of the clip.
        """
        if self._keeps_every_unit(units_per_slot):
            return ()
        if other._keeps_every_unit(units_per_slot):
            return ("every unit (masks.keep: all)",)
        specs = (
            (MaskSpec(strategy=e.strategy, scope=other.scope, ratio=e.ratio, seed=other.seed), e)
            for e in other.entries
        )
        gaps = (
            gap
            for spec, entry in specs
            for gap in self.lacks(spec, draws=entry.draws, units_per_slot=units_per_slot)
        )
        return tuple(dict.fromkeys(gaps))

    def _keeps_every_unit(self, units_per_slot: int) -> bool:
        """Whether any mask at all is covered: by wish, or by a ratio that hides nothing."""
        hides_nothing = (
            num_visible(e.ratio, units_per_slot) == units_per_slot for e in self.entries
        )
        return self.keep_all or any(hides_nothing)

    def describe(self) -> str:
        """For people."""
        if self.keep_all:
            return "every unit (any strategy, ratio and draw)"
        entries = "; ".join(str(entry) for entry in self.entries)
        return f"{entries} (by {self.scope}, mask seed {self.seed})"


def _contains(a: PlannedMasks, b: PlannedMasks) -> bool:
    same = a.strategy is b.strategy
    return same and a.ratio <= b.ratio and a.num_masks >= b.num_masks


def hidden_units(visible: Int[np.ndarray, "b k"], num_units: int) -> Int64[np.ndarray, "b m"]:
    """The other units of every row, ascending.

    Args:
        visible: As many distinct unit numbers in every row.
        num_units: Units of a clip.
    """
    rows = len(visible)
    return np.nonzero(~to_keep_mask(visible, num_units))[1].reshape(rows, -1)


def to_keep_mask(
    visible: Sequence[Int[np.ndarray, " k"]] | Int[np.ndarray, "b k"], num_units: int
) -> Bool[np.ndarray, "b units"]:
    """Boolean form of visible unit numbers: True where the student sees the unit."""
    mask = np.zeros((len(visible), num_units), dtype=bool)
    for row, units in zip(mask, visible, strict=True):
        row[units] = True
    return mask
