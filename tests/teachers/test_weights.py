"""Weights from files, folders and the hub's cache, and the sentences when there are none."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from small_models import CPU, SQUARE, TIMM_FAMILIES, random_clips, timm_model, timm_teacher
from test_transformers_vit import library_model, save

from kdhiera.config import TeacherConfig
from kdhiera.errors import UsageError
from kdhiera.teachers.build import build_teacher
from kdhiera.teachers.weights import Folder, HubRepository, load_weights, read_json, read_state

STATE = {"a": torch.arange(3.0), "b.c": torch.ones(2, 2)}


def same(found: Any) -> bool:
    return set(found) == set(STATE) and all(torch.equal(found[k], STATE[k]) for k in STATE)


@pytest.mark.parametrize("key", [None, "model", "state_dict", "module"])
def test_torch_files_may_nest_their_state(key: str | None, tmp_path: Path):
    path = tmp_path / "weights.pth"
    args = {"args": argparse.Namespace(lr=0.1), "epoch": 3}
    torch.save(STATE if key is None else {key: STATE, **args}, path)
    assert same(load_weights(str(path)))


class Harmful:
    def __reduce__(self):
        return (sys.exit, ("code ran",))


def test_pickled_code_never_runs(tmp_path: Path):
    path = tmp_path / "weights.pth"
    torch.save({"model": STATE, "extra": Harmful()}, path)
    with pytest.raises(UsageError, match=r"must be a whole .safetensors file, or a .pth"):
        load_weights(str(path))


def test_a_folder_of_one_or_of_several_files(tmp_path: Path):
    save_file(STATE, tmp_path / "model.safetensors")
    assert same(load_weights(str(tmp_path)))
    parts = tmp_path / "parts"
    parts.mkdir()
    save_file({"a": STATE["a"]}, parts / "one.safetensors")
    save_file({"b.c": STATE["b.c"]}, parts / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b.c": "two.safetensors"}}
    (parts / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(load_weights(str(parts)))
    (parts / "two.safetensors").unlink()
    with pytest.raises(UsageError, match=r"has no two.safetensors, which its model.safetensors.in"):
        load_weights(str(parts))


def test_what_is_missing_is_named_with_the_place(tmp_path: Path):
    with pytest.raises(
        UsageError, match=f"the folder {tmp_path} has no weights .model.safetensors"
    ):
        load_weights(str(tmp_path))
    with pytest.raises(UsageError, match="no teacher weights at /nowhere: put the file there"):
        load_weights("/nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json is not JSON"):
        read_json(Folder(tmp_path), "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UsageError, match="must hold a JSON object, got list"):
        read_json(Folder(tmp_path), "config.json")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_in_cache(cache: Path, repository: str, folder: Path) -> None:
    """As the hub's client lays it out."""
    where = cache / f"models--{repository.replace('/', '--')}"
    (where / "refs").mkdir(parents=True)
    (where / "refs" / "main").write_text("0" * 40)
    (where / "snapshots").mkdir()
    (where / "snapshots" / ("0" * 40)).symlink_to(folder, target_is_directory=True)


def test_the_hubs_cache_serves_offline(hub_cache: Path, tmp_path: Path):
    folder = save(library_model("dinov2"), tmp_path / "saved")
    put_in_cache(hub_cache, "some/dinov2", folder)
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "video_preprocessor_config.json").write_text("{}")
    values = {"kind": "transformers", "layers": [3], "precision": "fp32"}
    from_hub, from_folder = (
        build_teacher(TeacherConfig.model_validate(values | change), grid=SQUARE, device=CPU)
        for change in ({"model": "some/dinov2"}, {"weights": str(folder)})
    )
    assert from_hub.identity["model"] == "some/dinov2"
    assert from_hub.weights_sha256 == from_folder.weights_sha256
    clips = random_clips(grid=SQUARE)
    assert torch.equal(
        from_hub(clips, ["3"], None).features["3"], from_folder(clips, ["3"], None).features["3"]
    )


def test_timms_hub_serves_offline(hub_cache: Path, tmp_path: Path):
    family = TIMM_FAMILIES["dino"]
    put_in_cache(hub_cache, "timm/vit_small_patch16_224.dino", tmp_path / "saved")
    (tmp_path / "saved").mkdir()
    save_file(timm_model(family).state_dict(), tmp_path / "saved" / "model.safetensors")
    values = {"kind": "timm", "model": family.model, "options": family.options, "layers": [1]}
    teacher = build_teacher(TeacherConfig.model_validate(values), grid=SQUARE, device=CPU)
    assert teacher.weights_sha256 == timm_teacher(family, tmp_path).weights_sha256


@pytest.mark.parametrize(
    ("values", "repository"),
    [
        (
            {"kind": "timm", "model": "vit_small_patch16_224.dino"},
            "timm/vit_small_patch16_224.dino",
        ),
        ({"kind": "transformers", "model": "MCG-NJU/videomae-base"}, "MCG-NJU/videomae-base"),
    ],
)
def test_offline_says_what_is_missing_where_and_what_to_do(
    values: dict[str, Any], repository: str, hub_cache: Path
):
    config = TeacherConfig.model_validate(values | {"layers": [12]})
    with pytest.raises(UsageError) as caught:
        build_teacher(config, grid=SQUARE, device=CPU)
    message = str(caught.value)
    assert f"model.safetensors of {repository}" in message
    assert str(hub_cache) in message
    assert "name its folder in `teachers.<name>.weights`" in message
    assert "\n" not in message


def test_a_repository_without_weights_is_named(hub_cache: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    put_in_cache(hub_cache, "some/empty", tmp_path / "empty")
    with pytest.raises(UsageError, match="of some/empty is neither in the hub's cache"):
        read_state(HubRepository("some/empty"))
