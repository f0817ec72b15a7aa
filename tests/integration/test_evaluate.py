"""Evaluation of real students and teachers on real labelled clips."""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from labelled_runs import NUM_CLIPS, with_export, write_splits
from real_runs import read_tar, write_config, write_tar
from sklearn.neighbors import KNeighborsClassifier

from kdhiera.config import RunConfig, load
from kdhiera.data.shards import index_shards
from kdhiera.demo.prepare import Prepared
from kdhiera.errors import MismatchError, UsageError
from kdhiera.evaluation.kept import Kept, text_array
from kdhiera.featurize import Featurizer
from kdhiera.progress import make_progress
from kdhiera.results import Measure, load_outcomes, per_class_from_json
from kdhiera.stages.evaluate import EvaluateSummary, evaluate
from kdhiera.stages.evaluating.frozen import CLIPS
from kdhiera.stages.evaluating.labelled import (
    SPLITS,
    Split,
    clips_identity,
    splits_digest,
    splits_from_arrays,
    splits_to_arrays,
)
from kdhiera.student.hiera import HieraStudent

SETTINGS = {
    "labels": ["category", "direction"],
    "groups": ["object", "background"],
    "frame_stride": 3,
    "batch_size": 8,
    "resamples": 200,
    "seeds": [0, 1],
    "neighbours": 5,
    "attentive": {"epochs": 2, "lrs": [0.003]},
}


@pytest.fixture(scope="module")
def splits(demo: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_splits(demo, tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def make(usual, splits, tmp_path_factory) -> Callable[..., RunConfig]:
    """A run in a folder of its own with an exported student; keyword arguments are settings."""

    def make(folder: Path | None = None, *, weights: int = 5, **settings) -> RunConfig:
        folder = folder or tmp_path_factory.mktemp("evaluated")
        teachers = {"image": usual["teachers"]["image"]}
        section = {**splits, **SETTINGS, **settings}
        path = write_config(folder, {**usual, "teachers": teachers}, evaluate=section)
        return with_export(load(path), seed=weights)

    return make


def run(config: RunConfig, *, baselines: Path | None = None) -> EvaluateSummary:
    with make_progress() as progress:
        return evaluate(config, progress=progress, baselines=baselines)


@pytest.fixture(scope="module")
def evaluated(make) -> tuple[RunConfig, EvaluateSummary]:
    config = make(labels_per_class=[2])
    return config, run(config)


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the forwards of students and teachers, which run as ever."""
    counts: Counter[str] = Counter()
    dense, teach = HieraStudent.dense, Featurizer.teach

    def counted_dense(self, clips):
        counts["student"] += 1
        return dense(self, clips)

    def counted_teach(self, clips, *, layers, with_scores):
        counts["teacher"] += 1
        return teach(self, clips, layers=layers, with_scores=with_scores)

    monkeypatch.setattr(HieraStudent, "dense", counted_dense)
    monkeypatch.setattr(Featurizer, "teach", counted_teach)
    return counts


def with_views(config: RunConfig, clips: int, crops: int) -> RunConfig:
    section = config.evaluate.model_copy(update={"test_clips": clips, "test_crops": crops})
    return config.model_copy(update={"evaluate": section})


def labels_of(paths: dict[str, str], split: str, label: str) -> list[str]:
    members = read_tar(Path(paths[split]))
    return [json.loads(data)["labels"][label] for name, data in members if name.endswith("json")]


def test_every_model_and_method_stands_in_the_results(evaluated):
    _, summary = evaluated
    found = {(r.features, r.method, r.labels_per_class) for r in summary.results}
    students = {"distilled student", "random student"}
    for amount in (None, 2):
        for method in ("k-NN", "linear probe"):
            assert {f for f, m, a in found if (m, a) == (method, amount)} == {
                *students, "image teacher",
            }  # fmt: skip
        assert {f for f, m, a in found if (m, a) == ("attentive probe", amount)} == students
    assert summary.num_clips == NUM_CLIPS
    assert summary.num_groups.keys() == {"object", "background", "random seed"}
    text = summary.describe()
    for word in ("top-5", "2 a class", "±", "class by class", "chance", "random seed (2)"):
        assert word in text
    assert all(len(line) <= 100 for line in text.splitlines()[:-1])  # but for the path


def test_k_nn_is_scikit_learns_on_the_stored_features(evaluated, splits):
    config, summary = evaluated
    with np.load(summary.features) as stored:
        train, test = (stored[f"{s}|distilled student|slots"] for s in ("train", "test"))
    reference = KNeighborsClassifier(
        n_neighbors=5,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / config.evaluate.temperature),
    ).fit(train, labels_of(splits, "train", "direction"))
    wanted = reference.score(test, labels_of(splits, "test", "direction"))
    (found,) = (
        r
        for r in summary.results
        if (r.features, r.readout, r.method, r.label, r.labels_per_class)
        == ("distilled student", "slots", "k-NN", "direction", None)
    )
    assert found.accuracy.value == pytest.approx(wanted)
    assert (found.num_seeds, found.std) == (1, None)


def test_outcomes_classes_and_results_agree(evaluated):
    _, summary = evaluated
    outcomes = load_outcomes(Path(summary.outcomes))
    assert len(outcomes.uids) == NUM_CLIPS["test"]
    assert set(outcomes.groups) == {"object", "background"}
    counts = {t.measure: t for t in summary.per_class}
    for result in summary.results:
        names = ("label", "features", "readout", "method", "labels_per_class")
        measure = Measure(**{name: getattr(result, name) for name in names})
        right = outcomes.right[measure]
        assert right.shape == (2, NUM_CLIPS["test"])
        assert result.accuracy.value == pytest.approx(right[:, outcomes.known[result.label]].mean())
        classes = counts[measure].classes
        total = sum(row.total for row in classes)
        assert sum(row.correct for row in classes) / total == pytest.approx(result.accuracy.value)
        assert 0 <= outcomes.validation[measure] <= 1
        drawn = result.features == "random student" or result.labels_per_class == 2
        assert result.num_seeds == (2 if drawn or result.method == "attentive probe" else 1)
        if result.num_seeds == 2:
            assert result.std == pytest.approx(right.mean(1).std(ddof=1))
        assert (result.top5 is None) == (result.label == "direction")
    document = json.loads(Path(summary.path).read_text())
    assert per_class_from_json(document["per_class"]) == summary.per_class


def test_differences_are_those_of_the_results(evaluated):
    _, summary = evaluated
    value = {
        (r.label, r.features, r.readout, r.method, r.labels_per_class): r.accuracy.value
        for r in summary.results
    }
    assert len(summary.comparisons) == 2 * 2 * 5
    for c in summary.comparisons:
        ours, theirs = (
            value[c.label, features, c.readout, c.method, c.labels_per_class]
            for features in (c.features, c.baseline)
        )
        assert c.difference.value == pytest.approx(ours - theirs)


def test_nothing_is_measured_twice(evaluated, looked):
    config, summary = evaluated
    assert run(config) == summary
    assert not looked
    Path(summary.path).unlink()
    assert run(config) == summary
    assert looked["student"] == 0


def test_runs_share_their_baselines(make, evaluated, looked):
    """Another student of the same clips: random students and teachers are not run again."""
    first, summary = evaluated
    shared = Path(first.run_dir) / "baselines"
    config = make(labels_per_class=[2], weights=6)
    other = run(config, baselines=shared)
    batches = sum(-(-count // 8) for count in NUM_CLIPS.values())
    assert looked["student"] == batches
    assert looked["teacher"] <= 1  # its widths are checked when it is loaded
    baseline = [r for r in summary.results if r.features != "distilled student"]
    assert [r for r in other.results if r.features != "distilled student"] == baseline
    ours = [[r for r in s.results if r.features == "distilled student"] for s in (summary, other)]
    assert ours[0] != ours[1]


def test_damaged_baselines_are_computed_again(make, evaluated, looked, caplog, tmp_path):
    first, summary = evaluated
    damaged = shutil.copytree(Path(first.run_dir) / "baselines", tmp_path / "baselines")
    for path in damaged.iterdir():
        path.write_bytes(path.read_bytes()[:-30])
    with caplog.at_level(logging.WARNING):
        again = run(make(labels_per_class=[2]), baselines=damaged)
    assert (again.results, again.comparisons) == (summary.results, summary.comparisons)
    assert "computed again" in caplog.text
    assert looked["teacher"] > 1


def test_clips_that_decode_otherwise_than_before_are_all_looked_at_again(make, caplog):
    """As after a time-out: what is kept is of one clip less, and nothing may be mixed."""
    config = make(methods=["knn"], seeds=[0], labels=["direction"])
    summary = run(config)
    kept = Kept(Path(config.run_dir) / "baselines")
    shards = {split: index_shards([getattr(config.evaluate, split)[0]]) for split in SPLITS}
    where = clips_identity(config, shards)
    splits = dict(splits_from_arrays(kept.load(where), shards))
    less = {name: values[1:] for name, values in vars(splits["train"]).items()}
    splits["train"] = Split(**less)
    kept.save(where, splits_to_arrays(splits))
    for path in kept.folder.iterdir():
        arrays = dict(np.load(path))
        if CLIPS in arrays:
            arrays = {k: v[1:] if k.endswith("train") else v for k, v in arrays.items()}
            np.savez(path, **{**arrays, CLIPS: text_array(splits_digest(splits))})
    shutil.rmtree(Path(config.run_dir) / "measured")
    Path(summary.path).unlink()
    with caplog.at_level(logging.WARNING):
        assert run(config) == summary
    assert "other clips decode than before" in caplog.text


def test_test_clips_are_seen_in_all_views(make, evaluated, looked):
    config = make(
        methods=["knn"], seeds=[0], labels=["direction"], test_clips=2, test_crops=3, batch_size=6
    )
    many = run(config, baselines=Path(evaluated[0].run_dir) / "baselines")
    assert looked["student"] == 2 * ((24 + 12) // 6 + NUM_CLIPS["test"])  # six views a clip
    single = run(with_views(config, 1, 1), baselines=Path(evaluated[0].run_dir) / "baselines")
    whole = [r for r in evaluated[1].results if (r.method, r.labels_per_class) == ("k-NN", None)]
    wanted = {(r.features, r.readout): r.accuracy.value for r in whole if r.label == "direction"}
    for r in single.results:
        if r.features != "random student":  # of one seed here
            assert r.accuracy.value == wanted[r.features, r.readout]
    assert [r.accuracy for r in many.results] != [r.accuracy for r in single.results]
    measured = [np.load(path) for path in (Path(config.run_dir) / "measured").iterdir()]
    (features,) = (
        arrays
        for arrays in measured
        if "slots test" in arrays.files and arrays["slots test"].shape[1] > 1
    )
    assert features["slots test"].shape[:2] == (NUM_CLIPS["test"], 6)
    assert features["slots train"].shape[:2] == (NUM_CLIPS["train"], 1)
    assert (np.ptp(features["slots test"], axis=1).max(1) > 0).all()
    with np.load(evaluated[1].features) as stored:
        middle = stored["train|distilled student|slots"]
    np.testing.assert_allclose(middle, features["slots train"][:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"labels": ["colour"]}, "no label colour; they have: background, category"),
        ({"labels_per_class": [30]}, "asks for 30 clips of every class, but `bird` of label"),
        ({"attentive": {"heads": 7}}, "heads is 7, which does not divide the student's width"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(make, evaluated, settings, words):
    config, _ = evaluated
    changed = make(**{"labels_per_class": [2], **settings})
    with pytest.raises(UsageError, match=words):
        run(changed, baselines=Path(config.run_dir) / "baselines")
    assert {path.name for path in Path(changed.run_dir).iterdir()} <= {"export", "measured"}


def test_a_label_of_one_value_is_nothing_to_predict(make, tmp_path, splits):
    members = []
    for name, data in read_tar(Path(splits["train"])):
        if name.endswith("json"):
            content = json.loads(data)
            content["labels"]["direction"] = "left"
            data = json.dumps(content).encode()
        members.append((name, data))
    train = write_tar(tmp_path / "train.tar", members[:16])
    config = make(train=str(train), methods=["linear"], labels=["direction"])
    with pytest.raises(UsageError, match="`direction` has the single value 'left'"):
        run(config)


def test_another_clip_size_is_refused(make):
    config = make()
    larger = config.model_copy(update={"clip": config.clip.model_copy(update={"height": 96})})
    with pytest.raises(MismatchError, match="for clips of 4 x 64 x 64"):
        run(larger)


def test_a_summary_is_plain_values(evaluated):
    _, summary = evaluated
    values = json.loads(json.dumps(summary.to_json()))
    assert values["results"][0] == asdict(summary.results[0])
    assert values["per_class"] == json.loads(Path(summary.path).read_text())["per_class"]
