"""Every recipe's own teachers, offline: the names exist, and have the layers and scores asked for.

Their weights are random and narrow; names, depths, layers and sources are the recipe's.
"""

import os
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from small_models import CPU, random_clips, randomise
from test_transformers_vit import library_model, save

from kdhiera.config import RunConfig, TeacherConfig, load
from kdhiera.demo.prepare import Prepared
from kdhiera.teachers.build import build_teachers, check_teachers
from kdhiera.teachers.contract import check_output

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
NARROW = {"embed_dim": 48, "num_heads": 3}
# Repositories whose config.json is that of VideoMAE-B but for the width.
VIDEOMAES = ("MCG-NJU/videomae-base", "MCG-NJU/videomae-base-ssv2")


def narrow_timm(teacher: TeacherConfig, folder: Path) -> list[str]:
    """Overrides that put narrow random weights in place of those that timm's hub has."""
    assert teacher.model in timm.list_pretrained(), "no such name, or no weights of it"
    assert timm.get_pretrained_cfg(teacher.model).hf_hub_id
    model = timm.create_model(teacher.model, pretrained=False, num_classes=0, **NARROW)
    randomise(model)
    save_file(model.state_dict(), folder / "timm.safetensors")
    return [f"weights={folder / 'timm.safetensors'}", f"options={NARROW}"]


def narrow_videomae(teacher: TeacherConfig, folder: Path) -> list[str]:
    """The same for a repository of the hub: all but the width is the library's own default."""
    assert teacher.model in VIDEOMAES
    default = transformers.VideoMAEConfig()
    depth = default.num_hidden_layers
    model = library_model(
        "videomae", num_hidden_layers=depth, num_frames=default.num_frames, image_size=224
    )
    return [f"weights={save(model, folder / 'videomae')}"]


@pytest.fixture
def recipe(
    request: pytest.FixtureRequest,
    demo: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> RunConfig:
    """A file of `configs/` with a small clip; the demo's weights are the real ones."""
    monkeypatch.chdir(REPOSITORY)
    path: Path = request.param
    overrides = ["clip={num_frames: 4, height: 64, width: 64}"]
    for name, teacher in load(path).teachers.items():
        if teacher.weights is not None:
            own = {os.path.relpath(p, REPOSITORY) for p in (demo.image_teacher, demo.video_weights)}
            assert teacher.weights in own
        elif teacher.kind in ("timm", "transformers"):
            make = narrow_timm if teacher.kind == "timm" else narrow_videomae
            overrides += [f"teachers.{name}.{change}" for change in make(teacher, tmp_path)]
    return load(path, overrides)


@pytest.mark.parametrize("recipe", CONFIGS, ids=lambda path: path.stem, indirect=True)
def test_a_recipes_own_teachers_give_what_it_asks_for(recipe: RunConfig):
    teachers = build_teachers(recipe, device=CPU)
    check_teachers(recipe, teachers, device=CPU)
    clips = random_clips(2, recipe.clip.grid)
    scores = recipe.scores
    for name, teacher in teachers.items():
        layers = recipe.teachers[name].layers
        source = scores.source if name == scores.teacher and scores.source != "uniform" else None
        output = teacher(clips, layers, source)
        check_output(
            output,
            who=name,
            clips=clips,
            grid=recipe.clip.grid,
            layers=layers,
            scored=source is not None,
        )
        features = [output.features[layer] for layer in layers]
        assert all(torch.isfinite(f).all() and f.std() > 0 for f in features)
        assert not any(torch.equal(a, b) for a, b in pairwise(features))
