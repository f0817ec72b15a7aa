"""Fine-tuning on small real videos whose colour is their class."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from labelled_runs import with_export
from numbered import render
from real_runs import write_config, write_tar

from kdhiera.config import RunConfig, load
from kdhiera.data.sandbox import Sandbox
from kdhiera.data.shards import index_shards
from kdhiera.progress import make_progress
from kdhiera.results import load_outcomes
from kdhiera.stages.assemble import decode_limits, exported_student
from kdhiera.stages.evaluate import EvaluateSummary, evaluate
from kdhiera.stages.evaluating.finetuning import _Training
from kdhiera.student.hiera import build

COLOURS = {"red": 0, "blue": 2}
SIZES = {"train": 16, "validation": 4, "test": 8}
RECIPE = {"epochs": 6, "batch_size": 8, "lr": 0.03, "warmup_epochs": 1, "precision": "fp32"}


def noise(colour: str, seed: int) -> Callable[[int, int, int], np.ndarray]:
    """Frames of grey noise with more of one colour."""

    def draw(number: int, width: int, height: int) -> np.ndarray:
        rng = np.random.default_rng([seed, number])
        frame = rng.integers(0, 120, (height // 8, width // 8, 3))
        frame[..., COLOURS[colour]] += 70
        return frame.repeat(8, 0).repeat(8, 1).astype(np.uint8)

    return draw


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("colours")
    paths, seed = {}, 0
    for split, size in SIZES.items():
        members = []
        for i in range(size):
            colour, seed = list(COLOURS)[i % 2], seed + 1
            video = render(12, size=(96, 64), draw=noise(colour, seed))
            label = json.dumps({"labels": {"colour": colour, "scene": i // 2}})
            members += [(f"{i:03}.mp4", video), (f"{i:03}.json", label.encode())]
        paths[split] = str(write_tar(folder / f"{split}.tar", members))
    return paths


@pytest.fixture(scope="module")
def make(usual, colours, tmp_path_factory) -> Callable[..., RunConfig]:
    def make(**finetune) -> RunConfig:
        section = {
            **colours, "labels": ["colour"], "groups": ["scene"], "frame_stride": 2,
            "methods": ["finetune"], "resamples": 100, "finetune": {**RECIPE, **finetune},
        }  # fmt: skip
        teachers = {"image": usual["teachers"]["image"]}
        folder = tmp_path_factory.mktemp("finetuned")
        path = write_config(folder, {**usual, "teachers": teachers}, evaluate=section)
        return with_export(load(path))

    return make


def run(config: RunConfig, baselines: Path | None = None) -> EvaluateSummary:
    with make_progress() as progress:
        return evaluate(config, progress=progress, baselines=baselines)


@pytest.fixture(scope="module")
def tuned(make) -> tuple[RunConfig, EvaluateSummary]:
    config = make()
    return config, run(config)


def test_learns_beside_its_baselines(tuned):
    _, summary = tuned
    found = {(r.features, r.method): r.accuracy.value for r in summary.results}
    assert set(found) == {
        ("distilled student", "fine-tuning"),
        ("supervised from scratch", "fine-tuning"),
        ("image teacher", "linear probe"),
    }
    assert found["distilled student", "fine-tuning"] == 1
    assert found["supervised from scratch", "fine-tuning"] == 1
    (comparison,) = summary.comparisons
    assert (comparison.features, comparison.baseline) == (
        "distilled student",
        "supervised from scratch",
    )
    outcomes = load_outcomes(Path(summary.outcomes))
    tuned_measure = next(m for m in outcomes.right if m.features == "distilled student")
    assert outcomes.validation[tuned_measure] == 1
    assert "colour, fine-tuning (mean), class by class:" in summary.describe()


def scores(config: RunConfig) -> np.ndarray:
    """Of the only job that is the run's own."""
    (path,) = (Path(config.run_dir) / "measured").iterdir()
    return np.load(path)["test"]


def test_equal_seeds_give_equal_bits_and_scratch_is_trained_once(tuned, make):
    config, summary = tuned
    again = make()
    baselines = Path(config.run_dir) / "baselines"
    before = {path.name: path.stat().st_mtime_ns for path in baselines.iterdir()}
    assert run(again, baselines).results == summary.results
    assert (scores(again) == scores(config)).all()
    assert before == {path.name: path.stat().st_mtime_ns for path in baselines.iterdir()}


def test_every_epoch_sees_new_views_of_the_same_clips(make, colours):
    config = make(repeats=2, batch_size=12)
    (shard,) = index_shards([colours["train"]])
    classes = np.arange(5) % 2
    training = _Training(
        places=[(shard, i) for i in range(5)],
        classes=classes,
        recipe=config.evaluate.finetune,
        seed=3,
    )
    assert training.clips_per_epoch == 10
    assert training.steps_per_epoch == 1
    with Sandbox(decode_limits(config.decode), num_children=1) as sandbox:
        ((first, labels),) = training.batches(config, sandbox, 0)
        ((again, _),) = training.batches(config, sandbox, 0)
        ((second, other),) = training.batches(config, sandbox, 1)
    assert (first == again).all()
    assert (np.bincount(labels) == 2 * np.bincount(classes)).all()
    assert (labels[::2] == labels[1::2]).all()  # two views of a clip follow one another
    assert (first[::2] != first[1::2]).any((1, 2, 3, 4)).all()
    seen = {clip.tobytes() for clip in first} | {clip.tobytes() for clip in second}
    assert len(seen) == 20
    assert [int(np.argmax(clip.mean((0, 1, 2))) == 2) for clip in second] == list(other)


def test_the_same_weights_are_fine_tuned_at_three_poolings(make):
    config = make()
    export = Path(config.run_dir) / "export"
    student = exported_student(config, export, q_pool=3, drop_path=0.2)
    wanted = build(config.student, config.clip.grid, seed=5).state_dict()
    assert student.backbone.q_pool == 3
    assert student.backbone.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    for name, value in student.backbone.state_dict().items():
        assert (value == wanted[name]).all(), name
