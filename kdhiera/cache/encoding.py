"""How features become stored arrays and come back, on whatever device they are.

| name | arrays a token | error |
|------|----------------|-------|
| fp32 | codes float32  | none  |
| fp16 | codes float16  | 11 bits; a row with a value beyond 65504 is `overflow` |
| bf16 | codes uint16, the upper half of a float32 | 8 bits |
| int8 | codes int8, scale float32 | at most scale / 2 a value, scale = max abs / 127 |
| compact | codes int8 of a calibrated transform | see `kdhiera.cache.compact` |
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Shaped
from torch import Tensor

from kdhiera.cache.compact import Basis, CompactCodec, Encoded, calibrate_compact
from kdhiera.cache.layout import ArraySpec
from kdhiera.grid import TOKENS_PER_UNIT

ENCODINGS = ("fp32", "fp16", "bf16", "int8", "compact")
NEEDS_BASIS = frozenset({"compact"})

_HASH = "sha256"
_INT8_MAX = 127
_TINY = torch.finfo(torch.float32).tiny
_LARGEST = float(np.nextafter(np.float32(torch.finfo(torch.float32).max / _INT8_MAX), 0))
_AXES = ("row", "kept_unit", "token", "channel")


@runtime_checkable
class Codec(Protocol):
    """One column's way of storing features; immutable."""

    def specs(self, max_kept: int) -> dict[str, ArraySpec]:
        """Arrays that it fills, for rows of `max_kept` units."""
        ...

    def encode(self, features: Float[Tensor, "n k 4 c"], units: Int[Tensor, "n k"]) -> Encoded:
        """Finite features to arrays; what stands at padded units (-1) is zeros."""
        ...

    def decode(
        self, arrays: Mapping[str, Shaped[Tensor, "n k ..."]], units: Int[Tensor, "n k"]
    ) -> Float32[Tensor, "n k 4 c"]:
        """The arrays of any units back to features, on the arrays' device."""
        ...

    def to(self, device: torch.device) -> Codec:
        """The same codec with what it needs on a device."""
        ...


@dataclass(frozen=True, kw_only=True)
class _Plain:
    """Every value by itself.

    Args:
        width: Channels.
        dtype: Type of `codes`.
        pack: Features to codes.
        unpack: Codes to features.
    """

    width: int
    dtype: str
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor]

    def specs(self, max_kept: int) -> dict[str, ArraySpec]:
        shape = (max_kept, TOKENS_PER_UNIT, self.width)
        return {"codes": ArraySpec(shape=shape, dtype=self.dtype, axes=_AXES)}

    def encode(self, features: Float[Tensor, "n k 4 c"], units: Int[Tensor, "n k"]) -> Encoded:
        codes = self.pack(features.float())
        finite = self.unpack(codes).isfinite()
        representable = finite.flatten(1).all(1)
        codes = torch.where(finite, codes, torch.zeros_like(codes))
        return Encoded(arrays={"codes": codes}, representable=representable)

    def decode(
        self, arrays: Mapping[str, Shaped[Tensor, "n k ..."]], units: Int[Tensor, "n k"]
    ) -> Float32[Tensor, "n k 4 c"]:
        return self.unpack(arrays["codes"])

    def to(self, device: torch.device) -> _Plain:
        return self


@dataclass(frozen=True, kw_only=True)
class _Int8:
    """Symmetric rounding to 255 levels with a scale a token.

    The scale is float32: a float16 one underflows for tokens below 8e-6 and
    overflows above 8e6. It is never below the least normal float32, so that a token of
    zeros (and of denormals) divides by something and comes back as zeros; and never
    so large that `127 * scale` overflows.

    Args:
        width: Channels.
    """

    width: int

    def specs(self, max_kept: int) -> dict[str, ArraySpec]:
        tokens = (max_kept, TOKENS_PER_UNIT)
        return {
            "codes": ArraySpec(shape=(*tokens, self.width), dtype="int8", axes=_AXES),
            "scale": ArraySpec(shape=tokens, dtype="float32", axes=_AXES[:3]),
        }

    def encode(self, features: Float[Tensor, "n k 4 c"], units: Int[Tensor, "n k"]) -> Encoded:
        values = features.float()
        scale = (values.abs().amax(-1) / _INT8_MAX).clamp(_TINY, _LARGEST)
        codes = (values / scale[..., None]).round_().clamp_(-_INT8_MAX, _INT8_MAX)
        whole = torch.ones(len(values), dtype=torch.bool, device=values.device)
        arrays = {"codes": codes.to(torch.int8), "scale": scale}
        return Encoded(arrays=arrays, representable=whole)

    def decode(
        self, arrays: Mapping[str, Shaped[Tensor, "n k ..."]], units: Int[Tensor, "n k"]
    ) -> Float32[Tensor, "n k 4 c"]:
        return arrays["codes"].float() * arrays["scale"][..., None]

    def to(self, device: torch.device) -> _Int8:
        return self


def make_codec(encoding: str, *, width: int, basis: Basis | None = None) -> Codec:
    """The codec of a column.

    Args:
        encoding: One of `ENCODINGS`.
        width: Channels of the teacher's layer.
        basis: What `calibrate` made, for those of `NEEDS_BASIS`.

    Raises:
        ValueError: If the encoding is not known, or lacks its basis.
    """
    if encoding == "fp32":
        return _Plain(width=width, dtype="float32", pack=_same, unpack=_same)
    if encoding == "fp16":
        return _Plain(width=width, dtype="float16", pack=Tensor.half, unpack=Tensor.float)
    if encoding == "bf16":
        return _Plain(width=width, dtype="uint16", pack=_to_bf16_bits, unpack=_from_bf16_bits)
    if encoding == "int8":
        return _Int8(width=width)
    if encoding != "compact":
        raise ValueError(f"no encoding is named {encoding!r}; there are {', '.join(ENCODINGS)}")
    if basis is None:
        raise ValueError("a compact column needs its basis")
    return CompactCodec.of(basis)


def calibrate(
    encoding: str, features: Float32[Tensor, "n units 4 c"], *, error: float
) -> dict[str, np.ndarray]:
    """What an encoding of `NEEDS_BASIS` needs before its first part.

    Args:
        encoding: Its name.
        features: All units of some clips.
        error: Share of their centred variance that it may lose, above 0.
    """
    assert encoding in NEEDS_BASIS, encoding
    return calibrate_compact(features, error=error)


def error_bound(encoding: str, *, error: float) -> float:
    """Share of the centred variance that an encoding may lose on features like the calibrated.

    Args:
        encoding: One of `ENCODINGS`.
        error: The target of `compact`.
    """
    return {"fp32": 0.0, "fp16": 1e-5, "bf16": 1e-3, "int8": 1e-2, "compact": 2 * error}[encoding]


def basis_to_npz(basis: Basis) -> bytes:
    """A basis as one file, with a hash over its arrays: what makes a zip misses some bits."""
    sink = io.BytesIO()
    arrays = {**basis, _HASH: np.frombuffer(_basis_hash(basis), np.uint8)}
    np.savez(sink, allow_pickle=False, **arrays)
    return sink.getvalue()


def basis_from_npz(data: bytes) -> dict[str, np.ndarray]:
    """Inverse of `basis_to_npz`.

    Raises:
        ValueError: If it is no such file.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            basis = {name: arrays[name] for name in arrays.files}
        known = basis.pop(_HASH).tobytes()
    except Exception as error:  # damaged bytes make zipfile raise almost anything
        raise ValueError(repr(error)) from None
    if _basis_hash(basis) != known:
        raise ValueError("it does not match its own checksum")
    return basis


def _basis_hash(basis: Basis) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(basis):
        array = np.ascontiguousarray(basis[name])
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.digest()


def _same(values: Tensor) -> Tensor:
    return values


def _to_bf16_bits(values: Tensor) -> Tensor:
    return values.bfloat16().view(torch.uint16)


def _from_bf16_bits(codes: Tensor) -> Tensor:
    return codes.view(torch.bfloat16).float()
