import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import dies
from tiny_run import MemorySource, Setup

from kdhiera.cache.rows import KeptRows
from kdhiera.errors import KdhieraError, MismatchError, StoppedError, UsageError
from kdhiera.training.loop import num_steps
from kdhiera.training.metrics import read_metrics

CLOCKED = ("seconds", "data_wait")
STEPS = 32  # 8 epochs of 4 steps


class Watcher:
    """A progress that does something when a step is done."""

    def __init__(self, at: int, action: Any) -> None:
        self.at, self.action, self.done = at, action, 0

    def start(self, description: str, total: int | None, unit: str) -> int:
        return 0

    def advance(self, task: int, n: int = 1, **fields: object) -> None:
        self.done += n
        if n and self.done == self.at:
            self.action()

    def finish(self, task: int) -> None:
        pass


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    lines = read_metrics(run_dir)
    return [{k: v for k, v in line.items() if k not in CLOCKED} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Any]:
    """Metrics and weights of the whole run."""
    setup = Setup(run_dir=tmp_path_factory.mktemp("uninterrupted"))
    student = setup.student()
    setup.run(MemorySource(), student=student)
    return lines_of(setup.run_dir), student.state_dict()


def test_a_tiny_set_is_learnt(setup: Setup) -> None:
    """Random features of four clips can only be known by heart."""
    source = MemorySource(num_samples=4, num_views=2)
    summary = setup.run(source, epochs=100, lr=0.1, save_every=200, log_every=10)
    assert summary.last["loss"] < 0.35 * summary.first["loss"]
    explained = summary.of("explained_variance")
    assert explained.keys() == {"image/9", "video/3"}
    assert min(explained.values()) > 0.5
    assert all(value > 0.7 for value in summary.of("cosine").values())
    assert summary.steps == 100
    assert summary.clips == 400
    assert summary.first["explained_variance/image/9"] < 0.1


def test_the_same_seeds_give_the_same_run(
    setup: Setup, source: MemorySource, uninterrupted: tuple[Any, Any]
) -> None:
    student = setup.student()
    setup.run(source, student=student)
    lines, weights = uninterrupted
    assert lines_of(setup.run_dir) == lines
    assert [line["step"] for line in lines] == [1, *range(3, STEPS, 3), STEPS]
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())


def test_threads_do_not_make_a_run_random(setup: Setup, source: MemorySource) -> None:
    runs = [Setup(run_dir=setup.run_dir / name) for name in ("a", "b")]
    for run in runs:
        run.run(source, max_steps=6, num_threads=2, log_every=1)
    assert lines_of(runs[0].run_dir) == lines_of(runs[1].run_dir)


@pytest.mark.parametrize("at", [1, 17])
def test_sigterm_stops_cleanly_and_resuming_is_bit_exact(
    setup: Setup, source: MemorySource, uninterrupted: tuple[Any, Any], at: int
) -> None:
    kill = Watcher(at, lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match=rf"stopped after step {at} of {STEPS}"):
        setup.run(source, progress=kill)
    assert signal.getsignal(signal.SIGTERM) is before
    student = setup.student()
    resumed = Watcher(-1, None)
    summary = setup.run(source, student=student, progress=resumed)
    assert resumed.done == STEPS
    lines, weights = uninterrupted
    assert lines_of(setup.run_dir) == lines
    assert summary.steps == STEPS
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())


class Failing(MemorySource):
    """Reads well for a while."""

    reads = 0

    def read(self, samples: np.ndarray, *, view: int) -> KeptRows:
        self.reads += 1
        if self.reads > 21:
            raise OSError("no route to the cache")
        return super().read(samples, view=view)


def test_a_crash_goes_on_from_the_last_checkpoint_bit_exactly(
    setup: Setup, source: MemorySource, uninterrupted: tuple[Any, Any]
) -> None:
    with pytest.raises(OSError, match="no route to the cache"):
        setup.run(Failing())
    assert (setup.run_dir / "checkpoints" / "latest").read_text() == "step-00000016.pt\n"
    resumed = Watcher(-1, None)
    setup.run(source, progress=resumed)
    assert lines_of(setup.run_dir) == uninterrupted[0]


KILLED_RUN = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from tiny_run import MemorySource, Setup
Setup(run_dir=Path({run_dir!r})).run(MemorySource())
"""


def test_kill_9_at_any_moment_loses_nothing_but_time(
    setup: Setup, source: MemorySource, uninterrupted: tuple[Any, Any]
) -> None:
    code = KILLED_RUN.format(
        folder=str(Path(__file__).parent),
        run_dir=str(setup.run_dir),
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen([sys.executable, "-c", code], env=environment)
    deadline = time.monotonic() + 120
    while len(read_metrics(setup.run_dir)) < 7:
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.005)
    child.kill()
    child.wait()
    setup.run(source)
    assert lines_of(setup.run_dir) == uninterrupted[0]


def test_killed_again_and_again_also_while_it_writes_a_checkpoint_it_loses_time_only(
    setup: Setup, source: MemorySource, uninterrupted: tuple[Any, Any]
) -> None:
    """Mid-epoch, between a step and its checkpoint, and at some byte of the file."""
    folder = setup.run_dir / "checkpoints"

    def killed_at(step: int) -> None:
        kill = Watcher(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
        setup.run(source, progress=kill)

    def killed_while_writing(num_bytes: int) -> None:
        """The kernel ends the process in the write that takes a file beyond the limit."""
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
        setup.run(source)

    assert dies(lambda: killed_at(3)) == -signal.SIGKILL
    assert not folder.exists()
    assert dies(lambda: killed_at(8)) == -signal.SIGKILL  # its checkpoint is due
    assert not folder.exists()
    assert dies(lambda: killed_at(11)) == -signal.SIGKILL
    (first,) = folder.glob("*.pt")
    size = first.stat().st_size
    for share in (0.01, 0.5, 0.99):
        assert dies(lambda share=share: killed_while_writing(int(share * size))) == -signal.SIGXFSZ
        assert [path.name for path in folder.glob("step-*.pt")] == ["step-00000008.pt"]
        assert list(folder.glob(".step-00000016.pt.*.tmp")), "it was writing"
    rng = np.random.default_rng(0)
    for step in sorted(rng.choice(np.arange(12, STEPS), 3, replace=False)):
        assert dies(lambda step=step: killed_at(int(step))) == -signal.SIGKILL
    student = setup.student()
    setup.run(source, student=student)
    lines, weights = uninterrupted
    assert lines_of(setup.run_dir) == lines
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())


def test_a_damaged_newest_checkpoint_costs_time_only(
    setup: Setup, source: MemorySource, uninterrupted: tuple[Any, Any]
) -> None:
    stop = Watcher(18, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StoppedError):
        setup.run(source, progress=stop)
    newest = setup.run_dir / "checkpoints" / "step-00000018.pt"
    os.truncate(newest, newest.stat().st_size // 2)
    setup.run(source)
    assert lines_of(setup.run_dir) == uninterrupted[0]


def test_a_finished_run_is_not_run_again(setup: Setup, source: MemorySource) -> None:
    first = setup.run(source)
    again = Watcher(-1, None)
    second = setup.run(Failing(), progress=again)
    assert second == first
    assert again.done == STEPS


def test_another_identity_is_refused_with_the_difference(
    setup: Setup, source: MemorySource
) -> None:
    setup.run(source, epochs=1)
    setup.identity = {"cache": "abc", "lr": 0.02}
    files = {path: path.read_bytes() for path in setup.run_dir.rglob("*") if path.is_file()}
    with pytest.raises(MismatchError, match=r"lr: want 0.02, the run has 0.01\n"):
        setup.run(source, epochs=1)
    assert {p: p.read_bytes() for p in setup.run_dir.rglob("*") if p.is_file()} == files


def test_a_bad_batch_is_saved_for_replay(setup: Setup, source: MemorySource) -> None:
    source.features[0, 3] = np.nan  # shown once in epoch 0
    with pytest.raises(KdhieraError, match=r"teacher image, layer 9") as caught:
        setup.run(source, lr=1e-3)
    (saved,) = (setup.run_dir / "replay").iterdir()
    assert str(saved) in str(caught.value)
    replay = torch.load(saved, weights_only=True)
    assert 3 in replay["samples"].tolist()
    row = replay["samples"].tolist().index(3)
    assert replay["columns"]["image-9"]["codes"][row].isnan().all()
    assert replay["pixels"].shape == (4, 4, 2, 32, 32, 3)


def test_max_steps_ends_a_run_early(setup: Setup, source: MemorySource) -> None:
    assert num_steps(setup.config(), 18) == STEPS
    assert num_steps(setup.config(max_steps=1000), 18) == STEPS
    assert setup.run(source, max_steps=5).steps == 5


def test_too_few_clips_for_a_batch_are_refused(setup: Setup) -> None:
    with pytest.raises(UsageError, match="only 3 clips can be trained on"):
        setup.run(MemorySource(num_samples=3))


def test_metrics_are_the_means_since_the_last_line(setup: Setup, source: MemorySource) -> None:
    setup.run(source, log_every=1, max_steps=9)
    each = [line["loss"] for line in lines_of(setup.run_dir)]
    other = Setup(run_dir=setup.run_dir.with_name("coarse"))
    other.run(source, log_every=3, max_steps=9)
    coarse = lines_of(other.run_dir)
    assert coarse[2]["loss"] == pytest.approx(np.mean(each[3:6]))
    assert coarse[2]["step"] == 6
    assert coarse[2]["loss"] == pytest.approx(
        coarse[2]["loss/image/9"] + 0.5 * coarse[2]["loss/video/3"]
    )
    assert (
        json.loads((setup.run_dir / "metrics.jsonl").read_text().splitlines()[0])["epoch"] == 0.25
    )


def test_the_number_of_threads_is_put_back(setup: Setup, source: MemorySource) -> None:
    before = torch.get_num_threads()
    setup.run(source, max_steps=1, num_threads=before + 1)
    assert torch.get_num_threads() == before
