"""What the original Hiera implementation computes and names, kept as golden numbers.

The package is not a dependency (its licence is non-commercial). Made with

    pip install --no-deps --target /tmp/hiera hiera-transformer==0.1.4
    PYTHONPATH=.:/tmp/hiera python tests/student/original.py

which writes `golden/original.npz`: outputs of seeded weights on a seeded clip, and names and
shapes of its parameters. Weights and clip come from NumPy's frozen `RandomState`, so that
every version of every library draws them alike.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdhiera.grid import Grid
from kdhiera.student.base import normalise_pixels
from kdhiera.student.hiera import SIZES

GOLDEN = Path(__file__).parent / "golden" / "original.npz"
GRID = Grid(num_frames=4, height=64, width=96)
FULL = Grid(num_frames=16, height=224, width=224)
UNITS = [[1, 4, 5, 8], [0, 2, 7, 11]]
STRIDES = (4, 8, 16, 16)  # every so many channels of the stages are kept
VIDEO_SIZES = ("base", "base_plus", "large", "huge")
DECODER = ("encoder_norm.", "multi_scale_fusion_heads.", "mask_token", "decoder_")


def seeded(name: str, shape: Sequence[int]) -> torch.Tensor:
    """A parameter that keeps activations of order 1, from its name."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    if name.startswith("pos_embed"):
        values = 0.5 * noise
    elif noise.ndim > 1:
        values = noise / np.sqrt(noise[0].size)
    else:
        values = 0.1 * noise + ("norm" in name and name.endswith("weight"))
    return torch.from_numpy(values.astype(np.float32))


def clips() -> torch.Tensor:
    frames = (2, GRID.num_frames, GRID.height, GRID.width, 3)
    return torch.from_numpy(np.random.RandomState(0).randint(0, 256, frames, dtype=np.uint8))


def digest(shapes: Mapping[str, Sequence[int]]) -> str:
    """Of all names and shapes, in any order."""
    lines = sorted(f"{name} {list(shape)}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def shapes_of(state: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in state.items()}


def _arguments(size: str, grid: Grid, q_pool: int) -> dict[str, Any]:
    return {
        "input_size": (grid.num_frames, grid.height, grid.width),
        "embed_dim": SIZES[size]["embed_dim"],
        "num_heads": SIZES[size]["num_heads"],
        "stages": SIZES[size]["stages"],
        "q_pool": q_pool,
        "q_stride": (1, 2, 2),
        "mask_unit_size": (1, 8, 8),
        "patch_kernel": (3, 7, 7),
        "patch_stride": (2, 4, 4),
        "patch_padding": (1, 3, 3),
        "sep_pos_embed": True,
    }


@torch.no_grad()
def make() -> None:
    import hiera  # the original; see above
    from hiera.hiera_mae import MaskedAutoencoderHiera

    arrays: dict[str, np.ndarray] = {}
    names: dict[str, Any] = {}
    pixels = normalise_pixels(clips()).permute(0, 4, 1, 2, 3)
    units = torch.tensor(UNITS)
    mask = torch.zeros(2, GRID.num_units, dtype=torch.bool).scatter(1, units, True)
    for q_pool in (2, 3):
        model = hiera.Hiera(num_classes=10, **_arguments("nano", GRID, q_pool)).eval()
        shapes = shapes_of(model.state_dict())
        model.load_state_dict({name: seeded(name, shape) for name, shape in shapes.items()})
        _, stages = model(pixels, mask=mask, return_intermediates=True)
        for number, (stage, stride) in enumerate(zip(stages, STRIDES, strict=True), 1):
            arrays[f"q{q_pool}/stage{number}"] = stage.flatten(2, 4)[..., ::stride].numpy()
        _, stages = model(pixels, return_intermediates=True)
        arrays[f"q{q_pool}/whole"] = stages[-1][..., :: STRIDES[-1]].numpy()
        model.head = torch.nn.Identity()
        arrays[f"q{q_pool}/pooled"] = model(pixels).numpy()
        names["nano"] = shapes
    small = {"decoder_embed_dim": 64, "decoder_depth": 1, "decoder_num_heads": 2}
    autoencoder = MaskedAutoencoderHiera(**_arguments("nano", GRID, 2), **small)
    names["mae_nano"] = shapes_of(autoencoder.state_dict())
    for size in VIDEO_SIZES:
        model = getattr(hiera, f"hiera_{size}_16x224")()
        names[f"hiera_{size}_16x224"] = digest(shapes_of(model.state_dict()))
        model = getattr(hiera, f"mae_hiera_{size}_16x224")()
        shapes = shapes_of(model.state_dict())
        encoder = {name: shape for name, shape in shapes.items() if not name.startswith(DECODER)}
        names[f"mae_hiera_{size}_16x224"] = digest(encoder)
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, names=np.array(json.dumps(names)), **arrays)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    make()
