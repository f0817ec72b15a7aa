"""Torch's own random numbers, where a library draws them and takes no generator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kdhiera.views import stable_key


@contextmanager
def seeded(*parts: object, device: torch.device) -> Iterator[None]:
    """Within the block torch's generators follow from `parts`; outside they are as before."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        seed = stable_key(*parts) % 2**63
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
