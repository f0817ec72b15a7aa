"""The timm teacher against transformers' Dinov2 with eager attention, on the same real weights."""

import io
import tarfile

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from kdhiera.config import TeacherConfig
from kdhiera.demo.prepare import Prepared
from kdhiera.errors import UsageError
from kdhiera.grid import Grid
from kdhiera.teachers.base import state_sha256
from kdhiera.teachers.build import build_teacher
from kdhiera.teachers.positions import resample_positions
from kdhiera.teachers.transformer import TransformerTeacher as TimmImageTeacher

GRID = Grid(num_frames=4, height=128, width=128)
CPU = torch.device("cpu")
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def teacher_config(demo: Prepared, **changes: object) -> TeacherConfig:
    values = {
        "kind": "timm",
        "model": "vit_small_patch14_dinov2",
        "weights": str(demo.image_teacher),
        "layers": ["6", "9", "12"],
        "precision": "fp32",
    }
    return TeacherConfig.model_validate(values | changes)


@pytest.fixture(scope="module")
def teacher(demo: Prepared) -> TimmImageTeacher:
    built = build_teacher(teacher_config(demo), grid=GRID, device=CPU)
    assert isinstance(built, TimmImageTeacher)
    return built


@pytest.fixture(scope="module")
def reference(demo: Prepared) -> Dinov2Model:
    """transformers' own model with the same weights, renamed."""
    config = Dinov2Config(
        hidden_size=384,
        num_attention_heads=6,
        num_hidden_layers=12,
        patch_size=14,
        image_size=518,
        attn_implementation="eager",
    )
    model = Dinov2Model(config).eval()
    state = load_file(demo.image_teacher)
    named: dict[str, Tensor] = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.position_embeddings": state["pos_embed"],
        "embeddings.mask_token": torch.zeros(1, 384),
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    for part in ("weight", "bias"):
        projection = f"patch_embed.proj.{part}"
        named[f"embeddings.patch_embeddings.projection.{part}"] = state[projection]
        for i in range(12):
            ours, theirs = f"blocks.{i}", f"encoder.layer.{i}"
            split = state[f"{ours}.attn.qkv.{part}"].chunk(3)
            for name, value in zip(("q_proj", "k_proj", "v_proj"), split, strict=True):
                named[f"{theirs}.attention.{name}.{part}"] = value
            named[f"{theirs}.attention.o_proj.{part}"] = state[f"{ours}.attn.proj.{part}"]
            for j in (1, 2):
                named[f"{theirs}.norm{j}.{part}"] = state[f"{ours}.norm{j}.{part}"]
                named[f"{theirs}.mlp.fc{j}.{part}"] = state[f"{ours}.mlp.fc{j}.{part}"]
                named[f"{theirs}.layer_scale{j}.lambda1"] = state[f"{ours}.ls{j}.gamma"]
    model.load_state_dict(named, strict=True)
    return model


@pytest.fixture(scope="module")
def clips(demo: Prepared) -> Tensor:
    """Real frames: the first four of a test clip's video, twice, cut to the grid."""
    with tarfile.open(demo.test[0]) as tar:
        member = next(m for m in tar if m.name.endswith(".mp4"))
        data = tar.extractfile(member)
        assert data is not None
        video = av.open(io.BytesIO(data.read()))
    frames = [f.to_ndarray(format="rgb24")[:128, :128] for f in video.decode(video=0)][:4]
    clip = torch.from_numpy(np.stack(frames))
    return torch.stack([clip, clip.flip(2)])


def as_seen(clips: Tensor) -> Tensor:
    images = clips[:, ::2].flatten(0, 1).permute(0, 3, 1, 2) / 255.0
    resized = torch.nn.functional.interpolate(images, (112, 112), mode="bicubic", antialias=True)
    return (resized.clamp(0, 1) - MEAN) / STD


@torch.inference_mode()
def test_features_and_scores_equal_transformers(
    teacher: TimmImageTeacher, reference: Dinov2Model, clips: Tensor
) -> None:
    ours = teacher(clips, ["6", "9", "12", "norm"], "cls_attention")
    theirs = reference(as_seen(clips), output_hidden_states=True, output_attentions=True)
    for layer in (6, 9, 12):
        tokens = theirs.hidden_states[layer][:, 1:].view(2, 2, 8, 8, 384)
        scale = tokens.abs().max()
        assert (ours.features[str(layer)] - tokens).abs().max() < 1e-4 * scale, layer
    normed = theirs.last_hidden_state[:, 1:].view(2, 2, 8, 8, 384)
    torch.testing.assert_close(ours.features["norm"], normed, rtol=1e-3, atol=1e-3)
    row = theirs.attentions[-1].mean(1)[:, 0, 1:]
    expected = (row / row.sum(-1, keepdim=True)).view(2, 2, 8, 8)
    assert ours.scores is not None
    torch.testing.assert_close(ours.scores, expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(ours.scores.sum((2, 3)), torch.ones(2, 2))


def test_asking_for_less_gives_the_same(teacher: TimmImageTeacher, clips: Tensor) -> None:
    """Stopping at the last needed layer, or leaving scores out, changes no feature."""
    everything = teacher(clips, ["6", "9", "12"], "cls_attention")
    part = teacher(clips, ["6"], None)
    assert part.scores is None
    assert set(part.features) == {"6"}
    assert torch.equal(part.features["6"], everything.features["6"])
    only_scores = teacher(clips, [], "cls_attention")
    assert only_scores.features == {}
    assert everything.scores is not None
    assert only_scores.scores is not None
    assert torch.equal(only_scores.scores, everything.scores)


def test_positions_are_resampled_as_dinov2_does(demo: Prepared, reference: Dinov2Model) -> None:
    positions = load_file(demo.image_teacher)["pos_embed"]
    ours = resample_positions(positions, num_prefix=1, size=(8, 8))
    theirs = reference.embeddings.interpolate_pos_encoding(torch.zeros(1, 65, 384), 112, 112)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("antialias", [True])
def test_timms_own_resampling_would_be_another_teacher(demo: Prepared, antialias: bool) -> None:
    """Why the position grid is not left to timm: the largest entry moves by much."""
    positions = load_file(demo.image_teacher)["pos_embed"]
    ours = resample_positions(positions, num_prefix=1, size=(8, 8))[:, 1:]
    grid = positions[:, 1:].view(1, 37, 37, 384).permute(0, 3, 1, 2)
    other = torch.nn.functional.interpolate(grid, (8, 8), mode="bicubic", antialias=antialias)
    difference = (ours - other.flatten(2).transpose(1, 2)).abs().max()
    assert difference > 0.1 * ours.abs().max()


def test_bf16_stays_near_fp32(demo: Prepared, teacher: TimmImageTeacher, clips: Tensor) -> None:
    low = build_teacher(teacher_config(demo, precision="bf16"), grid=GRID, device=CPU)
    exact = teacher(clips, ["12"], None).features["12"]
    rough = low(clips, ["12"], None).features["12"].float()
    cosine = torch.nn.functional.cosine_similarity(rough, exact, dim=-1)
    assert cosine.min() > 0.99


def test_the_weights_hash_is_of_the_file_not_of_the_grid(demo: Prepared) -> None:
    wide = build_teacher(
        teacher_config(demo), grid=Grid(num_frames=2, height=64, width=96), device=CPU
    )
    assert wide.weights_sha256 == state_sha256(load_file(demo.image_teacher))
    assert wide.identity["input_px"] == [56, 84]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": ["13"]}, "'13' does not exist.*1 to 12 and `norm`"),
        ({"layers": ["0"]}, "'0' does not exist"),
        ({"model": "vit_smol_patch14"}, "no model 'vit_smol_patch14'"),
        ({"weights": "nowhere.safetensors"}, "no teacher weights at nowhere.safetensors"),
        ({"model": "vit_base_patch14_dinov2"}, "do not fit timm's vit_base_patch14_dinov2"),
        ({"model": "resnet18"}, "not a Vision Transformer"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(
    demo: Prepared, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        build_teacher(teacher_config(demo, **changes), grid=GRID, device=CPU)


def test_damaged_weights_are_one_sentence(demo: Prepared, tmp_path: object) -> None:
    from pathlib import Path

    damaged = Path(str(tmp_path)) / "weights.safetensors"
    damaged.write_bytes(demo.image_teacher.read_bytes()[:1000])
    with pytest.raises(UsageError, match="cannot be read"):
        build_teacher(teacher_config(demo, weights=str(damaged)), grid=GRID, device=CPU)
