"""Looking after real caches: sources, rows made again, and what a run asks of its cache."""

import contextlib
import io
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from forging import attempt_of, forge
from real_runs import MakeConfig, kdhiera

from kdhiera.cache.commit import Cache
from kdhiera.cache.drop import drop_column
from kdhiera.cache.layout import PartId, commit_file
from kdhiera.cli import main
from kdhiera.config import RunConfig, load
from kdhiera.errors import ExitCode, KdhieraError, MismatchError, UsageError
from kdhiera.featurize import Featurizer
from kdhiera.progress import Progress, make_progress
from kdhiera.stages.assemble import featurizer_of
from kdhiera.stages.cache_diff import diff_cache
from kdhiera.stages.distillation.source import open_cache
from kdhiera.stages.extract_teachers import extract
from kdhiera.stages.extraction import plan as extract_plan
from kdhiera.stages.extraction import worker as extract_worker
from kdhiera.stages.replaying.sources import SourceStatus
from kdhiera.stages.verify import CacheReport, check_cache

MakeRun = Callable[..., RunConfig]
COLUMNS = ("image.6.fp32", "image.12.fp32", "video.3.fp32")


@pytest.fixture
def progress() -> Iterator[Progress]:
    with make_progress() as made:
        yield made


@pytest.fixture
def run(make_config: MakeConfig, own_cache: Path) -> RunConfig:
    """A run with a finished cache of its own: two shards of twelve clips in two views."""
    assert own_cache.is_dir()
    return load(make_config("run"))


def check(run: RunConfig, progress: Progress, **asked: Any) -> CacheReport:
    options = {"sources": False, "recompute": 0, "repair": False} | asked
    return check_cache(run.cache.dir, config=run, progress=progress, **options)


def changed(run: RunConfig, *overrides: str) -> RunConfig:
    """The run with some settings overridden, as on a command line."""
    path = Path(run.run_dir).parent / "run.yaml"
    return load(path, overrides)


def parts_of(run: RunConfig) -> list[PartId]:
    return list(Cache.open(run.cache.dir).commits())


# rows made again


def test_a_sound_cache_comes_out_the_same(run: RunConfig, progress: Progress) -> None:
    report = check(run, progress, recompute=6, sources=True)
    assert report.sound
    assert report.sources is not None
    assert [c.status for c in report.sources.checks] == [SourceStatus.OK] * 2
    replayed = report.replayed
    assert replayed is not None
    assert (replayed.rows, replayed.parts, replayed.pixels_equal) == (6, 4, 6)
    assert {c.column: c.rows for c in replayed.columns} == dict.fromkeys(COLUMNS, 6)
    for column in replayed.columns:
        assert column.error < 1e-9
        assert column.worst_cosine > 0.999999
    assert (replayed.scores_rows, replayed.beyond) == (6, ())
    assert replayed.scores_error < 1e-5
    said = report.describe()
    assert said.splitlines()[-1] == "result    sound"
    assert json.loads(json.dumps(report.to_json()))["recompute"]["rows"] == 6


def test_features_of_other_weights_are_found_and_no_others(
    make_run: MakeRun, shards: list[Path], progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher whose weights change after they were hashed: the records know nothing of it."""

    def other_weights(*args: Any, **kwargs: Any) -> Featurizer:
        made = featurizer_of(*args, **kwargs)
        generator = torch.Generator().manual_seed(0)
        blocks: torch.nn.Module = made.teachers["video"]._blocks  # type: ignore[attr-defined]
        with torch.no_grad():
            for weights in blocks.parameters():
                noise = torch.randn(weights.shape, generator=generator)
                weights += 0.02 * weights.std(correction=0) * noise
        return made

    monkeypatch.setattr(extract_worker, "featurizer_of", other_weights)
    run = make_run("other", data={"shards": [str(shards[0])]}, views={"num": 1})
    extract(run, progress=progress)
    assert check(run, progress).sound  # every byte is what was written
    report = check(run, progress, recompute=4)
    assert not report.sound
    assert report.replayed is not None
    (what,) = report.replayed.beyond
    assert what.startswith("video.3.fp32 differs by")
    errors = {c.column: c.error for c in report.replayed.columns}
    assert max(errors[c] for c in COLUMNS[:2]) < 1e-9 < 1e-5 < errors["video.3.fp32"]
    assert "kdhiera cache drop" in report.describe()


def test_pixels_and_scores_that_were_not_of_these_clips_are_found(
    run: RunConfig, progress: Progress
) -> None:
    root = Path(run.cache.dir)
    first, second, *_ = parts_of(run)
    pixels = zarr.open_group(attempt_of(root, first) / "base.zarr", mode="r+")["pixels"]
    scores = zarr.open_group(attempt_of(root, second) / "base.zarr", mode="r+")["scores"]
    assert isinstance(pixels, zarr.Array)
    assert isinstance(scores, zarr.Array)
    pixels[:] = np.asarray(pixels)[::-1]
    scores[:] = np.asarray(scores)[::-1]
    for part in (first, second):
        forge(root, part, None)
    report = check(run, progress, recompute=8)
    assert report.replayed is not None
    said = " ".join(report.replayed.beyond)
    assert "pixels are equal in 6 of 8 rows" in said
    assert "other stored pixels" in said
    assert "scores differ by" in said
    assert all(c.error < 1e-9 for c in report.replayed.columns)


def test_every_column_gets_its_rows_where_it_is_committed(
    run: RunConfig, progress: Progress
) -> None:
    root = Path(run.cache.dir)
    first, second_view, other, other_view = parts_of(run)
    for part in (second_view, other_view):
        shutil.rmtree((root / commit_file(part, None)).parent)
    (root / commit_file(other, "video.3.fp32")).unlink()
    status = zarr.open_group(
        attempt_of(root, first, "image.6.fp32") / "targets.zarr/image/6.fp32", mode="r+"
    )["status"]
    assert isinstance(status, zarr.Array)
    status[:11] = 1  # nonfinite: such rows are no features to compare
    forge(root, first, "image.6.fp32", statuses={"ok": 1, "nonfinite": 11})
    report = check(run, progress, recompute=5)
    assert report.replayed is not None
    assert {c.column: c.rows for c in report.replayed.columns} == dict.fromkeys(COLUMNS, 5)
    assert report.replayed.beyond == ()
    report = check(run, progress, recompute=1000)
    assert report.replayed is not None
    assert {c.column: c.rows for c in report.replayed.columns} == {
        "image.6.fp32": 13,
        "image.12.fp32": 24,
        "video.3.fp32": 12,
    }


def test_columns_that_the_teachers_do_not_make_are_left_out_by_name(
    run: RunConfig, progress: Progress
) -> None:
    teachers = {"image": run.teachers["image"].model_copy(update={"layers": ("12",)})}
    fewer = run.model_copy(update={"teachers": teachers})
    report = check(fewer, progress, recompute=2)
    assert report.replayed is not None
    assert {c.column for c in report.replayed.columns} == set(COLUMNS[:2])
    assert set(report.skipped) == {"video.3.fp32"}
    assert report.sound


def test_a_config_of_another_teacher_is_refused(
    run: RunConfig, progress: Progress, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(str(run.teachers["image"].weights))
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, tmp_path / "other.safetensors")
    other = changed(run, f"teachers.image.weights={tmp_path / 'other.safetensors'}")
    with pytest.raises(MismatchError, match="weights_sha256"):
        check(other, progress, recompute=1)


def test_nothing_is_made_again_where_it_cannot_be(
    run: RunConfig, progress: Progress, shards: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="needs the config"):
        check_cache(
            run.cache.dir,
            config=None,
            sources=False,
            recompute=1,
            repair=False,
            progress=progress,
        )
    elsewhere = tmp_path / "unrelated.tar"
    shutil.copy(shards[0], elsewhere)
    other = changed(run, f"data.shards=[{elsewhere}]")
    with taken_away(*shards):
        report = check(other, progress, recompute=1)
    assert "none of its shards is in data.shards" in report.describe()
    assert (report.verified.problems, report.sound) == ((), False)
    part = parts_of(run)[0]
    (Path(run.cache.dir) / commit_file(part, None)).write_bytes(b"")
    report = check(run, progress, recompute=1, sources=True)
    assert (report.replayed, report.sources, report.sound) == (None, None, False)
    assert "run this again once it is whole" in report.describe()
    report = check(run, progress, recompute=1, sources=True, repair=True)
    assert report.replayed is not None
    assert report.sound
    assert "kdhiera extract-teachers" in report.describe()


def test_a_worker_fills_only_columns_of_its_own_teachers(run: RunConfig) -> None:
    """Between the driver's look and its own a column may have been dropped and made anew."""
    cache = Cache.open(run.cache.dir)
    identity = cache.columns.identity("video.3.fp32")
    assert identity is not None
    drop_column(cache, "video.3.fp32")
    other = {**identity, "weights_sha256": "00" * 32}
    Cache.open(run.cache.dir).columns.ensure("video.3.fp32", other, provenance={})
    with pytest.raises(MismatchError, match="weights_sha256"):
        extract_worker.PartExtractor(run, stop=threading.Event(), on_counts=lambda rows, bad: None)


def test_a_lost_identity_is_written_anew_and_nothing_is_planned_twice(
    run: RunConfig, progress: Progress
) -> None:
    root = Path(run.cache.dir)
    for key in ("cache.json", "columns/video.3.fp32/column.json"):
        (root / key).write_bytes(b"x")
        assert check(run, progress, repair=True).verified.removed == (key,)
        assert not (root / key).exists()
        plans: list[extract_plan.ExtractPlan] = []
        extract(run, progress=progress, on_plan=plans.append)
        assert [plan.parts for plan in plans] == [()]
        assert check(run, progress).sound


# sources


def test_sources_are_ok_moved_or_changed(
    make_run: MakeRun, run: RunConfig, shards: list[Path], progress: Progress, tmp_path: Path
) -> None:
    first, second = shards
    data = first.read_bytes()
    second_data = second.read_bytes()
    try:
        place = len(data) // 2
        first.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        second.unlink()
        report = check(run, progress, sources=True, repair=True)
        assert report.sources is not None
        found = {c.shard_id.split("-")[1]: c for c in report.sources.checks}
        assert found["0"].status is SourceStatus.CHANGED
        assert "same samples in other bytes" in found["0"].what
        assert found["1"].status is SourceStatus.MOVED
        assert not report.sound
        assert report.verified.removed == ()  # the cache is sound, and all that is left of it
        assert str(first) in report.describe()

        first.write_bytes(data[: len(data) // 2])  # cut
        report = check(run, progress, sources=True)
        assert "now holds other samples" in report.sources.checks[0].what  # type: ignore[union-attr]
        first.write_bytes(b"")
        report = check(run, progress, sources=True)
        assert "is no tar archive" in report.sources.checks[0].what  # type: ignore[union-attr]

        moved = tmp_path / "moved"
        moved.mkdir()
        (moved / first.name).write_bytes(data)
        first.unlink()
        (moved / second.name).write_bytes(second_data)
        elsewhere = changed(run, f"data.shards=[{moved}/*.tar]")
        report = check(elsewhere, progress, sources=True, recompute=2)
        assert report.sound
        assert "found at" in report.describe()
        with_folder = check_cache(
            run.cache.dir,
            config=None,
            sources=True,
            recompute=0,
            repair=False,
            progress=progress,
        )
        assert with_folder.sound  # moved is no damage
        assert "0 ok, 2 moved, 0 changed" in with_folder.describe()
    finally:
        first.write_bytes(data)
        second.write_bytes(second_data)


# going on under other versions


@contextlib.contextmanager
def taken_away(*paths: Path) -> Iterator[None]:
    for path in paths:
        path.rename(path.with_suffix(".away"))
    try:
        yield
    finally:
        for path in paths:
            path.with_suffix(".away").rename(path)


def other_versions() -> tuple[tuple[str, str], ...]:
    return (("torch", "0.0.1"),)


def test_other_versions_go_on_if_rows_come_out_the_same(
    run: RunConfig,
    progress: Progress,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(extract_plan, "versions", other_versions)
    more = changed(run, "views.num=3", "extract.probe_rows=2")
    caplog.set_level("INFO")
    extract(more, progress=progress)
    assert "pixels equal in 2 of 2 rows; image.6.fp32: worst cosine" in caplog.text


def test_other_versions_are_refused_if_rows_come_out_differently(
    run: RunConfig, progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(run.cache.dir)
    for part in parts_of(run):
        pixels = zarr.open_group(attempt_of(root, part) / "base.zarr", mode="r+")["pixels"]
        assert isinstance(pixels, zarr.Array)
        pixels[:] = 255 - np.asarray(pixels)
        forge(root, part, None)
    monkeypatch.setattr(extract_plan, "versions", other_versions)
    with pytest.raises(MismatchError, match="pixels are equal in 0 of 4 rows"):
        extract(changed(run, "views.num=3"), progress=progress)


def test_so_do_shards_that_are_new_to_the_cache(
    run: RunConfig,
    progress: Progress,
    shards: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What is compared was made of shards that the config no longer names, where they lay."""
    monkeypatch.setattr(extract_plan, "versions", other_versions)
    elsewhere = tmp_path / "another.tar"
    shutil.copy(shards[0], elsewhere)
    other = changed(run, f"data.shards=[{elsewhere}]", "extract.probe_rows=2")
    caplog.set_level("INFO")
    extract(other, progress=progress)
    assert "pixels equal in 2 of 2 rows; image.6.fp32: worst cosine" in caplog.text


def test_other_versions_without_the_old_shards_name_the_way_out(
    run: RunConfig,
    progress: Progress,
    shards: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A shard that is new, and none of those that the cache was made from."""
    monkeypatch.setattr(extract_plan, "versions", other_versions)
    root = Path(run.cache.dir)
    first, *_ = parts_of(run)
    (root / commit_file(first, "video.3.fp32")).unlink()
    for part in parts_of(run):
        if part.shard_id == first.shard_id:
            forge(root, part, None, statuses={"decode_error": 12}, array_rows=0)
    only_first = changed(run, f"data.shards=[{shards[0]}]")
    with (
        taken_away(shards[1]),
        pytest.raises(KdhieraError, match=r"extract\.probe_rows=0"),
    ):
        extract(only_first, progress=progress)


# what a run asks of its cache


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        ((), ExitCode.OK, "distill   would run"),
        (("objective.ratio=0.75", "objective.draws=1"), ExitCode.OK, "masks     covered"),
        (("views.num=1", "objective.teachers=[video]"), ExitCode.OK, "2 of 2"),
        (("views.num=3",), ExitCode.INCOMPLETE, "would add rows and image.6.fp32"),
        (("teachers.image.layers=[6, 9, 12]",), ExitCode.INCOMPLETE, "image.9.fp32: not there"),
        (("cache.encoding=int8",), ExitCode.INCOMPLETE, "would add image.6.int8"),
        (("cache.dir=nowhere",), ExitCode.INCOMPLETE, "would make a new cache"),
        (("views.num=3", "cache.allow_partial=true"), ExitCode.INCOMPLETE, "no shard is whole"),
        (("views.frame_stride=2",), ExitCode.REFUSED, "views.frame_stride"),
        (("clip.height=96",), ExitCode.REFUSED, "clip.height"),
        (("objective.strategy=random",), ExitCode.REFUSED, "plan in `masks`"),
        (("masks.ratio=0.25",), ExitCode.REFUSED, "attention at ratio 0.25"),
        (
            ("masks.draws=3", "objective.draws=1"),
            ExitCode.REFUSED,
            "plan no more in `masks`",
        ),
        (("teachers.video.precision=bf16",), ExitCode.REFUSED, "give these other names"),
        (("teachers.image.model=vit_base_patch14_dinov2",), ExitCode.REFUSED, "model"),
    ],
)
def test_diff_says_what_training_and_extraction_would_do(
    run: RunConfig,
    progress: Progress,
    overrides: tuple[str, ...],
    code: ExitCode,
    words: str,
) -> None:
    asked = changed(run, *overrides)
    found = diff_cache(asked)
    said = found.describe()
    assert words in said, said
    assert found.exit_code == code, said
    assert json.loads(json.dumps(found.to_json()))["exit_code"] == code
    try:  # training itself
        open_cache(asked)
        would_train = True
    except (MismatchError, UsageError):
        would_train = False
    assert (found.distill.startswith("would run")) == would_train, said
    if code is not ExitCode.REFUSED:
        work = extract(asked, progress=progress, dry_run=True).plan
        assert found.extract == ("has nothing to do",) or work.parts
        assert bool(work.parts) == (code is ExitCode.INCOMPLETE)
        assert sum(map(len, [found.missing])) in (len(work.parts), 0)


def test_diff_needs_no_shards_and_names_those_that_are_new(
    run: RunConfig, shards: list[Path], tmp_path: Path
) -> None:
    gone = changed(run, "data.shards=[/nowhere/part-0.tar]")
    assert diff_cache(gone).exit_code is ExitCode.OK  # they have moved: all that is cached
    new = tmp_path / "new.tar"
    shutil.copy(shards[0], new)
    more = changed(run, f"data.shards=[{shards[0]}, {shards[1]}, {new}]")
    found = diff_cache(more)
    assert found.unseen == (str(new),)
    assert found.exit_code is ExitCode.INCOMPLETE
    assert "1 shard in 2 views, never extracted" in found.describe()
    assert found.distill == "would run"


def test_a_cache_that_is_not_whole_is_told_with_the_ways_on(run: RunConfig) -> None:
    part = parts_of(run)[0]
    (Path(run.cache.dir) / commit_file(part, "video.3.fp32")).unlink()
    found = diff_cache(run)
    assert found.exit_code is ExitCode.INCOMPLETE
    assert "would add video.3.fp32 to 1 part" in found.describe()
    assert "would not run: 1 shard not whole" in found.distill
    partial = diff_cache(changed(run, "cache.allow_partial=true"))
    assert partial.distill == "would run, leaving out 1 shard not whole"
    live = diff_cache(changed(run, "cache.mode=live"))
    assert live.distill == "would run without the cache (cache.mode=live)"
    image = diff_cache(changed(run, "objective.teachers=[image]"))
    assert image.distill == "would run"  # it does not ask for what is missing


# as commands


def command(*arguments: object) -> tuple[int, str, str]:
    """The command line in this process: exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kdhiera", *map(str, arguments)])
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as end,
        ):
            main()
    return int(end.value.code or 0), out.getvalue(), err.getvalue()


@pytest.mark.slow
def test_the_commands_end_with_the_right_codes(run: RunConfig, tmp_path: Path) -> None:
    config, root = tmp_path / "run.yaml", Path(run.cache.dir)
    assert command("cache", "diff", config)[0] == 0
    code, out, _ = command("cache", "diff", config, "views.frame_stride=2")
    assert (code, "cache has" in out) == (3, True)
    code, out, err = command("cache", "info", config, "--json")
    assert (code, err, json.loads(out)["num_samples"]) == (0, "", 24)
    code, out, err = command("cache", "ls", tmp_path)
    assert (code, err) == (0, "")
    assert str(root) in out
    assert "complete" in out
    chunk = next((attempt_of(root, parts_of(run)[0]) / "base.zarr/pixels").glob("c.*"))
    chunk.unlink()
    code, out, err = command("cache", "verify", config)
    assert (code, str(chunk) in out) == (1, True)
    assert err.startswith("verify: 0/4 parts")
    code, _, err = command("distill", config)
    assert (code, str(chunk) in err) == (1, True)
    code, out, _ = command("cache", "verify", root, "--repair", "--json")
    assert (code, len(json.loads(out)["removed"])) == (0, 4)
    assert command("cache", "diff", config)[0] == 5
    assert command("extract-teachers", config)[0] == 0
    done = kdhiera("cache", "verify", config, "--recompute", 2, "--sources")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("result    sound\n")
    code, _, err = command("cache", "drop", root, "image.6.fp3")
    assert (code, "did you mean image.6.fp32" in err) == (2, True)
    code, out, _ = command("cache", "drop", root, "image.6.fp32", "--dry-run")
    assert (code, "would drop image.6.fp32" in out) == (0, True)
    code, out, _ = command("cache", "drop", config, "image.6.fp32")
    assert (code, "4 parts had it" in out) == (0, True)
    assert command("cache", "diff", config)[0] == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("verify", "nowhere"), "no cache in nowhere"),
        (("verify", "nowhere.yaml"), "no config file at nowhere.yaml"),
        (("verify", "folder", "views.num=1"), "name the config's .yaml file"),
        (("verify", "folder", "--recompute", "2"), "needs the config"),
        (("verify", "ftp://host/cache"), "scheme 'ftp'"),
        (("info", "nowhere"), "no cache in nowhere"),
        (("diff", "nowhere"), "no config file at nowhere"),
        (("ls", "nowhere"), "nowhere is no folder"),
        (("drop", "nowhere", "a.1.int8"), "no cache in nowhere"),
    ],
)
def test_a_wrong_input_is_one_sentence_and_code_2(arguments: tuple[str, ...], words: str) -> None:
    code, out, err = command("cache", *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
