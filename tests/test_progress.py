import io
import os
import pty
import re
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdhiera.progress import PlainProgress, counted, human_bytes, human_seconds, make_progress


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def plain():
    clock, out = Clock(), io.StringIO()
    progress = PlainProgress(out, interval_seconds=10, clock=clock)
    return progress, clock, lambda: out.getvalue().splitlines()


def test_lines_say_how_far_how_fast_and_how_long(plain):
    progress, clock, lines = plain
    task = progress.start("extract", 600, "clips")
    for _ in range(20):
        clock.now += 1
        progress.advance(task, 20)
    for _ in range(10):
        clock.now += 1
        progress.advance(task, 20, bad=3)
    clock.now += 0.4
    progress.finish(task)
    assert lines() == [
        "extract: 0/600 clips (0 %)",
        "extract: 200/600 clips (33 %), 20 clips/s, ETA 0:20",
        "extract: 400/600 clips (66 %), 20 clips/s, ETA 0:10",
        "extract: 600/600 clips (100 %), 20 clips/s, bad 3",
        "extract: 600/600 clips (100 %), 20 clips/s, took 0:30, bad 3",
    ]


def test_at_most_one_line_an_interval(plain):
    progress, clock, lines = plain
    task = progress.start("pack", 10_000, "videos")
    for _ in range(10_000):
        clock.now += 0.01
        progress.advance(task)
    progress.finish(task)
    assert len(lines()) <= 1 + 10 + 1


def test_a_slow_start_is_soon_forgotten(plain):
    progress, clock, lines = plain
    task = progress.start("extract", 10_000, "clips")
    clock.now += 100  # models load
    for _ in range(60):
        clock.now += 1
        progress.advance(task, 50)
    assert "2,550/10,000 clips (25 %), 50 clips/s, ETA 2:29" in lines()[-1]


def test_a_task_that_ends_early_says_so(plain):
    progress, clock, lines = plain
    task = progress.start("distill", 100, "steps")
    clock.now += 5
    progress.advance(task, 30)
    progress.finish(task)
    assert lines()[-1] == "distill: 30/100 steps (30 %), 6 steps/s, stopped after 0:05"
    progress.finish(task)
    assert len(lines()) == 2


def test_bytes_unknown_totals_and_slow_work(plain):
    progress, clock, lines = plain
    download = progress.start("download", 90_210_194, "bytes")
    scan = progress.start("scan", None, "shards")
    clock.now += 20
    progress.advance(download, 45_000_000)
    progress.advance(scan, 1)
    assert lines()[2:] == [
        "download: 45.0 MB/90.2 MB (49 %), 2.25 MB/s, ETA 0:20",
        "scan: 1 shards, 3 shards/min",
    ]


def test_nothing_to_do_is_no_division_by_zero(plain):
    progress, _, lines = plain
    progress.finish(progress.start("extract", 0, "clips"))
    assert lines() == ["extract: 0/0 clips", "extract: 0/0 clips, took 0:00"]


def test_threads_lose_no_count(plain):
    progress, clock, lines = plain
    task = progress.start("read", 40_000, "rows")
    workers = [
        threading.Thread(target=lambda: [progress.advance(task) for _ in range(5000)])
        for _ in range(8)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    clock.now += 1
    progress.finish(task)
    assert lines()[-1].startswith("read: 40,000/40,000 rows (100 %)")


def test_open_tasks_end_with_the_block_even_on_an_error():
    out = io.StringIO()

    def work():
        with make_progress(out) as progress:
            progress.advance(progress.start("extract", 4, "clips"), 2)
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert re.search(r"2/4 clips \(50 %\).*stopped after 0:00\n$", out.getvalue())


TERMINAL = """
from kdhiera.progress import make_progress
with make_progress() as progress:
    task = progress.start("extract [red]", 600, "clips")
    progress.advance(task, 120, bad=2)
    print("a result", flush=True)
    progress.finish(task)
"""


def _run_in_terminal(term):
    """Run with stderr on a pseudo-terminal and stdout in a pipe."""
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": term, "COLUMNS": "120"}
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", TERMINAL],
        stdout=subprocess.PIPE,
        stderr=slave,
        env=env,
    ) as process:
        os.close(slave)
        seen = b""
        while True:
            try:
                block = os.read(master, 4096)
            except OSError:  # Linux's way of saying that the other end is closed
                break
            if not block:
                break
            seen += block
        stdout = process.stdout.read()
    os.close(master)
    assert process.returncode == 0
    return stdout.decode(), seen.decode()


def test_bars_on_a_terminal_leave_stdout_alone():
    stdout, stderr = _run_in_terminal("xterm-256color")
    assert stdout == "a result\n"
    assert "\x1b[" in stderr
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stderr)
    assert "extract [red]" in text
    assert re.search(r"120/600 clips \(20 %\), .*stopped after 0:00, bad 2", text)


def test_a_dumb_terminal_gets_plain_lines():
    _, stderr = _run_in_terminal("dumb")
    assert "\x1b" not in stderr
    assert stderr.splitlines()[0] == "extract [red]: 0/600 clips (0 %)"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (1536, "1.54 kB"), (99_960, "100 kB"),
     (999_600, "1.00 MB"), (90_210_194, "90.2 MB"), (1.2e12, "1.20 TB"), (5e18, "5000 PB")],
)  # fmt: skip
def test_sizes(count, text):
    assert human_bytes(count) == text


@given(st.integers(0, 10**15))
def test_sizes_keep_three_digits(count):
    number, unit = human_bytes(count).split()
    factor = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15}[unit]
    assert float(number) * factor == pytest.approx(count, rel=0.0051)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (12.4, "0:12"), (59.6, "1:00"), (3599.9, "1:00:00"),
     (3723, "1:02:03"), (-1, "0:00")],
)  # fmt: skip
def test_durations(seconds, text):
    assert human_seconds(seconds) == text


def test_counts_agree_with_their_nouns() -> None:
    said = [counted(n, noun) for n, noun in ((1, "part"), (0, "part"), (2000, "process"))]
    assert said == ["1 part", "0 parts", "2,000 processes"]


@pytest.mark.parametrize("asked", [False, True])
def test_no_color_is_respected(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if asked:
        monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    with make_progress(terminal) as progress:
        task = progress.start("extract", 2, "clips")
        progress.advance(task, 2)
    coloured = re.search(r"\x1b\[(?:\d+;)*(?:3[0-8]|9[0-7])[;m]", terminal.getvalue())
    assert bool(coloured) is not asked
