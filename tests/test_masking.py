import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdhiera.masking import (
    MaskPlan,
    MaskSpec,
    PlannedMasks,
    Scope,
    Strategy,
    draw_mask,
    num_visible,
    priorities,
    to_keep_mask,
)

RATIOS = (0.5, 0.75, 0.8, 0.9, 0.95)


def spec(strategy: Strategy, ratio: float = 0.8, scope: Scope = Scope.SLOT) -> MaskSpec:
    return MaskSpec(strategy=strategy, scope=scope, ratio=ratio, seed=3)


def some_scores(slots: int = 4, units: int = 16, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).gamma(0.5, size=(slots, units)).astype(np.float32)
    return values / values.sum(1, keepdims=True)


def test_attention_masks_are_sequential_draws_without_replacement() -> None:
    """Exact probabilities of every unordered pair against 40,000 drawn masks."""
    scores = np.array([[0.5, 0.3, 0.15, 0.05]], np.float32)
    p = scores[0].astype(float)
    expected = {
        frozenset(pair): sum(p[a] * p[b] / (1 - p[a]) for a, b in (pair, pair[::-1]))
        for pair in itertools.combinations(range(4), 2)
    }
    n = 40_000
    half = spec(Strategy.ATTENTION, 0.5)
    seen = dict.fromkeys(expected, 0)
    for i in range(n):
        seen[frozenset(draw_mask(half, scores, uid=f"s/{i}", view=0, draw=0).tolist())] += 1
    for pair, share in expected.items():
        sigma = math.sqrt(share * (1 - share) / n)
        assert abs(seen[pair] / n - share) < 4.5 * sigma, pair


@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("scope", list(Scope))
def test_a_higher_ratio_shows_a_subset(strategy: Strategy, scope: Scope) -> None:
    for i in range(20):
        shown = [
            set(draw_mask(spec(strategy, r, scope), some_scores(seed=i), uid="a", view=i, draw=1))
            for r in RATIOS
        ]
        assert all(more >= fewer for more, fewer in itertools.pairwise(shown))


@pytest.mark.parametrize("strategy", list(Strategy))
def test_counts_are_equal_and_units_ascend(strategy: Strategy) -> None:
    for ratio in RATIOS:
        units = draw_mask(spec(strategy, ratio), some_scores(), uid="a", view=0, draw=0)
        assert np.all(np.diff(units) > 0)
        counts = np.bincount(units // 16, minlength=4)
        assert set(counts) == {max(1, round((1 - ratio) * 16))}


@pytest.mark.parametrize("strategy", [Strategy.TUBE, Strategy.ATTENTION_TUBE])
def test_tubes_show_the_same_positions_in_every_slot(strategy: Strategy) -> None:
    mask = to_keep_mask([draw_mask(spec(strategy), some_scores(), uid="a", view=0, draw=0)], 64)
    slots = mask.reshape(4, 16)
    assert np.all(slots == slots[0])


def test_topk_is_the_highest_scores_and_ties_go_to_the_lower_number() -> None:
    scores = np.array([[1, 3, 3, 2, 3]], np.float32)
    shown = draw_mask(spec(Strategy.ATTENTION_TOPK, 0.6), scores, uid="a", view=0, draw=0)
    assert shown.tolist() == [1, 2]


def test_random_ignores_scores_and_zero_scores_are_shown_last() -> None:
    flat = np.full((4, 16), 1 / 16, np.float32)
    random = spec(Strategy.RANDOM)
    one = draw_mask(random, flat, uid="a", view=0, draw=0)
    assert np.array_equal(one, draw_mask(random, some_scores(), uid="a", view=0, draw=0))
    holes = flat.copy()
    holes[:, 3:] = 0
    for i in range(50):
        shown = draw_mask(spec(Strategy.ATTENTION), holes, uid=str(i), view=0, draw=0)
        assert sorted(shown % 16) == sorted([0, 1, 2] * 4)


def test_masks_differ_by_sample_view_and_draw_but_never_by_process() -> None:
    scores = some_scores()
    one = spec(Strategy.ATTENTION)
    masks = {
        tuple(draw_mask(one, scores, uid=u, view=v, draw=d))
        for u in ("a", "b")
        for v in range(3)
        for d in range(3)
    }
    assert len(masks) == 18
    code = (
        "import numpy as np; from kdhiera.masking import *;"
        "s=MaskSpec(strategy=Strategy('attention'),scope=Scope('slot'),ratio=0.8,seed=3);"
        "f=np.full((2,8),0.125,np.float32);"
        "print(priorities(s,f,uid='x/0/k',view=1,draw=2).tobytes().hex())"
    )
    flat = np.full((2, 8), 0.125, np.float32)
    here = priorities(one, flat, uid="x/0/k", view=1, draw=2).tobytes().hex()
    environment = {"PYTHONHASHSEED": "7"}
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert there.stdout.strip() == here


def test_priorities_keep_their_values() -> None:
    """Stored caches depend on these numbers: they may never change."""
    scores = np.array([[0.1, 0.2, 0.3, 0.4]], np.float32)
    found = priorities(spec(Strategy.ATTENTION), scores, uid="s-0123/512/key", view=1, draw=0)
    # made by priorities(...) at cache format 1
    golden = [-1.3776512377269143, -1.7425212578467977, 0.4556364662429888, -0.49088926552064094]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found[0], golden, rtol=0, atol=1e-12)


def plan(**changes: object) -> MaskPlan:
    values: dict[str, object] = {
        "entries": tuple(
            PlannedMasks(strategy=s, ratio=0.75, draws=3)
            for s in (Strategy.ATTENTION, Strategy.TUBE, Strategy.ATTENTION_TOPK)
        ),
        "scope": Scope.SLOT,
        "seed": 3,
        "keep_all": False,
    }
    return MaskPlan(**(values | changes))  # type: ignore[arg-type]


@given(st.integers(0, 1000), st.sampled_from(RATIOS[1:]))
def test_a_plan_keeps_whatever_it_covers(seed: int, ratio: float) -> None:
    scores, uid = some_scores(seed=seed), f"s/{seed}"
    kept = plan().kept_units(scores, uid=uid, view=1)
    assert len(kept) <= plan().max_kept(4, 16)
    for strategy in (e.strategy for e in plan().entries):
        run = spec(strategy, ratio)
        assert not plan().lacks(run, draws=3, units_per_slot=16)
        for draw in range(3):
            assert set(draw_mask(run, scores, uid=uid, view=1, draw=draw)) <= set(kept)


@pytest.mark.parametrize(
    ("run", "draws", "words"),
    [
        (spec(Strategy.RANDOM), 1, "strategy random"),
        (spec(Strategy.TUBE, 0.5), 1, "ratio 0.5"),
        (spec(Strategy.TUBE), 4, "4 draws"),
        (spec(Strategy.TUBE, scope=Scope.CLIP), 1, "scope clip"),
    ],
)
def test_what_a_plan_does_not_cover_is_named(run: MaskSpec, draws: int, words: str) -> None:
    assert any(words in gap for gap in plan().lacks(run, draws=draws, units_per_slot=16))
    assert not plan(keep_all=True).lacks(run, draws=draws, units_per_slot=16)


def test_keep_all_keeps_all() -> None:
    everything = plan(keep_all=True)
    assert everything.max_kept(4, 16) == 64
    assert everything.kept_units(some_scores(), uid="a", view=0).tolist() == list(range(64))


def test_a_ratio_that_hides_nothing_covers_every_mask() -> None:
    """Of 16 units a ratio of 0.02 rounds to none hidden: any strategy, scope, seed and draw."""
    bare = plan(entries=(PlannedMasks(strategy=Strategy.TUBE, ratio=0.02, draws=1),))
    assert bare.kept_units(some_scores(), uid="a", view=0).tolist() == list(range(64))
    foreign = MaskSpec(strategy=Strategy.RANDOM, scope=Scope.CLIP, ratio=0.5, seed=8)
    assert not bare.lacks(foreign, draws=9, units_per_slot=16)
    assert not bare.lacks_plan(plan(keep_all=True), units_per_slot=16)
    assert bare.lacks(foreign, draws=9, units_per_slot=64)  # hides one of 64


@pytest.mark.parametrize(("ratio", "k"), [(0.8, 10), (0.9, 5), (0.0, 49), (0.999, 1)])
def test_visible_counts_of_the_reference_grid(ratio: float, k: int) -> None:
    assert num_visible(ratio, 49) == k
