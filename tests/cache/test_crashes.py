"""A process dies at any file operation: what is committed reads right, the next run goes on.

The folder is frozen before and after every file operation of a piece of work, so that each
copy is what SIGKILL leaves at that point; `test_kills.py` does it with real signals. In every
state all that is committed is read. The next run is tried in every state that differs in
more than garbage, and in a sample of the rest, which extraction never looks at.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from faults import Freezer, watched
from tiny_cache import (
    add_column,
    assert_holds,
    begin,
    catch_up,
    content,
    fill,
    folder_of,
    gc,
    make_cache,
    write_part,
)

from kdhiera.cache import layout
from kdhiera.cache.commit import Cache
from kdhiera.cache.drop import drop_column
from kdhiera.cache.layout import PartId
from kdhiera.cache.reader import CacheReader
from kdhiera.cache.records import unseal
from kdhiera.cache.repair import repair
from kdhiera.cache.verify import verify
from kdhiera.errors import DamagedError

A, B = (PartId(shard_id=shard, view=0) for shard in ("a-0", "b-0"))
WHAT = {part: content(part, 2) for part in (A, B)}
FIRST, SECOND, COMPACT = "image.1.fp32", "video.2.int8", "image.1.compact"
BOTH = (FIRST, SECOND)
SAMPLE = 20  # every such state that differs in garbage only goes on, too
LATER = 3 * 24 * 3600.0


pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(autouse=True)
def one_row_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "ZARR_SHARD_ROWS", 1)


@pytest.fixture
def root(memory: Path) -> Path:
    return memory / "cache"


def states(root: Path, work: Callable[[], object]) -> Iterator[tuple[Path, bool]]:
    """The states that `root` goes through in some work, one after the other on the disk.

    Yields:
        Where it lies, and whether the next run is to be tried on it.
    """
    freezer = Freezer(root)
    with freezer.every_state():
        work()
    seen: set[Any] = set()
    for number, state in enumerate(freezer.states):
        visible = frozenset((p, d) for p, d in state.files.items() if not p.startswith("parts/"))
        copy = root.parent / "state"
        state.thaw(copy)
        yield copy, visible not in seen or number % SAMPLE == 0
        shutil.rmtree(copy)
        seen.add(visible)
    assert len(freezer.states) > 3


def sound(root: Path, columns: Sequence[str] = BOTH, *, damaged: Sequence[PartId] = ()) -> None:
    """Whatever is committed is whole and right, but for parts that were damaged before."""
    if not (root / "cache.json").exists():
        return
    cache = Cache.open(root)
    for part in cache.records():
        try:
            commits = cache.part_commits(part)
            if commits is None:
                continue
            there = [c for c in columns if c in commits.columns]
            reader = CacheReader(cache, num_views=1, columns=there, shards={part.shard_id})
            assert_holds(reader, {part: WHAT[part]}, there)
            for column in there:
                assert reader.statistics(column).count == 2 * 8 * 4
        except DamagedError:
            assert part in damaged


def go_on(root: Path, columns: Sequence[str] = BOTH, parts: Sequence[PartId] = (A, B)) -> None:
    """The next extraction leaves everything whole; the garbage of all is found later."""
    cache = make_cache(root, columns)
    for part in parts:
        catch_up(cache, part, columns, WHAT[part])
    complete(root, columns, parts)
    gc(cache, later=LATER)
    complete(root, columns, parts)
    named = {
        cache.folder(commit)
        for commits in cache.commits().values()
        for commit in (commits.base, *commits.columns.values())
    }
    there = {p.relative_to(root).as_posix() for p in root.glob("parts/*/*/*")}
    assert there == named
    assert not list(root.rglob(".*.tmp"))


def complete(root: Path, columns: Sequence[str], parts: Sequence[PartId]) -> None:
    cache = Cache.open(root)
    assert not verify(cache).problems
    reader = CacheReader(
        cache, num_views=1, columns=columns, shards={part.shard_id for part in parts}
    )
    assert_holds(reader, {part: WHAT[part] for part in parts}, columns)


def test_a_new_cache_and_its_first_part(root: Path):
    def work() -> None:
        write_part(make_cache(root, BOTH), A, WHAT[A], BOTH)

    for state, next_run in states(root, work):
        sound(state)
        if next_run:
            go_on(state, parts=(A,))


def test_a_column_with_a_basis_on_a_committed_base(root: Path):
    write_part(make_cache(root, BOTH), A, WHAT[A], BOTH)
    every = (*BOTH, COMPACT)

    def work() -> None:
        cache = Cache.open(root)
        add_column(cache, COMPACT)
        commits = cache.part_commits(A)
        assert commits is not None
        write_part(cache, A, WHAT[A], (COMPACT,), base=commits.base)

    for state, next_run in states(root, work):
        sound(state, every)
        assert set(Cache.open(state).commits()[A].columns) >= set(BOTH)
        if next_run:
            go_on(state, every, parts=(A,))


def test_columns_that_join_the_base_of_another(root: Path):
    cache = make_cache(root, BOTH)
    loser = begin(cache, A, BOTH)
    fill(loser, WHAT[A], BOTH)
    write_part(cache, A, WHAT[A], (FIRST,))
    for state, next_run in states(root, loser.commit):
        sound(state)
        assert FIRST in Cache.open(state).commits()[A].columns
        if next_run:
            go_on(state, parts=(A,))


def test_rows_of_a_loser_that_are_discarded(root: Path):
    cache = make_cache(root, BOTH)
    loser = begin(cache, A, BOTH)
    fill(loser, content(A, 2, seed=1), BOTH)
    write_part(cache, A, WHAT[A], (FIRST,))

    def work() -> None:
        assert loser.commit().replay_needed
        catch_up(cache, A, BOTH, WHAT[A])

    for state, next_run in states(root, work):
        sound(state)
        if next_run:
            go_on(state, parts=(A,))


def two_parts(root: Path) -> Cache:
    cache = make_cache(root, BOTH)
    for part in (A, B):
        write_part(cache, part, WHAT[part], BOTH)
    return cache


def test_a_column_that_is_dropped(root: Path):
    cache = two_parts(root)
    for state, _ in states(root, lambda: drop_column(cache, FIRST)):
        sound(state)
        there = Cache.open(state)
        assert all(SECOND in commits.columns for commits in there.commits().values())
        if FIRST in there.columns.names() or list(state.glob(f"commits/*/*/{FIRST}.json")):
            drop_column(there, FIRST)  # a second time goes on where the first one died
        assert not list(state.glob(f"commits/*/*/{FIRST}.json"))
        go_on(state)


def test_damage_that_is_repaired(root: Path):
    cache = two_parts(root)
    (folder_of(cache, cache.commits()[A].base) / "base.zarr/units/c.0.0").write_bytes(b"")
    found = verify(cache)
    assert len(found.problems) == 1
    for state, _ in states(root, lambda: repair(cache, found)):
        sound(state, damaged=[A])
        there = Cache.open(state)
        assert B in there.records()
        repair(there, verify(there))
        go_on(state)


@pytest.mark.parametrize("expired", [False, True])
def test_garbage_that_is_collected(root: Path, expired: bool):
    """Of attempts that ended and lost a column, and of one that died."""
    cache = two_parts(root)
    drop_column(cache, FIRST)
    fill(begin(cache, A, (SECOND,)), WHAT[A], (SECOND,))
    later = LATER if expired else 0.0

    def work() -> None:
        found = gc(cache, later=later)
        assert len(found.garbage) == (3 if expired else 2)
        assert len(found.waiting) == (0 if expired else 1)

    for number, (state, next_run) in enumerate(states(root, work)):
        sound(state, (SECOND,))
        if next_run or number % 8 == 0:
            complete(state, (SECOND,), (A, B))
            gc(Cache.open(state), later=later)
            assert not gc(Cache.open(state), remove=False, later=later).garbage
            go_on(state)


def test_nothing_is_named_before_it_survives_a_power_cut(tmp_path: Path):
    """Every file of a record, and every folder above it, is synced before the record appears."""
    root = tmp_path / "cache"
    contents: dict[str, bytes] = {}
    entries: dict[str, set[str]] = {}
    named = 0

    def lasting(path: Path) -> bool:
        below = [p for p in (path, *path.parents) if root in p.parents]
        return all(p.name in entries[str(p.parent)] for p in below)

    def before(name: str, args: tuple[Any, ...]) -> None:
        nonlocal named
        if name == "fsync":
            path = os.readlink(f"/proc/self/fd/{args[0]}")
            if os.path.isdir(path):
                entries[path] = set(os.listdir(path))
            else:
                contents[path] = Path(path).read_bytes()
        elif name == "link" and Path(args[1]).relative_to(root).parts[0] == layout.COMMITS:
            record = Path(args[0]).read_bytes()
            body = unseal(record, "")
            part = PartId(shard_id=body["shard_id"], view=body["view"])
            assert contents[str(args[0])] == record
            for file in body["files"]:
                path = root / layout.attempt_folder(part, body["attempt"]) / file
                assert contents[str(path)] == path.read_bytes()
                assert lasting(path)
                named += 1

    def after(name: str, args: tuple[Any, ...]) -> None:
        if name in ("replace", "rename"):
            contents[str(args[1])] = contents.pop(str(args[0]), b"")

    with watched(before, after):
        cache = make_cache(root, BOTH)
        write_part(cache, A, WHAT[A], BOTH)
        commits = cache.part_commits(A)
        assert commits is not None
        add_column(cache, COMPACT)
        write_part(cache, A, WHAT[A], (COMPACT,), base=commits.base)
    records = list((root / layout.COMMITS).rglob("*.json"))
    assert len(records) == 4
    assert named > 40
    for path in records:  # and the record itself before the work counts as done
        assert lasting(path)
