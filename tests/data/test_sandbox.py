"""Decode children: what they do to the rest when they hang, crash or are killed. Real ones."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import numbered
import pytest
from odd_videos import ODD

from kdhiera.data.clip import Clip, DecodeFailure, LookRequest
from kdhiera.data.decode import decode_clip
from kdhiera.data.ordered import decode_samples
from kdhiera.data.sandbox import Sandbox
from kdhiera.data.shards import Sample
from kdhiera.errors import KdhieraError, UsageError
from kdhiera.views import RowStatus

VIDEO = numbered.render(30, b_frames=2)


def children():
    """Process ids of this process's decode children, zombies included; others are not ours."""
    own = os.getpid()
    return {
        int(stat.parent.name)
        for stat in Path("/proc").glob("[0-9]*/stat")
        if _parent(stat) == own and _decodes(stat.parent)
    }


def _decodes(process):
    try:
        command = (process / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return b"kdhiera.data.sandbox" in command or not command


def _parent(stat):
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def gone(pid, seconds=10.0):
    """Whether a process ends in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


def is_right(clip):
    return (
        isinstance(clip, Clip) and tuple(numbered.numbers(clip.frames)) == clip.view.frame_indices
    )


def test_a_child_gives_what_decoding_here_gives(limits, request_clip):
    with Sandbox(limits(), num_children=1) as sandbox:
        for view in range(3):
            clip = sandbox.submit(VIDEO, request_clip(view, flip=True)).result()
            here = decode_clip(VIDEO, request_clip(view, flip=True), limits())
            assert (clip.frames == here.frames).all()
            assert (clip.view, clip.crc32c, clip.decoder) == (here.view, here.crc32c, here.decoder)
            replay = request_clip(9, replay=clip.view, replay_decoder=clip.decoder)
            assert (sandbox.submit(VIDEO, replay).result().frames == clip.frames).all()


def test_a_look_says_what_a_video_is_and_how_its_frames_decode(limits):
    with Sandbox(limits(), num_children=1) as sandbox:
        look = sandbox.look(ODD["lost slices"].make(), LookRequest(indices=(0, 1, 20))).result()
        assert (look.info.codec, look.info.num_frames, look.info.num_packets) == ("h264", 30, 30)
        flaws = [bool(frame.flaw) for frame in look.frames]
        assert flaws == [False, False, True]
        assert any("h264: " in line for line in look.said)
        assert all(line.isprintable() for line in look.said)
        whole = sandbox.look(VIDEO, LookRequest()).result()
        assert [frame.index for frame in whole.frames] == [i * 29 // 15 for i in range(16)]
        assert (whole.said, whole.failure) == ((), None)
        none = sandbox.look(b"no video", LookRequest()).result()
        assert (none.info, none.failure.status) == (None, RowStatus.DECODE_ERROR)


def test_failures_keep_their_status_and_words(limits, request_clip):
    with Sandbox(limits(max_frame_pixels=10_000), num_children=1) as sandbox:
        cases = {
            b"": (RowStatus.DECODE_ERROR, "0 bytes"),
            b"#EXTM3U\nhttp://127.0.0.1:1/": (RowStatus.DECODE_ERROR, "#EXTM3U"),
            numbered.audio_only(): (RowStatus.DECODE_ERROR, "no video stream"),
            VIDEO[: len(VIDEO) // 2]: (RowStatus.DECODE_ERROR, "moov atom not found"),
            numbered.render(3): (RowStatus.TOO_SHORT, "3 frames"),
            numbered.render(9, size=(320, 240)): (RowStatus.DECODE_LIMIT, "320x240"),
        }
        for data, (status, words) in cases.items():
            failure = sandbox.submit(data, request_clip()).result()
            assert isinstance(failure, DecodeFailure)
            assert failure.status is status
            assert words in failure.message
            assert failure.message.isprintable()
        assert is_right(sandbox.submit(VIDEO, request_clip()).result())


def test_a_decoder_that_hangs_is_killed_at_the_deadline(limits, request_clip, hanging_video):
    request = request_clip(height=96, width=160)
    with Sandbox(limits(backend="decord", deadline_seconds=2.0), num_children=1) as sandbox:
        started = time.monotonic()
        hung = sandbox.submit(hanging_video, request)
        after = sandbox.submit(VIDEO, request_clip())
        assert hung.result() == DecodeFailure(
            status=RowStatus.DECODE_TIMEOUT, message="no clip after decode.deadline_seconds (2 s)"
        )
        assert 2.0 <= time.monotonic() - started < 20.0
        assert is_right(after.result())
        assert after.result().decoder == "decord"
    with Sandbox(limits(), num_children=1) as sandbox:
        clip = sandbox.submit(hanging_video, request).result()
        reference = numbered.all_frames(hanging_video)
        assert clip.num_frames == len(reference) == 115
        for index, frame in zip(clip.view.frame_indices, clip.frames, strict=True):
            assert (frame == reference[index]).all()


def test_a_stopped_child_is_killed_too(limits, request_clip):
    with Sandbox(limits(deadline_seconds=1.0), num_children=1) as sandbox:
        assert is_right(sandbox.submit(VIDEO, request_clip()).result())
        (child,) = children()
        os.kill(child, signal.SIGSTOP)
        failure = sandbox.submit(VIDEO, request_clip()).result()
        assert failure.status is RowStatus.DECODE_TIMEOUT
        assert gone(child)
        assert is_right(sandbox.submit(VIDEO, request_clip()).result())


def test_a_child_killed_between_clips_is_replaced(limits, request_clip):
    with Sandbox(limits(), num_children=1) as sandbox:
        for _ in range(3):
            assert is_right(sandbox.submit(VIDEO, request_clip()).result())
            (child,) = children()
            os.kill(child, signal.SIGKILL)
            assert gone(child)
        assert is_right(sandbox.submit(VIDEO, request_clip()).result())


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGKILL, None),  # says nothing of the video, so it is tried again
        (signal.SIGSEGV, RowStatus.DECODE_ERROR),
        (signal.SIGABRT, RowStatus.DECODE_ERROR),
    ],
)
def test_a_child_that_dies_at_work(number, status, limits, request_clip):
    with Sandbox(limits(), num_children=1) as sandbox:
        assert is_right(sandbox.submit(VIDEO, request_clip()).result())
        (child,) = children()
        os.kill(child, signal.SIGSTOP)  # so that it is still there when the request arrives
        pending = sandbox.submit(VIDEO, request_clip(1))
        time.sleep(0.2)
        os.kill(child, number)
        os.kill(child, signal.SIGCONT)
        outcome = pending.result()
        if status is None:
            assert is_right(outcome)
        else:
            message = f"the decode process died of {number.name}"
            assert outcome == DecodeFailure(status=status, message=message)
        assert is_right(sandbox.submit(VIDEO, request_clip(2)).result())


def test_whoever_always_gets_killed_becomes_a_failure(limits, request_clip):
    stop = threading.Event()

    def kill():
        while not stop.is_set():
            for child in children():
                with contextlib.suppress(ProcessLookupError):  # gone since it was listed
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.001)

    with Sandbox(limits(deadline_seconds=5.0), num_children=1) as sandbox:
        assert is_right(sandbox.submit(VIDEO, request_clip()).result())
        killer = threading.Thread(target=kill)
        for child in children():
            os.kill(child, signal.SIGSTOP)
        pending = sandbox.submit(VIDEO, request_clip())
        time.sleep(0.2)
        killer.start()
        error = pending.exception()  # no child gets as far as its first message
        stop.set()
        killer.join()
        assert isinstance(error, KdhieraError)
        assert "does not start" in str(error)
        assert is_right(sandbox.submit(VIDEO, request_clip()).result())


def test_memory_is_limited(limits, request_clip):
    big = numbered.render(2, size=(3840, 2160), options={"preset": "ultrafast"})
    wanted = request_clip(num_frames=2, height=32, width=64)
    with Sandbox(limits(), num_children=1) as sandbox:
        assert isinstance(sandbox.submit(big, wanted).result(), Clip)
    with Sandbox(limits(max_memory_bytes=500 * 2**20), num_children=1) as sandbox:
        heavy = sandbox.submit(b"\0\0\0\x18ftypisom" + bytes(400 * 2**20), wanted).result()
        assert isinstance(heavy, DecodeFailure)
        assert heavy.status is RowStatus.DECODE_LIMIT
        assert is_right(sandbox.submit(VIDEO, request_clip()).result())


def test_too_little_memory_to_start_is_said_at_once(limits, request_clip):
    with Sandbox(limits(max_memory_bytes=2**27), num_children=1) as sandbox:
        error = sandbox.submit(VIDEO, request_clip()).exception()
    assert isinstance(error, KdhieraError)
    assert "decode.max_memory_bytes is 134217728, at least" in str(error)


def test_children_are_recycled(limits, request_clip):
    with Sandbox(limits(clips_per_child=2), num_children=1) as sandbox:
        seen = []
        for view in range(5):
            assert is_right(sandbox.submit(VIDEO, request_clip(view)).result())
            seen += children()
    assert [len(list(group)) for _, group in itertools.groupby(seen)] == [2, 2, 1]


def sample(video):
    return Sample(
        key="a",
        ordinal=0,
        uid="s/0/a",
        offset=0,
        num_bytes=len(video),
        video=video,
        labels={},
        status=RowStatus.OK,
        message="",
    )


def test_order_is_kept_and_little_is_taken_in_advance(limits, request_clip):
    taken = 0

    def items():
        nonlocal taken
        for view in range(30):
            taken += 1
            yield sample(VIDEO if view % 7 else b"no video"), request_clip(view)

    with Sandbox(limits(), num_children=2) as sandbox:
        for view, (_, outcome) in enumerate(decode_samples(sandbox, items(), in_flight=4)):
            assert taken <= view + 4
            if view % 7:
                assert outcome.view == decode_clip(VIDEO, request_clip(view), limits()).view
            else:
                assert outcome.status is RowStatus.DECODE_ERROR


def shared_memory():
    """Named segments there are; other tests keep folders beside them."""
    if not os.path.isdir("/dev/shm"):
        return set()
    with os.scandir("/dev/shm") as found:
        return {entry.name for entry in found if not entry.is_dir()}


def test_nothing_leaks(limits, request_clip):
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    shared = shared_memory()
    with Sandbox(limits(clips_per_child=10), num_children=2) as sandbox:
        wanted = ((sample(VIDEO if v % 5 else b"junk"), request_clip(v)) for v in range(60))
        outcomes = [outcome for _, outcome in decode_samples(sandbox, wanted, in_flight=5)]
        assert sum(map(is_right, outcomes)) == 48
        assert len(children()) <= 2
    assert not children()
    assert len(os.listdir("/proc/self/fd")) == files
    assert threading.active_count() == threads
    assert shared_memory() <= shared


def test_closing_ends_what_is_unfinished(limits, request_clip, hanging_video):
    sandbox = Sandbox(limits(backend="decord"), num_children=1)
    hung = sandbox.submit(hanging_video, request_clip(height=96, width=160))
    queued = sandbox.submit(VIDEO, request_clip())
    while not children():
        time.sleep(0.01)
    time.sleep(0.5)
    started = time.monotonic()
    sandbox.close()
    assert time.monotonic() - started < 10.0
    assert not children()
    for future in (hung, queued):
        with pytest.raises(CancelledError):
            future.result()
    with pytest.raises(RuntimeError, match="closed"):
        sandbox.submit(VIDEO, request_clip())
    sandbox.close()


def test_children_die_with_their_parent(hanging_video, tmp_path):
    """Also those that hang in native code and would never notice a closed socket."""
    video = tmp_path / "video.mp4"
    video.write_bytes(hanging_video)
    script = textwrap.dedent(
        """
        import sys, time
        from conftest import LIMITS, POLICY
        from dataclasses import replace
        from kdhiera.data.clip import ClipRequest
        from kdhiera.data.sandbox import Sandbox
        sandbox = Sandbox(replace(LIMITS, backend="decord"), num_children=1)
        data = open(sys.argv[1], "rb").read()
        policy = replace(POLICY, height=96, width=160)
        sandbox.submit(data, ClipRequest(uid="a", view=0, policy=policy))
        while not (child := next(iter(sandbox._children), None)):
            time.sleep(0.01)
        time.sleep(1.5)
        print(child.process.pid, flush=True)
        time.sleep(60)
        """
    )
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(video)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    with parent:
        child = int(parent.stdout.readline())
        assert not gone(child, 0.1)
        parent.kill()
    assert gone(child)


def test_a_child_sees_no_secrets_and_ignores_the_parents_signals(limits, request_clip, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with Sandbox(limits(), num_children=1) as sandbox:
        assert is_right(sandbox.submit(VIDEO, request_clip()).result())
        (child,) = children()
        environment = Path(f"/proc/{child}/environ").read_bytes()
        assert b"hush" not in environment
        assert b"proxy" not in environment.lower()
        os.kill(child, signal.SIGINT)
        os.kill(child, signal.SIGTERM)
        assert is_right(sandbox.submit(VIDEO, request_clip()).result())
        assert children() == {child}


@pytest.mark.parametrize("module", ["kdhiera.data.sandbox", "kdhiera.data.decode"])
def test_a_child_loads_no_learning_library(module):
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert not {"torch", "torchvision", "ray", "zarr", "webdataset", "transformers"} & set(loaded)
    assert ("av" in loaded) == (module == "kdhiera.data.decode")


def test_wrong_pools_are_the_users_mistake(limits):
    with pytest.raises(UsageError, match="at least 1"):
        Sandbox(limits(), num_children=0)


def test_a_decoder_that_is_not_installed_is_one_sentence(limits, monkeypatch):
    monkeypatch.setattr(sys, "path", [])  # where nothing is installed
    monkeypatch.delitem(sys.modules, "decord", raising=False)
    for backend, words in (
        ("torchcodec", r"pip install 'kdhiera\[torchcodec\]'"),
        ("decord", "auto"),
    ):
        with pytest.raises(UsageError, match=f"{backend}, which is not installed.*{words}"):
            Sandbox(limits(backend=backend), num_children=1)
