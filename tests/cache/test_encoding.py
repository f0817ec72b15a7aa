import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdhiera.cache.encoding import ENCODINGS
from kdhiera.cache.layout import column_arrays

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
FEATURES = arrays.arrays(np.float32, (2, 3, 4, 5), elements=FINITE)


def layer_norm_error(features: torch.Tensor, decoded: torch.Tensor) -> float:
    """Energy of the difference after an affine-free layer norm, of which the target has 1."""
    norm = torch.nn.LayerNorm(features.shape[-1], elementwise_affine=False)
    return float((norm(features) - norm(decoded)).square().mean())


@pytest.mark.parametrize("name", sorted(ENCODINGS))
def test_arrays_are_those_of_the_layout(name: str):
    specs = column_arrays(name, max_kept=3, width=5)
    encoded = ENCODINGS[name].encode(torch.randn(2, 3, 4, 5))
    assert {*encoded, "status"} == set(specs)
    for array, values in encoded.items():
        assert values.shape[1:] == specs[array].shape
        assert values.numpy().dtype == specs[array].dtype


@given(FEATURES)
def test_fp32_is_exact(features: np.ndarray):
    encoding = ENCODINGS["fp32"]
    decoded = encoding.decode(encoding.encode(torch.from_numpy(features)))
    np.testing.assert_array_equal(decoded.numpy(), features)


@settings(max_examples=300)
@given(FEATURES)
def test_int8_is_within_half_a_step_of_any_finite_value(features: np.ndarray):
    encoded = ENCODINGS["int8"].encode(torch.from_numpy(features))
    decoded = ENCODINGS["int8"].decode(encoded).numpy()
    assert np.isfinite(decoded).all()
    largest = np.abs(features.astype(np.float64)).max(-1, keepdims=True)
    step = np.maximum(largest / 127, float(np.finfo(np.float32).tiny))
    assert np.all(np.abs(decoded.astype(np.float64) - features) <= step * (0.5 + 1e-4))


def test_int8_of_zeros_is_zeros():
    features = torch.zeros(1, 2, 4, 8)
    features[0, 0, 0] = torch.linspace(-3, 3, 8)
    decoded = ENCODINGS["int8"].decode(ENCODINGS["int8"].encode(features))
    assert decoded[0, 0, 1:].abs().max() == 0
    assert decoded[0, 1].abs().max() == 0


@pytest.mark.parametrize("value", [3.4028234663852886e38, 1e-38, 1e-45])
def test_int8_survives_the_ends_of_float32(value: float):
    features = torch.tensor([[[[value, -value, 0.0, value / 2]]]])
    decoded = ENCODINGS["int8"].decode(ENCODINGS["int8"].encode(features))
    assert decoded.isfinite().all()
    assert (decoded - features).abs().max() <= max(value / 250, 1e-38)


def test_int8_codes_use_the_whole_symmetric_range():
    features = torch.randn(4, 3, 4, 64)
    encoded = ENCODINGS["int8"].encode(features)
    assert encoded["codes"].abs().amax(-1).eq(127).all()
    flipped = ENCODINGS["int8"].encode(-features)
    assert torch.equal(flipped["codes"], -encoded["codes"])


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_int8_error_after_layer_norm_is_below_the_bar_for_gaussian_features(scale: float):
    features = torch.randn(64, 6, 4, 384, generator=torch.Generator().manual_seed(0)) * scale
    decoded = ENCODINGS["int8"].decode(ENCODINGS["int8"].encode(features))
    assert layer_norm_error(features, decoded) <= 5e-4
