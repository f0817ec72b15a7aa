"""What every teacher keeps, whatever its kind; `Teacher` says it in words."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import CPU, SQUARE, TIMM_FAMILIES, random_clips, timm_teacher, watched
from test_transformers_vit import library_model, save, teacher_of

from kdhiera.config import TeacherConfig
from kdhiera.errors import UsageError
from kdhiera.grid import Grid
from kdhiera.teachers.base import Teacher
from kdhiera.teachers.build import build_teacher
from kdhiera.teachers.scores import SCORE_SOURCES


@dataclass(frozen=True)
class Case:
    """A teacher and what it offers."""

    make: Callable[..., Teacher]
    layers: tuple[str, ...]
    sources: tuple[str, ...] = ()


def timm_case(name: str, *, sources: tuple[str, ...] = SCORE_SOURCES, norm: bool = True) -> Case:
    def make(folder: Path, **changes: Any) -> Teacher:
        return timm_teacher(TIMM_FAMILIES[name], folder, **changes)

    return Case(make, ("1", "2", "3", "norm") if norm else ("1", "2", "3"), sources)


def library_case(kind: str, *, sources: tuple[str, ...] = SCORE_SOURCES) -> Case:
    def make(folder: Path, **changes: Any) -> Teacher:
        return teacher_of(save(library_model(kind), folder), **changes)

    return Case(make, ("1", "2", "3", "norm"), sources)


def lowlevel_case(kind: str) -> Case:
    def make(folder: Path, **changes: Any) -> Teacher:
        config = TeacherConfig.model_validate({"kind": kind} | changes)
        return build_teacher(config, grid=SQUARE, device=CPU)

    return Case(make, ("patch",))


def own_case() -> Case:
    """A factory of the user's own."""

    def make(folder: Path, **changes: Any) -> Teacher:
        values = {"kind": "module", "factory": "module_teacher:build", "layers": ["mean"]}
        return build_teacher(
            TeacherConfig.model_validate(values | changes), grid=SQUARE, device=CPU
        )

    return Case(make, ("mean",))


WITHOUT_CLS = tuple(s for s in SCORE_SOURCES if s != "cls_attention")
CASES = {
    **{f"timm {n}": timm_case(n) for n in ("dinov2-reg", "dinov3", "mae", "clip")},
    "timm siglip": timm_case("siglip", sources=WITHOUT_CLS),
    "timm eva02": timm_case("eva02", norm=False),
    "transformers videomae": library_case("videomae", sources=WITHOUT_CLS),
    "transformers vjepa2": library_case("vjepa2", sources=WITHOUT_CLS),
    "transformers dinov2": library_case("dinov2"),
    "transformers vit": library_case("vit"),
    "pixels": lowlevel_case("pixels"),
    "hog": lowlevel_case("hog"),
    "module": own_case(),
}


@pytest.mark.parametrize("name", CASES)
class TestTeacher:
    """One instance a case and method; weights are on disk in `tmp_path`."""

    def teacher(self, name: str, folder: Path, **changes: Any) -> Teacher:
        return CASES[name].make(folder, **changes)

    def test_it_is_a_teacher_that_says_who_it_is(self, name: str, tmp_path: Path):
        teacher = self.teacher(name, tmp_path)
        assert isinstance(teacher, Teacher)
        assert teacher.identity["kind"] == name.split()[0]
        assert len(teacher.weights_sha256) == 64
        again = self.teacher(name, tmp_path)
        assert (again.identity, again.weights_sha256) == (teacher.identity, teacher.weights_sha256)

    def test_features_are_float32_on_the_token_grid(self, name: str, tmp_path: Path):
        case = CASES[name]
        clips = random_clips(3, grid_of(name))
        out = self.teacher(name, tmp_path)(clips, case.layers, None)
        assert set(out.features) == set(case.layers)
        assert out.scores is None
        for feature in out.features.values():
            assert feature.shape[:4] == (3, *grid_of(name).tokens)
            assert feature.dtype == torch.float32
            assert feature.isfinite().all()

    def test_it_repeats_itself(self, name: str, tmp_path: Path):
        case, clips = CASES[name], random_clips(2, grid_of(name))
        teacher = self.teacher(name, tmp_path)
        first, second = (teacher(clips, case.layers, None) for _ in range(2))
        for layer in case.layers:
            assert torch.equal(first.features[layer], second.features[layer])

    def test_a_clip_does_not_depend_on_its_batch(self, name: str, tmp_path: Path):
        case, clips = CASES[name], random_clips(3, grid_of(name))
        teacher = self.teacher(name, tmp_path)
        together = teacher(clips, case.layers, None)
        for i in range(3):
            alone = teacher(clips[i : i + 1], case.layers, None)
            for layer in case.layers:
                ours, theirs = alone.features[layer], together.features[layer][i : i + 1]
                assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()

    def test_asking_for_less_gives_the_same(self, name: str, tmp_path: Path):
        case, clips = CASES[name], random_clips(2, grid_of(name))
        teacher = self.teacher(name, tmp_path)
        everything = teacher(clips, case.layers, None)
        for layer in case.layers:
            one = teacher(clips, [layer], None)
            assert set(one.features) == {layer}
            assert torch.equal(one.features[layer], everything.features[layer])
        for source in case.sources:
            scored = teacher(clips, case.layers, source)
            alone = teacher(clips, [], source)
            assert alone.features == {}
            assert torch.equal(scored.scores, alone.scores)
            for layer in case.layers:
                assert torch.equal(scored.features[layer], everything.features[layer])

    def test_scores_are_shares_of_a_slot(self, name: str, tmp_path: Path):
        case, clips = CASES[name], random_clips(2, grid_of(name))
        teacher = self.teacher(name, tmp_path)
        for source in case.sources:
            teacher.check((), source)
            scores = teacher(clips, [], source).scores
            assert scores.shape == (2, *grid_of(name).tokens)
            assert scores.dtype == torch.float32
            assert (scores >= 0).all()
            torch.testing.assert_close(scores.sum((2, 3)), torch.ones(2, 2))
            assert scores.std() > 0

    def test_what_it_lacks_is_refused_with_what_it_has(self, name: str, tmp_path: Path):
        case, teacher = CASES[name], self.teacher(name, tmp_path)
        teacher.check(case.layers, None)
        for layer in ("0", "4", "-1", "1.5", "nrom", "norm " if "norm" in case.layers else "norm"):
            with pytest.raises(UsageError, match=case.layers[0]):
                teacher.check([layer], None)
        for source in (*SCORE_SOURCES, "magic"):
            if source in case.sources:
                continue
            with pytest.raises(UsageError, match=case.sources[0] if case.sources else "scores"):
                teacher.check([], source)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.sources])
def test_low_precision_stays_near(name: str, tmp_path: Path):
    """bf16 keeps float32 out and loses less than a hundredth of the variance."""
    case, clips = CASES[name], random_clips(2, grid_of(name))
    exact = case.make(tmp_path)(clips, ["2"], case.sources[0])
    rough = case.make(tmp_path, precision="bf16")(clips, ["2"], case.sources[0])
    feature = rough.features["2"]
    assert feature.dtype == torch.float32
    assert not torch.equal(feature, exact.features["2"])
    error = (feature - exact.features["2"]).square().mean()
    assert error < 1e-2 * exact.features["2"].var()
    assert rough.scores.dtype == torch.float32
    low = case.make(tmp_path, precision="bf16")
    blocks, _ = watched(None, low._backbone.blocks, lambda: low(clips, ["3"], None))
    for block in blocks:  # what blocks add up is float32, what they compute with is not
        assert (block[0] if isinstance(block, tuple) else block).dtype == torch.float32
    torch.testing.assert_close(rough.scores.sum((2, 3)), torch.ones(2, 2))
    assert (rough.scores / exact.scores).log().abs().max() < math.log(1.5)


def grid_of(name: str) -> Grid:
    """The student's grid that a case is made for."""
    kind, _, family = name.partition(" ")
    return TIMM_FAMILIES[family].grid if kind == "timm" else SQUARE
