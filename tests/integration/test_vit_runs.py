"""The plain ViT student on real features, from the cache to export, pictures and accuracies."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kdhiera.config import RunConfig
from kdhiera.errors import MismatchError, StoppedError, UsageError
from kdhiera.progress import Progress, make_progress
from kdhiera.stages.distill import distill, student_of
from kdhiera.stages.distillation.source import open_cache
from kdhiera.stages.evaluate import evaluate
from kdhiera.stages.export import export_original
from kdhiera.stages.pictures.clips import clip_figures
from kdhiera.student.export import load_exported
from kdhiera.student.vit import VitStudent
from kdhiera.training.metrics import read_metrics

MakeRun = Callable[..., RunConfig]

STEPS = 20
VIT = {"kind": "vit", "drop_path": 0.1}
TRAIN = {"max_steps": STEPS, "lr": 0.05}


@pytest.fixture
def progress() -> Progress:
    with make_progress() as made:
        yield made


@dataclass
class Stopping:
    """A progress that asks the process to stop at a step."""

    at: int
    done: int = 0

    def start(self, description: str, total: int | None, unit: str) -> int:
        return 0

    def advance(self, task: int, n: int = 1, **fields: object) -> None:
        self.done += n
        if n and self.done == self.at:
            os.kill(os.getpid(), signal.SIGTERM)

    def finish(self, task: int) -> None:
        pass


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_exported(
        Path(config.run_dir) / "export"
    ).backbone.state_dict()
    return state


def losses(config: RunConfig) -> list[float]:
    return [line["loss"] for line in read_metrics(Path(config.run_dir))]


@pytest.mark.usefixtures("own_cache")
def test_from_the_cache_to_accuracies(
    make_run: MakeRun, progress: Progress, shards: list[Path]
) -> None:
    labelled = {"train": str(shards[0]), "validation": str(shards[1]), "test": str(shards[1])}
    evaluation = {**labelled, "labels": ["direction"], "resamples": 100, "neighbours": 3}
    config = make_run("vit", student=VIT, train=TRAIN, evaluate=evaluation)
    student, _, specs = student_of(config, open_cache(config))
    assert [spec.tap for spec in specs] == ["block:6", "block:7", "block:7"]
    assert isinstance(student, VitStudent)
    distill(config, progress=progress)
    assert len(losses(config)) == STEPS
    assert losses(config)[-1] < 0.9 * losses(config)[0]

    again = make_run("again", student=VIT, train=TRAIN)
    with pytest.raises(StoppedError, match=f"stopped after step 7 of {STEPS}"):
        distill(again, progress=Stopping(7))
    distill(again, progress=progress)
    assert losses(again) == losses(config)
    resumed = weights(again)
    assert all(torch.equal(value, resumed[name]) for name, value in weights(config).items())

    other = make_run("vit", student={"kind": "hiera"}, train=TRAIN)
    with pytest.raises(MismatchError, match=r"'kind': 'vit'"):
        distill(other, progress=progress)
    with pytest.raises(MismatchError, match=r"not the config's: it is a vit for clips of 4 x 64"):
        export_original(other, None)
    with pytest.raises(UsageError, match=r"^--to hiera: the student is a plain ViT \(student.kin"):
        export_original(config, None)

    start = make_run("start", student={**VIT, "init": f"{config.run_dir}/export"})
    begun = student_of(start, open_cache(start))[0].backbone.state_dict()
    assert all(torch.equal(begun[name], value) for name, value in weights(config).items())

    assert len(clip_figures(config, num_clips=1, with_masks=False, progress=progress)[0]) == 1
    summary = evaluate(config, progress=progress)
    assert {result.features for result in summary.results} >= {"distilled student"}


@pytest.mark.usefixtures("own_cache")
def test_heads_of_all_kinds_read_a_vit(make_run: MakeRun, progress: Progress) -> None:
    config = make_run(
        "options",
        student={
            **VIT,
            "head": "mlp",
            "mix": True,
            "taps": {"image": ["block:3", "block:7"], "video": ["block:5"]},
        },
        train={**TRAIN, "grad_checkpointing": True},
    )
    distill(config, progress=progress)
    assert losses(config)[-1] < 0.9 * losses(config)[0]
    wrong = make_run("wrong", student={**VIT, "taps": {"video": ["stage3.end"]}})
    with pytest.raises(UsageError, match=r"no tap `stage3.end`: a plain ViT has no backbone st"):
        distill(wrong, progress=progress)
