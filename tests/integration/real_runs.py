"""What integration tests share: tars, and the command line as a user runs it."""

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from kdhiera.cache.commit import Cache
from kdhiera.cache.reader import CacheReader
from kdhiera.config import RunConfig
from kdhiera.stages.assemble import columns_of

MakeConfig = Callable[..., Path]
Member = tuple[str, bytes]
COMMAND = (sys.executable, "-c", "from kdhiera.cli import main; main()")


def write_tar(path: Path, members: Iterable[Member]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read_tar(path: Path) -> list[Member]:
    with tarfile.open(path) as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]


def kdhiera(
    *arguments: object, cwd: Path | None = None, timeout: float = 280
) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=timeout,
        check=False,
    )


def contents(config: RunConfig) -> dict[str, object]:
    """Everything that training could read, by uid and view."""
    cache = Cache.open(config.cache.dir)
    reader = CacheReader(cache, num_views=config.views.num, columns=tuple(columns_of(config)))
    found: dict[str, object] = {}
    for view in range(config.views.num):
        rows = reader.read(np.arange(reader.num_samples), view=view)
        for i, uid in enumerate(rows.uids):
            found[f"{uid} {view}"] = (
                rows.units[i].tobytes(),
                rows.scores[i].tobytes(),
                rows.pixels[i].tobytes(),
                *(a[i].tobytes() for c in rows.columns.values() for a in c.values()),
            )
    return found


def write_config(
    folder: Path, usual: Mapping[str, Any], name: str = "small", **sections: Any
) -> Path:
    """A config file in a folder, where its cache and its run will be too."""
    values = {
        **usual,
        "name": name,
        "run_dir": str(folder / f"run-{name}"),
        "cache": {**usual["cache"], "dir": str(folder / "cache")},
    }
    for section, changes in sections.items():
        merged = isinstance(changes, Mapping) and isinstance(values.get(section), Mapping)
        values[section] = {**values[section], **changes} if merged else changes
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(values))))
    return path
