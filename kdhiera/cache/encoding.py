"""How features become stored codes and come back, on whatever device they are.

| name | arrays a token | error |
|------|----------------|-------|
| fp32 | codes float32  | none  |
| int8 | codes int8, scale float32 | at most scale / 2 a value, scale = max abs / 127 |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor

_INT8_MAX = 127
_TINY = torch.finfo(torch.float32).tiny
_LARGEST = float(np.nextafter(np.float32(torch.finfo(torch.float32).max / _INT8_MAX), 0))


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """One way of storing features.

    Args:
        encode: Finite features `[..., c]` to the arrays that `layout.column_arrays` lists.
        decode: Those arrays back to float32 features.
    """

    encode: Callable[[Float[Tensor, "*rows c"]], dict[str, Tensor]]
    decode: Callable[[Mapping[str, Tensor]], Float32[Tensor, "*rows c"]]


def encode_fp32(features: Float[Tensor, "*rows c"]) -> dict[str, Tensor]:
    """The features themselves."""
    return {"codes": features.float()}


def decode_fp32(arrays: Mapping[str, Shaped[Tensor, ...]]) -> Float32[Tensor, "*rows c"]:
    """The features themselves."""
    return arrays["codes"]


def encode_int8(features: Float[Tensor, "*rows c"]) -> dict[str, Tensor]:
    """Symmetric rounding to 255 levels with a scale a token.

    The scale is float32: a float16 one underflows for tokens below 8e-6 and
    overflows above 8e6. It is never below the least normal float32, so that a token of
    zeros (and of denormals) divides by something and comes back as zeros; and never
    so large that `127 * scale` overflows.

    Args:
        features: Finite features.

    Returns:
        `codes` int8 `[..., c]` in -127..127 and `scale` float32 `[...]`.
    """
    values = features.float()
    scale = (values.abs().amax(-1) / _INT8_MAX).clamp(_TINY, _LARGEST)
    codes = (values / scale[..., None]).round_().clamp_(-_INT8_MAX, _INT8_MAX)
    return {"codes": codes.to(torch.int8), "scale": scale}


def decode_int8(arrays: Mapping[str, Shaped[Tensor, ...]]) -> Float32[Tensor, "*rows c"]:
    """`codes * scale`, float32."""
    return arrays["codes"].float() * arrays["scale"][..., None]


ENCODINGS: Mapping[str, Encoding] = {
    "fp32": Encoding(encode=encode_fp32, decode=decode_fp32),
    "int8": Encoding(encode=encode_int8, decode=decode_int8),
}
