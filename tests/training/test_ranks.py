"""Ranks that train together: real processes that meet over gloo."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import together
from test_loop import Watcher, lines_of
from tiny_run import MemorySource, Setup

from kdhiera.cache.rows import KeptRows
from kdhiera.config import ObjectiveConfig
from kdhiera.errors import KdhieraError, MismatchError, StoppedError, UsageError
from kdhiera.training import checkpoint
from kdhiera.training.loop import check_resumable
from kdhiera.training.metrics import read_metrics
from kdhiera.training.ranks import ALONE, GradientMean, RankLostError, Ranks, joined

STEPS = 16
EVERYTHING: dict[str, Any] = {
    "max_steps": STEPS, "lr": 0.05, "jitter": 0.3, "clip_grad": 0.5, "log_every": 1,
}  # fmt: skip
DROPPING = ObjectiveConfig(teacher_drop=0.4)


def run(folder: Path, ranks: Ranks = ALONE, *, source: Any = None, **changes: Any) -> int:
    """Steps of a run in which everything that is random is on."""
    options = {"objective": DROPPING, "ranks": ranks, **EVERYTHING, **changes}
    return Setup(run_dir=folder).run(source or MemorySource(), **options).steps


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = checkpoint.load_latest(folder / "checkpoints")
    assert state is not None
    return {
        f"{part}/{k}": v for part in ("student", "heads") for k, v in state["learner"][part].items()
    }


def assert_close(found: Path, wanted: Path) -> None:
    """Up to the order in which floats are added."""
    ours, theirs = lines_of(found), lines_of(wanted)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(weights(found), weights(wanted), rtol=1e-4, atol=1e-5)


def assert_equal(found: Path, wanted: Path) -> None:
    """To the last bit."""
    assert lines_of(found) == lines_of(wanted)
    ours, theirs = weights(found), weights(wanted)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one rank."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run of two ranks."""
    folder = tmp_path_factory.mktemp("pair")
    assert together(2, lambda ranks: run(folder, ranks), folder) == [STEPS, STEPS]
    return folder


def test_two_ranks_have_the_losses_of_one(alone: Path, pair: Path) -> None:
    assert len(lines_of(pair)) == STEPS
    assert_close(pair, alone)


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.long)])
def test_parts_one_after_the_other_have_the_losses_of_all_at_once(
    alone: Path, tmp_path: Path, size: int
) -> None:
    found = together(size, lambda ranks: run(tmp_path, ranks, accumulate=4 // size), tmp_path)
    assert found == [STEPS] * size
    assert_close(tmp_path, alone)


@pytest.mark.long
def test_without_the_draws_of_the_whole_batch_losses_would_differ(
    alone: Path, tmp_path: Path
) -> None:
    """What the comparisons above could miss: another seed is not within their tolerance."""
    run(tmp_path, seed=1)
    with pytest.raises(AssertionError):
        assert_close(tmp_path, alone)


class Counting(MemorySource):
    """Keeps what was asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[int]] = []

    def read(self, samples: np.ndarray, *, view: int) -> KeptRows:
        self.asked.append(samples.tolist())
        return super().read(samples, view=view)


def test_a_rank_reads_its_slice_and_no_more(tmp_path: Path) -> None:
    def reads(ranks: Ranks) -> list[list[int]]:
        source = Counting()
        run(tmp_path / f"of-{ranks.size}", ranks, source=source, max_steps=9)
        return source.asked

    whole = reads(ALONE)
    first, second = together(2, reads, tmp_path)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole
    assert {len(part) for part in first} == {2}


def test_a_run_goes_on_at_another_number_of_ranks(alone: Path, tmp_path: Path) -> None:
    def until(step: int) -> Callable[[Ranks], int]:
        def stopping(ranks: Ranks) -> int:
            stop = threading.Event()
            return run(tmp_path, ranks, stop=stop, progress=Watcher(step, stop.set))

        return stopping

    for step, size in ((3, 1), (8, 2), (13, 4)):
        told = together(size, until(step), tmp_path)
        assert all(isinstance(each, StoppedError) for each in told), told
        assert f"after step {step} of {STEPS}" in str(told[0])
    assert run(tmp_path) == STEPS
    assert_close(tmp_path, alone)


@pytest.mark.parametrize("asked", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_signal_at_one_rank_stops_all_at_the_same_step(
    pair: Path, tmp_path: Path, asked: int
) -> None:
    def signalled(ranks: Ranks) -> int:
        at = 11 if ranks.rank == asked else -1
        watcher = Watcher(at, lambda: os.kill(os.getpid(), signal.SIGTERM))
        return run(tmp_path, ranks, progress=watcher)

    told = together(2, signalled, tmp_path)
    assert [type(each) for each in told] == [StoppedError, StoppedError]
    assert f"stopped after step 11 of {STEPS}" in str(told[1])
    assert together(2, lambda ranks: run(tmp_path, ranks), tmp_path) == [STEPS, STEPS]
    assert_equal(tmp_path, pair)


def test_a_rank_that_is_killed_costs_time_only(pair: Path, tmp_path: Path) -> None:
    """Again and again, each of them once, within an epoch and at its end."""
    for step, killed in ((3, 1), (8, 0), (13, 1)):

        def killing(ranks: Ranks, step: int = step, killed: int = killed) -> int:
            at = step if ranks.rank == killed else -1
            watcher = Watcher(at, lambda: os.kill(os.getpid(), signal.SIGKILL))
            return run(tmp_path, ranks, progress=watcher)

        told = together(2, killing, tmp_path)
        assert told[killed] == -signal.SIGKILL
        assert isinstance(told[1 - killed], RankLostError), told
        assert "another rank is gone" in str(told[1 - killed])
    assert together(2, lambda ranks: run(tmp_path, ranks), tmp_path) == [STEPS, STEPS]
    assert_equal(tmp_path, pair)


@pytest.mark.long
def test_three_ranks_go_on_to_the_bit(tmp_path: Path) -> None:
    """With three the order of adding matters: it must not depend on where a run began."""

    def until(folder: Path, step: int) -> Callable[[Ranks], int]:
        def stopping(ranks: Ranks) -> int:
            stop = threading.Event()
            watcher = Watcher(step, stop.set)
            return run(folder, ranks, stop=stop, progress=watcher, batch_size=6, max_steps=12)

        return stopping

    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert together(3, until(whole, -1), whole) == [12] * 3
    assert isinstance(together(3, until(parted, 5), parted)[2], StoppedError)
    assert together(3, until(parted, -1), parted) == [12] * 3
    assert_equal(parted, whole)


def test_a_bad_batch_stops_all_ranks_and_the_offenders_is_saved(tmp_path: Path) -> None:
    def broken(ranks: Ranks) -> int:
        source = MemorySource()
        source.features[0, 3] = np.nan  # shown once in epoch 0
        return run(tmp_path, ranks, source=source, lr=1e-3)

    first, second = together(2, broken, tmp_path)
    assert isinstance(first, KdhieraError)
    assert str(first) == str(second)
    found = re.search(
        r"rank (\d): the loss is not finite: teacher image, layer 9 \(the c", str(first)
    )
    assert found
    (saved,) = (tmp_path / "replay").iterdir()
    assert saved.name.endswith(f"-rank-{found[1]}.pt")
    assert str(saved) in str(first)
    assert 3 in torch.load(saved, weights_only=True)["samples"].tolist()


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    def uneven(ranks: Ranks) -> int:
        return run(tmp_path, ranks, batch_size=6, accumulate=2)

    told = together(2, uneven, tmp_path)
    assert all(isinstance(each, UsageError) for each in told)
    assert "cut into 2 (ranks) x 2 (train.accumulate) equal parts" in str(told[0])
    assert "make it a multiple of 4" in str(told[0])


def test_ranks_of_other_runs_are_refused(tmp_path: Path) -> None:
    def different(ranks: Ranks) -> int:
        setup = Setup(run_dir=tmp_path, identity={"cache": "abc", "lr": ranks.rank})
        return setup.run(MemorySource(), ranks=ranks).steps

    told = together(2, different, tmp_path)
    assert all(isinstance(each, MismatchError) for each in told)
    assert "differ in lr (1, 0): all ranks need the same config" in str(told[0])


def test_ranks_without_a_place_to_meet_are_told_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        pytest.raises(UsageError, match=r"2 ranks cannot meet .*MASTER_ADDR.* with torchrun"),
        joined("cpu"),
    ):
        pass


def test_ranks_that_do_not_share_a_run_folder_are_refused(tmp_path: Path, pair: Path) -> None:
    told = together(2, lambda r: run(pair if r.rank == 0 else tmp_path / "own", r), tmp_path)
    assert all(isinstance(each, MismatchError) for each in told)
    assert "one run_dir that they share" in str(told[0])


def test_what_the_first_rank_is_refused_all_are(tmp_path: Path) -> None:
    def refused(ranks: Ranks) -> None:
        run(tmp_path, max_steps=1) if ranks.is_first else None
        ranks.first(lambda: check_resumable(tmp_path, {"cache": "other"}))

    told = together(2, refused, tmp_path)
    assert [type(each) for each in told] == [MismatchError] * 2
    assert str(told[0]) == str(told[1])


def test_gradients_are_the_mean_over_ranks_while_parts_are_not(tmp_path: Path) -> None:
    """Many small buckets, parameters without a gradient, and parts that add up first."""

    def learn(ranks: Ranks) -> list[torch.Tensor | None]:
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(30, generator=generator)) for _ in range(6)]
        mean = GradientMean(parameters, ranks, bucket_bytes=200)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = None
            for part in range(2):
                if part:
                    mean.expect()
                used = [p for i, p in enumerate(parameters) if i != 2]
                total = sum((p * (i + 1) * (ranks.rank + part)).sum() for i, p in enumerate(used))
                total.backward()  # type: ignore[union-attr]
            mean.finish()
        return [parameter.grad for parameter in parameters]

    for found in together(3, learn, tmp_path):
        assert found.pop(2) is None
        for i, gradient in enumerate(found):  # ranks and parts: (0 + 1 + 1 + 2 + 2 + 3) / 3
            assert torch.equal(gradient, torch.full((30,), 3.0 * (i + 1)))


TORCHRUN = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from test_ranks import run
from kdhiera.training.ranks import joined
with joined("cpu") as ranks:
    run(Path({run_dir!r}), ranks)
"""


@pytest.mark.slow
@pytest.mark.long
def test_torchrun_starts_ranks(pair: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    folder = str(Path(__file__).parent)
    script.write_text(TORCHRUN.format(folder=folder, run_dir=str(tmp_path / "run")))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            script,
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        timeout=200,
    )
    assert read_metrics(tmp_path / "run")
    assert_equal(tmp_path / "run", pair)
