"""Which device and which number format a run computes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kdhiera.errors import UsageError


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many of torch's CPU threads within the block; 0 leaves them as they are."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def resolve_device(name: str) -> torch.device:
    """The device that a config's `device` means.

    Args:
        name: `auto` (a CUDA device if there is one, else the CPU) or a torch device name.

    Raises:
        UsageError: If the name is no device, or no such device is here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(
            f"device must be auto, cpu, cuda or cuda:N, got {name!r}: pick one of these"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device is {name}, but torch sees {torch.cuda.device_count()} CUDA devices here: "
            "use device=cpu or device=auto"
        )
    return device


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype that matrix products run in under autocast.

    Args:
        precision: `fp32`, `bf16`, or `auto`: bf16 where the hardware multiplies it (a CUDA
            device from Ampere on, a CPU with AVX512-BF16 or AMX), else fp32.
        device: Where it runs.

    Returns:
        `torch.float32` (no autocast) or `torch.bfloat16`.

    Raises:
        UsageError: If the precision has another name.
    """
    if precision == "auto":
        return torch.bfloat16 if _multiplies_bf16(device) else torch.float32
    named = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if precision not in named:
        raise UsageError(f"precision must be auto, fp32 or bf16, got {precision!r}")
    return named[precision]


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported())  # CPUs with AMX have it too
    return False
