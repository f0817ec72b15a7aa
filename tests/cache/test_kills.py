"""Processes that really die, by SIGKILL: at file operations, at random times, side by side."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import pytest
from crashing import (
    PARTS,
    collect_at_once,
    extract,
    extract_among_collectors,
    extract_and_count,
    extract_and_die,
    extract_in_child,
    extract_together,
)
from tiny_cache import COLUMNS, assert_holds, content, gc

from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import PartId
from kdhiera.cache.reader import CacheReader
from kdhiera.cache.verify import verify

DEATHS = 16
LATER = 1e6


pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def children() -> Iterator[ForkServerContext]:
    """Processes that begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        here = str(Path(__file__).parent)  # the server takes no sys.path
        patch.setenv("PYTHONPATH", here, prepend=os.pathsep)
        context.set_forkserver_preload(["crashing"])
        first = context.Process()
        first.start()
        first.join()
        yield context


def assert_sound(root: Path) -> None:
    """Whatever is committed is whole and right, readable by anyone."""
    if not (root / "cache.json").exists():
        return
    cache = Cache.open(root)
    assert not verify(cache).problems
    for part, commits in cache.commits().items():
        if part.view == 0:
            columns = tuple(commits.columns)
            reader = CacheReader(cache, num_views=1, columns=columns, shards={part.shard_id})
            assert_holds(reader, {part: content(part)}, columns)


def assert_complete(root: Path, parts: tuple[PartId, ...]) -> None:
    """Every row is there, once and right; with the garbage gone nothing else is."""
    cache = Cache.open(root)
    gc(cache, later=LATER)
    assert not verify(cache).problems
    views = 1 + max(part.view for part in parts)
    reader = CacheReader(cache, num_views=views, columns=COLUMNS)
    assert_holds(reader, {part: content(part) for part in parts})
    assert all(reader.statistics(column).count == len(parts) * 5 * 8 * 4 for column in COLUMNS)
    records = [p for p in (root / "commits").rglob("*") if p.is_file()]
    assert len(records) == len(parts) * (1 + len(COLUMNS))
    assert len(list(root.rglob("base.zarr"))) == len(parts)


@pytest.mark.slow
def test_death_at_file_operations_leaves_whole_parts_only(
    tmp_path: Path, children: ForkServerContext
):
    """Some of all, and all that publish; every one of them is in `test_crashes.py`."""
    total = children.Value("i", 0)
    child = children.Process(target=extract_and_count, args=(str(tmp_path / "all"), total))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert total.value > 100
    for operation in np.linspace(0, total.value - 1, DEATHS).astype(int):
        root = tmp_path / f"{operation}"
        child = children.Process(target=extract_and_die, args=(str(root), operation))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert_sound(root)
        extract(root, PARTS[:1])
        assert_complete(root, PARTS[:1])


@pytest.mark.slow
def test_death_at_random_times_and_another_run_goes_on(tmp_path: Path, children: ForkServerContext):
    rng = np.random.default_rng(0)
    root = tmp_path / "cache"
    killed = 0
    for _ in range(15):
        child = children.Process(target=extract_in_child, args=(str(root),))
        child.start()
        child.join(timeout=float(rng.uniform(0.02, 0.3)))
        child.kill()
        child.join()
        assert_sound(root)
        if child.exitcode == 0:
            break
        killed += 1
    assert killed > 0
    extract(root)
    assert_complete(root, PARTS)


def test_two_runs_at_once_do_the_work_once_or_harmlessly_twice(
    tmp_path: Path, children: ForkServerContext
):
    start = children.Barrier(2)
    runs = [children.Process(target=extract_together, args=(str(tmp_path), start)) for _ in "ab"]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
        assert run.exitcode == 0
    assert_complete(tmp_path, PARTS)


@pytest.mark.slow
def test_runs_and_collectors_at_once_and_all_of_them_killed(
    tmp_path: Path, children: ForkServerContext
):
    """The clock of the collectors is wrong by days: they take live attempts for dead ones."""
    rng = np.random.default_rng(1)
    root = tmp_path / "cache"
    for _ in range(8):
        targets = [extract_among_collectors, extract_among_collectors, collect_at_once]
        running = [children.Process(target=target, args=(str(root),)) for target in targets]
        for child in running:
            child.start()
        running[0].join(timeout=float(rng.uniform(0.1, 0.8)))
        for child in running:
            child.kill()
            child.join()
        assert_sound(root)
    extract(root)
    assert_complete(root, PARTS)
