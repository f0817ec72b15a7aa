"""Shards and caches in buckets, by the installed command, and runs that race."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from places import Place
from real_runs import MakeConfig, Member, contents, kdhiera, write_tar
from s3_server import Request, Server

from kdhiera.cache.commit import Cache
from kdhiera.cache.verify import verify
from kdhiera.config import RunConfig, load
from kdhiera.data.ranges import Forward
from kdhiera.errors import IncompleteError, MismatchError
from kdhiera.progress import Progress, make_progress
from kdhiera.stages.assemble import columns_of
from kdhiera.stages.distill import distill
from kdhiera.stages.extract_teachers import extract
from kdhiera.stages.replaying.replay import replay_rows

MakeRun = Callable[..., RunConfig]
TRAIN = {"max_steps": 2, "epochs": 2, "batch_size": 8, "device": "cpu", "lr": 1e-3}


@pytest.fixture
def progress() -> Iterator[Progress]:
    with make_progress() as made:
        yield made


@pytest.fixture
def in_bucket(shards: list[Path], s3_url: str) -> str:
    """A pattern of the usual shards, which lie in a bucket."""
    place = Place(f"{s3_url}/videos")
    for shard in shards:
        place.put(shard.name, shard.read_bytes())
    return f"{s3_url}/videos/part-{{0..1}}.tar"


@pytest.fixture
def one_teacher(make_run: MakeRun) -> dict[str, Any]:
    """The usual image teacher and one layer of it."""
    image = make_run("usual").model_dump(mode="json")["teachers"]["image"]
    return {"image": {**image, "layers": ["12"]}}


def start(*arguments: object) -> subprocess.Popen[str]:
    """The command line in a process, and a process group, of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", "from kdhiera.cli import main; main()", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_shards_and_cache_in_a_bucket_give_the_same_as_on_disk(
    make_config: MakeConfig,
    progress: Progress,
    tmp_path: Path,
    s3: Server,
    s3_url: str,
    in_bucket: str,
) -> None:
    """With the first run killed in the middle of an upload, and trained from with both modes."""
    cache, one_view = {"dir": str(tmp_path / "local")}, {"num": 1}
    local = load(make_config("local", cache=cache, views=one_view))
    extract(local, progress=progress)
    moved = load(make_config("moved", data={"shards": in_bucket}, cache=cache, views=one_view))
    assert extract(moved, progress=progress, dry_run=True).plan.parts == ()  # the same shards
    path = make_config(
        "bucket",
        data={"shards": in_bucket},
        views=one_view,
        cache={"dir": f"{s3_url}/cache", "encoding": "fp32"},
        train=TRAIN,
    )

    killed = start("extract-teachers", path)

    def kill(request: Request) -> bool:
        """In the middle of the second part, with the first one committed."""
        if request.method == "PUT" and "/parts/part-1-" in request.path:
            if killed.poll() is None and len(s3.asked("/parts/part-1-", "PUT")) == 10:
                os.killpg(killed.pid, signal.SIGKILL)
            return len(s3.asked("/parts/part-1-", "PUT")) >= 10
        return False

    s3.requests.clear()
    s3.before = kill
    _, errors = killed.communicate(timeout=250)
    s3.before = None
    assert killed.returncode == -signal.SIGKILL, errors
    assert [p.view for p in Cache.open(f"{s3_url}/cache").commits()] == [0]

    done = kdhiera("extract-teachers", path)
    assert done.returncode == 0, done.stderr
    assert contents(load(path)) == contents(local)
    opened = Cache.open(f"{s3_url}/cache")
    assert verify(opened).problems == ()
    sources = {commits.base.source for commits in opened.commits().values()}
    assert {s.path for s in sources} == {f"{s3_url}/videos/part-{i}.tar" for i in range(2)}
    on_disk = Cache.open(local.cache.dir).commits().values()
    assert {s.sha256 for s in sources} == {commits.base.source.sha256 for commits in on_disk}
    done = kdhiera("distill", path)
    assert done.returncode == 0, done.stderr
    live = load(path, ["cache.mode=live"])
    assert distill(live, progress=progress, overwrite=True).training.steps == 2
    config = load(path)
    replayed = replay_rows(config, opened, num_rows=3, columns=columns_of(config))
    assert (replayed.rows, replayed.pixels_equal) == (3, 3)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_runs_that_race_lose_nothing(
    make_config: MakeConfig,
    progress: Progress,
    one_teacher: dict[str, Any],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    where: str,
    shards: list[Path],
) -> None:
    """Separate processes on one cache: one wants fewer columns, one other shards."""
    alone = load(make_config("alone", views={"num": 1}, cache={"dir": str(tmp_path / "alone")}))
    extract(alone, progress=progress)
    root = str(tmp_path / "raced")
    both: Any = [str(s) for s in shards]
    second: Any = both[1:]
    if where == "bucket":
        both = request.getfixturevalue("in_bucket")
        second = both.replace("{0..1}", "1")
        root = f"{request.getfixturevalue('s3_url')}/raced"
    common = {"views": {"num": 1}, "cache": {"dir": root, "encoding": "fp32"}}
    paths = [
        make_config("few", data={"shards": both}, teachers=one_teacher, **common),
        make_config("whole", data={"shards": both}, **common),
        make_config("second", data={"shards": second}, **common),
    ]
    running = [start("extract-teachers", path) for path in paths]
    for process in running:
        _, errors = process.communicate(timeout=280)
        assert process.returncode == 0, errors
    assert contents(load(paths[1])) == contents(alone)
    opened = Cache.open(root)
    assert verify(opened).problems == ()
    for part, commits in opened.commits().items():  # what lost the race is not left behind
        named = {commits.base.attempt, *(c.attempt for c in commits.columns.values())}
        assert set(opened.store.names(f"parts/{part.shard_id}/{part.view}")) == named


@pytest.fixture(params=["disk", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "disk":
        return Place(str(tmp_path / "place"))
    return Place(request.getfixturevalue("s3_url"))


def other_bytes(tar: bytes, members: list[Member]) -> bytes:
    """The same headers and another video: one byte of the last one differs."""
    at = tar.rindex(members[-2][1][-100:])
    return tar[:at] + bytes([tar[at] ^ 1]) + tar[at + 1 :]


@pytest.mark.slow
def test_a_shard_with_the_same_index_and_other_bytes_is_refused(
    make_run: MakeRun,
    one_teacher: dict[str, Any],
    real_members: list[Member],
    tmp_path: Path,
    progress: Progress,
    place: Place,
) -> None:
    members = real_members[:6]
    tar = write_tar(tmp_path / "x.tar", members).read_bytes()
    shard = place.put("x.tar", tar)
    config = make_run("one", data={"shards": shard}, views={"num": 1}, teachers=one_teacher)
    extract(config, progress=progress)
    before = Cache.open(config.cache.dir).commits()
    place.overwrite("x.tar", other_bytes(tar, members))
    teachers = {"image": {**one_teacher["image"], "layers": ["6", "12"]}}
    for change in ({"views": {"num": 2}}, {"views": {"num": 1}, "teachers": teachers}):
        sections = {"data": {"shards": shard}, "teachers": one_teacher, **change}
        with pytest.raises(MismatchError, match=r"source_changed: \S+x\.tar has the index of"):
            extract(make_run("two", **sections), progress=progress)
        cache = Cache.open(config.cache.dir)
        assert cache.commits() == before
        (part,) = before
        for view in range(2):  # nothing is left of the refused attempt
            attempts = cache.store.names(f"parts/{part.shard_id}/{view}")
            assert len(attempts) == (view == 0)
    place.overwrite("x.tar", tar)
    two = make_run("two", data={"shards": shard}, views={"num": 2}, teachers=one_teacher)
    extract(two, progress=progress)
    assert len(Cache.open(config.cache.dir).commits()) == 2


def test_a_shard_that_is_replaced_while_it_is_read_is_never_mixed(
    make_run: MakeRun,
    one_teacher: dict[str, Any],
    real_members: list[Member],
    tmp_path: Path,
    progress: Progress,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Replaced between its last sample and its end, when all the work on it is done."""
    members = real_members[:6]
    tar = write_tar(tmp_path / "x.tar", members).read_bytes()
    calm = write_tar(tmp_path / "calm.tar", real_members[6:10]).read_bytes()
    paths = [place.put("x.tar", tar), place.put("calm.tar", calm)]
    config = make_run("one", data={"shards": paths}, views={"num": 1}, teachers=one_teacher)
    finish = Forward.sha256
    replacements = [other_bytes(tar, members)]

    def replaced(self: Forward) -> str:
        if self.version.num_bytes == len(tar) and replacements:
            place.overwrite("x.tar", replacements.pop())
        return finish(self)

    monkeypatch.setattr("kdhiera.data.ranges._BLOCK_BYTES", 4096)
    monkeypatch.setattr("kdhiera.data.ranges._BLOCKS_AHEAD", 1)
    monkeypatch.setattr(Forward, "sha256", replaced)
    if place.root.startswith("s3://"):  # an object is known by its ETag: the others are done
        with pytest.raises(IncompleteError, match="is not the file that was indexed any more"):
            extract(config, progress=progress)
        assert [p.shard_id[:5] for p in Cache.open(config.cache.dir).commits()] == ["calm-"]
    extract(config, progress=progress)
    commits = Cache.open(config.cache.dir).commits().values()
    hashes = {c.base.source.path: c.base.source.sha256 for c in commits}
    wanted = (other_bytes(tar, members), calm)
    assert hashes == {p: sha256(b).hexdigest() for p, b in zip(paths, wanted, strict=True)}
