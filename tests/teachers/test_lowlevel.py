"""Pixels and HOG against slow formulas, pixel by pixel."""

import math

import numpy as np
import pytest
import torch
from small_models import GRID, random_clips

from kdhiera.config import TeacherConfig
from kdhiera.errors import UsageError
from kdhiera.grid import Grid
from kdhiera.teachers.build import build_teacher
from kdhiera.teachers.lowlevel import hog_targets

CPU = torch.device("cpu")


def teacher_of(kind: str, grid: Grid = GRID):
    config = TeacherConfig.model_validate({"kind": kind})
    return build_teacher(config, grid=grid, device=CPU)


def slow_hog(image: np.ndarray) -> np.ndarray:
    """HOG of one colour plane `[y, x]`: `[rows, columns, 2, 2, 9]` by the definition."""
    height, width = image.shape
    cells = np.zeros((height // 8, width // 8, 9))
    for y in range(height):
        for x in range(width):
            down = image[y + 1, x] - image[y - 1, x] if 0 < y < height - 1 else 0.0
            right = image[y, x + 1] - image[y, x - 1] if 0 < x < width - 1 else 0.0
            degrees = math.degrees(math.atan2(down, right)) % 180.0
            cells[y // 8, x // 8, int(degrees // 20) % 9] += math.hypot(down, right) / 64
    blocks = np.zeros((height // 16, width // 16, 2, 2, 9))
    for y in range(height // 16):
        for x in range(width // 16):
            block = cells[2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
            block = block / math.sqrt((block**2).sum() + 1e-10)
            block = np.minimum(block, 0.2)
            blocks[y, x] = block / math.sqrt((block**2).sum() + 1e-10)
    return blocks


def test_hog_is_the_definition():
    clips = random_clips(1, Grid(num_frames=2, height=32, width=64))
    found = teacher_of("hog", Grid(num_frames=2, height=32, width=64))(clips, ["patch"], None)
    frame = clips[0, 0].double().numpy()
    expected = np.stack([slow_hog(frame[:, :, c]) for c in range(3)], axis=2)
    features = found.features["patch"]
    assert features.shape == (1, 1, 2, 4, 108)
    np.testing.assert_allclose(
        features[0, 0].numpy(), expected.reshape(2, 4, 108), rtol=1e-4, atol=1e-6
    )


def test_hog_agrees_with_scikit_image():
    """Values of scikit-image 0.26.0, whose 2 x 2 blocks at every second cell are our patches:

    h = skimage.feature.hog(image, 9, (8, 8), (2, 2), "L2-Hys", feature_vector=False)[::2, ::2]
    h.sum(), h[1, 0, 0, 0]
    """
    expected_sum = 21.630947122297577
    expected_cell = [0.2223777, 0.2312795, 0.0361391, 0.2045599, 0.2452942, 0.2029897]
    expected_cell += [0.0306173, 0.1002751, 0.1474639]
    y, x = np.mgrid[:32, :32]
    image = ((7 * y * y + 13 * x * y + 3 * x * x) % 256).astype(np.uint8)
    frames = torch.from_numpy(image)[None, None, :, :, None].expand(1, 1, 32, 32, 3)
    found = hog_targets(frames.contiguous())[0, 0].reshape(2, 2, 3, 36)
    assert torch.equal(found[:, :, 0], found[:, :, 2])
    assert float(found[:, :, 0].double().sum()) == pytest.approx(expected_sum, rel=1e-5)
    np.testing.assert_allclose(found[1, 0, 1].numpy()[:9], expected_cell, rtol=1e-4, atol=1e-6)


def test_a_horizontal_gradient_has_angle_zero_both_ways():
    ramp = torch.arange(32, dtype=torch.uint8).mul(4).expand(32, 32)
    frames = torch.stack([ramp, ramp.flip(1)])[None, :, :, :, None].expand(1, 2, 32, 32, 3)
    found = hog_targets(frames.contiguous()).reshape(2, 2, 2, 3, 4, 9)
    assert (found[..., 0] > 0.4).all()
    assert (found[..., 1:] == 0).all()


def test_a_flat_patch_is_zero_not_nan():
    flat = torch.full((1, 2, 32, 32, 3), 77, dtype=torch.uint8)
    for kind in ("hog", "pixels"):
        out = teacher_of(kind, Grid(num_frames=2, height=32, width=32))(flat, ["patch"], None)
        assert (out.features["patch"] == 0).all()


def test_pixels_are_each_patch_normalised():
    clips = random_clips()
    out = teacher_of("pixels")(clips, ["patch"], None).features["patch"]
    assert out.shape == (2, 2, 4, 6, 768)
    for b, t, h, w in [(0, 0, 0, 0), (1, 1, 3, 5), (0, 1, 2, 1)]:
        patch = clips[b, 2 * t, 16 * h : 16 * h + 16, 16 * w : 16 * w + 16].double() / 255
        values = patch.reshape(-1)  # y, x, colour
        expected = (values - values.mean()) / math.sqrt(float(values.var()) + 1e-6)
        torch.testing.assert_close(out[b, t, h, w].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["pixels", "hog"])
def test_they_look_at_the_first_frame_of_a_tubelet_only(kind: str):
    clips = random_clips()
    changed = clips.clone()
    changed[:, 1::2] = 0
    teacher = teacher_of(kind)
    assert torch.equal(
        teacher(clips, ["patch"], None).features["patch"],
        teacher(changed, ["patch"], None).features["patch"],
    )


@pytest.mark.parametrize("kind", ["pixels", "hog"])
def test_they_have_one_layer_and_no_scores(kind: str):
    teacher = teacher_of(kind)
    with pytest.raises(UsageError, match=f"kind {kind} has the layer `patch` only"):
        teacher.check(["12"], None)
    with pytest.raises(UsageError, match="gives no scores, got score source 'feature_norm'"):
        teacher.check([], "feature_norm")


def test_settings_without_use_are_errors():
    for extra, words in [
        ({"weights": "x.pth"}, "no use for `weights`"),
        ({"precision": "bf16"}, "always computes in fp32"),
        ({"compile": True}, "no use for `compile`"),
        ({"options": {"bins": 8}}, "no use for `options`"),
    ]:
        with pytest.raises(ValueError, match=words):
            TeacherConfig.model_validate({"kind": "hog", **extra})
    assert TeacherConfig.model_validate({"kind": "hog", "precision": "auto"}).precision == "fp32"
    assert TeacherConfig.model_validate({"kind": "pixels"}).layers == ("patch",)
