"""Faults by real means: kills, broken videos, broken shards, interrupted runs."""

import io
import json
import os
import random
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from real_runs import COMMAND, MakeConfig, Member, contents, kdhiera, write_tar

from kdhiera.cache.commit import Cache
from kdhiera.cache.reader import CacheReader
from kdhiera.config import RunConfig, load
from kdhiera.errors import BadDataError, IncompleteError, MismatchError
from kdhiera.progress import Progress, make_progress
from kdhiera.stages.assemble import columns_of
from kdhiera.stages.distill import distill
from kdhiera.stages.extract_teachers import extract
from kdhiera.views import RowStatus

MakeRun = Callable[..., RunConfig]
SHARED_HANG = Path(__file__).parents[1] / "data" / "decord_hang.mp4"


@pytest.fixture
def progress() -> Progress:
    with make_progress() as made:
        yield made


def test_an_extraction_killed_at_random_resumes_to_the_same_content(
    make_config: MakeConfig, usual_cache: Path, tmp_path: Path
) -> None:
    """SIGKILL of driver and children at random instants, until it gets through."""
    calm = load(make_config("calm", cache={"dir": str(usual_cache)}))
    path = make_config("wild", cache={"dir": str(tmp_path / "wild-cache")})
    rng = random.Random(0)
    parts = tmp_path / "wild-cache" / "parts"
    killed = 0
    for _ in range(4):
        before = len(list(parts.rglob("attempt.json")))
        process = subprocess.Popen(
            [*COMMAND, "extract-teachers", str(path)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while len(list(parts.rglob("attempt.json"))) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 1.0))  # somewhere between its first byte and its commit
        if process.poll() is not None:  # it was faster
            assert process.returncode == 0
            break
        os.killpg(process.pid, signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed
    assert kdhiera("extract-teachers", path).returncode == 0
    assert contents(load(path)) == contents(calm)


def test_extracting_again_does_nothing(make_run: MakeRun, progress: Progress) -> None:
    config = make_run("twice")
    first = extract(config, progress=progress)
    before = {p: p.stat().st_mtime_ns for p in Path(config.cache.dir).rglob("*")}
    second = extract(config, progress=progress)
    assert (len(first.plan.parts), len(second.plan.parts)) == (4, 0)
    assert {p: p.stat().st_mtime_ns for p in Path(config.cache.dir).rglob("*")} == before


def test_bad_videos_become_statuses_and_good_ones_go_on(
    make_run: MakeRun, real_members: list[Member], tmp_path: Path, progress: Progress
) -> None:
    good = real_members[:16]
    video = next(data for name, data in good if name.endswith(".mp4"))
    bad = [
        ("empty.mp4", b""),
        ("text.mp4", b"this is not a video\n" * 50),
        ("cut.mp4", video[: len(video) // 8]),
        ("playlist.mp4", b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:1/x.ts\n"),
        ("lonely.json", b"{}"),
        ("../../escape.mp4", video),
        ("hang.mp4", SHARED_HANG.read_bytes()),
    ]
    shard = write_tar(tmp_path / "mixed.tar", [*good, *bad])
    config = make_run(
        "mixed", data={"shards": [str(shard)], "max_bad_fraction": 0.5}, views={"num": 1}
    )
    summary = extract(config, progress=progress)
    cache = Cache.open(Path(config.cache.dir))
    (part,) = cache.commits().values()
    status = {row.key: row.status for row in cache.rows(part.base)}
    assert summary.rows["ok"] == 10
    assert status["text"] is status["empty"] is status["playlist"] is RowStatus.DECODE_ERROR
    assert status["cut"] is not RowStatus.OK
    assert status["lonely"] is RowStatus.MISSING_MEMBER
    assert status["../../escape"] is status["hang"] is RowStatus.OK
    assert all(r.message for r in cache.rows(part.base) if r.status is not RowStatus.OK)
    assert not list(tmp_path.parent.glob("escape*"))
    reader = CacheReader(cache, num_views=1, columns=tuple(columns_of(config)))
    assert reader.num_samples == 10


def test_mostly_bad_data_stops_with_its_own_code(
    make_config: MakeConfig, real_members: list[Member], tmp_path: Path
) -> None:
    members = [*real_members[:16], *((f"bad{i}.mp4", b"no") for i in range(16))]
    shard = write_tar(tmp_path / "bad.tar", members)
    path = make_config("bad", data={"shards": [str(shard)]}, views={"num": 1})
    done = kdhiera("extract-teachers", path)
    assert done.returncode == 4, done.stderr
    assert "16 of 24 clips are bad" in done.stderr
    assert "max_bad_fraction" in done.stderr
    with pytest.raises(BadDataError), make_progress() as bars:
        extract(load(path), progress=bars)  # again: still refused, whatever is committed


def test_a_broken_shard_is_reported_and_the_others_are_done(
    make_run: MakeRun, shards: list[Path], tmp_path: Path, progress: Progress
) -> None:
    junk = tmp_path / "junk.tar"
    junk.write_bytes(b"not a tar at all" * 100)
    cut = tmp_path / "cut.tar"
    with tarfile.open(shards[0]) as tar:
        end = tar.getmembers()[12].offset  # six samples stand before
    cut.write_bytes(shards[0].read_bytes()[: end + 700])
    config = make_run(
        "broken", data={"shards": [str(junk), str(cut), str(shards[1])]}, views={"num": 1}
    )
    with pytest.raises(IncompleteError, match=r"(?s)no tar archive.*some shards"):
        extract(config, progress=progress)
    cache = Cache.open(Path(config.cache.dir))
    rows = {p.shard_id: found.base.num_rows for p, found in cache.commits().items()}
    assert sorted(rows.values()) == [6, 12]
    problems = [s.problems for i in rows for s in cache.sources(i)]
    assert any("shard_truncated" in p for found in problems for p in found)


@pytest.mark.usefixtures("own_cache")
def test_another_configuration_is_refused_with_the_fields_that_differ(
    make_config: MakeConfig, progress: Progress
) -> None:
    done = kdhiera("extract-teachers", make_config("other", views={"seed": 5}))
    assert done.returncode == 3, done.stderr
    assert "views.seed" in done.stderr
    assert "cache has" in done.stderr
    other = load(make_config("other", clip={"height": 96}))
    for stage in (extract, distill):
        with pytest.raises(MismatchError, match=r"clip\.height"):
            stage(other, progress=progress)


@pytest.mark.usefixtures("own_cache")
def test_masks_that_are_not_covered_are_refused_before_training(
    make_config: MakeConfig, progress: Progress
) -> None:
    done = kdhiera("distill", make_config("greedy", objective={"strategy": "tube"}))
    assert done.returncode == 3, done.stderr
    assert "strategy tube (planned: attention)" in done.stderr
    for change, words in (
        ({"objective": {"ratio": 0.3}}, r"attention at ratio 0\.3"),
        ({"masks": {"strategies": ["tube"]}, "objective": {"strategy": "tube"}}, "It keeps"),
    ):
        with pytest.raises(MismatchError, match=words):
            distill(load(make_config("greedy", **change)), progress=progress)
    assert not (make_config("greedy").parent / "run-greedy").exists()


def test_training_uses_the_shards_that_the_config_names(
    shards: list[Path], own_cache: Path
) -> None:
    """Also when they are gone; a wrong shard that was dropped from the config is forgotten."""
    from kdhiera.cache.expected import expect_shard, expected_shards

    cache = Cache.open(own_cache)
    expect_shard(cache, "wrong-0123456789ab", path="/data/wrong.tar")
    both = expected_shards(cache, [str(s) for s in shards])
    assert len(both) == 2
    assert expected_shards(cache, [str(shards[0].parent / "part-*.tar")]) == both
    (one,) = expected_shards(cache, [str(shards[1])])
    assert one.startswith("part-1-")
    assert len(expected_shards(cache, ["/moved/elsewhere.tar"])) == 3
    expect_shard(cache, "part-1-ba9876543210", path=str(shards[1]))  # the file was replaced
    assert expected_shards(cache, [str(shards[1])]) == {"part-1-ba9876543210"}


def test_an_interrupted_extraction_leaves_training_refusing(
    make_run: MakeRun, own_cache: Path, shards: list[Path], progress: Progress
) -> None:
    """A planned shard that was never reached is missed, not ignored."""
    from kdhiera.cache.expected import expect_shard

    never = shards[0].with_name("never.tar")
    expect_shard(Cache.open(own_cache), "never-0123456789ab", path=str(never))
    config = make_run("partial", data={"shards": [*map(str, shards), str(never)]})
    with pytest.raises(MismatchError, match="never-0123456789ab"):
        distill(config, progress=progress)


@pytest.mark.usefixtures("own_cache")
def test_sigterm_stops_training_with_a_checkpoint_and_the_losses_go_on(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    from kdhiera.training.metrics import read_metrics

    assert kdhiera("distill", make_config("calm", train={"epochs": 20})).returncode == 0
    stopped = make_config("stopped", train={"epochs": 20})
    process = subprocess.Popen(
        [*COMMAND, "distill", str(stopped)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "run-stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if log.exists() and len(log.read_text().splitlines()) >= 4:
            break
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 75, errors
    assert "goes on from it" in errors
    done = kdhiera("distill", stopped)
    assert done.returncode == 0, done.stderr
    calm = [line["loss"] for line in read_metrics(tmp_path / "run-calm")]
    wild = [line["loss"] for line in read_metrics(tmp_path / "run-stopped")]
    assert calm == wild


@pytest.mark.usefixtures("own_cache")
def test_two_processes_may_not_train_in_one_folder(make_config: MakeConfig, tmp_path: Path) -> None:
    from filelock import FileLock

    path = make_config("locked")
    folder = tmp_path / "run-locked"
    folder.mkdir()
    with FileLock(folder / ".lock"):
        done = kdhiera("distill", path)
    assert done.returncode == 2
    assert "another process trains in" in done.stderr


def test_a_nonfinite_teacher_marks_its_rows_and_other_columns_live(
    make_run: MakeRun, progress: Progress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "sick_teacher.py"
    module.write_text(SICK_TEACHER)
    monkeypatch.syspath_prepend(tmp_path)
    config = make_run("sick", views={"num": 1})
    teachers = {k: t.model_dump(mode="json") for k, t in config.teachers.items()}
    teachers["video"] = {
        "kind": "module",
        "factory": "sick_teacher:build",
        "layers": ["1"],
        "precision": "fp32",
    }
    config = make_run("sick", views={"num": 1}, teachers=teachers)
    extract(config, progress=progress)
    cache = Cache.open(Path(config.cache.dir))
    both = CacheReader(cache, num_views=1, columns=("image.12.fp32", "video.1.fp32"))
    image = CacheReader(cache, num_views=1, columns=("image.12.fp32",))
    assert image.num_samples == 24
    assert 0 < both.num_samples < 24
    assert "nonfinite" in both.coverage.describe()


SICK_TEACHER = """
import torch
from kdhiera.teachers.base import TeacherOutput


class Sick:
    identity = {"kind": "module", "model": "sick"}
    weights_sha256 = "0" * 64

    def __init__(self, grid):
        self.grid = grid

    def check(self, layers, score_source):
        pass

    def __call__(self, clips, layers, score_source):
        b, (t, h, w) = len(clips), self.grid.tokens
        features = clips.float().mean((1, 2, 3))[:, None, None, None, :].repeat(1, t, h, w, 1)
        bright = clips.float().mean((1, 2, 3, 4)) > 110
        features[bright] = float("nan")
        return TeacherOutput(features={n: features for n in layers}, scores=None)


def build(*, grid, device, dtype):
    return Sick(grid)
"""


def test_the_labels_travel_into_the_cache(usual_cache: Path, shards: list[Path]) -> None:
    reader = CacheReader(Cache.open(usual_cache), num_views=2, columns=())
    with tarfile.open(shards[0]) as tar:
        member = next(m for m in tar if m.name.endswith(".json"))
        content = tar.extractfile(member)
        assert content is not None
        expected = json.load(io.TextIOWrapper(content))["labels"]
    assert expected in reader.labels(np.arange(reader.num_samples))
