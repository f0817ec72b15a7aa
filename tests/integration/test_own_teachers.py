"""Teachers that a run cannot use as they are: what is said, and that nothing was begun."""

import logging
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "teachers"))

from small_models import TIMM_FAMILIES, timm_model

from kdhiera.cache.commit import Cache
from kdhiera.config import RunConfig
from kdhiera.errors import KdhieraError, UsageError
from kdhiera.progress import Progress, make_progress
from kdhiera.stages.distill import distill
from kdhiera.stages.distillation import source as sources_stage
from kdhiera.stages.distillation.source import open_source
from kdhiera.stages.extract_teachers import extract

MakeRun = Callable[..., RunConfig]
TESTS = Path(__file__).parents[1]


@pytest.fixture
def progress() -> Progress:
    with make_progress() as made:
        yield made


def of(make_run: MakeRun, fault: str, *layers: str, **sections: Any) -> RunConfig:
    """A run whose only teacher has a fault."""
    teacher = {"kind": "module", "factory": "broken_teacher:build", "layers": layers or ("first",)}
    mine = {**teacher, "options": {"fault": fault}, "precision": "fp32"}
    usual = make_run("own", views={"num": 1}, **sections).model_dump(mode="json")
    return RunConfig.model_validate(
        usual | {"teachers": {"mine": mine}, "scores": {"teacher": "mine"}}
    )


@pytest.mark.parametrize("fault", ["teacher", "grid", "no scores", "logits"])
def test_no_cache_is_made_for_a_teacher_that_cannot_fill_it(
    make_run: MakeRun, progress: Progress, fault: str
) -> None:
    config = of(make_run, fault)
    with pytest.raises(UsageError, match=r"^teacher mine.*broken_teacher:build"):
        extract(config, progress=progress)
    assert not Path(config.cache.dir).exists()


@pytest.mark.parametrize("fault", ["teacher", "grid", "no scores", "logits"])
def test_no_clip_is_decoded_for_a_teacher_that_cannot_train(
    make_run: MakeRun, progress: Progress, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources_stage, "LiveSource", pytest.fail)
    with pytest.raises(UsageError, match=r"^teacher mine.*broken_teacher:build"):
        distill(of(make_run, fault, cache={"mode": "live"}), progress=progress)


@pytest.mark.parametrize(
    "ray",
    [False, pytest.param(True, marks=[pytest.mark.ray, pytest.mark.slow])],
    ids=["here", "ray"],
)
def test_a_layer_that_is_not_given_is_not_tried_again(
    make_run: MakeRun,
    progress: Progress,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    ray: bool,
) -> None:
    """Where a cache is there already, those who would fill it find out."""
    path = [str(TESTS.parent), str(TESTS / "teachers")]  # for actors, which import the factory
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    extract(of(make_run, "layer", "first"), progress=progress)
    config = of(make_run, "layer", "first", "last", ray={"enabled": ray})
    with pytest.raises(UsageError, match=r"^teacher mine .* layer 'last' and gave 'first'"):
        extract(config, progress=progress)
    assert "failed" not in caplog.text
    commits = Cache.open(config.cache.dir).commits().values()
    assert {column for found in commits for column in found.columns} == {"mine.first.fp32"}


def test_scores_that_turn_negative_stop_the_extraction(
    make_run: MakeRun, progress: Progress
) -> None:
    config = of(make_run, "signed")
    with pytest.raises(KdhieraError, match=r"^teacher mine gives negative scores") as caught:
        extract(config, progress=progress)
    assert isinstance(caught.value, UsageError)  # not tried again
    assert not Cache.open(config.cache.dir).commits()


@pytest.mark.parametrize(
    ("source", "warnings"), [("cls_attention", 1), ("received_attention", 0), ("uniform", 0)]
)
def test_maes_class_token_is_warned_of_once(
    make_run: MakeRun,
    progress: Progress,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    source: str,
    warnings: int,
) -> None:
    family = TIMM_FAMILIES["mae"]
    torch.save(timm_model(family).state_dict(), tmp_path / "mae.pth")
    teacher = {"kind": "timm", "model": family.model, "options": dict(family.options)}
    teacher |= {"weights": str(tmp_path / "mae.pth"), "layers": ["3"], "precision": "fp32"}
    config = make_run(
        "mae",
        teachers={"image": teacher, "edges": {"kind": "hog"}},
        scores={"teacher": "image", "source": source},
        views={"num": 1},
    )

    def said() -> Counter[str]:
        found = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        caplog.clear()
        return Counter("scores.source=received_attention" in text for text in found)

    extract(config, progress=progress)
    assert said()[True] == warnings
    live = config.model_copy(update={"cache": config.cache.model_copy(update={"mode": "live"})})
    with open_source(live, None):
        assert said()[True] == warnings
