from dataclasses import replace
from pathlib import Path

import pytest
from places import Place

from kdhiera.data.clip import ClipRequest, DecodeLimits
from kdhiera.views import CropPolicy, FramePolicy, ViewPolicy

LIMITS = DecodeLimits(
    backend="auto",
    deadline_seconds=60.0,
    max_frame_pixels=10**7,
    max_duration_seconds=1000.0,
    max_video_bytes=10**8,
    max_memory_bytes=4 * 2**30,
    clips_per_child=1000,
)
POLICY = ViewPolicy(
    num_frames=8,
    height=48,
    width=96,
    frames=FramePolicy.UNIFORM,
    frame_stride=2,
    crop=CropPolicy.CENTER,
    crop_scale=(1.0, 1.0),
    crop_ratio=(1.0, 1.0),
    flip=False,
    allow_short=False,
    seed=3,
)


@pytest.fixture
def limits():
    """Makes limits that differ from the usual ones in what is given."""
    return lambda **changes: replace(LIMITS, **changes)


@pytest.fixture
def request_clip():
    """Makes requests: of the whole frame, eight frames, unless told otherwise."""

    def make(view=0, uid="shard/0/key", replay=None, replay_decoder=None, **policy):
        return ClipRequest(
            uid=uid,
            view=view,
            policy=replace(POLICY, **policy),
            replay=replay,
            replay_decoder=replay_decoder,
        )

    return make


@pytest.fixture(scope="session")
def hanging_video():
    """An ordinary stream-copied cut; decord 0.6.0 hangs for ever when asked for its frames."""
    return (Path(__file__).parent / "decord_hang.mp4").read_bytes()


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path):
    """Somewhere to put shards; whoever reads them must not see a difference."""
    if request.param == "disk":
        return Place(str(tmp_path / "place"))
    return Place(request.getfixturevalue("s3_url"))
