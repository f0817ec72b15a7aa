"""Processes die at every file operation and at random; nothing partial is ever visible."""

import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import pytest
from crashing import (
    PARTS,
    extract,
    extract_and_count,
    extract_and_die,
    extract_in_child,
    extract_together,
)
from tiny_cache import COLUMNS, assert_holds, content

from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import PartId
from kdhiera.cache.reader import CacheReader

PUBLISHING = 20  # file operations at the end, each of which is tried


@pytest.fixture(scope="module")
def children() -> Iterator[ForkServerContext]:
    """Processes that begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the server takes no sys.path
        context.set_forkserver_preload(["crashing"])
        first = context.Process()
        first.start()
        first.join()
        yield context


def assert_sound(root: Path, parts: tuple[PartId, ...]) -> None:
    """Whatever is committed is whole and right, readable by anyone."""
    if not (root / "cache.json").exists():
        return
    cache = Cache.open(root)
    for part, commits in cache.commits().items():
        assert part in parts
        for columns in ((), COLUMNS[:1], COLUMNS):
            if set(columns) <= set(commits.columns) and part.view == 0:
                reader = CacheReader(cache, num_views=1, columns=columns, shards={part.shard_id})
                assert_holds(reader, {part: content(part)}, columns)
                assert all(reader.statistics(c).count == 5 * 8 * 4 for c in columns)


def assert_complete(root: Path, parts: tuple[PartId, ...]) -> None:
    views = 1 + max(part.view for part in parts)
    reader = CacheReader(Cache.open(root), num_views=views, columns=COLUMNS)
    assert_holds(reader, {part: content(part) for part in parts})


@pytest.mark.slow
def test_death_at_any_file_operation_leaves_whole_parts_only(
    tmp_path: Path, children: ForkServerContext
):
    total = children.Value("i", 0)
    child = children.Process(target=extract_and_count, args=(str(tmp_path / "all"), total))
    child.start()
    child.join()
    assert child.exitcode == 0
    last = total.value - PUBLISHING
    assert last > 50
    for operation in [*range(0, last, 15), *range(last, total.value)]:
        root = tmp_path / f"{operation}"
        child = children.Process(target=extract_and_die, args=(str(root), operation))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert_sound(root, PARTS[:1])
        if operation >= last or operation % 2 == 0:  # another run goes on from there
            extract(root, PARTS[:1])
            assert_complete(root, PARTS[:1])


@pytest.mark.slow
def test_death_at_random_times_and_another_run_goes_on(tmp_path: Path, children: ForkServerContext):
    rng = np.random.default_rng(0)
    root = tmp_path / "cache"
    killed = 0
    for _ in range(25):
        child = children.Process(target=extract_in_child, args=(str(root),))
        child.start()
        child.join(timeout=float(rng.uniform(0.02, 0.3)))
        child.kill()
        child.join()
        assert_sound(root, PARTS)
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
    records = [p for p in (tmp_path / "commits").rglob("*") if p.is_file()]
    assert len(records) == len(PARTS) * (1 + len(COLUMNS))
