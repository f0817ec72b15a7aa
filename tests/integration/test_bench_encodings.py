"""The bench on real clips and teachers: its figures, and the bounds that encodings promise."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from real_runs import MakeConfig, kdhiera

from kdhiera.cache.encoding import ENCODINGS, calibrate
from kdhiera.demo.prepare import Prepared
from kdhiera.stages.encoding_figures import Neighbours, gaussian_bits, measure_layer, pooled


def test_gaussian_bits_follow_reverse_water_filling():
    equal = np.full(10, 4.0)
    assert gaussian_bits(equal, 0.25) == pytest.approx(1.0)  # R = log2(variance / D) / 2
    assert gaussian_bits(equal, 1.0) == pytest.approx(0.0, abs=1e-9)
    # Level 1 leaves 1 of 16 and of 4, and all of 0.5: (1 + 1 + 0.5) / 20.5 of the energy.
    expected = (np.log2(16) / 2 + np.log2(4) / 2) / 3
    assert gaussian_bits(np.array([16.0, 4.0, 0.5]), 2.5 / 20.5) == pytest.approx(expected)
    assert gaussian_bits(np.zeros(3), 0.1) == 0


def test_pooling_leaves_padding_out():
    features = torch.arange(2 * 3 * 4 * 2, dtype=torch.float32).view(2, 3, 4, 2)
    units = torch.tensor([[0, 4, -1], [1, -1, -1]])
    found = pooled(features, units)
    torch.testing.assert_close(found[0], features[0, :2].mean((0, 1)))
    torch.testing.assert_close(found[1], features[1, :1].mean((0, 1)))


def test_figures_are_what_numpy_finds():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(16, 16, generator=generator)
    features = torch.randn(24, 6, 4, 16, generator=generator) @ mixing + 2
    units = torch.arange(6).repeat(12, 1)
    units[3, 4:] = -1
    basis = calibrate("compact", features[:12], error=0.02)
    classes = np.arange(12) % 3
    neighbours = Neighbours(
        gallery=features[:12].mean((1, 2)), classes=(classes, classes), neighbours=3, temperature=1
    )
    layer = measure_layer(features[12:], units, basis, neighbours, teacher="image", layer="9")
    assert [e.encoding for e in layer.encodings] == list(ENCODINGS)
    by_name = {e.encoding: e for e in layer.encodings}
    assert by_name["fp32"].error == by_name["fp32"].standardised_error == 0
    assert by_name["fp32"].accuracy == layer.accuracy
    assert by_name["fp32"].same_neighbour == 1
    # bf16 by hand: the upper half of every float32, rounded to even.
    kept = features[12:][units >= 0].numpy().reshape(-1, 16)
    bits = kept.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    lost = (rounded.astype(np.float64) - kept) ** 2
    centred = (kept - basis["mean"].astype(np.float64)) ** 2
    found = by_name["bf16"]
    assert found.error == pytest.approx(lost.sum() / centred.sum(), rel=1e-6)
    assert found.standardised_error == pytest.approx((lost.mean(0) / centred.mean(0)).mean(), 1e-6)
    cosines = (rounded.astype(np.float64) * kept).sum(1) / (
        np.linalg.norm(rounded.astype(np.float64), axis=1) * np.linalg.norm(kept, axis=1)
    )
    assert found.worst_cosine == pytest.approx(cosines.min(), abs=1e-7)
    assert [error for _, error in layer.sweep] == sorted(error for _, error in layer.sweep)
    assert np.diff([bits for bits, _ in layer.sweep]).max() < 0
    assert by_name["compact"].error <= 0.02001


@pytest.mark.slow
def test_encodings_keep_their_bounds_on_real_clips(
    make_config: MakeConfig, demo: Prepared, tmp_path: Path
) -> None:
    """ViT-S/14 at layers 3, 6, 9 and 12, on clips that no basis was made from."""
    image = {
        "kind": "timm",
        "model": "vit_small_patch14_dinov2",
        "weights": str(demo.image_teacher),
        "layers": [3, 6, 9, 12],
    }
    config = make_config(
        "bench",
        teachers={"image": image},
        clip={"num_frames": 8, "height": 128, "width": 128},
        views={"num": 1, "frame_stride": 2},
        masks={"ratio": 0.8, "draws": 2},
        data={"shards": [str(p) for p in (*demo.unlabelled, *demo.train)]},
    )
    values = config.read_text()
    done = kdhiera("cache", "bench-encodings", config, "--clips", 64, "--out", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["calibrated"] == found["measured"] == 32
    layers = [layer for layer in found["layers"] if layer["teacher"] == "image"]
    assert [layer["layer"] for layer in layers] == ["3", "6", "9", "12"]
    for layer in layers:
        by_name = {e["encoding"]: e for e in layer["encodings"]}
        assert by_name["fp32"]["error"] == 0
        assert by_name["bf16"]["error"] < 2e-5
        assert by_name["int8"]["error"] < 2e-3
        assert by_name["int8"]["bits"] < 7
        compact = by_name["compact"]
        assert 0.016 < compact["error"] <= 0.0171
        assert compact["bits"] <= 3
        assert compact["worst_cosine"] > 0.9
        assert not any(e["lost_rows"] for e in layer["encodings"])
        least = min(layer["bound"], key=lambda point: abs(point[1] - compact["error"]))[0]
        assert compact["bits"] < least + 0.7
    assert (tmp_path / "rate-distortion.png").stat().st_size > 10_000
    assert not (tmp_path / "cache").exists()
    assert config.read_text() == values


def test_too_few_clips_are_refused_before_any_work(
    make_config: MakeConfig, shards: list[Path], tmp_path: Path
) -> None:
    config = make_config("bench")
    done = kdhiera("cache", "bench-encodings", config, "--clips", 3)
    assert done.returncode == 2
    done = kdhiera("cache", "bench-encodings", config, f"data.shards={tmp_path}/none-*.tar")
    assert done.returncode == 2
    assert "no file matches" in done.stderr
    assert "Traceback" not in done.stderr
