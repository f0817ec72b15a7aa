"""Teachers of the user's own: how their factory is found and called, and what they must give."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import CPU, SQUARE

from kdhiera.config import RunConfig, TeacherConfig
from kdhiera.errors import UsageError
from kdhiera.teachers.build import build_teacher, build_teachers, check_teachers
from kdhiera.teachers.scores import ScoreChoice


def build(choice: ScoreChoice | None = None, **changes: Any) -> Any:
    values = {"kind": "module", "factory": "module_teacher:build", "layers": ["mean"]}
    config = TeacherConfig.model_validate(values | changes)
    return build_teacher(config, grid=SQUARE, device=CPU, choice=choice)


def test_a_factory_gets_its_options_weights_and_what_scores_are_read_from():
    assert build().seen == {}
    teacher = build(options={"width": 3}, weights="w.pth")
    assert teacher.seen == {"width": 3, "weights": "w.pth"}
    chosen = build(ScoreChoice(layer="2", heads=(1,)))
    assert chosen.seen == {"score_layer": "2", "score_heads": [1]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"factory": "module_teacher"}, "must read package.module:function"),
        ({"factory": "no_such_module:build"}, "cannot be imported .ModuleNotFoundError"),
        ({"factory": "module_teacher:bild"}, "cannot be imported .AttributeError"),
        ({"options": {"grid": 1}}, "failed with its options .TypeError"),
        ({"layers": ["last"]}, "the layer is mean, got 'last'"),
    ],
)
def test_what_a_factory_cannot_do_is_one_sentence(changes: dict[str, Any], words: str):
    with pytest.raises(UsageError, match=words):
        build(**changes)


def run_config(tmp_path: Path, **changes: Any) -> RunConfig:
    own = {"kind": "module", "factory": "module_teacher:build", "layers": ["mean"]}
    values = {
        "name": "x",
        "run_dir": str(tmp_path),
        "data": {"shards": "none.tar"},
        "clip": {"num_frames": 4, "height": 64, "width": 64},
        "teachers": {"mine": own, "edges": {"kind": "hog"}},
        "scores": {"teacher": "mine", "source": "uniform"},
        "cache": {"dir": str(tmp_path)},
    }
    return RunConfig.model_validate(values | changes)


def test_all_teachers_of_a_run_and_the_score_teachers_source(tmp_path: Path):
    assert set(build_teachers(run_config(tmp_path), device=CPU)) == {"mine", "edges"}
    scores = {"teacher": "mine", "source": "feature_norm", "layer": "mean"}
    with pytest.raises(UsageError, match="no scores here, got 'feature_norm'"):
        build_teachers(run_config(tmp_path, scores=scores), device=CPU)


def test_messages_say_what_the_run_calls_a_teacher(tmp_path: Path):
    teachers = {"eyes": {"kind": "transformers", "model": "videomae", "layers": [1]}}
    scores = {"teacher": "eyes", "source": "uniform"}
    config = run_config(tmp_path, teachers=teachers, scores=scores)
    with pytest.raises(UsageError, match=r"in `teachers\.eyes\.weights`"):
        build_teachers(config, device=CPU)


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    build()
    assert torch.equal(torch.rand(3), expected)


def broken(tmp_path: Path, fault: str) -> RunConfig:
    teacher = {"kind": "module", "factory": "broken_teacher:build", "layers": ["first", "last"]}
    teachers = {"mine": {**teacher, "options": {"fault": fault}}, "edges": {"kind": "hog"}}
    return run_config(tmp_path, teachers=teachers, scores={"teacher": "mine"})


def check(config: RunConfig, **how: Any) -> None:
    check_teachers(config, build_teachers(config, device=CPU), device=CPU, **how)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("teacher", r"returned int, which lacks identity, weights_sha256, check, __call__: return"),
        ("output", r"returned dict: return a .*TeacherOutput"),
        ("layer", r"was asked for layer 'last' and gave 'first': return every layer"),
        ("grid", r"layer 'first' as float32 \[2, 2, 3, 4, 3\] on cpu: .* \[2, 2, 4, 4, channels\]"),
        ("flat", r"layer 'first' as float32 \[2, 32, 3\] on cpu: return float features \[2, 2, 4"),
        ("batch", r"layer 'first' as float32 \[1, 2, 4, 4, 3\] on cpu"),
        ("dtype", r"layer 'first' as int32 \[2, 2, 4, 4, 3\] on cpu: return float features"),
        ("numpy", r"layer 'first' as ndarray: return float features"),
        ("device", r"layer 'first' as float32 \[.*\] on meta: return .* on the clips' device"),
        ("gradient", r"layer 'first' as .* with a gradient: .* made under torch.no_grad\(\)"),
        ("crash", r"fails on black clips \(ValueError: two lines\): correct the factory"),
        ("no scores", r"was asked for scores and gave none: return them, or .*`scores.teacher`"),
        ("units", r"gave scores as float32 \[2, 2, 2, 2\] on cpu: .* float scores \[2, 2, 4, 4\]"),
        ("whole numbers", r"gave scores as int64 \[2, 2, 4, 4\] on cpu: return float scores"),
        ("logits", r"gives negative scores \(-2.77\): they must be shares of their slot"),
        ("sums", r"gives scores that sum to 16 in a slot: .* divide them by their sum"),
    ],
)
def test_what_breaks_the_contract_is_one_sentence(tmp_path: Path, fault: str, words: str):
    with pytest.raises(UsageError, match=words) as caught:
        check(broken(tmp_path, fault))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("teacher mine")
    assert "broken_teacher:build" in message


def test_what_keeps_the_contract_passes(tmp_path: Path):
    check(broken(tmp_path, ""))
    check(run_config(tmp_path))  # no scores are asked for, and none given


def test_a_device_that_is_not_the_one_it_will_run_on_does_not_judge(tmp_path: Path):
    check(broken(tmp_path, "crash"), must_run=False)
    with pytest.raises(UsageError, match="gives negative scores"):
        check(broken(tmp_path, "logits"), must_run=False)
