"""Runs of several ranks from their commands: torchrun, and Ray Train."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from real_runs import COMMAND, MakeConfig

from kdhiera.config import load
from kdhiera.errors import ExitCode
from kdhiera.progress import PlainProgress
from kdhiera.stages.distill import distill
from kdhiera.training import checkpoint
from kdhiera.training.metrics import read_metrics

CLOCKED = ("seconds", "data_wait")
RANDOM = {
    "student": {"drop_path": 0.2},
    "objective": {"teacher_drop": 0.3},
    "train": {"epochs": 5, "jitter": 0.2, "num_threads": 1},
}
TORCHRUN = (
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
    "-m", "kdhiera.stages.distill",
)  # fmt: skip


def start(*command: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=280)
    return process.returncode, out, err


def lines_of(path: Path) -> list[dict[str, Any]]:
    lines = read_metrics(Path(load(path).run_dir))
    return [{k: v for k, v in line.items() if k not in CLOCKED} for line in lines]


def weights(path: Path) -> dict[str, torch.Tensor]:
    state = checkpoint.load_latest(Path(load(path).run_dir) / "checkpoints")
    assert state is not None
    return dict(state["learner"]["student"])


def assert_equal(found: Path, wanted: Path) -> None:
    assert lines_of(found) == lines_of(wanted)
    ours, theirs = weights(found), weights(wanted)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def wait_for(process: subprocess.Popen[str], path: Path, steps: int) -> None:
    """Until a run has done some steps."""
    deadline = time.monotonic() + 200
    while len(read_metrics(Path(load(path).run_dir))) < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes(words: bytes, below: int) -> list[int]:
    """Processes below another whose command line has these words."""
    found = subprocess.run(["pgrep", "-P", str(below)], capture_output=True, text=True, check=False)
    pids = [int(pid) for pid in found.stdout.split()]
    named = [p for p in pids if words in Path(f"/proc/{p}/cmdline").read_bytes()]
    return [*named, *(p for pid in pids for p in processes(words, pid))]


@pytest.mark.slow
def test_torchrun_trains_stops_on_a_signal_and_goes_on(
    make_config: MakeConfig, own_cache: Path
) -> None:
    alone, pair = (make_config(name, **RANDOM) for name in ("alone", "pair"))
    process = start(*TORCHRUN, pair)
    wait_for(process, pair, 4)
    process.send_signal(signal.SIGTERM)
    code, _, err = end(process)
    assert code != 0, err
    assert "error: stopped after step" in err
    assert "the same command goes on from it" in err
    done = len(lines_of(pair))
    assert 4 <= done < 15

    code, out, err = end(start(*TORCHRUN, pair, "--resume"))
    assert code == 0, err
    assert out.count("steps     15 of 8 clips") == 1
    distill(load(alone), progress=PlainProgress(io.StringIO()))
    for ours, theirs in zip(lines_of(pair), lines_of(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-3)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
def test_ray_workers_that_are_killed_are_started_anew(
    make_config: MakeConfig, own_cache: Path
) -> None:
    pair, killed = (make_config(name, **RANDOM) for name in ("pair", "killed"))
    code, _, err = end(start(*TORCHRUN, pair))
    assert code == 0, err
    process = start(*COMMAND, "distill", killed, "train.num_workers=2")
    wait_for(process, killed, 5)
    victim = processes(b"ray::RayTrainWorker", process.pid)[-1]
    os.kill(victim, signal.SIGKILL)
    code, out, err = end(process)
    assert code == 0, err
    assert "steps     15 of 8 clips" in out
    assert_equal(killed, pair)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
def test_ray_trains_as_torchrun_does_and_hears_of_signals(
    make_config: MakeConfig, own_cache: Path
) -> None:
    alone, pair = (make_config(name, **RANDOM) for name in ("alone", "pair"))
    process = start(*COMMAND, "distill", pair, "train.num_workers=2")
    wait_for(process, pair, 4)
    process.send_signal(signal.SIGTERM)
    code, _, err = end(process)
    assert code == ExitCode.INTERRUPTED, err
    assert "error: stopped after step" in err
    code, out, err = end(start(*COMMAND, "distill", pair))
    assert code == 0, err
    assert "steps     15 of 8 clips" in out
    code, _, err = end(start(*COMMAND, "distill", alone))
    assert code == 0, err
    for ours, theirs in zip(lines_of(pair), lines_of(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-3)


@pytest.mark.ray
@pytest.mark.long
def test_what_ray_has_no_room_for_is_refused(make_config: MakeConfig, own_cache: Path) -> None:
    path = make_config("large", **RANDOM)
    code, _, err = end(
        start(*COMMAND, "distill", path, "train.num_workers=2", "train.num_threads=500")
    )
    assert code == ExitCode.USAGE
    assert "error: 2 workers need 1000 CPUs and the Ray cluster has" in err


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
def test_what_trying_again_cannot_mend_is_told_at_once(
    make_config: MakeConfig, own_cache: Path
) -> None:
    path = make_config("damaged", **RANDOM)
    for chunk in own_cache.rglob("base.zarr/pixels/c.*"):
        chunk.unlink()
    code, _, err = end(start(*COMMAND, "distill", path, "train.num_workers=2"))
    assert code == ExitCode.FAILED
    assert re.search(r"^error: .*pixels", err, re.MULTILINE), err
    assert err.count("Started training worker group") <= 1


@pytest.mark.slow
@pytest.mark.long
def test_live_teachers_at_two_ranks_are_those_of_one(
    make_config: MakeConfig, own_cache: Path
) -> None:
    live = {**RANDOM, "train": {**RANDOM["train"], "max_steps": 4}}
    alone, pair = (make_config(name, **live) for name in ("alone", "pair"))
    code, _, err = end(start(*TORCHRUN, pair, "cache.mode=live"))
    assert code == 0, err
    distill(load(alone), progress=PlainProgress(io.StringIO()))
    for ours, theirs in zip(lines_of(pair), lines_of(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-3)
