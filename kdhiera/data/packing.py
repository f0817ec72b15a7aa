"""Writing tar shards whose bytes depend on nothing but what is put into them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from typing import IO, cast

from kdhiera.data.tars import BLOCK_BYTES


class ShardWriter:
    """Samples into a tar, as webdataset names them: `KEY.mp4` and `KEY.json`.

    No time, user or machine gets into the file. The file is left open by `close`.

    Args:
        file: Open for writing.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._hashed = _Hashed(file)
        self._tar = tarfile.open(  # noqa: SIM115 - closed in close()
            fileobj=cast("IO[bytes]", self._hashed),
            mode="w",
            format=tarfile.PAX_FORMAT,
        )

    def add(self, key: str, extension: str, video: bytes, about: bytes) -> None:
        """Append one sample.

        Args:
            key: From `keys.make_keys`.
            extension: Of the video, without a dot.
            video: All bytes of it.
            about: From `describe_sample`.
        """
        for name, data in ((f"{key}.{extension}", video), (f"{key}.json", about)):
            info = tarfile.TarInfo(name)  # mtime, uid and gid 0, mode 0644
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))

    def close(self) -> tuple[int, str]:
        """End the archive.

        Returns:
            Bytes written, and their SHA-256 as hex digits.
        """
        self._tar.close()
        return self._hashed.num_bytes, self._hashed.digest.hexdigest()


def describe_sample(labels: Mapping[str, str], name: str) -> bytes:
    """What `KEY.json` holds: the labels, and the path that the video came from.

    Args:
        labels: By name.
        name: Path; bytes that are no text are escaped, as `os.fsdecode` has them.
    """
    return (json.dumps({"labels": labels, "path": name}, sort_keys=True) + "\n").encode()


def sample_bytes(video: int, about: int) -> int:
    """Bytes that a sample takes in a tar, its headers among them (long names take a little more).

    Args:
        video: Bytes of the video.
        about: Bytes of its JSON.
    """
    return sum(BLOCK_BYTES + -(-size // BLOCK_BYTES) * BLOCK_BYTES for size in (video, about))


class _Hashed:
    """A file that is hashed as it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.num_bytes = 0
        self.digest = hashlib.sha256()

    def tell(self) -> int:
        return self.num_bytes

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self.num_bytes += len(data)
        self.digest.update(data)
        return len(data)
