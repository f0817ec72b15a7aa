"""How others keep features, written and read as their documentation says.

Theia (its `doc/dataset_format.md`): WebDataset tars, one set of shards a column; a sample of a
feature column is `KEY.MODEL.safetensors`, which may hold several tensors, spatial ones with axes
`c h w` in bf16; a sample of the image column is `KEY.image`, a NumPy array of uint8. Training
walks through the tars in order (shards in random order, a shuffle buffer after decoding) and zips
the columns. Theia's samples are images. The nearest that clips have is a slot (two frames, and
`c h w` of every layer); a sample that is a whole clip (`c t h w`) is not what is documented, and
cheaper to read.

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


def write_theia(
    folder: Path, taught: Taught, grid: Grid, *, clips_a_shard: int, by_slot: bool
) -> None:
    """Theia's layout of some clips: a folder of tars a teacher, and one for the frames.

    Args:
        folder: Gets the folders of tars.
        taught: The clips.
        grid: Their grid.
        clips_a_shard: Clips of a tar.
        by_slot: Whether a slot is a sample, or a clip.
    """
    columns: dict[str, str | None] = {"frames": None}
    columns |= {f"features-{teacher}": teacher for teacher, _ in taught.features}
    for first in range(0, len(taught.rows), clips_a_shard):
        some = taught[first : first + clips_a_shard]
        for column, teacher in columns.items():
            extension = "image" if teacher is None else f"{teacher}.safetensors"
            path = folder / column / f"{first // clips_a_shard:06d}.tar"
            path.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(path, "w") as tar:
                for key, data in _samples(some, teacher, grid, by_slot):
                    member = tarfile.TarInfo(f"{key}.{extension}")
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


def _samples(
    taught: Taught, teacher: str | None, grid: Grid, by_slot: bool
) -> Iterator[tuple[str, bytes]]:
    """Keys and contents of the samples of a teacher, or of the frames."""
    for clip, row in enumerate(taught.rows):
        frames = taught.frames[clip].reshape(grid.slots, -1, *taught.frames.shape[2:])
        tokens = {
            layer: _channels_first(values[clip], grid)
            for (name, layer), values in taught.features.items()
            if name == teacher
        }
        for slot in range(grid.slots) if by_slot else (slice(None),):
            key = f"{row.key}-{slot}" if by_slot else row.key
            if teacher is None:
                yield key, _npy(frames[slot])
            else:
                yield (
                    key,
                    save_safetensors(
                        {layer: values[:, slot].contiguous() for layer, values in tokens.items()}
                    ),
                )


def _channels_first(units: Tensor, grid: Grid) -> Tensor:
    """Unit-major tokens `[units, 4, c]` as `[c, t, h, w]` in bf16."""
    tokens: Tensor = grid.units_to_tokens(units[None])[0]
    return tokens.permute(3, 0, 1, 2).to(torch.bfloat16)


def _npy(array: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()
