"""Contrasts against slow references: pairs by hand, the pigeonhole bootstrap, Holm by hand."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import NUM_CLIPS, PROBE, record

from kdhiera.ablation.contrasts import (
    RESAMPLES,
    Verdict,
    answer,
    difference,
    estimate,
    holm,
    resolve,
)
from kdhiera.config.ablation import AblationConfig, MetricConfig
from kdhiera.evaluation.bootstrap import bootstrap_difference, bootstrap_interval, bootstrap_means

SLOTS = dataclasses.replace(PROBE, readout="slots")
KNN = dataclasses.replace(PROBE, method="k-NN")


def rows(records) -> dict[tuple[int, str], dict[str, object]]:
    """One row a seed and known clip."""
    found = {}
    for r in records:
        o = r.outcomes
        for i, uid in enumerate(o.uids):
            if o.known["direction"][i]:
                found[r.seed, uid] = {
                    "right": float(o.right[PROBE][0, i]),
                    **{name: column[i] for name, column in o.groups.items()},
                    "seed": str(r.seed),
                }
    return found


def columns(keys, table, names) -> list[np.ndarray]:
    return [np.array([table[key][name] for key in keys]) for name in names]


def shuffled(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(NUM_CLIPS)


def asked(**changes) -> dict:
    return {
        "name": "new against base",
        "variant": "new",
        "against": "base",
        "metric": {"label": "direction"},
        **changes,
    }


def ablation(*questions: list[dict], seeds=(0, 1, 2)) -> AblationConfig:
    return AblationConfig.model_validate(
        {
            "name": "n",
            "run_dir": "runs",
            "base": "base.yaml",
            "variants": {"base": {}, "new": {"train.lr": 1.0}, "more": {"train.lr": 2.0}},
            "seeds": seeds,
            "questions": [
                {"title": f"question {i}", "contrasts": contrasts}
                for i, contrasts in enumerate(questions)
            ],
        }
    )


def test_an_accuracy_is_that_of_known_clips_resampled_by_all_they_share() -> None:
    records = [record(seed=s) for s in (0, 1, 2)]
    found = estimate(records, PROBE)
    table = rows(records)
    assert len(table) == 3 * (NUM_CLIPS - 3)
    values = np.array([row["right"] for row in table.values()])
    factors = columns(table, table, ["object", "background", "seed"])
    assert found.value == bootstrap_interval(values, factors, resamples=RESAMPLES, seed=0)
    each = [np.mean([r["right"] for k, r in table.items() if k[0] == s]) for s in (0, 1, 2)]
    assert found.value.value == pytest.approx(np.mean(each))
    assert found.std == pytest.approx(np.std(each, ddof=1))
    assert found.seeds == (0, 1, 2)


def test_one_seed_is_no_factor_and_has_no_spread() -> None:
    found = estimate([record()], PROBE)
    table = rows([record()])
    values = np.array([row["right"] for row in table.values()])
    factors = columns(table, table, ["object", "background"])
    assert found.value == bootstrap_interval(values, factors, resamples=RESAMPLES, seed=0)
    assert found.std is None


def test_clips_that_share_nothing_are_resampled_one_by_one() -> None:
    one = record(groups=False)
    values = one.outcomes.right[PROBE][0, one.outcomes.known["direction"]].astype(float)
    wanted = bootstrap_interval(values, [np.arange(len(values))], resamples=RESAMPLES, seed=0)
    assert estimate([one], PROBE).value == wanted


def test_validation_is_a_mean_over_seeds() -> None:
    records = [record(seed=0, validation=0.4), record(seed=1, validation=0.6)]
    found = estimate(records, PROBE, of_validation=True)
    assert found.value.value == pytest.approx(0.5)
    assert (found.value.low, found.value.high) == (0.4, 0.6)
    assert estimate(records, KNN) is None


def test_pairs_are_of_the_same_clip_and_seed() -> None:
    """The other variant lists its clips in another order and lacks a seed."""
    new = [record("new", s, share=0.8) for s in (0, 1, 2)]
    base = [record("base", s, order=shuffled(s)) for s in (2, 0)]
    found, p = difference(new, PROBE, base, PROBE)
    ours, theirs = rows(new), rows(base)
    keys = [key for key in ours if key in theirs]
    assert {seed for seed, _ in keys} == {0, 2}
    a, b = (np.array([t[k]["right"] for k in keys]) for t in (ours, theirs))
    factors = columns(keys, ours, ["object", "background", "seed"])
    assert found.value == bootstrap_difference(a, b, factors, resamples=RESAMPLES, seed=0)
    each = [
        np.mean([x - y for x, y, k in zip(a, b, keys, strict=True) if k[0] == s]) for s in (0, 2)
    ]
    assert found.std == pytest.approx(np.std(each, ddof=1))
    assert found.seeds == (0, 2)
    means = bootstrap_means(a - b, factors, resamples=RESAMPLES, seed=0)
    beyond = min((means <= 0).sum(), (means >= 0).sum())
    assert p == pytest.approx(min(1, 2 * (beyond + 1) / (RESAMPLES + 1)))


def test_the_order_of_clips_means_nothing() -> None:
    new = [record("new", s) for s in (0, 1)]
    straight = difference(new, PROBE, [record("base", s) for s in (0, 1)], PROBE)
    mixed = difference(new, PROBE, [record("base", s, order=shuffled(s)) for s in (1, 0)], PROBE)
    assert straight == mixed


def test_only_clips_that_both_have_are_compared() -> None:
    one, other = record("new"), record("base", order=range(12))
    found, _ = difference([one], PROBE, [other], PROBE)
    ours, theirs = rows([one]), rows([other])
    assert len(theirs) == 11
    wanted = np.mean([ours[key]["right"] - theirs[key]["right"] for key in theirs])
    assert found.value.value == pytest.approx(wanted)
    assert difference([one], PROBE, [record("base", 7)], PROBE) is None


def test_a_variant_is_no_different_from_itself() -> None:
    records = [record(seed=s) for s in (0, 1)]
    found, p = difference(records, PROBE, records, PROBE)
    assert (found.value.value, found.value.low, found.value.high, p) == (0, 0, 0, 1)


def test_not_worse_by_more_than_a_margin() -> None:
    new, base = [record("new", s) for s in (0, 1)], [record("base", s) for s in (0, 1)]
    ours, theirs = rows(new), rows(base)
    values = np.array([ours[k]["right"] - theirs[k]["right"] for k in ours])
    factors = columns(ours, ours, ["object", "background", "seed"])
    means = bootstrap_means(values, factors, resamples=RESAMPLES, seed=0)
    for margin in (0.02, 0.1, 0.6, 0.99):
        _, p = difference(new, PROBE, base, PROBE, margin=margin)
        assert p == pytest.approx(((means <= -margin).sum() + 1) / (RESAMPLES + 1))


def test_verdicts() -> None:
    sure = [record("new", s, share=1.0) for s in (0, 1, 2)]
    base = [record("base", s, share=0.1) for s in (0, 1, 2)]
    back = {"variant": "base", "against": "new"}
    questions = (
        [
            asked(),
            asked(**back),
            asked(against="new"),
            asked(against="more"),
            asked(margin=0.05),
            asked(**back, margin=0.05),
        ],
    )
    found = answer(ablation(*questions).questions, [*sure, *base])
    assert [c.verdict for c in found] == [
        Verdict.BETTER,
        Verdict.WORSE,
        Verdict.OPEN,
        Verdict.NOT_RUN,
        Verdict.NOT_WORSE,
        Verdict.OPEN,
    ]
    assert found[3].difference is None
    assert all(c.adjusted is None for c in found)


def test_other_features_and_methods_of_the_same_variant_compare() -> None:
    records = [record("new", s, measures=[PROBE, KNN]) for s in (0, 1)]
    question = [asked(against="new", against_metric={"label": "direction", "method": "k-NN"})]
    (found,) = answer(ablation(question).questions, records)
    o = [r.outcomes for r in records]
    known = o[0].known["direction"]
    wanted = np.mean([x.right[PROBE][0, known].mean() - x.right[KNN][0, known].mean() for x in o])
    assert found.difference.value.value == pytest.approx(wanted)


def test_a_metric_without_a_readout_takes_the_mean() -> None:
    records = [record(measures=[SLOTS, PROBE])]
    assert resolve(MetricConfig(label="direction"), records) == PROBE
    assert resolve(MetricConfig(label="direction", readout="slots"), records) == SLOTS
    assert resolve(MetricConfig(label="direction"), [record(measures=[SLOTS])]) == SLOTS
    assert resolve(MetricConfig(label="category"), records) is None
    assert resolve(MetricConfig(label="direction", method="k-NN"), records) is None
    assert resolve(MetricConfig(label="direction", labels_per_class=5), records) is None
    assert resolve(MetricConfig(label="direction", features="random student"), records) is None


def test_holm_by_hand() -> None:
    """0.01 x 4, then 0.02 x 3, then 0.03 x 2, which may not be less; 0.5 x 1."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_the_largest_of_all_smaller_ones(p_values: list[float]) -> None:
    """Max over all j with p_j <= p_i of (number of p that are not below p_j) * p_j."""
    wanted = [
        min(1.0, max(sum(r >= q for r in p_values) * q for q in p_values if q <= p))
        for p in p_values
    ]
    assert holm(p_values) == pytest.approx(wanted)


def test_primary_contrasts_are_corrected_together_also_for_those_not_run_yet() -> None:
    records = [record(v, s, share=p) for v, p in (("new", 0.9), ("base", 0.5)) for s in (0, 1, 2)]
    first = [asked(primary=True), asked(name="aside")]
    second = [asked(name="later", variant="more", primary=True)]
    one, aside, later = answer(ablation(first, second).questions, records)
    assert one.adjusted == pytest.approx(min(1.0, 2 * one.p_value))
    assert aside.p_value == one.p_value
    assert aside.adjusted is None
    assert (later.adjusted, later.verdict) == (None, Verdict.NOT_RUN)
