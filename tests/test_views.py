import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdhiera.views import (
    CropPolicy,
    FramePolicy,
    TooShortError,
    ViewPolicy,
    draw_view,
    stable_key,
    stable_uniforms,
)

POLICY = ViewPolicy(
    num_frames=8,
    height=128,
    width=128,
    frames=FramePolicy.DENSE,
    frame_stride=4,
    crop=CropPolicy.RANDOM_RESIZED,
    crop_scale=(0.5, 1.0),
    crop_ratio=(0.75, 1.3333),
    flip=False,
    allow_short=False,
    seed=1,
)


@given(
    st.sampled_from(list(FramePolicy)),
    st.integers(8, 2000),
    st.integers(1, 64),
    st.integers(0, 9),
)
def test_frames_are_distinct_ascending_and_inside(
    frames: FramePolicy, num_frames: int, stride: int, view: int
) -> None:
    policy = replace(POLICY, frames=frames, frame_stride=stride)
    drawn = draw_view(policy, uid="a", view=view, num_frames=num_frames, height=90, width=160)
    assert len(drawn.frame_indices) == 8
    steps = np.diff(drawn.frame_indices)
    assert np.all(steps > 0)
    assert drawn.frame_indices[0] >= 0
    assert drawn.frame_indices[-1] < num_frames
    if frames in (FramePolicy.DENSE, FramePolicy.DENSE_CENTER):
        assert set(steps) == {min(stride, max(1, (num_frames - 1) // 7))}


@given(st.integers(8, 500), st.integers(0, 30))
def test_uniform_takes_one_frame_of_every_segment(num_frames: int, view: int) -> None:
    policy = replace(POLICY, frames=FramePolicy.UNIFORM)
    drawn = draw_view(policy, uid="a", view=view, num_frames=num_frames, height=90, width=160)
    if num_frames >= 16:
        segments = [math.floor(i * 8 / num_frames + 1e-9) for i in drawn.frame_indices]
        assert np.all(np.abs(np.array(segments) - np.arange(8)) <= 1)


@given(st.integers(1, 7), st.sampled_from(list(FramePolicy)))
def test_short_videos_are_refused_or_repeat_frames(num_frames: int, frames: FramePolicy) -> None:
    policy = replace(POLICY, frames=frames)
    with pytest.raises(TooShortError, match=f"shows {num_frames} frames"):
        draw_view(policy, uid="a", view=0, num_frames=num_frames, height=90, width=160)
    drawn = draw_view(
        replace(policy, allow_short=True), uid="a", view=0, num_frames=num_frames, height=9, width=9
    )
    assert np.all(np.diff(drawn.frame_indices) >= 0)
    assert drawn.frame_indices[-1] < num_frames


@given(st.integers(8, 700), st.integers(8, 700), st.integers(0, 50))
def test_crops_lie_inside_and_keep_to_the_policy(height: int, width: int, view: int) -> None:
    drawn = draw_view(POLICY, uid="v", view=view, num_frames=99, height=height, width=width)
    y, x, h, w = drawn.crop
    assert 0 <= y <= y + h <= height
    assert 0 <= x <= x + w <= width
    assert h > 0
    assert w > 0
    if min(height, width) > 100 and 0.8 < width / height < 1.25:
        assert 0.48 <= h * w / (height * width) <= 1.0
        assert 0.74 <= w / h <= 1.35


def test_center_is_the_largest_centred_crop_of_the_clips_shape() -> None:
    policy = replace(POLICY, crop=CropPolicy.CENTER, height=128, width=256)
    drawn = draw_view(policy, uid="v", view=0, num_frames=99, height=300, width=400)
    assert drawn.crop == (50, 0, 200, 400)


def test_dense_center_is_the_middle_and_needs_no_luck() -> None:
    policy = replace(POLICY, frames=FramePolicy.DENSE_CENTER, frame_stride=2)
    views = {
        draw_view(policy, uid=u, view=0, num_frames=16, height=9, width=9).frame_indices
        for u in "abc"
    }
    assert views == {tuple(range(1, 16, 2))} or views == {tuple(range(0, 15, 2))}


def test_views_differ_by_sample_view_and_seed_only() -> None:
    def draw(uid: str, view: int, seed: int) -> object:
        policy = replace(POLICY, seed=seed)
        return draw_view(policy, uid=uid, view=view, num_frames=500, height=240, width=320)

    drawn = {draw(u, v, s) for u in ("a", "b") for v in (0, 1) for s in (0, 1)}
    assert len(drawn) == 8
    assert draw("a", 1, 0) == draw("a", 1, 0)


def test_every_second_view_is_mirrored_if_asked() -> None:
    policy = replace(POLICY, flip=True)
    flips = [
        draw_view(policy, uid="a", view=v, num_frames=50, height=90, width=160).flip
        for v in range(4)
    ]
    assert flips == [False, True, False, True]


def test_stable_numbers_keep_their_values() -> None:
    """Views and masks of stored caches depend on these: they may never change."""
    assert stable_key("unit", 0, "shard/0/key", 1, 2) == 251677603826157922359246048453940856096
    assert stable_uniforms(3, "unit", 0, "shard/0/key", 1, 2).tolist() == [
        0.13655926122248252,
        0.8447638293677816,
        0.16805482006331018,
    ]


def test_stable_uniforms_are_uniform_inside_the_open_interval() -> None:
    u = stable_uniforms(100_000, "test")
    assert u.min() > 0
    assert u.max() < 1
    counts = np.bincount((u * 20).astype(int), minlength=20)
    chi2 = ((counts - 5000) ** 2 / 5000).sum()
    assert chi2 < 50  # 19 degrees of freedom


@given(st.integers(8, 400), st.integers(1, 8), st.integers(1, 10))
def test_clips_are_spread_evenly_over_the_video(num_frames: int, stride: int, clips: int) -> None:
    policy = replace(
        POLICY, frames=FramePolicy.DENSE_CENTER, crop=CropPolicy.CENTER, frame_stride=stride
    )

    def starts(clips: int) -> list[int]:
        spread = replace(policy, clips=clips)
        views = (
            draw_view(spread, uid="a", view=v, num_frames=num_frames, height=90, width=160)
            for v in range(spread.num_spread)
        )
        return [view.frame_indices[0] for view in views]

    used = max(1, min(stride, (num_frames - 1) // 7))
    room = num_frames - 7 * used
    wanted = [math.floor((i + 0.5) * room / clips + 1e-9) for i in range(clips)]
    assert starts(clips) == wanted
    assert wanted[-1] + 7 * used < num_frames
    assert starts(1) == [room // 2]


@given(st.integers(8, 400), st.integers(1, 10))
def test_uniform_clips_are_spread_evenly_over_every_segment(num_frames: int, clips: int) -> None:
    policy = replace(POLICY, frames=FramePolicy.UNIFORM_CENTER, clips=clips)
    for clip in range(clips):
        view = draw_view(policy, uid="a", view=clip, num_frames=num_frames, height=9, width=9)
        length = Fraction(num_frames, 8)
        exact = [math.floor(length * (i + Fraction(2 * clip + 1, 2 * clips))) for i in range(8)]
        if len(set(exact)) == 8:
            assert np.abs(np.subtract(view.frame_indices, exact)).max() <= (num_frames < 16)
        again = draw_view(policy, uid="b", view=clip, num_frames=num_frames, height=9, width=9)
        assert again.frame_indices == view.frame_indices


@pytest.mark.parametrize(("height", "width"), [(90, 160), (160, 90), (128, 128)])
def test_three_crops_reach_from_edge_to_edge(height: int, width: int) -> None:
    policy = replace(
        POLICY, frames=FramePolicy.DENSE_CENTER, crop=CropPolicy.CENTER, clips=2, crops=3
    )
    views = [
        draw_view(policy, uid="a", view=v, num_frames=100, height=height, width=width)
        for v in range(policy.num_spread)
    ]
    assert len(views) == 6
    assert len({v.frame_indices for v in views}) == 2
    side = min(height, width)
    room = max(height, width) - side
    for clip in (views[:3], views[3:]):
        assert len({v.frame_indices for v in clip}) == 1
        offsets = [max(v.crop[:2]) for v in clip]
        assert offsets == [0, room // 2, room]
        assert {v.crop[2:] for v in clip} == {(side, side)}
    one = draw_view(
        replace(policy, crops=1), uid="a", view=0, num_frames=100, height=height, width=width
    )
    assert one.crop == views[1].crop
