"""Every odd video of the table in docs/decoding.md: right frames or a status, never others."""

import functools
import importlib.util
from pathlib import Path

import numbered
import numpy as np
import pytest
from odd_videos import ODD, table

from kdhiera.data.clip import Clip, ClipError
from kdhiera.data.decode import decode_clip
from kdhiera.data.sandbox import Sandbox
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


def test_the_page_says_of_every_video_what_becomes_of_it():
    lines = PAGE.read_text().splitlines()
    start = lines.index("| video | becomes |") + 2
    assert lines[start : start + len(ODD)] == table()


OTHERS = [
    "decord",
    pytest.param(
        "torchcodec",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("torchcodec") is None, reason="the extra kdhiera[torchcodec]"
        ),
    ),
]


@pytest.mark.parametrize("backend", OTHERS)
def test_another_decoder_gives_the_frames_asked_for_or_none(backend, limits, request_clip):
    """In children: one of the videos hangs decord for ever."""
    wrong, right = [], 0
    with Sandbox(
        limits(**USUAL, backend=backend, deadline_seconds=20.0), num_children=1
    ) as sandbox:
        for name, odd in ODD.items():
            if name == "the cut that hangs decord":
                continue  # a test of its own: test_sandbox.py
            for view in range(2):
                request = request_clip(view, frames=FramePolicy.UNIFORM)
                outcome = sandbox.submit(video(name), request).result()
                if isinstance(outcome, Clip):
                    chosen = [odd.shows[i] for i in outcome.view.frame_indices] if odd.shows else []
                    same = [read(frame, odd) for frame in outcome.frames] == chosen
                    right += same
                    wrong += [] if same and outcome.decoder == backend else [name]
    assert wrong == []
    assert right > 30
