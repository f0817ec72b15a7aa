"""Where tests put shards: a folder or a bucket, used alike."""

import os
from pathlib import Path

from kdhiera.objects import ObjectStore
from kdhiera.stores import LocalStore


class Place:
    """Files under one root, written behind the back of what reads them."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._store = ObjectStore(root) if root.startswith("s3://") else LocalStore(Path(root))

    def put(self, name: str, data: bytes) -> str:
        """Write or replace a file; returns its address."""
        self._store.write(name, data)
        return f"{self.root}/{name}"

    def overwrite(self, name: str, data: bytes) -> None:
        """Replace a file's bytes in place, where there is such a thing."""
        if isinstance(self._store, LocalStore):
            Path(self.root, name).write_bytes(data)
            os.utime(Path(self.root, name), (1, 1))  # clocks of file systems are coarse
        else:
            self._store.write(name, data)

    def remove(self, name: str) -> None:
        """Remove a file."""
        self._store.delete([name])
