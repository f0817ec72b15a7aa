"""Drawing, against Pillow's own compositing and against what a pair must share."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdhiera.demo.draw import draw_clips, draw_object
from kdhiera.demo.task import Axis, TaskSpec, Trajectory
from kdhiera.demo.video import decode, encode

SPEC = TaskSpec(size_px=64, num_frames=8)


@pytest.fixture
def stamp(tmp_path: Path) -> Path:
    """A red disc with a soft edge and a green right half, in a wide empty border."""
    y, x = np.mgrid[-30:30, -40:40]
    alpha = np.clip(20 - np.hypot(y, x), 0, 1) * 255
    picture = np.zeros((60, 80, 4), np.uint8)
    picture[..., 0] = 255
    picture[:, 40:, :2] = (0, 255)
    picture[..., 3] = alpha
    Image.fromarray(picture).save(tmp_path / "disc.png")
    return tmp_path / "disc.png"


def trajectory(stamp: Path, **changes: object) -> Trajectory:
    values: dict[str, object] = {
        "number": 0,
        "category": "disc",
        "stamp": stamp,
        "mirrored": False,
        "scale": 0.4,
        "background": "any",
        "background_start": 0.5,
        "background_crop": (0.0, 0.0, 1.0),
        "axis": Axis.HORIZONTAL,
        "start": 0.1,
        "travel": 0.5,
        "across": 0.3,
    }
    return Trajectory(**(values | changes))


def moving_background(frames: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, 64, 64, 3), dtype=np.uint8)


def test_object_has_its_scale_and_no_border(stamp: Path) -> None:
    colour, opacity = draw_object(trajectory(stamp), 160)
    assert np.sqrt(opacity.shape[0] * opacity.shape[1]) == pytest.approx(64, abs=1)
    assert opacity.max() == 1
    assert (colour <= 255 * opacity + 1).all()  # premultiplied
    mirrored = draw_object(trajectory(stamp, mirrored=True), 160)[0]
    assert colour[32, 10, 0] > 250
    assert mirrored[32, -10, 0] > 250


def test_pasting_agrees_with_pillow(stamp: Path) -> None:
    plan = trajectory(stamp, axis=Axis.VERTICAL, travel=0.0, start=0.2)
    video = moving_background()
    forward, _ = draw_clips(SPEC, plan, video)
    colour, opacity = draw_object(plan, 64)
    straight = np.divide(colour, opacity, out=np.zeros_like(colour), where=opacity > 0)
    layer = np.concatenate([straight, 255 * opacity], axis=-1).round().clip(0, 255)
    y, x = plan.offsets(8, 64, *opacity.shape[:2])[0]
    expected = Image.fromarray(video[6]).convert("RGBA")
    expected.alpha_composite(Image.fromarray(layer.astype(np.uint8)), (int(x), int(y)))
    difference = forward[0].astype(int) - np.asarray(expected.convert("RGB"))
    assert abs(difference).max() <= 2


@pytest.mark.parametrize("axis", list(Axis))
def test_pair_shares_positions_and_its_background_runs_forward(stamp: Path, axis: Axis) -> None:
    plan = trajectory(stamp, axis=axis, start=0.6)  # crosses the edge on its way
    black = np.zeros((20, 64, 64, 3), np.uint8)
    forward, backward = draw_clips(SPEC, plan, black)
    np.testing.assert_array_equal(forward, backward[::-1])
    assert not np.array_equal(forward, backward)
    noise = moving_background()
    forward_over, backward_over = draw_clips(SPEC, plan, noise)
    start = int(0.5 * (20 - 8 + 1))
    for clip, alone in ((forward_over, forward), (backward_over, backward)):
        empty = alone.max(-1) == 0
        np.testing.assert_array_equal(clip[empty], noise[start : start + 8][empty])


def test_whole_object_is_in_every_frame(stamp: Path) -> None:
    for start in (0.0, 0.4, 0.7, 0.95):
        black = np.zeros((8, 64, 64, 3), np.uint8)
        clip, _ = draw_clips(SPEC, trajectory(stamp, start=start), black)
        lit = clip.sum(axis=(1, 2, 3), dtype=np.int64)
        assert np.ptp(lit) <= 0.001 * lit.mean()


def test_direction_is_what_it_says(stamp: Path) -> None:
    black = np.zeros((8, 64, 64, 3), np.uint8)
    for axis, column in ((Axis.HORIZONTAL, 1), (Axis.VERTICAL, 0)):
        clip, _ = draw_clips(SPEC, trajectory(stamp, axis=axis, start=0.05, travel=0.4), black)
        places = [np.argwhere(frame.max(-1) > 0).mean(0)[column] for frame in clip]
        assert (np.diff(places) > 0).all()  # right, or down


def test_encoding_is_deterministic_and_close(stamp: Path) -> None:
    grey = np.full((8, 64, 64, 3), 128, np.uint8)
    clip, _ = draw_clips(SPEC, trajectory(stamp), grey)
    video = encode(clip, 12)
    assert encode(clip, 12) == video
    path = stamp.with_name("clip.mp4")
    path.write_bytes(video)
    shown = decode(path, 64)
    assert shown.shape == clip.shape
    # Half-resolution colour costs a saturated edge much, the rest little.
    assert abs(shown.astype(int) - clip).mean() < 4
