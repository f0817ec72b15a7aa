"""An extraction that is told to stop, by signal, at any time: it says so and goes on later."""

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numbered
import pytest
from real_runs import COMMAND, contents, write_config, write_tar

from kdhiera.config import load
from kdhiera.progress import make_progress
from kdhiera.stages.extract_teachers import extract


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)]
)
def test_a_stopped_extraction_ends_with_75_and_goes_on(
    number: signal.Signals, tmp_path: Path
) -> None:
    """Once while it loads its libraries, once while it works."""
    clips = [(f"clip{i}.mp4", numbered.render(24 + i)) for i in range(40)]
    shards = [str(write_tar(tmp_path / f"{i}.tar", clips[10 * i :][:10])) for i in range(4)]
    usual: dict[str, Any] = {
        "data": {"shards": shards},
        "clip": {"num_frames": 8, "height": 64, "width": 64},
        "views": {"num": 2, "frame_stride": 2},
        "teachers": {"hog": {"kind": "hog"}},
        "scores": {"teacher": "hog", "source": "uniform"},
        "masks": {"ratio": 0.5, "draws": 1},
        "cache": {"encoding": "fp32"},
        "extract": {"batch_size": 2, "device": "cpu"},
        "ray": {"enabled": False},
    }
    path = write_config(tmp_path, usual)
    parts = tmp_path / "cache" / "parts"
    for begun in (False, True):
        process = subprocess.Popen(
            [*COMMAND, "extract-teachers", str(path)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if begun:
            while not list(parts.rglob("attempt.json")) and process.poll() is None:
                time.sleep(0.01)
        else:
            time.sleep(1.5)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 75, errors
        assert "run" in errors.splitlines()[-1]
    calm = load(write_config(tmp_path, usual, "calm", cache={"dir": str(tmp_path / "calm")}))
    config = load(path)
    with make_progress() as progress:
        extract(config, progress=progress)
        extract(calm, progress=progress)
    assert contents(config) == contents(calm)
