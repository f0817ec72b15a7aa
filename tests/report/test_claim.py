from kdhiera.report.claim import claim_blocks, claim_lines, claim_table, claims
from kdhiera.results import Comparison, Interval, Result


def result(features: str, low: float, high: float, method: str = "linear probe") -> Result:
    return Result(
        label="kind",
        features=features,
        readout="mean",
        method=method,
        accuracy=Interval(value=(low + high) / 2, low=low, high=high),
        chance=0.2,
        num_clips=100,
    )


def comparison(low: float, high: float, method: str = "linear probe") -> Comparison:
    return Comparison(
        label="kind",
        features="student",
        baseline="random",
        readout="mean",
        method=method,
        difference=Interval(value=(low + high) / 2, low=low, high=high),
        num_clips=100,
    )


def verdicts(*pairs: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]) -> str:
    """Verdict of one student, random student and difference."""
    ((student, random, difference),) = pairs
    found = claims(
        [result("student", *student), result("random", *random)], [comparison(*difference)]
    )
    return found[0].verdict


def test_the_verdict_is_the_strongest_that_holds() -> None:
    assert verdicts(((0.6, 0.7), (0.4, 0.5), (0.1, 0.3))) == "better, intervals apart"
    assert verdicts(((0.5, 0.7), (0.4, 0.6), (0.02, 0.2))) == "better, paired; intervals overlap"
    assert verdicts(((0.5, 0.7), (0.4, 0.6), (-0.02, 0.2))) == "not told apart"
    assert verdicts(((0.3, 0.4), (0.5, 0.6), (-0.3, -0.1))) == "worse"


def test_a_label_that_cannot_be_separated_is_said_so() -> None:
    overlapping = claims(
        [result("student", 0.5, 0.7), result("random", 0.4, 0.6)], [comparison(0.02, 0.2)]
    )
    assert list(claim_lines(overlapping)) == [
        "kind: distilled and random cannot be separated by their intervals in this run"
    ]
    apart = claims(
        [result("student", 0.6, 0.7), result("random", 0.4, 0.5)], [comparison(0.1, 0.3)]
    )
    assert list(claim_lines(apart)) == ["kind: intervals apart by linear probe (mean)"]


def test_only_frozen_features_on_all_labels_are_claimed() -> None:
    results = [
        result(features, 0.4, 0.5, method)
        for features in ("student", "random")
        for method in ("linear probe", "fine-tuning")
    ]
    found = claims(results, [comparison(0.0, 0.1), comparison(0.0, 0.1, "fine-tuning")])
    assert [c.student.method for c in found] == ["linear probe"]
    assert claim_table(found).rows[0][:2] == ("kind", "linear probe, mean")
    assert claim_blocks([]) == []
