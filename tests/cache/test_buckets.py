"""A cache in a bucket under faults: lost answers, broken uploads, killed writers, damage."""

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from s3_server import KEYS, Request, Server
from tiny_cache import (
    COLUMNS,
    assert_holds,
    begin,
    catch_up,
    content,
    fill,
    make_cache,
    write_part,
)

from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import PartId, commit_file
from kdhiera.cache.reader import CacheReader
from kdhiera.cache.repair import repair
from kdhiera.cache.verify import verify
from kdhiera.errors import DamagedError, KdhieraError

PART = PartId(shard_id="a-0", view=0)
WHAT = content(PART)
RECORDS = [commit_file(PART, None), *(commit_file(PART, c) for c in COLUMNS)]


@pytest.fixture
def cache(s3_url: str) -> Cache:
    return make_cache(f"{s3_url}/cache")


def assert_whole(cache: Cache) -> None:
    """The part is there, once, right, and nothing damaged."""
    opened = Cache.open(cache.url)
    assert_holds(CacheReader(opened, num_views=1, columns=COLUMNS), {PART: WHAT})
    assert verify(opened).problems == ()
    assert sorted(opened.records()[PART]) == sorted(RECORDS)


@pytest.mark.parametrize("kind", ["lost", "refused", "conflict"])
@pytest.mark.parametrize("record", RECORDS)
def test_a_record_whose_answer_is_lost_or_late_is_committed_once(
    s3: Server, cache: Cache, record: str, kind: str
):
    fault = s3.fault(kind, record, times=2)
    result = write_part(cache, PART, WHAT)
    assert fault.hits >= 1
    assert result.won_base
    assert set(result.published) == set(COLUMNS)
    assert_whole(cache)


@pytest.mark.parametrize("kind", ["lost", "cut", "refused"])
def test_every_upload_may_fail_once(s3: Server, cache: Cache, kind: str):
    fault = s3.fault(kind, "/parts/", times=12)
    write_part(cache, PART, WHAT)
    assert fault.hits == 12
    assert_whole(cache)


def test_an_upload_that_never_gets_through_publishes_nothing(s3: Server, cache: Cache):
    s3.fault("refused", "pixels", times=1000)
    with pytest.raises(KdhieraError, match=r"^s3://bucket/\S+pixels\S+: \S") as caught:
        write_part(cache, PART, WHAT)
    assert "\n" not in str(caught.value)
    s3.faults.clear()
    assert Cache.open(cache.url).commits() == {}
    assert list(cache.store.walk("parts")) == []  # what was uploaded of it is removed again
    write_part(cache, PART, WHAT)
    assert_whole(cache)


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_that_never_gets_through_and_the_next_run_goes_on(
    s3: Server, cache: Cache, record: str
):
    s3.fault("refused", record, times=1000)
    with pytest.raises(KdhieraError, match="s3://bucket"):
        write_part(cache, PART, WHAT)
    s3.faults.clear()
    opened = Cache.open(cache.url)
    for commits in opened.commits().values():  # what was published before it is whole
        there = tuple(commits.columns)
        assert_holds(CacheReader(opened, num_views=1, columns=there), {PART: WHAT}, there)
    catch_up(opened, PART)
    assert_whole(cache)


def test_a_base_whose_answer_is_lost_after_another_has_won(s3: Server, cache: Cache):
    """The lost answer was a refusal: only what lies there tells who won."""
    with begin(cache, PART) as late:
        fill(late, WHAT)
        first = write_part(cache, PART, WHAT)
        fault = s3.fault("lost", RECORDS[0])
        second = late.commit()
    assert fault.hits == 1
    assert first.won_base
    assert not second.won_base
    assert_whole(cache)
    (attempt,) = cache.store.names(f"parts/{PART.shard_id}/{PART.view}")
    assert attempt == cache.commits()[PART].base.attempt  # the loser's objects are gone


def test_no_upload_is_in_several_parts(s3: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch):
    """A killed writer must leave nothing that no listing shows: no multipart uploads."""
    monkeypatch.setattr("kdhiera.objects._LARGE_BYTES", 1000)  # all arrays count as large
    s3.requests.clear()
    write_part(cache, PART, WHAT)
    assert_whole(cache)
    assert s3.asked("/parts/", "PUT")
    assert s3.asked("/parts/", "POST") == []
    assert all(r.path.rpartition("/")[2] for r in s3.asked("/parts/", "PUT"))


@pytest.mark.parametrize("damage", ["remove", "cut", "flip"])
@pytest.mark.parametrize("name", ["rows.parquet", "base.zarr/pixels/c", "image/1.int8/codes/c"])
def test_damaged_objects_are_found_refused_and_mended(
    s3: Server, cache: Cache, damage: str, name: str
):
    write_part(cache, PART, WHAT)
    key = next(e.key for e in cache.store.walk("parts") if f"/{name}" in e.key)
    data = cache.store.read(key)
    if damage == "remove":
        cache.store.delete([key])
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        cache.store.write(key, {"cut": data[:-1], "flip": flipped}[damage])
    opened = Cache.open(cache.url)
    found = verify(opened)
    assert any(key in problem.what for problem in found.problems)

    def train() -> None:
        reader = CacheReader(opened, num_views=1, columns=COLUMNS)
        assert_holds(reader, {PART: WHAT})

    with pytest.raises(DamagedError, match="is damaged"):
        train()
    repair(opened, found)
    catch_up(Cache.open(cache.url), PART)
    assert_whole(cache)


@pytest.fixture(scope="module")
def children() -> Iterator[ForkServerContext]:
    """Processes that begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        context.set_forkserver_preload(["tiny_cache"])
        first = context.Process()
        first.start()
        first.join()
        yield context


def extract(url: str, endpoint: str, temporary: str) -> None:
    """One part, in a child of its own."""
    os.environ.update({**KEYS, "AWS_ENDPOINT_URL": endpoint})
    tempfile.tempdir = temporary
    catch_up(make_cache(url), PART)


class Killer:
    """Kills a process at its PUT number `at`, before that is done or after."""

    def __init__(self, at: int, *, done: bool) -> None:
        self.at, self.done, self.count = at, done, 0
        self.pid: int | None = None
        self._lock = threading.Lock()

    def before(self, request: Request) -> bool:
        if request.method != "PUT":
            return False
        with self._lock:
            self.count += 1
            mine = self.count == self.at
        if mine and not self.done:
            self._kill()
        return self.count >= self.at + self.done  # a dead process sends nothing more

    def after(self, request: Request) -> None:
        if self.done and self.count >= self.at:
            self._kill()

    def _kill(self) -> None:
        assert self.pid is not None
        os.kill(self.pid, signal.SIGKILL)


@pytest.mark.slow
def test_death_at_any_write_leaves_whole_parts_only(
    s3: Server,
    s3_url: str,
    tmp_path: Path,
    children: ForkServerContext,
    monkeypatch: pytest.MonkeyPatch,
):
    """SIGKILL at every publication and at some uploads, before and after they are done."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    make_cache(f"{s3_url}/all")
    s3.requests.clear()
    write_part(Cache.open(f"{s3_url}/all"), PART)
    total = len([r for r in s3.requests if r.method == "PUT"])
    assert total > 20
    last = total - len(RECORDS)
    publications = [(at, done) for at in range(last + 1, total + 1) for done in (False, True)]
    for at, done in [(2, False), (last // 2, True), *publications]:
        url = f"{s3_url}/{at}-{done}"
        make_cache(url)
        killer = Killer(at, done=done)
        child = children.Process(target=extract, args=(url, s3.url, str(tmp_path)))
        child.start()
        killer.pid = child.pid
        s3.before, s3.after = killer.before, killer.after
        child.join()
        s3.before = s3.after = None
        assert child.exitcode == -signal.SIGKILL
        left = list(tmp_path.iterdir())
        opened = Cache.open(url)
        for commits in opened.commits().values():
            there = tuple(commits.columns)
            assert_holds(CacheReader(opened, num_views=1, columns=there), {PART: WHAT}, there)
        catch_up(opened, PART)
        assert_whole(opened)
        assert bool(left) == (
            at <= last
        )  # staged files, after the lease and until all are uploaded
        assert list(tmp_path.iterdir()) == []  # the next writer removed them
