import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kdhiera.errors import UsageError
from kdhiera.evaluation import bootstrap
from kdhiera.evaluation.bootstrap import bootstrap_difference, bootstrap_interval


def test_clips_that_are_their_own_group_give_the_ordinary_bootstrap():
    rng = np.random.default_rng(0)
    right = rng.random(250) < 0.7
    got = bootstrap_interval(right, [np.arange(250)], resamples=20000, seed=1)
    ordinary = stats.bootstrap(
        (right.astype(float),), np.mean, n_resamples=20000, method="percentile", rng=2
    ).confidence_interval
    assert got.value == right.mean()
    assert got.low == pytest.approx(ordinary.low, abs=0.005)
    assert got.high == pytest.approx(ordinary.high, abs=0.005)


def test_one_factor_resamples_whole_groups():
    """Against a slow bootstrap that concatenates the drawn groups' clips."""
    rng = np.random.default_rng(3)
    groups = rng.integers(15, size=120)
    values = rng.random(120) < 0.3 + 0.03 * groups
    got = bootstrap_interval(values, [groups], resamples=8000, seed=4)
    means = []
    for _ in range(8000):
        drawn = rng.integers(15, size=15)
        means.append(np.concatenate([values[groups == g] for g in drawn]).mean())
    low, high = np.quantile(means, [0.025, 0.975])
    assert got.low == pytest.approx(low, abs=0.012)
    assert got.high == pytest.approx(high, abs=0.012)


def test_two_factors_multiply_multiplicities():
    """Against a slow bootstrap that lists every clip of every drawn (object, background)."""
    rng = np.random.default_rng(5)
    objects, backgrounds = rng.integers(8, size=90), rng.integers(6, size=90)
    values = rng.random(90) < 0.2 + 0.04 * objects + 0.05 * backgrounds
    got = bootstrap_interval(values, [objects, backgrounds], resamples=6000, seed=6)
    means = []
    for _ in range(6000):
        rows, columns = rng.integers(8, size=8), rng.integers(6, size=6)
        listed = [values[(objects == o) & (backgrounds == b)] for o in rows for b in columns]
        means.append(np.concatenate(listed).mean())
    low, high = np.quantile(means, [0.025, 0.975])
    assert got.low == pytest.approx(low, abs=0.02)
    assert got.high == pytest.approx(high, abs=0.02)


def _coverage(interval_groups, *, num_backgrounds, background_effect, repeats=250):
    """Share of simulated test sets whose interval holds the true accuracy, 0.5."""
    rng = np.random.default_rng(7)
    hits = 0
    for seed in range(repeats):
        objects = rng.integers(30, size=240)
        backgrounds = rng.integers(num_backgrounds, size=240)
        chance = (
            0.5
            + 0.2 * rng.choice([-1, 1], size=30)[objects]
            + background_effect * rng.choice([-1, 1], size=num_backgrounds)[backgrounds]
        )
        right = rng.random(240) < chance
        groups = interval_groups(objects, backgrounds)
        interval = bootstrap_interval(right, groups, resamples=400, seed=seed)
        hits += interval.low <= 0.5 <= interval.high
    return hits / repeats


def test_covers_the_truth_about_as_often_as_it_says():
    both = _coverage(lambda o, b: [o, b], num_backgrounds=12, background_effect=0.15)
    assert 0.92 <= both <= 1.0


def test_ignoring_the_groups_would_cover_too_rarely():
    neither = _coverage(
        lambda o, b: [np.arange(len(o))], num_backgrounds=12, background_effect=0.15
    )
    assert neither < 0.8


def test_few_groups_cover_too_rarely_and_have_to_be_named():
    both = _coverage(lambda o, b: [o, b], num_backgrounds=3, background_effect=0.15)
    assert both < 0.85


def test_one_factor_covers_at_its_nominal_level():
    objects = _coverage(lambda o, b: [o], num_backgrounds=12, background_effect=0.0)
    assert 0.90 <= objects <= 0.98


def test_paired_differences_cancel_what_is_common():
    rng = np.random.default_rng(8)
    objects = rng.integers(20, size=200)
    hard = rng.random(20) < 0.5
    a = np.where(hard[objects], 0.1, 0.9) > rng.random(200)
    b = a.copy()
    b[:10] = ~b[:10]
    options = {"resamples": 1000, "seed": 9}
    paired = bootstrap_difference(a, b, [objects], **options)
    alone = bootstrap_interval(a, [objects], **options)
    assert paired.value == pytest.approx(a.mean() - b.mean())
    assert paired.high - paired.low < 0.3 * (alone.high - alone.low)
    same = bootstrap_difference(a, a, [objects], **options)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    back = bootstrap_difference(b, a, [objects], **options)
    assert (back.low, back.high) == pytest.approx((-paired.high, -paired.low))


def test_seeds_decide_and_chunks_and_group_names_do_not(monkeypatch):
    rng = np.random.default_rng(10)
    values, objects = rng.random(100) < 0.5, rng.integers(10, size=100)
    backgrounds = rng.integers(4, size=100)
    options = {"resamples": 300, "seed": 11}
    first = bootstrap_interval(values, [objects, backgrounds], **options)
    named = np.array([f"object-{o}" for o in objects])
    assert bootstrap_interval(values, [named, backgrounds], **options) == first
    monkeypatch.setattr(bootstrap, "CHUNK_WEIGHTS", 700)
    assert bootstrap_interval(values, [objects, backgrounds], **options) == first
    other = bootstrap_interval(values, [objects, backgrounds], resamples=300, seed=12)
    assert other != first


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 6), st.integers(1, 30))
def test_bounds_are_ordered_and_within_the_values(seed, num_objects, num_backgrounds, num_clips):
    rng = np.random.default_rng(seed)
    values = rng.random(num_clips) < 0.5
    groups = [
        rng.integers(num_objects, size=num_clips),
        rng.integers(num_backgrounds, size=num_clips),
    ]
    got = bootstrap_interval(values, groups, resamples=50, seed=0)
    assert 0 <= got.low <= got.high <= 1


def test_no_clip_is_an_error():
    with pytest.raises(UsageError, match="no test clip"):
        bootstrap_interval(np.zeros(0), [np.zeros(0)], resamples=10, seed=0)
