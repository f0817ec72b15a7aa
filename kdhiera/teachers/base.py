"""What a teacher is: frozen, deterministic, clip in, token grids out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TeacherOutput:
    """What one pass over a batch of clips gives.

    Args:
        features: Raw features by layer name, `[b, t, h, w, c]` on the token grid, as the
            teacher's block returns them (before any final norm unless the layer is `norm`).
        scores: Score of every token `[b, t, h, w]`, non-negative, summing to 1 per slot;
            None unless asked for.
    """

    features: Mapping[str, Float[Tensor, "b t h w c"]]
    scores: Float[Tensor, "b t h w"] | None


@runtime_checkable
class Teacher(Protocol):
    """A frozen teacher bound to one token grid and device.

    `identity` names all that changes its features apart from the weights (kind, model,
    preprocessing) as JSON values; `weights_sha256` covers the weights themselves.
    """

    identity: Mapping[str, object]
    weights_sha256: str

    def check(self, layers: Sequence[str], score_source: str | None) -> None:
        """Raise `UsageError` naming what exists if a layer or score source does not."""
        ...

    def __call__(
        self, clips: UInt8[Tensor, "b f y x 3"], layers: Sequence[str], score_source: str | None
    ) -> TeacherOutput:
        """Features of `layers`, and scores if a source is named.

        Args:
            clips: RGB clips at the student's resolution, on the teacher's device.
            layers: Layer names, such as `"9"` (after 9 blocks) or `"norm"`.
            score_source: Such as `"cls_attention"`, or None.
        """
        ...


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, dtypes and bytes of a state dict, in sorted order."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
