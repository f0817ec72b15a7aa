"""Original VideoMAE (V1, V2) checkpoints, against the model written out by hand."""

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import CPU, as_video, mean_scores, random_clips
from torch import Tensor
from torch.nn import functional

from kdhiera.config import TeacherConfig
from kdhiera.errors import UsageError
from kdhiera.grid import Grid
from kdhiera.teachers.base import Teacher
from kdhiera.teachers.build import build_teacher

WIDTH, HEADS, DEPTH, HIDDEN = 48, 3, 3, 80
GRID = Grid(num_frames=4, height=64, width=64)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPTIONS = {"num_attention_heads": HEADS, "image_size": 56, "num_frames": 4}


def original_state(*, pooled: bool) -> dict[str, Tensor]:
    """Names and shapes as published: fused qkv, q_bias and v_bias, tubelet 2, patch 14."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return 0.2 * torch.randn(shape, generator=generator)

    state = {"patch_embed.proj.weight": draw(WIDTH, 3, 2, 14, 14)}
    state["patch_embed.proj.bias"] = draw(WIDTH)
    for i in range(DEPTH):
        block = {
            "norm1.weight": 1 + draw(WIDTH),
            "norm1.bias": draw(WIDTH),
            "attn.q_bias": draw(WIDTH),
            "attn.v_bias": draw(WIDTH),
            "attn.qkv.weight": draw(3 * WIDTH, WIDTH),
            "attn.proj.weight": draw(WIDTH, WIDTH),
            "attn.proj.bias": draw(WIDTH),
            "norm2.weight": 1 + draw(WIDTH),
            "norm2.bias": draw(WIDTH),
            "mlp.fc1.weight": draw(HIDDEN, WIDTH),
            "mlp.fc1.bias": draw(HIDDEN),
            "mlp.fc2.weight": draw(WIDTH, HIDDEN),
            "mlp.fc2.bias": draw(WIDTH),
        }
        state |= {f"blocks.{i}.{name}": value for name, value in block.items()}
    norm = "fc_norm" if pooled else "norm"
    return state | {f"{norm}.weight": 1 + draw(WIDTH), f"{norm}.bias": draw(WIDTH)}


def sine_table(count: int) -> Tensor:
    """Token p, channel j: sin for even j, cos for odd j, of p / 10000^(2 floor(j/2) / width)."""
    table = torch.empty(count, WIDTH, dtype=torch.float64)
    for p in range(count):
        for j in range(WIDTH):
            angle = p / 10000 ** (2 * (j // 2) / WIDTH)
            table[p, j] = math.cos(angle) if j % 2 else math.sin(angle)
    return table.float()


def by_hand(state: dict[str, Tensor], video: Tensor, positions: Tensor) -> Any:
    """All block outputs and softmax maps of VideoMAE's encoder."""
    pixels = video.transpose(1, 2)
    x = functional.conv3d(
        pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=(2, 14, 14)
    )
    x = x.flatten(2).transpose(1, 2) + positions
    outputs, maps = [], []
    for i in range(DEPTH):
        s = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if f"blocks.{i}." in k}
        y = functional.layer_norm(x, (WIDTH,), s["norm1.weight"], s["norm1.bias"], 1e-6)
        bias = torch.cat([s["attn.q_bias"], torch.zeros(WIDTH), s["attn.v_bias"]])
        qkv = functional.linear(y, s["attn.qkv.weight"], bias)
        q, k, v = qkv.reshape(len(y), -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).softmax(-1)
        maps.append(attention)
        y = (attention @ v).transpose(1, 2).reshape(x.shape)
        x = x + functional.linear(y, s["attn.proj.weight"], s["attn.proj.bias"])
        y = functional.layer_norm(x, (WIDTH,), s["norm2.weight"], s["norm2.bias"], 1e-6)
        y = functional.gelu(functional.linear(y, s["mlp.fc1.weight"], s["mlp.fc1.bias"]))
        x = x + functional.linear(y, s["mlp.fc2.weight"], s["mlp.fc2.bias"])
        outputs.append(x)
    return outputs, maps


def teacher_of(state: Any, folder: Path, **changes: Any) -> Teacher:
    path = folder / "checkpoint.pth"
    torch.save(state, path)
    values = {
        "kind": "transformers",
        "model": "videomae",
        "weights": str(path),
        "options": OPTIONS,
        "layers": [1, 2, 3],
        "precision": "fp32",
    }
    config = TeacherConfig.model_validate(values | changes)
    return build_teacher(config, grid=GRID, device=CPU)


@pytest.mark.parametrize("wrapped", ["plain", "fine-tuned", "pre-trained", "hub copy"])
def test_original_checkpoints_are_the_model_written_out(wrapped: str, tmp_path: Path):
    pooled = wrapped == "fine-tuned"
    state = original_state(pooled=pooled)
    stored: Any = dict(state)
    if wrapped == "fine-tuned":
        stored = {"module": {**state, "head.weight": torch.ones(400, WIDTH)}, "epoch": 3}
    if wrapped == "pre-trained":
        encoder = {f"encoder.{k}": v for k, v in state.items()}
        rest = {"decoder.blocks.0.attn.qkv.weight": torch.ones(3, 3), "mask_token": torch.ones(1)}
        stored = {"model": {**encoder, **rest}, "args": argparse.Namespace(lr=1e-3, name="x")}
    if wrapped == "hub copy":
        stored = {f"model.{k}": v for k, v in state.items()}
    teacher = teacher_of(stored, tmp_path)
    clips = random_clips(grid=GRID)
    outputs, maps = by_hand(state, as_video(clips, (56, 56), MEAN, STD), sine_table(2 * 4 * 4))
    out = teacher(clips, ["1", "2", "3"], "received_attention")
    for layer, expected in enumerate(outputs, start=1):
        found = out.features[str(layer)].flatten(1, 3)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    expected = mean_scores(maps[-1], "received_attention", 0, 16)
    torch.testing.assert_close(out.scores.reshape(-1, 16).double(), expected, rtol=1e-4, atol=1e-7)
    if pooled:
        with pytest.raises(UsageError, match="no final norm"):
            teacher.check(["norm"], None)
    else:
        norm = functional.layer_norm(
            outputs[-1], (WIDTH,), state["norm.weight"], state["norm.bias"], 1e-6
        )
        found = teacher(clips, ["norm"], None).features["norm"].flatten(1, 3)
        torch.testing.assert_close(found, norm, rtol=1e-4, atol=1e-5)


def test_the_table_is_resampled_as_videomae_v2_does(tmp_path: Path):
    """From 4 x 6 x 6 to 2 x 4 x 4: bicubic in every slot, then linear over slots."""
    state = original_state(pooled=False)
    options = {**OPTIONS, "image_size": 6 * 14, "num_frames": 8}
    teacher = teacher_of(state, tmp_path, options=options)
    table = sine_table(4 * 6 * 6).reshape(4, 6, 6, WIDTH).permute(0, 3, 1, 2)
    spatial = functional.interpolate(table, (4, 4), mode="bicubic", align_corners=False)
    # Half the slots, linearly: centres of the new ones lie midway between two old ones.
    resampled = (spatial[0::2] + spatial[1::2]) / 2
    positions = resampled.permute(0, 2, 3, 1).reshape(32, WIDTH)
    clips = random_clips(grid=GRID)
    outputs, _ = by_hand(state, as_video(clips, (56, 56), MEAN, STD), positions)
    found = teacher(clips, ["3"], None).features["3"].flatten(1, 3)
    assert (found - outputs[2]).abs().max() < 1e-5 * outputs[2].abs().max()


def test_learned_positions_are_used(tmp_path: Path):
    state = original_state(pooled=False)
    positions = torch.randn(1, 32, WIDTH, generator=torch.Generator().manual_seed(1))
    teacher = teacher_of({**state, "pos_embed": positions}, tmp_path)
    clips = random_clips(grid=GRID)
    outputs, _ = by_hand(state, as_video(clips, (56, 56), MEAN, STD), positions)
    found = teacher(clips, ["1"], None).features["1"].flatten(1, 3)
    assert (found - outputs[0]).abs().max() < 1e-5 * outputs[0].abs().max()
    other = teacher_of(state, tmp_path)
    assert other.weights_sha256 != teacher.weights_sha256


def test_published_sizes_need_no_options(tmp_path: Path):
    """Heads of a width of VideoMAE's own sizes are known: only the shapes are looked at."""
    from kdhiera.teachers.videomae_names import settings

    small = {
        "patch_embed.proj.weight": torch.empty(384, 3, 2, 16, 16),
        "blocks.0.attn.qkv.weight": torch.empty(1152, 384),
        "blocks.0.attn.q_bias": torch.empty(384),
        "blocks.0.mlp.fc1.weight": torch.empty(1536, 384),
        "norm.weight": torch.empty(384),
    }
    assert settings(small) == {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 1,
        "num_attention_heads": 6,
        "patch_size": 16,
        "tubelet_size": 2,
        "qkv_bias": True,
        "layer_norm_eps": 1e-6,
        "use_mean_pooling": False,
    }


@pytest.mark.parametrize(
    ("extra", "options", "words"),
    [
        ({}, {}, "width 48 do not say how many attention heads"),
        ({"blocks.0.attn.scale": torch.ones(1)}, OPTIONS, "such as blocks.0.attn.scale"),
        ({"blocks.1.gamma_1": torch.ones(WIDTH)}, OPTIONS, "such as blocks.1.gamma_1"),
        ({"blocks.0.mlp.fc1.weight": None}, OPTIONS, "lack its patch embedding of videos or"),
        ({"pos_embed": torch.ones(1, 30, WIDTH)}, OPTIONS, "hold 30 positions, but .* 2 x 4 x 4"),
        ({"blocks.2.mlp.fc2.bias": None}, OPTIONS, "do not fit videomae.*fc2|is missing"),
    ],
)
def test_other_models_under_these_names_are_refused(
    extra: dict[str, Any], options: dict[str, Any], words: str, tmp_path: Path
):
    state = {k: v for k, v in (original_state(pooled=True) | extra).items() if v is not None}
    with pytest.raises(UsageError, match=words):
        teacher_of(state, tmp_path, options=options)
