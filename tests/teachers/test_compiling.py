"""Compiled blocks: the same features, one compilation for all blocks, one sentence if it fails."""

from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from small_models import SQUARE, TIMM_FAMILIES, random_clips, timm_teacher
from torch._dynamo.utils import counters

from kdhiera.config import TeacherConfig
from kdhiera.errors import UsageError
from kdhiera.stages.replaying.replay import ARITHMETIC
from kdhiera.teachers.compiling import compile_blocks


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing compiled before, and a cache of its own."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_features_are_within_the_arithmetic_of_a_column(fresh: None, tmp_path: Path):
    """So `compile` need not be in the identity: a replay would not tell the two apart."""
    family = TIMM_FAMILIES["dinov2-reg"]
    eager = timm_teacher(family, tmp_path)
    compiled = timm_teacher(family, tmp_path, compile=True)
    clips = random_clips(2, family.grid)
    expected = eager(clips, ["1", "2", "3"], "cls_attention")
    found = compiled(clips, ["1", "2", "3"], "cls_attention")
    for layer, feature in expected.features.items():
        error = (found.features[layer] - feature).square().mean() / feature.var()
        assert error < ARITHMETIC["fp32"] / 1000, layer
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1  # three blocks, one compilation
    assert not counters["graph_break"]
    assert compiled.identity == eager.identity


def test_blocks_stay_as_they_are_without_it():
    blocks = [torch.nn.Linear(2, 2) for _ in range(3)]
    assert compile_blocks(blocks, False) == blocks


def test_a_machine_that_cannot_compile_says_so(
    fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (str(tmp_path / "no-compiler"),))
    monkeypatch.setattr(torch._inductor.config, "fx_graph_cache", False)
    teacher = timm_teacher(TIMM_FAMILIES["dino"], tmp_path, compile=True)
    with pytest.raises(
        UsageError, match=r"torch cannot compile .* set teachers.<name>.compile=fal"
    ):
        teacher(random_clips(1, SQUARE), ["1"], None)


def test_other_errors_of_a_block_pass_through():
    class Picky(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError("not a compiler's fault")

    (block,) = compile_blocks([Picky()], "default")
    with pytest.raises(ZeroDivisionError, match="not a compiler's fault"):
        block(torch.ones(1))


@pytest.mark.parametrize("value", [False, True, "default", "max-autotune-no-cudagraphs"])
def test_how_is_a_switch_or_a_mode(value: bool | str):
    values = {"kind": "timm", "model": "x", "layers": [1], "compile": value}
    assert TeacherConfig.model_validate(values).compile == value


@pytest.mark.parametrize("value", ["reduce-overhead", "yes please", 3])
def test_other_modes_are_refused(value: object):
    values = {"kind": "timm", "model": "x", "layers": [1], "compile": value}
    with pytest.raises(ValueError, match="compile"):
        TeacherConfig.model_validate(values)
