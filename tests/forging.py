"""Caches whose files contradict their records although every checksum fits."""

import hashlib
from pathlib import Path
from typing import Any

import google_crc32c

from kdhiera.cache.layout import PartId, commit_file, commit_folder
from kdhiera.cache.records import seal, unseal
from kdhiera.cache.writer import file_ends


def body_of(root: Path, part: PartId, column: str | None) -> dict[str, Any]:
    return unseal((root / commit_file(part, column)).read_bytes(), "")


def attempt_of(root: Path, part: PartId, column: str | None = None) -> Path:
    """Folder of the attempt that a record names."""
    attempt = body_of(root, part, column)["attempt"]
    return root / "parts" / part.shard_id / str(part.view) / str(attempt)


def forge(root: Path, part: PartId, column: str | None, **fields: Any) -> None:
    """Change a sealed record, and take its files as they are now for what was written."""
    body = body_of(root, part, column) | fields
    folder = attempt_of(root, part, column)
    for name in body["files"]:
        data = (folder / name).read_bytes()
        body["files"][name] = [len(data), google_crc32c.value(data)]
    ends = file_ends(folder)
    body["ends"] = {name: ends[name] for name in body["ends"]}
    (root / commit_file(part, column)).write_bytes(seal(body))
    if column is None:
        _bind_columns(root, part)


def _bind_columns(root: Path, part: PartId) -> None:
    sha256 = hashlib.sha256((root / commit_file(part, None)).read_bytes()).hexdigest()
    for path in (root / commit_folder(part)).glob("*.*.*.json"):
        path.write_bytes(seal(unseal(path.read_bytes(), "") | {"base_sha256": sha256}))
