"""Every encoding gives back what it promises."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdhiera.cache.encoding import (
    ENCODINGS,
    NEEDS_BASIS,
    Codec,
    basis_from_npz,
    basis_to_npz,
    calibrate,
    make_codec,
)

WIDTH = 6


def some(seed: int = 0, rows: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 5, 4, WIDTH, generator=generator) * 3 + 1


def codec_of(name: str) -> Codec:
    basis = calibrate(name, some(9, rows=40), error=0.002) if name in NEEDS_BASIS else None
    return make_codec(name, width=WIDTH, basis=basis)


def units_of(features: torch.Tensor) -> torch.Tensor:
    return torch.arange(features.shape[1]).expand(len(features), -1)


@pytest.mark.parametrize("name", ENCODINGS)
def test_arrays_are_what_the_specs_say_and_come_back_close(name: str):
    codec, features = codec_of(name), some()
    specs = codec.specs(5)
    encoded = codec.encode(features, units_of(features))
    assert encoded.representable.all()
    assert encoded.arrays.keys() == specs.keys()
    for array, values in encoded.arrays.items():
        assert values.numpy().dtype == specs[array].dtype
        assert tuple(values.shape) == (3, *specs[array].shape)
        assert len(specs[array].axes) == values.ndim
    error = (codec.decode(encoded.arrays, units_of(features)) - features).square().sum()
    allowed = 2.1e-3 if name == "compact" else 3e-4
    assert error <= allowed * (features - features.mean()).square().sum()


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_unit_decodes_from_its_own_slice(name: str):
    codec, features = codec_of(name), some()
    units = units_of(features)
    arrays = codec.encode(features, units).arrays
    whole = codec.decode(arrays, units)
    picked = codec.decode({n: a[:, [3, 1]] for n, a in arrays.items()}, units[:, [3, 1]])
    torch.testing.assert_close(picked, whole[:, [3, 1]], rtol=1e-6, atol=1e-6)


def test_exact_types_are_numpys():
    features = some()
    units = units_of(features)
    fp32 = codec_of("fp32").encode(features, units).arrays["codes"]
    np.testing.assert_array_equal(fp32.numpy(), features.numpy())
    fp16 = codec_of("fp16").encode(features, units).arrays["codes"]
    np.testing.assert_array_equal(fp16.numpy(), features.numpy().astype(np.float16))
    bits = codec_of("bf16").encode(features, units).arrays["codes"].numpy().astype(np.uint32) << 16
    assert np.abs(bits.view(np.float32) / features.numpy() - 1).max() <= 2.0**-8


@pytest.mark.parametrize(("name", "value"), [("fp16", 70000.0), ("bf16", 3.4e38), ("int8", 3.4e38)])
def test_a_value_beyond_the_range_loses_its_row_and_no_other(name: str, value: float):
    features = some()
    features[1, 2, 3, 4] = value
    codec = codec_of(name)
    encoded = codec.encode(features, units_of(features))
    assert encoded.representable.tolist() == [True, False, True]
    assert codec.decode(encoded.arrays, units_of(features)).isfinite().all()


@given(st.integers(0, 200), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_int8_errs_by_half_a_step_at_most(seed: int, size: float):
    features = some(seed) * size
    codec = codec_of("int8")
    arrays = codec.encode(features, units_of(features)).arrays
    error = (codec.decode(arrays, units_of(features)) - features).abs()
    assert (error <= 0.5001 * arrays["scale"][..., None]).all()


@given(seed=st.integers(0, 200), outlier=st.sampled_from([30.0, 300.0, 1e4, 1e8]))
def test_int8_keeps_outliers_to_two_per_cent_and_the_rest_to_half_a_step(seed: int, outlier: float):
    features = torch.randn(2, 3, 4, 384, generator=torch.Generator().manual_seed(seed))
    features[..., 17] *= outlier
    codec = codec_of("int8")
    arrays = codec.encode(features, units_of(features)).arrays
    decoded = codec.decode(arrays, units_of(features))
    scale = arrays["scale"][..., None]
    assert ((decoded - features).abs() <= torch.maximum(0.51 * scale, 0.021 * features.abs())).all()
    # Its scale is what the root mean square asks for: four times finer than a maximum's.
    rms = features.square().mean(-1, keepdim=True).sqrt()
    assert (scale <= 1.01 * rms / 20).all()


def test_int8_keeps_zeros_and_extremes():
    features = torch.zeros(1, 2, 4, WIDTH)
    features[0, 1] = 3e38
    codec = codec_of("int8")
    encoded = codec.encode(features, units_of(features))
    decoded = codec.decode(encoded.arrays, units_of(features))
    assert encoded.representable.all()
    assert (decoded[0, 0] == 0).all()
    torch.testing.assert_close(decoded[0, 1], features[0, 1], rtol=0.02, atol=0)


def test_int8_scales_have_eight_significant_bits():
    scale = codec_of("int8").encode(some(), units_of(some())).arrays["scale"]
    assert torch.equal(scale, scale.bfloat16().float())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ENCODINGS)
def test_a_row_comes_out_the_same_alone_and_in_a_batch(name: str, threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        features = torch.randn(9, 24, 4, 96, generator=torch.Generator().manual_seed(5))
        basis = calibrate(name, features, error=0.017) if name in NEEDS_BASIS else None
        codec = make_codec(name, width=96, basis=basis)
        units = units_of(features).clone()
        units[3, 20:] = -1
        features[3, 20:] = 0
        together = codec.encode(features, units).arrays
        for i in range(len(features)):
            alone = codec.encode(features[i : i + 1], units[i : i + 1]).arrays
            for array, values in alone.items():
                assert torch.equal(values[0], together[array][i]), (array, i)
    finally:
        torch.set_num_threads(before)


def test_a_basis_file_is_the_basis_and_anything_else_is_refused():
    basis = calibrate("compact", some(), error=0.01)
    data = basis_to_npz(basis)
    back = basis_from_npz(data)
    assert basis.keys() == back.keys()
    for name, values in basis.items():
        np.testing.assert_array_equal(back[name], values)
    for bad in (b"", b"nonsense", data[: len(data) // 2]):
        with pytest.raises(ValueError, match=r".*"):
            basis_from_npz(bad)


def test_unknown_encodings_and_a_missing_basis_are_refused():
    with pytest.raises(ValueError, match="no encoding is named 'int4'"):
        make_codec("int4", width=WIDTH)
    with pytest.raises(ValueError, match="needs its basis"):
        make_codec("compact", width=WIDTH)
