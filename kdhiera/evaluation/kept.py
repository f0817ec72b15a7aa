"""What has been computed once, by the fingerprint of what it was computed from."""

from __future__ import annotations

import json
import logging
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdhiera import __version__
from kdhiera.cache.fingerprint import canonical_json, fingerprint
from kdhiera.storage import atomic_file, make_folder

logger = logging.getLogger(__name__)

IDENTITY = "identity"


@dataclass(frozen=True)
class Kept:
    """Arrays in a folder, one npz file an identity.

    Several processes may share the folder: files are whole or absent, and two that compute
    the same write the same. A damaged file counts as absent.

    Args:
        folder: Created when something is saved.
    """

    folder: Path

    def load(self, identity: Mapping[str, object]) -> dict[str, np.ndarray] | None:
        """The arrays of an identity, or None."""
        path = self._path(identity)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            logger.warning("%s is damaged (%s): computed again", path, type(error).__name__)
            return None
        if arrays.pop(IDENTITY, np.zeros(0)).tobytes() != canonical_json(_versioned(identity)):
            logger.warning("%s holds something else than its name says: computed again", path)
            return None
        return arrays

    def save(self, identity: Mapping[str, object], arrays: Mapping[str, np.ndarray]) -> None:
        """Write arrays; none may be called `identity`."""
        make_folder(self.folder)
        written = np.frombuffer(canonical_json(_versioned(identity)), np.uint8)
        with atomic_file(self._path(identity)) as file:
            np.savez(file, **{IDENTITY: written}, **arrays)  # type: ignore[arg-type]

    def _path(self, identity: Mapping[str, object]) -> Path:
        return self.folder / f"{fingerprint(_versioned(identity))[:32]}.npz"


def _versioned(identity: Mapping[str, object]) -> dict[str, object]:
    return {"kdhiera": __version__, **identity}


def text_array(value: object) -> np.ndarray:
    """A JSON value as an array."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def from_text_array(array: np.ndarray) -> object:
    """Inverse of `text_array`."""
    value: object = json.loads(array.tobytes())
    return value
