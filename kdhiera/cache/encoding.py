"""How features become stored arrays and come back, on whatever device they are.

| name | arrays a token | error |
|------|----------------|-------|
| fp32 | codes float32  | none  |
| fp16 | codes float16  | 11 bits; a row with a value beyond 65504 is `overflow` |
| bf16 | codes uint16, the upper half of a float32 | 8 bits |
| int8 | codes int8, scale float32 | at most scale / 2 a value, 2 % beyond 79 scales |
| compact | records of uint8 of a calibrated transform | see `kdhiera.cache.compact` |
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

from kdhiera.cache.calibration import Calibration
from kdhiera.cache.compact import Basis, CompactCodec, Encoded
from kdhiera.cache.layout import ArraySpec
from kdhiera.cache.levels import Levels
from kdhiera.grid import TOKENS_PER_UNIT

ENCODINGS = ("fp32", "fp16", "bf16", "int8", "compact")
NEEDS_BASIS = frozenset({"compact"})

_HASH = "sha256"
INT8_LEVELS = Levels(linear=79, curve=0.125, top=127)
_SCALES_PER_RMS = 20.0
_TINY = torch.finfo(torch.float32).tiny
_LARGEST = torch.finfo(torch.float32).max / 1.03  # a level is at most 2 % above its value
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
    """One byte a value and a scale a token; levels spread out beyond 79 scales.

    The scale follows the token's root mean square, not its maximum: a few outlier channels
    (they carry most of the mean at the last layers of ViTs) would make a maximum's scale
    too coarse for all the others. It is rounded up to 8 significant bits, so that its last
    digits depend on no order of summation and compress away.

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
        mean_square = values.double().square().mean(-1)
        largest = values.abs().amax(-1)
        needed = torch.maximum(
            mean_square.sqrt() / _SCALES_PER_RMS, largest.double() / INT8_LEVELS.largest
        )
        scale = _round_up(needed.float())
        codes = INT8_LEVELS.nearest(values.abs() / scale[..., None]).copysign_(values)
        fits = largest <= _LARGEST
        codes = codes.masked_fill_(~fits[..., None], 0.0).to(torch.int8)
        return Encoded(
            arrays={"codes": codes, "scale": scale}, representable=fits.flatten(1).all(1)
        )

    def decode(
        self, arrays: Mapping[str, Shaped[Tensor, "n k ..."]], units: Int[Tensor, "n k"]
    ) -> Float32[Tensor, "n k 4 c"]:
        return INT8_LEVELS.signed(arrays["codes"].float()) * arrays["scale"][..., None]

    def to(self, device: torch.device) -> _Int8:
        return self


def _round_up(scale: Float32[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """To 8 significant bits, at least the least normal number: zeros are divided by it."""
    bits = scale.clamp_min(_TINY).view(torch.int32)
    return ((bits + 0xFFFF) & -0x10000).view(torch.float32)


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


def start_calibration(encoding: str, *, width: int) -> Calibration:
    """Gathers what an encoding of `NEEDS_BASIS` needs before its first part.

    Args:
        encoding: Its name.
        width: Channels of the teacher's layer.
    """
    assert encoding in NEEDS_BASIS, encoding
    return Calibration(width)


def calibrate(
    encoding: str, features: Float32[Tensor, "n units 4 c"], *, error: float
) -> dict[str, np.ndarray]:
    """The basis of some clips at once; `start_calibration` takes them one after another.

    Args:
        encoding: One of `NEEDS_BASIS`.
        features: All units of some clips, at least one.
        error: Share of every row's energy about their mean that may be lost, above 0.
    """
    calibration = start_calibration(encoding, width=features.shape[-1])
    calibration.add(features)
    return calibration.basis(error=error)


def error_bound(encoding: str, *, error: float) -> float:
    """Share of the centred variance by which stored features may differ from those encoded.

    Args:
        encoding: One of `ENCODINGS`.
        error: The target of `compact`, of every row's energy about the calibrated means. Rows
            have less about the means of their own part: 0.65 to 0.97 of it in what was
            measured, hence twice the target.
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
