"""What a run ran on: versions, machine and devices, kept in its folder."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from kdhiera import __version__
from kdhiera.machine import num_cpus
from kdhiera.storage import make_folder, write_atomic

ENVIRONMENT = "environment.json"
PACKAGES = (
    "av", "decord", "einops", "google-crc32c", "numcodecs", "numpy", "obstore", "pillow",
    "pyarrow", "pydantic", "ray", "safetensors", "scikit-learn", "tensorstore", "timm", "torch",
    "torchvision", "transformers", "webdataset", "zarr",
)  # fmt: skip


def record_environment(run_dir: Path, stage: str, *, device: torch.device) -> None:
    """Write into `environment.json` of a run folder what a stage of the run uses.

    It is that of the machine where the command runs, also where Ray works on others. Entries of
    other stages stay. No address, path, variable or argument is recorded.

    Args:
        run_dir: Folder of the run; it is made.
        stage: Such as `distill`.
        device: Where it computes.
    """
    path = run_dir / ENVIRONMENT
    known: dict[str, Any] = {}
    with suppress(FileNotFoundError, ValueError):
        known = json.loads(path.read_text())
    make_folder(run_dir)
    document = {**known, stage: describe_environment(device)}
    write_atomic(path, (json.dumps(document, indent=2, sort_keys=True) + "\n").encode())


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine, and the device that is computed on."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "kdhiera": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": num_cpus(),
        "device": str(device),
        "device_name": device_name(device),
        "cuda": torch.version.cuda,
        "packages": package_versions(PACKAGES),
    }


def package_versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def device_name(device: torch.device) -> str:
    """What a device is called by its maker; of a CPU what the system says."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
