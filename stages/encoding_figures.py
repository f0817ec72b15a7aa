"""Bits, errors and speed of encodings on some features of one layer."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn import functional

from kdhiera.cache.arrays import ArrayWriter, create_group
from kdhiera.cache.compact import CompactCodec
from kdhiera.cache.encoding import ENCODINGS, NEEDS_BASIS, Codec, make_codec
from kdhiera.evaluation.knn import knn_predict

SWEEP = (0.003, 0.006, 0.01, 0.03, 0.06, 0.1)  # of compact's error, beside the run's own
_TIMINGS = 5


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Clips that decoded ones are compared with.

    Args:
        gallery: Pooled features.
        classes: Their class numbers and those of the measured clips, -1 where a clip has no
            label; None if there is no label.
        neighbours: k of k-NN.
        temperature: Of its vote.
    """

    gallery: Float[Tensor, "g c"]
    classes: tuple[Int64[np.ndarray, " g"], Int64[np.ndarray, " n"]] | None
    neighbours: int
    temperature: float

    def nearest(self, pooled: Float[Tensor, "n c"]) -> Int64[np.ndarray, " n"]:
        """The clip of the gallery with the highest cosine similarity to each."""
        one, other = (functional.normalize(t.float(), dim=1) for t in (pooled, self.gallery))
        return np.asarray((one @ other.T).argmax(1).cpu().numpy())

    def accuracy(self, pooled: Float[Tensor, "n c"]) -> float | None:
        """Share of labelled clips whose class k-NN finds."""
        if self.classes is None:
            return None
        known, truth = self.classes
        if not (truth >= 0).any():
            return None
        votes = knn_predict(
            self.gallery[torch.from_numpy(known >= 0)],
            known[known >= 0],
            pooled[torch.from_numpy(truth >= 0)],
            neighbours=min(self.neighbours, int((known >= 0).sum())),
            temperature=self.temperature,
            num_classes=int(max(known.max(), truth.max())) + 1,
        )
        return float((votes.argmax(1) == truth[truth >= 0]).mean())


@dataclass(frozen=True, kw_only=True)
class EncodingFigures:
    """One encoding of one layer.

    Args:
        encoding: Its name.
        bits: Stored bits a value: every byte of the chunk files over the kept values.
        error: Energy of the difference as a share of the energy about the calibration mean.
        standardised_error: The same after standardising each channel.
        worst_cosine: Lowest cosine of a token and what came back of it.
        lost_rows: Rows beyond the encoding's range, left out of all the others.
        same_neighbour: Share of clips whose nearest clip is that of the original.
        accuracy: Of k-NN from what came back; None without labels.
        encode_rate: Values a second, features to arrays, on the device.
        store_rate: Values a second, arrays to files: compression and checksums.
        decode_rate: Values a second, arrays to features, on the device.
    """

    encoding: str
    bits: float
    error: float
    standardised_error: float
    worst_cosine: float
    lost_rows: int
    same_neighbour: float
    accuracy: float | None
    encode_rate: float
    store_rate: float
    decode_rate: float


@dataclass(frozen=True, kw_only=True)
class LayerFigures:
    """One layer: its encodings, and how far `compact` is from what could be.

    Args:
        teacher: Name of the teacher.
        layer: Its layer.
        width: Channels.
        basis_bytes: Of the basis that a `compact` column stores once.
        accuracy: Of k-NN on the features themselves; None without labels.
        encodings: One for each of `ENCODINGS`.
        sweep: `compact` from the least error to the largest, as (bits, error).
        bound: Fewest bits for Gaussian coefficients of the same transform, as (bits, error).
    """

    teacher: str
    layer: str
    width: int
    basis_bytes: int
    accuracy: float | None
    encodings: tuple[EncodingFigures, ...]
    sweep: tuple[tuple[float, float], ...]
    bound: tuple[tuple[float, float], ...]


def measure_layer(
    features: Float[Tensor, "n k 4 c"],
    units: Int64[Tensor, "n k"],
    basis: Mapping[str, np.ndarray],
    neighbours: Neighbours,
    *,
    teacher: str,
    layer: str,
) -> LayerFigures:
    """All encodings of one layer.

    Args:
        features: Kept units of clips that `basis` was not made from, on the device.
        units: Their numbers, -1 pads, on the device.
        basis: Of `compact`, with the run's error.
        neighbours: What decoded clips are compared with.
        teacher: Name of the teacher.
        layer: Its layer.
    """
    width = features.shape[-1]

    def codec_of(encoding: str, error: float | None = None) -> Codec:
        changed = {**basis, "error": np.array(error)} if error is not None else basis
        return make_codec(
            encoding, width=width, basis=changed if encoding in NEEDS_BASIS else None
        ).to(features.device)

    own = float(basis["error"])
    mean = torch.from_numpy(basis["mean"]).to(features.device)
    whole = neighbours.accuracy(pooled(features, units))
    encodings = tuple(
        _measure(name, codec_of(name), features, units, mean, neighbours) for name in ENCODINGS
    )
    sweep = [
        _rate_and_error(codec_of("compact", error), features, units, mean)
        for error in sorted({*SWEEP, own})
    ]
    compact = CompactCodec.of(basis).to(features.device)
    variances = compact.coefficients(features[units >= 0]).double().square().mean(0).flatten()
    return LayerFigures(
        teacher=teacher,
        layer=layer,
        width=width,
        basis_bytes=sum(values.nbytes for values in basis.values()),
        accuracy=whole,
        encodings=encodings,
        sweep=tuple(sweep),
        bound=tuple(
            (gaussian_bits(variances.cpu().numpy(), error), error)
            for error in np.geomspace(min(*SWEEP, own), max(*SWEEP, own), 25).tolist()
        ),
    )


def pooled(features: Float[Tensor, "n k 4 c"], units: Int64[Tensor, "n k"]) -> Float[Tensor, "n c"]:
    """Mean over the tokens of the kept units."""
    there = (units >= 0)[..., None, None]
    counts = 4 * there.sum((1, 2, 3)).clamp_min(1)
    return features.where(there, 0.0).sum((1, 2)) / counts[:, None]


def gaussian_bits(variances: Float64[np.ndarray, " n"], error: float) -> float:
    """Least bits a value at `error` of the energy, were the coefficients Gaussian.

    Reverse water-filling: Cover and Thomas, Elements of Information Theory, 10.3.3.
    """
    low, high = 0.0, float(variances.max())
    for _ in range(80):
        level = (low + high) / 2
        enough = np.minimum(variances, level).sum() >= error * variances.sum()
        low, high = (low, level) if enough else (level, high)
    if high == 0:
        return 0.0
    return float(0.5 * np.log2(np.maximum(variances / high, 1)).mean())


def _measure(
    name: str,
    codec: Codec,
    features: Float[Tensor, "n k 4 c"],
    units: Int64[Tensor, "n k"],
    mean: Float[Tensor, " c"],
    neighbours: Neighbours,
) -> EncodingFigures:
    kept = units >= 0
    num_values = int(kept.sum()) * features[0, 0].numel()
    encoded = codec.encode(features, units)
    decoded = codec.decode(encoded.arrays, units)
    bits, store_seconds = _stored(codec, encoded.arrays, units.shape[1], num_values)
    whole = kept & encoded.representable[:, None]
    before, after = features[whole].double(), decoded[whole].double()
    lost = (after - before).square().mean((0, 1))
    varied = (before - mean).square().mean((0, 1))
    one, other = pooled(features, units), pooled(decoded, units)
    return EncodingFigures(
        encoding=name,
        bits=bits,
        error=_share(lost.sum(), varied.sum()),
        standardised_error=float((lost / varied)[varied > 0].mean()) if bool(varied.any()) else 0.0,
        worst_cosine=float(functional.cosine_similarity(before, after, dim=-1).min()),
        lost_rows=int((~encoded.representable).sum()),
        same_neighbour=float((neighbours.nearest(one) == neighbours.nearest(other)).mean()),
        accuracy=neighbours.accuracy(other),
        encode_rate=num_values / _seconds(lambda: codec.encode(features, units), features.device),
        store_rate=num_values / store_seconds,
        decode_rate=num_values
        / _seconds(lambda: codec.decode(encoded.arrays, units), features.device),
    )


def _rate_and_error(
    codec: Codec,
    features: Float[Tensor, "n k 4 c"],
    units: Int64[Tensor, "n k"],
    mean: Float[Tensor, " c"],
) -> tuple[float, float]:
    kept = units >= 0
    encoded = codec.encode(features, units)
    lost = (codec.decode(encoded.arrays, units) - features)[kept].double().square().sum()
    varied = (features[kept].double() - mean).square().sum()
    num_values = int(kept.sum()) * features[0, 0].numel()
    bits, _ = _stored(codec, encoded.arrays, units.shape[1], num_values)
    return bits, _share(lost, varied)


def _share(lost: Tensor, varied: Tensor) -> float:
    return float(lost / varied) if float(varied) > 0 else 0.0


def _stored(
    codec: Codec, arrays: Mapping[str, Tensor], max_kept: int, num_values: int
) -> tuple[float, float]:
    """Bits a value in chunk files like a part's, and the seconds to write them."""
    with tempfile.TemporaryDirectory(prefix="kdhiera-bench-") as name:
        folder = Path(name)
        create_group(folder, {})
        host = {array: values.cpu().numpy() for array, values in arrays.items()}
        started = time.perf_counter()
        for array, spec in codec.specs(max_kept).items():
            writer = ArrayWriter(folder, array, spec)
            writer.append(host[array])
            writer.finish()
        seconds = time.perf_counter() - started
        chunks = (f for f in folder.rglob("*") if f.is_file() and f.name != "zarr.json")
        return 8 * sum(f.stat().st_size for f in chunks) / num_values, seconds


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    """Median over a few calls, the device waited for."""
    taken = []
    for _ in range(_TIMINGS):
        _finish(device)
        started = time.perf_counter()
        function()
        _finish(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
