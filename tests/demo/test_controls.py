"""The controls: silent on the task as it is drawn, loud on a task that leaks."""

from pathlib import Path

import numpy as np
import pytest

from kdhiera.demo.assets import Assets
from kdhiera.demo.controls import Clips, motion, read_clips, run_controls
from kdhiera.demo.render import render_task
from kdhiera.demo.task import SPLITS, TaskSpec
from kdhiera.errors import UsageError
from kdhiera.results import Control

SPEC = TaskSpec(size_px=64, train=192, validation=72, test=144, window_px=64, window_frames=128)


@pytest.fixture(scope="module")
def drawn(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Clips]:
    out = tmp_path_factory.mktemp("controls") / "shards"
    render_task(SPEC, videos=assets.videos, stamps=assets.stamps, out=out, num_processes=1)
    return {
        split: read_clips(sorted(out.glob(f"{split}-*.tar")), size_px=SPEC.size_px)
        for split in SPLITS
    }


def by_name(results: list[Control]) -> dict[str, Control]:
    return {result.name: result for result in results}


def test_task_needs_order(drawn: dict[str, Clips]) -> None:
    results = by_name(run_controls(drawn, resamples=500))
    for result in results.values():
        assert result.holds, result
        assert result.num_clips == SPEC.test
    # Nearly exact: a pair shares its positions, every second of which is read here.
    assert results["positions, sorted"].accuracy.value == pytest.approx(0.5, abs=0.05)
    assert results["positions in order"].accuracy.value == 1.0
    assert results["motion, frames in order"].accuracy.value > 0.8


def test_image_features_are_found_by_key(drawn: dict[str, Clips]) -> None:
    telling = {
        key: np.array([sign, 1.0])
        for clips in drawn.values()
        for key, sign in zip(clips.keys, clips.positive, strict=True)
    }
    result = by_name(run_controls(drawn, image_features=telling, resamples=200))
    assert result["image teacher, pooled"].accuracy.value == 1.0
    assert not result["image teacher, pooled"].holds


def leaking(count: int, seed: int) -> Clips:
    """The first version's fault: starts near the centre and a fixed way to go."""
    rng = np.random.default_rng(seed)
    positive = np.arange(count) % 2
    way = np.linspace(0, 0.3, 8) * (2 * positive[:, None] - 1)
    centres = np.stack(
        [rng.uniform(0.3, 0.7, (count, 8)), 0.5 - way.mean(1)[:, None] + way], axis=-1
    )
    return Clips(
        keys=tuple(f"{seed}-{i}" for i in range(count)),
        thumbnails=rng.random((count, 8, 16, 16), dtype=np.float32),
        centres=centres,
        vertical=(np.arange(count) // 2 % 2).astype(bool),
        positive=positive,
        objects=np.array([f"o{i % 20}" for i in range(count)]),
        backgrounds=np.array([f"b{i % 3}" for i in range(count)]),
    )


def test_leak_in_the_first_frame_is_caught() -> None:
    splits = {split: leaking(200, seed) for seed, split in enumerate(SPLITS)}
    horizontal = by_name(run_controls(splits, resamples=200))["position in the first frame"]
    assert not horizontal.holds
    assert horizontal.accuracy.value > 0.7


def test_motion_finds_the_shift() -> None:
    clip = np.zeros((1, 6, 16, 16))
    for t in range(6):
        clip[0, t, 4:7, 2 * t : 2 * t + 3] = 1  # two pixels to the right a frame
    fits = motion(clip).reshape(7, 7)
    assert np.unravel_index(fits.argmax(), fits.shape) == (3, 5)
    backwards = motion(clip[:, ::-1]).reshape(7, 7)
    np.testing.assert_allclose(backwards, fits[::-1, ::-1], atol=1e-6)


def test_no_shards_is_said() -> None:
    with pytest.raises(UsageError, match="no labelled shards"):
        read_clips([], size_px=64)


def test_clips_are_read_in_order(drawn: dict[str, Clips]) -> None:
    test = drawn["test"]
    assert test.thumbnails.shape == (144, 8, 16, 16)
    assert list(test.keys) == sorted(test.keys)
    assert (test.positive == np.arange(144) % 2 ^ 1).all()
    assert Path(test.objects[0]).parts[0] == "bird"
