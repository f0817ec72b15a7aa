"""How others keep features, written and read as their documentation says.

Theia (its `doc/dataset_format.md`): WebDataset tars, one set of shards a column; a sample of a
feature column is `KEY.MODEL.safetensors`, which may hold several tensors, spatial ones with axes
`c h w` in bf16; a sample of the image column is `KEY.image`, a NumPy array of uint8. Training
walks through the tars in order (shards in random order, a shuffle buffer after decoding) and zips
the columns. Theia's samples are images. Here a sample is a whole clip, which is cheaper to read
than its images one by one: tensors have axes `c t h w`, one a layer.

Dense Zarr: one array a layer, fp16, a chunk a clip, with the compression that zarr-python
chooses by itself.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
import zarr
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from benchmarks.material import Taught
from kdhiera.grid import Grid


def write_theia(folder: Path, taught: Taught, grid: Grid, *, clips_a_shard: int) -> None:
    """Theia's layout of some clips: a folder of tars a teacher, and one for the frames."""
    for first in range(0, len(taught.rows), clips_a_shard):
        some = taught[first : first + clips_a_shard]
        name = f"{first // clips_a_shard:06d}.tar"
        clips = range(len(some.rows))
        frames = {"image": [_npy(clip) for clip in some.frames]}
        columns = {
            f"{teacher}.safetensors": [_safetensors(some, teacher, clip, grid) for clip in clips]
            for teacher in sorted({teacher for teacher, _ in some.features})
        }
        for extension, members in {**frames, **columns}.items():
            path = folder / extension.partition(".")[0] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(path, "w") as tar:
                for row, data in zip(some.rows, members, strict=True):
                    member = tarfile.TarInfo(f"{row.key}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def read_theia(folder: Path) -> Iterator[dict[str, Tensor]]:
    """Samples of all columns in the order of the tars: frames, and tokens `n c` by layer."""
    columns = sorted(path for path in folder.iterdir() if path.is_dir())
    readers = [
        webdataset.WebDataset(
            [str(path) for path in sorted(column.glob("*.tar"))],
            shardshuffle=False,
            empty_check=False,
        ).decode(_decode)
        for column in columns
    ]
    for samples in zip(*readers, strict=True):
        whole: dict[str, Tensor] = {}
        for sample in samples:
            for name, value in sample.items():
                if name.endswith("safetensors"):
                    whole |= {f"{name} {layer}": tokens for layer, tokens in value.items()}
                elif name == "image":
                    whole[name] = torch.from_numpy(value)
        yield whole


def write_dense(folder: Path, features: Mapping[tuple[str, str], Tensor]) -> None:
    """All tokens in fp16 as zarr-python stores them unless told otherwise."""
    group = zarr.create_group(folder, zarr_format=3)
    for (teacher, layer), values in features.items():
        array = group.create_array(
            f"{teacher}.{layer}", shape=values.shape, chunks=(1, *values.shape[1:]), dtype="float16"
        )
        array[:] = values.half().numpy()


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _decode(extension: str, data: bytes) -> Any:
    if extension.endswith("safetensors"):
        return {k: values.flatten(1).T for k, values in load_safetensors(data).items()}
    return np.load(io.BytesIO(data)) if extension.endswith("image") else data


def _safetensors(taught: Taught, teacher: str, clip: int, grid: Grid) -> bytes:
    return save_safetensors(
        {
            layer: _channels_first(values[clip], grid)
            for (name, layer), values in taught.features.items()
            if name == teacher
        }
    )


def _channels_first(units: Tensor, grid: Grid) -> Tensor:
    """Unit-major tokens `[units, 4, c]` as `[c, t, h, w]` in bf16."""
    tokens = grid.units_to_tokens(units[None])[0]
    return tokens.permute(3, 0, 1, 2).to(torch.bfloat16).contiguous()


def _npy(array: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()
