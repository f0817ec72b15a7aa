"""What training reads of a set of clips, from the cache or from live teachers alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int16, Shaped, UInt8


@dataclass(frozen=True, kw_only=True)
class KeptRows:
    """Kept units of `b` clips of one view.

    Args:
        uids: Identity of every sample.
        units: Kept unit numbers, ascending, -1 pads at the end.
        scores: Scores of all units.
        pixels: RGB of the kept units, as decoded and cropped.
        columns: Encoded features by column id: arrays that all begin with axes `b K`.
    """

    uids: tuple[str, ...]
    units: Int16[np.ndarray, "b k"]
    scores: Float32[np.ndarray, "b slots units"]
    pixels: UInt8[np.ndarray, "b k 2 32 32 3"]
    columns: Mapping[str, Mapping[str, Shaped[np.ndarray, "b k ..."]]]
