"""What comes before a run: `init`, `config check`, `doctor`; what a run tells of its machine."""

import json
import platform
import re
import resource
from pathlib import Path

import pytest
import torch
import yaml
from real_runs import MakeConfig, Member, kdhiera, write_tar

from kdhiera.config import RunConfig, load
from kdhiera.demo.prepare import Prepared
from kdhiera.errors import ExitCode, UsageError
from kdhiera.progress import make_progress
from kdhiera.stages.check_config import check_config, check_run
from kdhiera.stages.checks import Checks, Verdict
from kdhiera.stages.distill import distill
from kdhiera.stages.doctor import examine
from kdhiera.stages.evaluate import evaluate
from kdhiera.stages.extract_teachers import extract
from kdhiera.stages.initialise import InitSummary, initialise
from kdhiera.stages.initialising.fit import Teachers

# ---- init


@pytest.fixture
def split_shards(real_members: list[Member], tmp_path: Path) -> Path:
    """24 labelled clips of the demo in three splits."""
    folder = tmp_path / "shards"
    folder.mkdir()
    pairs = [real_members[i : i + 2] for i in range(0, 48, 2)]
    for split, own in {"train": pairs[::2], "validation": pairs[1::4], "test": pairs[3::4]}.items():
        write_tar(folder / f"{split}-000000.tar", [member for pair in own for member in pair])
    return folder


def init(path: Path, *videos: object, **changes) -> InitSummary:
    with make_progress() as progress:
        return initialise(str(path), [str(v) for v in videos], progress=progress, **changes)


def reduced(path: Path, demo: Prepared) -> RunConfig:
    """The written config at a size that a test can run."""
    return load(
        path,
        [
            "clip={num_frames: 4, height: 64, width: 64}",
            "views.num=1",
            f"teachers.image.weights={demo.image_teacher}",
            f"teachers.video.weights={demo.video_weights}",
            f"teachers.video.options.source={demo.video_source}",
            "ray.enabled=false",
            "extract.device=cpu",
            "train.device=cpu",
            "train.epochs=1",
            "train.warmup_epochs=0",
            "evaluate.methods=[knn]",
            f"run_dir={path.parent / 'run'}",
            f"cache.dir={path.parent / 'cache'}",
        ],
    )


@pytest.mark.long
def test_inits_config_runs_end_to_end(split_shards: Path, tmp_path: Path, demo: Prepared) -> None:
    path = tmp_path / "my.yaml"
    summary = init(path, split_shards, teachers=Teachers.DEMO)
    config = load(path)
    assert config.data.shards == (f"{split_shards}/train-*.tar",)
    assert config.evaluate is not None
    assert config.evaluate.test == (f"{split_shards}/test-*.tar",)
    assert config.evaluate.labels == summary.seen.classes == ("background", "category")
    assert config.train.batch_size <= 12 // 2
    small = reduced(path, demo)
    failed = [check.words for check in check_run(small) if check.verdict is Verdict.FAIL]
    assert not failed
    with make_progress() as progress:
        assert extract(small, progress=progress).rows == {"ok": 12}
        assert distill(small, progress=progress).training.steps >= 1
        assert evaluate(small, progress=progress).results
    known = json.loads(Path(small.run_dir, "environment.json").read_text())
    assert set(known) == {"extract-teachers", "distill", "evaluate"}
    for stage in known.values():
        assert stage["device"] == "cpu"
        assert stage["packages"]["torch"] == torch.__version__.partition("+")[0]
        assert platform.python_version() in stage["python"]
    text = json.dumps(known)
    assert str(tmp_path) not in text
    assert "AWS" not in text


def test_init_writes_a_config_without_a_problem(
    split_shards: Path, tmp_path: Path, demo: Prepared
) -> None:
    summary = init(tmp_path / "my.yaml", split_shards, teachers=Teachers.DEMO)
    checks = Checks(checks=check_run(reduced(tmp_path / "my.yaml", demo)))
    assert not checks.failed, checks.describe()
    assert "category: 6 values in training" in checks.describe()
    assert "config check" in summary.describe()


def test_init_fits_clips_to_sizes_rates_and_lengths(tmp_path: Path) -> None:
    from fractions import Fraction

    from made_videos import plain_video

    def shard(name: str, **kind) -> Path:
        data = plain_video(**kind)
        return write_tar(tmp_path / f"{name}.tar", [(f"{i}.mp4", data) for i in range(4)])

    usual = init(
        tmp_path / "a.yaml", shard("a", count=90, size=(320, 256), rate=30), teachers=Teachers.BASE
    )
    assert (usual.fit.num_frames, usual.fit.size, usual.fit.frame_stride) == (16, 224, 4)
    assert usual.fit.span_seconds == pytest.approx(61 / 30, rel=0.02)
    slow = init(
        tmp_path / "b.yaml", shard("b", count=40, size=(320, 100), rate=8), teachers=Teachers.BASE
    )
    assert (slow.fit.size, slow.fit.frame_stride) == (96, 1)
    brief = init(
        tmp_path / "c.yaml", shard("c", count=33, size=(64, 64), rate=60), teachers=Teachers.BASE
    )
    assert (brief.fit.num_frames, brief.fit.size, brief.fit.frame_stride) == (16, 64, 2)
    assert brief.fit.share_long_enough == 1.0
    short = init(tmp_path / "d.yaml", shard("d", count=5, size=(64, 64), rate=25))
    assert short.fit.allow_short
    assert load(tmp_path / "d.yaml").views.allow_short
    long = init(tmp_path / "e.yaml", shard("e", count=30, size=(64, 64), rate=Fraction(1)))
    assert long.fit.num_views > usual.fit.num_views
    for name in "abcde":
        text = (tmp_path / f"{name}.yaml").read_text()
        assert text.count("#") > 10
        assert load(tmp_path / f"{name}.yaml").data.shards == (str(tmp_path / f"{name}.tar"),)
        assert "no labels" in "".join(usual.notes)


def test_init_never_overwrites_and_says_what_is_missing(
    split_shards: Path, real_members: list[Member], tmp_path: Path
) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("mine")
    videos = tmp_path / "videos" / "class"
    videos.mkdir(parents=True)
    (videos / "a.mp4").write_bytes(real_members[0][1])
    table = tmp_path / "table.csv"
    table.write_text("path\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    bad = write_tar(tmp_path / "bad.tar", [("a.mp4", b"no video"), ("b.json", b"{}")])
    for name, given, words in (
        ("my.yaml", split_shards, "--force"),
        ("my.txt", split_shards, "end in .yaml"),
        ("no/where.yaml", split_shards, "there is no folder"),
        ("new.yaml", videos.parent, "is a folder of videos.*kdhiera pack"),
        ("new.yaml", videos / "a.mp4", "is videos.*kdhiera pack"),
        ("new.yaml", table, "is a table of videos.*kdhiera pack"),
        ("new.yaml", empty, "neither .tar shards nor videos"),
        ("new.yaml", tmp_path / "none-*.tar", "no file matches"),
        ("new.yaml", bad, "none of 2 samples that were looked at has a video"),
    ):
        with pytest.raises(UsageError, match=words):
            init(tmp_path / name, given)
    assert path.read_text() == "mine"
    assert not (tmp_path / "new.yaml").exists()
    init(path, split_shards, force=True)
    assert load(path).name == "my"


# ---- config check


def failures(checks: Checks) -> dict[str, str]:
    return {check.name: check.words for check in checks.failed}


def test_check_says_all_is_well_and_writes_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    path = make_config()
    checks = check_config(str(path))
    assert checks.exit_code is ExitCode.OK, checks.describe()
    assert checks.to_json()["ok"]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_check_lists_every_problem_not_only_the_first(
    make_config: MakeConfig, shards: list[Path], tmp_path: Path
) -> None:
    cut = tmp_path / "cut.tar"
    cut.write_bytes(shards[0].read_bytes()[:-20_000])
    text = tmp_path / "text.tar"
    text.write_text("no tar " * 200)
    copy = tmp_path / "elsewhere" / shards[0].name
    copy.parent.mkdir()
    copy.write_bytes(shards[0].read_bytes())
    path = make_config(
        data={
            "shards": [str(tmp_path / "none.tar"), str(text), str(cut), str(shards[0]), str(copy)]
        },
        objective={"ratio": 0.2},
        student={"taps": {"image": ["block:1"], "video": ["block:99"]}},
        train={"batch_size": 4000, "device": "cuda:7", "warmup_epochs": 10},
        evaluate={"train": str(shards[0]), "validation": str(shards[0]), "test": "none.tar"},
    )
    values = yaml.safe_load(path.read_text())
    values["teachers"]["image"]["weights"] = "nowhere.safetensors"
    values["teachers"]["video"]["layers"] = [9]
    path.write_text(yaml.safe_dump(values))
    checks = check_config(str(path))
    assert checks.exit_code is ExitCode.USAGE
    said = [f"{check.name}: {check.words}" for check in checks.failed]
    for words in (
        r"masks: .*ratio 0.2",
        r"shards: no file matches '.*none\.tar'",
        r"shards: .*text\.tar is no tar",
        r"shards: .* are the same: list it once",
        r"training: device is cuda:7",
        r"teacher image: no teacher weights at nowhere",
        r"teacher video: .*got '9'",
        r"student: student.taps.image names 1 taps for 2 layers",
        r"student: .*block:99",
        r"steps: train.batch_size is 4000",
        r"evaluate.test: no file matches",
    ):
        assert any(re.search(words, line, re.DOTALL) for line in said), (words, said)
    warned = [c.words for c in checks.checks if c.verdict is Verdict.WARN]
    assert any("shard_truncated" in words for words in warned)
    assert any("in train as well" in words for words in warned)


def test_check_lists_every_wrong_setting(make_config: MakeConfig) -> None:
    path = make_config(clip={"num_frames": 7, "height": 100, "width": 31}, scores={"teacher": "x"})
    said = [check.words for check in check_config(str(path)).failed]
    assert len(said) == 4
    assert all(
        any(word in line for line in said)
        for word in ("clip.num_frames", "clip.height", "clip.width", "scores.teacher names `x`")
    )
    path = make_config(trian={}, train={"epochs": 0, "lr": -1})
    said = [check.words for check in check_config(str(path)).failed]
    assert len(said) == 3
    assert check_config("nowhere.yaml").exit_code is ExitCode.USAGE


@pytest.mark.long
def test_check_tells_a_cache_and_a_run_of_other_settings(
    make_config: MakeConfig, own_cache: Path, tmp_path: Path
) -> None:
    same = check_config(str(make_config()))
    assert not same.failed
    assert "has nothing to do" in next(c.words for c in same.checks if c.name == "cache")
    other = check_config(str(make_config("other", clip={"height": 96})))
    assert other.exit_code is ExitCode.REFUSED
    assert "clip" in failures(other)["cache"]
    both = check_config(str(make_config("both", clip={"height": 96}, objective={"ratio": 0.1})))
    assert both.exit_code is ExitCode.USAGE
    config = load(make_config("run", train={"max_steps": 1}))
    with make_progress() as progress:
        distill(config, progress=progress)
    again = check_config(str(make_config("run", train={"max_steps": 1})))
    assert "goes on" in next(c.words for c in again.checks if c.name == "run")
    changed = check_config(str(make_config("run", train={"max_steps": 2})))
    assert changed.exit_code is ExitCode.REFUSED
    assert "other settings" in failures(changed)["run"]


@pytest.mark.long
def test_check_notices_other_weights_than_the_caches(
    make_config: MakeConfig, own_cache: Path, demo: Prepared, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(demo.image_teacher)
    state["blocks.0.mlp.fc1.bias"] += 1
    save_file(state, tmp_path / "other.safetensors")
    path = make_config()
    values = yaml.safe_load(path.read_text())
    values["teachers"]["image"]["weights"] = str(tmp_path / "other.safetensors")
    path.write_text(yaml.safe_dump(values))
    checks = check_config(str(path))
    assert checks.exit_code is ExitCode.REFUSED
    assert "weights_sha256" in failures(checks)["cache"]


# ---- doctor


def verdicts(checks: Checks) -> dict[str, Verdict]:
    return {check.name: check.verdict for check in checks.checks}


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.slow
def test_doctor_finds_a_healthy_machine(make_config: MakeConfig, tmp_path: Path) -> None:
    path = make_config(ray={"enabled": True})
    done = kdhiera("doctor", path, "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert done.returncode == 0, found
    words = {check["name"]: check["words"] for check in found["checks"]}
    assert "11 of 11 frames right" in words["pyav"]
    assert "ran a task" in words["ray"]
    assert "2 shards, 24 samples" in words["shards"]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_doctor_says_what_fails(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "quiet")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nothing answers there
    path = make_config(cache={"dir": "s3://bucket/cache"}, data={"shards": "none-*.tar"})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, hard))
    try:
        checks = examine(str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    failed = failures(checks)
    assert "nothing answers" in failed["bucket"]
    assert "too few" in failed["files"]
    assert "no file matches" in failed["shards"]
    said = checks.describe()
    assert "AWS_SECRET_ACCESS_KEY" in said
    assert "hush" not in said
    assert "quiet" not in said
    assert said.splitlines()[-1].endswith(f"{len(checks.failed)} fail")


@pytest.mark.long
def test_doctor_writes_to_the_bucket_and_leaves_nothing(
    make_config: MakeConfig, s3_url: str
) -> None:
    from kdhiera.stores import open_store

    checks = examine(str(make_config(cache={"dir": f"{s3_url}/cache"})))
    bucket = next(check for check in checks.checks if check.name == "bucket")
    assert bucket.verdict is Verdict.OK
    assert not list(open_store(s3_url).walk(""))


@pytest.mark.long
def test_doctor_ends_with_code_1_or_2(make_config: MakeConfig, tmp_path: Path) -> None:
    path = make_config(data={"shards": "none-*.tar"})
    done = kdhiera("doctor", path, cwd=tmp_path)
    assert done.returncode == 1
    assert re.search(r"^fail  shards +no file matches", done.stdout, re.MULTILINE)
    assert kdhiera("doctor", "nowhere.yaml", cwd=tmp_path).returncode == 2
