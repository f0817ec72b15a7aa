"""Every odd video of the table in docs/decoding.md: right frames or a status, never others."""

import functools
from pathlib import Path

import numbered
import numpy as np
import pytest
from odd_videos import ODD

from kdhiera.data.clip import ClipError
from kdhiera.data.decode import decode_clip
from kdhiera.data.video import open_video
from kdhiera.views import FramePolicy

GOOD = [name for name, odd in ODD.items() if odd.status == "ok"]
BAD = [name for name, odd in ODD.items() if odd.status != "ok"]
PAGE = Path(__file__).parents[2] / "docs" / "decoding.md"
USUAL = {"max_frame_pixels": 8192 * 4320, "max_duration_seconds": 4 * 3600.0}


@functools.cache
def video(name):
    return ODD[name].make()


def read(frame, odd):
    """The number of a frame that came out upright."""
    return numbered.number(np.rot90(frame, -odd.turned), grey=odd.grey)


@pytest.mark.parametrize("name", [name for name in GOOD if ODD[name].shows])
def test_the_frames_asked_for_are_the_frames_returned(name, limits, request_clip):
    odd = ODD[name]
    never = set(odd.never)
    with open_video(video(name), limits(**USUAL)) as opened:
        assert opened.info.num_frames == len(odd.shows)
        found = {i: read(f, odd) for i, f in opened.frames(range(len(odd.shows)))}
        assert found == {i: n for i, n in enumerate(odd.shows) if i not in never}
        for index in range(0, len(odd.shows), 4):
            alone = {i: read(f, odd) for i, f in opened.frames([index])}
            assert alone == ({} if index in never else {index: odd.shows[index]})
    height, width = opened.info.height, opened.info.width
    for view in range(3):
        request = request_clip(view, frames=FramePolicy.UNIFORM, height=height, width=width)
        clip = decode_clip(video(name), request, limits(**USUAL))
        chosen = [odd.shows[i] for i in clip.view.frame_indices]
        assert [read(frame, odd) for frame in clip.frames] == chosen
        assert len(set(chosen)) == len(chosen)


@pytest.mark.parametrize("name", BAD)
def test_what_is_bad_becomes_a_status_with_its_reason(name, limits, request_clip):
    for view in range(2):
        with pytest.raises(ClipError) as caught:
            decode_clip(video(name), request_clip(view), limits(**USUAL))
        assert caught.value.status == ODD[name].status
        assert ODD[name].words in caught.value.message
        assert caught.value.message
        assert caught.value.message.isprintable()
