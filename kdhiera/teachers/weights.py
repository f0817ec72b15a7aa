"""Where a teacher's weights come from: a file, a folder, or a hub's repository.

The hub's cache is looked at first and without the network, so what was fetched once is
used offline and does not change under a run.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import load_file
from torch import Tensor

from kdhiera.errors import UsageError

logger = logging.getLogger(__name__)

WEIGHT_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
NESTED = ("model", "state_dict", "module")  # keys that checkpoints put their state dict under


@runtime_checkable
class Source(Protocol):
    """A place with named files."""

    def file(self, name: str) -> Path | None:
        """Path of a file, or None if the place has none of that name."""
        ...

    def lacks(self, what: str) -> UsageError:
        """The error that says what is missing, where it was looked for, and what to do."""
        ...


@dataclass(frozen=True)
class Folder:
    """A folder on this machine."""

    path: Path

    def file(self, name: str) -> Path | None:
        """See `Source.file`."""
        found = self.path / name
        return found if found.is_file() else None

    def lacks(self, what: str) -> UsageError:
        """See `Source.lacks`."""
        return UsageError(f"the folder {self.path} has no {what}: put it there, or name the file")


@dataclass(frozen=True)
class HubRepository:
    """A repository of the Hugging Face hub."""

    name: str

    def file(self, name: str) -> Path | None:
        """See `Source.file`.

        Raises:
            UsageError: If the file is not in the cache and the hub cannot be reached.
        """
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        cached = try_to_load_from_cache(self.name, name)
        if isinstance(cached, str):
            return Path(cached)
        try:
            return Path(hf_hub_download(self.name, name))
        except Exception as error:  # the hub client raises errors of several libraries
            reached = not isinstance(error, LocalEntryNotFoundError)
            if isinstance(error, EntryNotFoundError) and reached:
                return None
            reason = "it cannot be reached" if not reached else _first_line(error)
            raise UsageError(
                f"{name} of {self.name} is neither in the hub's cache ({constants.HF_HUB_CACHE}) "
                f"nor to be had from the hub ({reason}): fetch the repository where there is a "
                "network and name its folder in `teachers.<name>.weights`"
            ) from error

    def lacks(self, what: str) -> UsageError:
        """See `Source.lacks`."""
        return UsageError(f"the hub's repository {self.name} has no {what}: name another one")


def source_of(weights: str) -> Source:
    """The folder that `weights` is, or that the file `weights` lies in.

    Raises:
        UsageError: If there is neither.
    """
    path = Path(weights)
    if path.is_dir():
        return Folder(path)
    if not path.is_file():
        raise UsageError(
            f"no teacher weights at {weights}: put the file there, or name another one"
        )
    return Folder(path.parent)


def read_json(source: Source, name: str) -> dict[str, Any] | None:
    """A JSON file of a source, or None if there is none.

    Raises:
        UsageError: If it is no JSON object.
    """
    path = source.file(name)
    if path is None:
        return None
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error}): it is damaged, replace it") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def read_state(source: Source) -> dict[str, Tensor]:
    """The state dict of a folder or repository, one file or several with an index.

    Raises:
        UsageError: If there is none, or one that cannot be read.
    """
    for name in WEIGHT_FILES:
        path = source.file(name)
        if path is not None:
            return _read(path)
    for name in INDEX_FILES:
        index = read_json(source, name)
        if index is not None:
            state: dict[str, Tensor] = {}
            for part in sorted(set(index.get("weight_map", {}).values())):
                path = source.file(part)
                if path is None:
                    raise source.lacks(f"{part}, which its {name} names")
                state |= _read(path)
            return state
    raise source.lacks(f"weights ({', '.join((*WEIGHT_FILES, *INDEX_FILES))})")


def load_weights(path: str) -> dict[str, Tensor]:
    """Read a state dict from a file or a folder; pickled code is never run.

    Args:
        path: A `.safetensors` file; a `.pth`, `.pt` or `.bin` file of torch, which may nest
            its state dict under `model`, `state_dict` or `module`; or a folder with one.

    Raises:
        UsageError: If the file is missing, of another kind, or damaged.
    """
    source = source_of(path)
    return read_state(source) if Path(path).is_dir() else _read(Path(path))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Published checkpoints often keep the arguments of their training: plain attributes.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise errors of zip, pickle and safetensors
        raise UsageError(
            f"the teacher weights at {path} cannot be read ({type(error).__name__}): they must be "
            "a whole .safetensors file, or a .pth file that holds tensors only"
        ) from error
    for key in NESTED:
        state = state.get(key, state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UsageError(f"the teacher weights at {path} are no state dict of tensors")
    return dict(state)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
