"""The transform coding keeps to its error in every row, whatever the row is like."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

from kdhiera.cache.arrays import ArrayWriter, create_group
from kdhiera.cache.calibration import Calibration
from kdhiera.cache.compact import CompactCodec
from kdhiera.cache.encoding import calibrate

DOC = Path(__file__).parents[2] / "docs" / "encodings.md"


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def all_units(features: torch.Tensor) -> torch.Tensor:
    return torch.arange(features.shape[1]).expand(len(features), -1)


def lost_shares(codec: CompactCodec, features: torch.Tensor, mean: torch.Tensor) -> np.ndarray:
    """Error of every row as a share of its energy about the calibrated means, in float64."""
    units = all_units(features)
    encoded = codec.encode(features, units)
    assert encoded.representable.all()
    decoded = codec.decode(encoded.arrays, units).double()
    lost = (decoded - features.double()).square().sum((1, 2, 3))
    return (lost / (features.double() - mean).square().sum((1, 2, 3))).numpy()


def correlated(seed: int, rows: int, width: int, units: int = 12) -> torch.Tensor:
    """Features with a hundredfold range of principal variances, tokens alike in a unit."""
    mixing = randn(99, width, width).double()
    axes = torch.linalg.qr(mixing)[0].float() * torch.logspace(0, -1, width)[:, None]
    shared = randn(seed, rows, units, 1, width) + 0.4 * randn(seed + 1, rows, units, 4, width)
    return shared @ axes + 3


@given(
    width=st.integers(1, 40),
    kept=st.integers(1, 9),
    clips=st.integers(1, 3),
    outlier=st.sampled_from([1.0, 1e3, 1e6]),
    size=st.sampled_from([1e-20, 1.0, 1e15]),
    error=st.sampled_from([0.002, 0.017, 0.3]),
    seed=st.integers(0, 1000),
)
def test_every_row_keeps_to_the_error_however_unlike_the_calibration_it_is(
    width: int, kept: int, clips: int, outlier: float, size: float, error: float, seed: int
):
    calibrated = randn(seed, clips, 2, 4, width) * size
    codec = CompactCodec.of(calibrate("compact", calibrated, error=error))
    features = randn(seed + 1, 3, kept, 4, width) * size
    features[1] *= 10  # of another size
    features[2, 0, 0, 0] *= outlier
    features[:, :, :, width // 2] *= outlier
    mean = calibrated.double().mean((0, 1, 2))
    assert (lost_shares(codec, features, mean) <= error * 1.001).all()


def test_no_row_loses_much_less_than_it_may():
    codec = CompactCodec.of(calibrate("compact", correlated(0, 40, 64), error=0.017))
    features = correlated(7, 20, 64)
    mean = correlated(0, 40, 64).double().mean((0, 1, 2))
    shares = lost_shares(codec, features, mean)
    assert (shares > 0.95 * 0.017).all()


@pytest.mark.parametrize("value", [1e5, 1e18, 1e30])
def test_a_coefficient_of_any_size_is_kept(value: float):
    codec = CompactCodec.of(calibrate("compact", correlated(0, 40, 64), error=0.017))
    features = correlated(3, 2, 64)
    features[0, 3, 2, 1] = value
    assert (lost_shares(codec, features, torch.tensor(3.0)) <= 0.01701).all()


@pytest.mark.parametrize("value", [3e38, float("inf"), float("nan")])
def test_only_what_float32_cannot_sum_is_not_representable(value: float):
    codec = CompactCodec.of(calibrate("compact", correlated(0, 40, 64), error=0.017))
    features = correlated(3, 3, 64)
    features[1, 0, 0, 0] = value
    encoded = codec.encode(features, all_units(features))
    assert encoded.representable.tolist() == [True, False, True]
    assert (encoded.arrays["codes"][1] == 0).all()
    assert codec.decode(encoded.arrays, all_units(features)).isfinite().all()


def test_rows_without_variance_come_back_as_they_were():
    constant = torch.full((3, 5, 4, 8), 2.5)
    codec = CompactCodec.of(calibrate("compact", constant, error=0.017))
    encoded = codec.encode(constant, all_units(constant))
    assert torch.equal(codec.decode(encoded.arrays, all_units(constant)), constant)
    channel = randn(1, 6, 5, 4, 8)
    channel[..., 3] = 7.0  # never varied
    codec = CompactCodec.of(calibrate("compact", channel, error=0.002))
    encoded = codec.encode(channel, all_units(channel))
    decoded = codec.decode(encoded.arrays, all_units(channel))
    torch.testing.assert_close(decoded[..., 3], channel[..., 3], rtol=0, atol=1e-5)


def test_padded_units_are_zeros_and_change_nothing():
    codec = CompactCodec.of(calibrate("compact", correlated(0, 40, 16), error=0.017))
    features = correlated(5, 2, 16)
    alone = codec.encode(features[:, :7], all_units(features[:, :7])).arrays["codes"]
    units = all_units(features).clone()
    units[:, 7:] = -1
    features[:, 7:] = 0
    padded = codec.encode(features, units).arrays["codes"]
    assert torch.equal(padded[:, :7], alone)
    assert (padded[:, 7:] == 0).all()


def test_a_basis_is_the_same_however_clips_come_in_and_holds_what_numpy_finds():
    features = correlated(0, 30, 24)
    whole = calibrate("compact", features, error=0.017)
    pieces = Calibration(24)
    for start in range(0, 30, 7):
        pieces.add(features[start : start + 7])
    assert pieces.num_units == 30 * 12
    for name, values in pieces.basis(error=0.017).items():
        np.testing.assert_array_equal(values, whole[name], err_msg=name)
    tokens = features.double().numpy()
    np.testing.assert_allclose(whole["mean"], tokens.mean((0, 1, 2)), rtol=1e-6)
    means = tokens.mean(2).reshape(-1, 24)  # of units
    expected = np.linalg.eigvalsh(np.cov(means.T, bias=True))[::-1]
    found = ((means - means.mean(0)) @ whole["components"][0].T.astype(np.float64)).var(0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)
    for components in whole["components"]:
        np.testing.assert_allclose(components @ components.T, np.eye(24), atol=1e-5)
    assert sorted(whole["order"]) == list(range(4 * 24))
    assert (np.sort(whole["pairs"], 1) == np.arange(256)).all()


def test_a_byte_holds_a_large_and_a_small_coefficient():
    features = correlated(0, 30, 24)
    basis = calibrate("compact", features, error=0.017)
    spread = CompactCodec.of(basis).coefficients(features).flatten(0, 1).square().mean(0).flatten()
    ordered = spread[torch.from_numpy(basis["order"].astype(np.int64))]
    first, second = ordered[0::2], ordered[1::2]
    assert (first.diff() <= 1e-6 * spread.max()).all()
    assert (second.diff() >= -1e-6 * spread.max()).all()
    assert first.min() >= second.max() * 0.9


def stored_codes(folder: Path, codec: CompactCodec, features: torch.Tensor) -> Path:
    """One written array, as in a part."""
    group = folder / "group"
    create_group(group, {})
    writer = ArrayWriter(group, "codes", codec.specs(features.shape[1])["codes"])
    writer.append(codec.encode(features, all_units(features)).arrays["codes"].numpy())
    writer.finish()
    return group / "codes"


@pytest.mark.parametrize("width", [1, 7, 48])
def test_the_documented_reader_gives_what_decoding_gives(width: int, tmp_path: Path):
    """The code in the document, on bytes that zarr-python read."""
    block = re.search(r"```python\n(.*?def read_compact.*?)```", DOC.read_text(), re.DOTALL)
    assert block, "docs/encodings.md has no read_compact"
    namespace: dict[str, object] = {}
    exec(block[1], namespace)  # a document of our own
    basis = calibrate("compact", correlated(0, 20, width), error=0.017)
    codec = CompactCodec.of(basis)
    features = correlated(11, 5, width)
    features[1, 2, 3, 0] = 1e4
    codes = zarr.open_array(stored_codes(tmp_path, codec, features), mode="r")[:]
    expected = codec.decode({"codes": torch.from_numpy(codes)}, all_units(features)).numpy()
    found = namespace["read_compact"](codes, basis)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    assert np.square(found - features.numpy()).sum() < 0.02 * np.square(features.numpy() - 3).sum()


def test_bits_are_near_what_reverse_water_filling_allows(tmp_path: Path):
    """Gaussian features, rows of 24 units, everything on disk counted."""
    width, error = 384, 0.017
    codec = CompactCodec.of(calibrate("compact", correlated(0, 60, width, 24), error=error))
    features = correlated(500, 16, width, 24)
    spread = codec.coefficients(features).double().square().mean((0, 1)).flatten().numpy()
    low, high = 0.0, spread.max()
    for _ in range(60):  # the water level
        level = (low + high) / 2
        low, high = (
            (level, high)
            if np.minimum(spread, level).sum() < error * spread.sum()
            else (low, level)
        )
    bound = np.maximum(0, 0.5 * np.log2(spread / level)).mean()
    array = stored_codes(tmp_path, codec, features)
    num_bytes = sum(f.stat().st_size for f in array.rglob("c*") if f.is_file())
    bits = 8 * num_bytes / features.numel()
    assert bound < bits < bound + 0.6
