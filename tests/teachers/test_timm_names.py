"""Original checkpoints of timm's families, renamed as timm does, positions left to us."""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_models import (
    CPU,
    TIMM_FAMILIES,
    Family,
    as_images,
    random_clips,
    timm_model,
    timm_teacher,
    watched,
)
from torch import Tensor

from kdhiera.config import TeacherConfig
from kdhiera.errors import UsageError
from kdhiera.teachers.base import Teacher
from kdhiera.teachers.build import build_teacher
from kdhiera.teachers.positions import Resampling, resample_positions


def load(family: Family, weights: Path, **changes: Any) -> Teacher:
    values = {
        "kind": "timm",
        "model": family.model,
        "options": dict(family.options),
        "weights": str(weights),
        "layers": [3],
        "precision": "fp32",
    }
    config = TeacherConfig.model_validate(values | changes)
    return build_teacher(config, grid=family.grid, device=CPU)


def original_dinov2_reg(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Meta's layout: `register_tokens`, a class position, a mask token."""
    cls_position = torch.full((1, 1, 48), 0.25)
    rest = {k: v for k, v in state.items() if k not in ("reg_token", "cls_token", "pos_embed")}
    return {
        **rest,
        "register_tokens": state["reg_token"],
        "cls_token": state["cls_token"] - cls_position,
        "pos_embed": torch.cat([cls_position, state["pos_embed"]], dim=1),
        "mask_token": torch.zeros(1, 48),
    }


def original_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's layout, text tower included."""
    names = [
        ("patch_embed.proj", "conv1"),
        ("norm_pre", "ln_pre"),
        ("blocks.", "transformer.resblocks."),
        (".norm1.", ".ln_1."),
        (".norm2.", ".ln_2."),
        ("attn.qkv.", "attn.in_proj_"),
        ("attn.proj", "attn.out_proj"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    ]
    result = {}
    for name, value in state.items():
        if name.startswith("norm."):
            name = name.replace("norm.", "ln_post.")
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        result[f"visual.{name}"] = value
    result["visual.class_embedding"] = result.pop("visual.cls_token")[0, 0]
    result["visual.positional_embedding"] = result.pop("visual.pos_embed")[0]
    result["visual.proj"] = torch.zeros(48, 16)
    text = {"positional_embedding": torch.zeros(77, 48), "ln_final.weight": torch.zeros(48)}
    return {**result, **text}


def original_dinov3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Meta's layout: `storage_tokens`, layer scales as modules, a masked bias, a mask token."""
    rest = {k.replace("gamma_", "ls"): v for k, v in state.items() if k != "reg_token"}
    rest = {re.sub(r"\.ls(\d)$", r".ls\1.gamma", k): v for k, v in rest.items()}
    biases = {f"blocks.{i}.attn.qkv.bias": torch.zeros(144) for i in range(3)}
    masks = {f"blocks.{i}.attn.qkv.bias_mask": torch.zeros(144) for i in range(3)}
    extra = {"rope_embed.periods": torch.ones(4), "mask_token": torch.zeros(1, 48)}
    return {**rest, **biases, **masks, **extra, "storage_tokens": state["reg_token"]}


def open_clips_siglip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's layout: timm's model under `visual.trunk`, a text tower beside it."""
    text = {"text.positional_embedding": torch.zeros(64, 48), "logit_scale": torch.zeros(1)}
    return {f"visual.trunk.{k}": v for k, v in state.items()} | text


@pytest.mark.parametrize(
    ("name", "rename"),
    [
        ("dinov2-reg", original_dinov2_reg),
        ("dinov3", original_dinov3),
        ("clip", original_clip),
        ("siglip", open_clips_siglip),
    ],
)
def test_original_names_give_the_same_teacher(
    name: str, rename: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    family = TIMM_FAMILIES[name]
    plain = timm_teacher(family, tmp_path)
    path = tmp_path / "original.pth"
    torch.save({"model": rename(timm_model(family).state_dict())}, path)
    original = load(family, path)
    assert capsys.readouterr().out == ""  # results go to stdout, timm's remarks do not
    clips = random_clips(grid=family.grid)
    torch.testing.assert_close(
        original(clips, ["3"], None).features["3"], plain(clips, ["3"], None).features["3"]
    )
    if name != "dinov2-reg":  # no arithmetic in the renaming: the very same tensors
        assert original.weights_sha256 == plain.weights_sha256


@pytest.mark.parametrize("name", ["dino", "dinov2", "dinov2-reg", "clip", "siglip", "eva02"])
@pytest.mark.parametrize("trained_on", [6, 3])
def test_positions_of_another_grid_are_resampled_by_the_familys_rule(
    name: str, trained_on: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Against timm's model at the student's size with the positions put in by hand."""
    family = TIMM_FAMILIES[name]
    patch = family.size[0] // 4
    with caplog.at_level(logging.INFO):
        teacher = timm_teacher(replace(family, native=trained_on * patch), tmp_path)
    rule = {"dinov2-reg": "bicubic-antialias", "clip": "bicubic-antialias"}
    rule |= {"siglip": "bilinear-corners"}
    expected_rule = rule.get(name, "bicubic")
    said = f"position grid resampled from {trained_on} x {trained_on} to 4 x 4 ({expected_rule})"
    assert said in caplog.text
    assert teacher.identity["position_grid"] == expected_rule
    state = timm_model(replace(family, native=trained_on * patch)).state_dict()
    model = timm_model(family, size=family.size)
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    state["pos_embed"] = resample_positions(
        state["pos_embed"], num_prefix=prefix, size=(4, 4), resampling=Resampling(expected_rule)
    )
    model.load_state_dict(state)
    clips = random_clips(grid=family.grid)
    settings = model.pretrained_cfg
    images = as_images(clips, family.size, settings["mean"], settings["std"])
    blocks, _ = watched(model, model.blocks, lambda: model.forward_features(images))
    expected = blocks[2][:, model.num_prefix_tokens :].reshape(2, 2, 4, 4, 48)
    found = teacher(clips, ["3"], None).features["3"]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_rotary_models_have_nothing_to_resample(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        teacher = timm_teacher(TIMM_FAMILIES["dinov3"], tmp_path)
    assert "resampled" not in caplog.text
    assert teacher.identity["position_grid"] == "none"


def test_a_folder_in_timms_layout_says_its_colours(tmp_path: Path):
    family = TIMM_FAMILIES["dino"]
    save_file(timm_model(family).state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "vit_small_patch16_224", "pretrained_cfg": {"mean": [0.5, 0.4, 0.3]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    teacher = load(family, tmp_path)
    assert teacher.identity["mean"] == [0.5, 0.4, 0.3]
    assert "mean" not in timm_teacher(family, tmp_path).identity  # the model's own
    assert load(family, tmp_path, mean=[0.1, 0.1, 0.1]).identity["mean"] == [0.1, 0.1, 0.1]
    clips = random_clips(grid=family.grid)
    images = as_images(clips, family.size, [0.5, 0.4, 0.3], (0.229, 0.224, 0.225))
    model = timm_model(family, size=family.size)
    blocks, _ = watched(model, model.blocks, lambda: model.forward_features(images))
    torch.testing.assert_close(
        teacher(clips, ["3"], None).features["3"].flatten(0, 1).flatten(1, 2), blocks[2][:, 1:]
    )
    (tmp_path / "config.json").write_text(json.dumps(config | {"architecture": "vit_base"}))
    with pytest.raises(UsageError, match=r"holds weights of vit_base, but .* is vit_small_patch16"):
        load(family, tmp_path)


def test_a_tag_that_decides_the_colours_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    dino = TIMM_FAMILIES["dino"]
    timm_teacher(dino, tmp_path)
    timm_teacher(TIMM_FAMILIES["dinov2"], tmp_path)
    assert not caplog.records
    timm_teacher(replace(dino, model="vit_small_patch16_224"), tmp_path)
    assert "normalised with mean (0.5, 0.5, 0.5) of timm's default tag" in caplog.text
    assert "vit_small_patch16_224.dino" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "vit_small_patch32_224"}, r"their patches are \(16, 16\) px, the model's \(32"),
        ({"model": "vit_small_patch16_224.dyno"}, "timm cannot make vit_small_patch16_224.dyno"),
        ({"options": {"depth": 4}}, "do not fit timm's vit_small_patch16_224.dino: .* is missing"),
        ({"options": {"embed_dim": 48, "depth": 2, "num_heads": 3}}, "blocks.2.* is left over"),
        ({"options": {"embed_dim": 96, "depth": 3, "num_heads": 3}}, r"is \(\d.*for \(\d"),
        ({"options": {"dept": 4}}, r"with teachers.<name>.options \{'dept': 4\} \(TypeError"),
        ({"model": "samvit_base_patch16", "options": {}}, "not a Vision Transformer that kdhiera"),
        ({"model": "hiera_tiny_224", "options": {}}, "not a Vision Transformer that kdhiera"),
    ],
)
def test_what_does_not_fit_is_one_sentence(change: dict[str, Any], words: str, tmp_path: Path):
    family = TIMM_FAMILIES["dino"]
    save_file(timm_model(family).state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(UsageError, match=words) as caught:
        load(family, tmp_path / "weights.safetensors", **change)
    assert "\n" not in str(caught.value)
