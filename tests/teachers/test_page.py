"""docs/teachers.md: every example loads, and its tables say what the code does."""

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from kdhiera.config import ScoresConfig, TeacherConfig, load
from kdhiera.teachers.positions import timm_resampling
from kdhiera.teachers.scores import SCORE_SOURCES
from kdhiera.teachers.transformers_vit import ARCHITECTURES

PAGE = (Path(__file__).parents[2] / "docs" / "teachers.md").read_text()
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
REST = {
    "name": "page",
    "run_dir": "runs/page",
    "data": {"shards": "x.tar"},
    "cache": {"dir": "caches/page"},
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_is_a_config(example: str, tmp_path: Path):
    path = tmp_path / "page.yaml"
    path.write_text(yaml.safe_dump(REST | yaml.safe_load(example)))
    config = load(path)
    assert config.scores.teacher in config.teachers
    for teacher in config.teachers.values():
        if teacher.kind == "timm":
            import timm

            assert timm.is_model(teacher.model.split(".")[0])
            assert "." not in teacher.model or timm.get_pretrained_cfg(teacher.model)


def test_examples_cover_every_kind():
    kinds = {t["kind"] for e in EXAMPLES for t in yaml.safe_load(e)["teachers"].values()}
    assert kinds == set(get_args(TeacherConfig.model_fields["kind"].annotation))


def test_tables_name_what_there_is():
    for source in get_args(ScoresConfig.model_fields["source"].annotation):
        assert f"| `{source}` |" in PAGE
    assert {*SCORE_SOURCES, "uniform"} == set(
        get_args(ScoresConfig.model_fields["source"].annotation)
    )
    for architecture in ARCHITECTURES:
        assert f"`{architecture}`" in PAGE
    table = PAGE.partition("| family | positions")[2]
    for model, row in [
        ("vit_base_patch14_dinov2", "DINOv2, MAE"),
        ("vit_base_patch14_reg4_dinov2", "DINOv2 with registers"),
        ("vit_base_patch16_siglip_224", "SigLIP"),
    ]:
        words = {
            "bicubic": "no antialiasing",
            "bicubic-antialias": "antialiased",
            "bilinear-corners": "corners kept",
        }[timm_resampling(model)]
        assert re.search(rf"{row}.*{words}", table)
