"""Folders and tables of videos into shards, as other readers find them."""

import csv
import hashlib
import io
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mounts import may_mount, namespace
from numbered import render
from other_readers import webdataset_samples

from kdhiera.data.shards import index_shard
from kdhiera.errors import DamagedError, ExitCode, KdhieraError, MismatchError, UsageError
from kdhiera.progress import make_progress
from kdhiera.stages.pack import PackSummary, pack
from kdhiera.stages.packing.order import PackSettings

DYING = Path(__file__).with_name("dying_pack.py")
COMMAND = (sys.executable, "-c", "from kdhiera.cli import main; main()", "pack")


@pytest.fixture(scope="module")
def clips() -> list[bytes]:
    """Small real videos, all different."""
    return [render(4 + i, size=(96, 48)) for i in range(5)]


@pytest.fixture
def videos(tmp_path: Path, clips: list[bytes]) -> Path:
    """Twelve videos in two classes."""
    folder = tmp_path / "videos"
    for i in range(12):
        path = folder / f"class {i % 2}" / f"take.{i:02}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(clips[i % 5])
    return folder


def packed(source: Path, out: Path, *, overwrite: bool = False, **changes) -> PackSummary:
    how = PackSettings(**{"num_children": 1, **changes})
    with make_progress() as progress:
        return pack(str(source), str(out), settings=how, overwrite=overwrite, progress=progress)


def hashes(folder: Path) -> dict[str, str]:
    """Of the shards and the list of what was skipped."""
    files = [*folder.glob("*.tar"), *folder.glob("skipped.csv")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def skipped(out: Path) -> dict[str, tuple[str, str]]:
    with (out / "skipped.csv").open(newline="") as file:
        return {row["path"]: (row["status"], row["reason"]) for row in csv.DictReader(file)}


def test_the_webdataset_library_reads_back_bytes_keys_and_labels(
    videos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    summary = packed(videos, out, folder_labels=True, max_per_shard=5)
    shards = sorted(out.glob("*.tar"))
    assert [s.name for s in shards] == [f"videos-{i:06}.tar" for i in range(3)]
    assert summary.patterns() == {"videos": f"{out}/videos-{{000000..000002}}.tar"}
    found = webdataset_samples(*shards)
    assert [len(webdataset_samples(shard)) for shard in shards] == [5, 5, 2]
    paths = sorted(p.relative_to(videos).as_posix() for p in videos.rglob("*.mp4"))
    assert [s["json"]["path"] for s in found] == paths
    for sample, path in zip(found, paths, strict=True):
        assert sample["mp4"] == (videos / path).read_bytes()
        assert sample["json"]["labels"] == {"class": path.partition("/")[0]}
        assert sample["__key__"] == path.replace(" ", "_").replace("take.", "take_")[:-4]
    for shard in shards:
        assert not index_shard(str(shard)).problems
    assert summary.labels == {"class": {"class 0": 6, "class 1": 6}}
    digests = {s.file: s.sha256 for s in summary.shards}
    assert digests == hashes(out)
    assert summary.exit_code is ExitCode.OK
    assert not (out / "skipped.csv").exists()


def test_packing_again_reads_and_writes_nothing(videos: Path, tmp_path: Path) -> None:
    first = packed(videos, tmp_path / "out")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert packed(videos, tmp_path / "out") == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == times


def test_shards_end_before_they_are_too_large(videos: Path, tmp_path: Path) -> None:
    limit = 3 * max(p.stat().st_size for p in videos.rglob("*.mp4"))
    packed(videos, tmp_path / "out", shard_bytes=limit)
    sizes = [p.stat().st_size for p in sorted((tmp_path / "out").glob("*.tar"))]
    assert len(sizes) > 2
    assert max(sizes) <= limit + 10240  # a tar is rounded up to that
    packed(videos, tmp_path / "each", shard_bytes=1)
    assert len(list((tmp_path / "each").glob("*.tar"))) == 12


def test_splits_are_the_videos_own_and_whole(videos: Path, tmp_path: Path) -> None:
    shares = {"validation": 0.3, "test": 0.3}

    def by_split(out: Path) -> dict[str, set[str]]:
        names = ("train", *shares)
        found = {n: sorted(out.glob(f"{n}-*.tar")) for n in names}
        return {
            n: {s["json"]["path"] for s in webdataset_samples(*found[n])} for n in names if found[n]
        }

    packed(videos, tmp_path / "out", splits=shares, seed=1)
    before = by_split(tmp_path / "out")
    assert sum(map(len, before.values())) == 12
    assert set(before) == {"train", "validation", "test"}
    (videos / "class 0" / "another.mp4").write_bytes(render(6))
    packed(videos, tmp_path / "more", splits=shares, seed=1, shuffle=True)
    after = by_split(tmp_path / "more")
    assert all(before[name] <= after[name] for name in before)
    packed(videos, tmp_path / "else", splits=shares, seed=2)
    assert by_split(tmp_path / "else") != after


def test_shuffling_mixes_the_same_way_every_time(videos: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        packed(videos, tmp_path / out, shuffle=True, max_per_shard=6, folder_labels=True)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    first = webdataset_samples(tmp_path / "one" / "videos-000000.tar")
    assert len({s["json"]["labels"]["class"] for s in first}) == 2
    packed(videos, tmp_path / "three", shuffle=True, seed=1, max_per_shard=6, folder_labels=True)
    assert hashes(tmp_path / "one") != hashes(tmp_path / "three")


def test_what_cannot_be_read_is_left_out_and_listed(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = (videos / "class 0" / "take.00.mp4").read_bytes()
    (videos / "empty.mp4").touch()
    (videos / "text.mp4").write_text("no video")
    (videos / "cut.mp4").write_bytes(good[: len(good) // 2])
    (videos / "gone.mp4").symlink_to("nowhere.mp4")
    (videos / "linked.mp4").symlink_to(videos / "class 0" / "take.00.mp4")
    (videos / "loop").symlink_to(videos)
    (videos / ".hidden.mp4").write_bytes(good)
    (videos / ".git").mkdir()
    (videos / ".git" / "x.mp4").write_bytes(good)
    (videos / "notes.txt").touch()
    (videos / "README").touch()
    (videos / "folder.mp4").mkdir()
    os.mkfifo(videos / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as there:
        monkeypatch.chdir(videos)  # a socket's path is short
        there.bind("socket.mp4")
    out = videos / "shards"  # inside the source: not packed itself
    summary = packed(videos, out)
    assert summary.num_videos == 13
    assert {path: status for path, (status, _) in skipped(out).items()} == {
        "gone.mp4": "not_found",
        "pipe.mp4": "not_a_video",
        "socket.mp4": "not_a_video",
        "cut.mp4": "decode_error",
        "empty.mp4": "decode_error",
        "text.mp4": "decode_error",
    }
    assert "0 bytes" in skipped(out)["empty.mp4"][1]
    assert "no known video container" in skipped(out)["text.mp4"][1]
    assert summary.passed_by == {
        "hidden files": 1,
        "hidden folders": 1,
        "links to folders (not followed)": 1,
        ".txt files": 1,
        "other files": 1,
    }
    said = summary.describe()
    assert "skipped   6 files (3 decode_error, 2 not_a_video, 1 not_found)" in said
    assert "links to folders (not followed)" in said
    assert summary.exit_code is ExitCode.OK  # fewer than twenty are not judged
    assert packed(videos, out) == summary
    everything = packed(videos, tmp_path / "unlooked", check=False)
    assert everything.num_videos == 16


def test_mostly_bad_videos_end_with_code_4_and_the_good_are_packed(
    tmp_path: Path, clips: list[bytes]
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02}.mp4").write_bytes(b"" if i % 2 else clips[0])
    done = subprocess.run(
        [*COMMAND, folder, tmp_path / "out", "--json", "--workers", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ExitCode.TOO_MUCH_BAD_DATA
    assert json.loads(done.stdout)["num_videos"] == 10
    assert len(webdataset_samples(tmp_path / "out" / "videos-000000.tar")) == 10
    for path in folder.iterdir():
        path.write_bytes(b"")
    none = packed(folder, tmp_path / "none")
    assert none.exit_code is ExitCode.TOO_MUCH_BAD_DATA
    assert not list((tmp_path / "none").glob("*.tar"))
    assert packed(folder, tmp_path / "none") == none


def test_a_table_names_paths_labels_and_splits(videos: Path, tmp_path: Path) -> None:
    strange = 'a "quoted", name\nof two lines é.mp4'
    (videos / strange).write_bytes(render(4))
    outside = tmp_path / "outside.mp4"
    outside.write_bytes(render(5))
    table = videos / "table.csv"
    with table.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(
            [
                ("path", "action", "actor", "part"),
                ("class 0/take.00.mp4", "run", "007", "train"),
                ("class 1/../class 1/take.01.mp4", "walk", "", "test"),
                (strange, "run, fast", "8", "train"),
                (str(outside), "jump", "9", "test"),
                ("missing.mp4", "run", "1", "train"),
                ("class 0/take.00.mp4", "walk", "1", "train"),
                ("class 0", "walk", "1", "train"),
            ]
        )
    out = tmp_path / "out"
    summary = packed(table, out, split_column="part")
    train, test = (webdataset_samples(out / f"{split}-000000.tar") for split in ("train", "test"))
    labels = {s["json"]["path"]: s["json"]["labels"] for s in (*train, *test)}
    assert labels == {
        "class 0/take.00.mp4": {"action": "run", "actor": "007"},
        "class 1/take.01.mp4": {"action": "walk"},
        strange: {"action": "run, fast", "actor": "8"},
        str(outside)[1:]: {"action": "jump", "actor": "9"},
    }
    assert len(train) == 2
    assert {path: status for path, (status, _) in skipped(out).items()} == {
        "missing.mp4": "not_found",
        "class 0/take.00.mp4": "listed_twice",
        "class 0": "not_a_video",
    }
    assert skipped(out)["class 0/take.00.mp4"][1] == (
        "line 8 names it again; line 2 is the one that counts"
    )
    assert summary.labels["action"] == {"run": 1, "walk": 1, "run, fast": 1, "jump": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "one of them must be `path`; there is nothing"),
        ("file,label\na.mp4,x\n", "one of them must be `path`; there is file, label"),
        ("path,a,a\nx.mp4,1,2\n", "a name of its own"),
        ("path,label\na.mp4\n", "line 2: 1 cells, and the header has 2"),
        ("path,label\n,x\n", "line 2: the path is empty"),
        ("path,label\ns3://bucket/a.mp4,x\n", "is an address"),
        ('path,label\n"a.mp4,x\n', "is no table"),
        (b"path,label\n\xff\xfe.mp4,x\n", "is no table in UTF-8"),
        ("path,label\nnowhere.mp4,x\n", "names no video that is there (nowhere.mp4: there is no"),
    ],
)
def test_a_wrong_table_is_refused_before_anything_is_made(
    text: str | bytes, words: str, tmp_path: Path
) -> None:
    table = tmp_path / "table.csv"
    table.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UsageError) as error:
        packed(table, tmp_path / "out")
    assert words in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]


def test_wrong_requests_are_refused(videos: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.tsv"
    table.write_text("path\tpart\nvideos/class 0/take.00.mp4\t\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "out"
    for source, where, changes, words in (
        (tmp_path / "nowhere", out, {}, "is not there"),
        (videos / "class 0" / "take.00.mp4", out, {}, "no folder and no .csv"),
        (empty, out, {}, "it is empty"),
        (videos, "s3://bucket/out", {}, "is an address"),
        (videos, out, {"split_column": "part"}, "the source is a folder"),
        (table, out, {"folder_labels": True}, "a table's labels are its columns"),
        (table, out, {"split_column": "part"}, "line 2: column `part` is empty"),
        (table, out, {"split_column": "other"}, "no column `other`"),
    ):
        with pytest.raises(UsageError, match=words.replace("(", r"\(")):
            packed(source, where, **changes)
        assert not out.exists()
    for splits in ({"train": 0.1}, {"a/b": 0.1}, {"a": 0.0}, {"a": 0.6, "b": 0.4}):
        with pytest.raises(UsageError, match="split"):
            PackSettings(splits=splits)
    packed(videos, out)
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "other-000000.tar").write_bytes(b"")
    with pytest.raises(UsageError, match="need no packing"):
        packed(shards, tmp_path / "new")
    with pytest.raises(UsageError, match="was not packed there"):
        packed(videos, shards)


def test_other_videos_or_settings_are_refused_until_overwritten(
    videos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    packed(videos, out, max_per_shard=2)
    before = hashes(out)
    (out / "mine-000000.tar").touch()
    with pytest.raises(MismatchError, match="max_per_shard: 2 there, now 5"):
        packed(videos, out, max_per_shard=5)
    touched = videos / "class 0" / "take.00.mp4"
    os.utime(touched, (1, 1))
    with pytest.raises(MismatchError, match="their sizes, times or labels have changed"):
        packed(videos, out, max_per_shard=2)
    touched.unlink()
    with pytest.raises(MismatchError, match="12 there, now 11"):
        packed(videos, out, max_per_shard=2)
    assert before.items() <= hashes(out).items()
    packed(videos, out, max_per_shard=5, overwrite=True)
    names = sorted(p.name for p in out.glob("*.tar"))
    assert names == ["mine-000000.tar", *(f"videos-{i:06}.tar" for i in range(3))]
    (out / "videos-000001.tar").unlink()
    with pytest.raises(DamagedError, match=r"videos-000001\.tar was packed and is gone"):
        packed(videos, out, max_per_shard=5)


def test_a_video_that_changes_meanwhile_stops_the_packing(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Writing:
        """Progress that appends to a video once the listing is done."""

        def start(self, *_: object) -> int:
            with (videos / "class 1" / "take.11.mp4").open("ab") as file:
                file.write(b"more")
            return 0

        def advance(self, *_: object, **__: object) -> None: ...
        def finish(self, _: int) -> None: ...

    with pytest.raises(KdhieraError, match="changed after it was listed"):
        pack(
            str(videos),
            str(tmp_path / "out"),
            settings=PackSettings(max_per_shard=3, num_children=1),
            progress=Writing(),
        )
    assert not list((tmp_path / "out").glob(".*.tmp"))


raw_names = st.binary(min_size=1, max_size=40).map(os.fsdecode)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=15)
file_names = st.one_of(raw_names, texts).filter(lambda n: not {"/", "\0"} & {*n} and n[0] != ".")


@settings(max_examples=40)
@given(st.sets(file_names, min_size=1, max_size=6))
def test_whatever_files_are_called_they_are_packed(
    tmp_path_factory: pytest.TempPathFactory, names: set[str]
) -> None:
    folder = tmp_path_factory.mktemp("names")
    (folder / "videos").mkdir()
    for number, name in enumerate(names):
        (folder / "videos" / f"{name}.mp4").write_bytes(b"%d" % number)
    with make_progress(io.StringIO()) as progress:
        how = PackSettings(check=False)
        pack(str(folder / "videos"), str(folder / "out"), settings=how, progress=progress)
    found = {
        s["json"]["path"]: s["mp4"]
        for s in webdataset_samples(folder / "out" / "videos-000000.tar")
    }
    assert found == {f"{name}.mp4": b"%d" % number for number, name in enumerate(names)}


def killed_after(seconds: float, source: Path, out: Path) -> bool:
    """Pack in a process that is killed so long after it began to; whether it was."""
    command = [*COMMAND, source, out, "--max-per-shard", "1", "--workers", "1", "--shuffle"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("pack: "):
                break
        time.sleep(seconds)
        process.kill()
        process.wait()
    return process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("deaths", [2, pytest.param(25, marks=pytest.mark.long)])
def test_killed_at_any_time_the_same_command_ends_with_the_same_shards(
    deaths: int, videos: Path, tmp_path: Path
) -> None:
    for i in range(30):
        (videos / f"more-{i:02}.mp4").write_bytes(render(4 + i % 3) if i % 5 else b"no video")
    packed(videos, tmp_path / "undisturbed", max_per_shard=1, shuffle=True)
    draw = random.Random(deaths)
    out = tmp_path / "out"
    instants = [0.0, *(draw.uniform(0, 0.6) for _ in range(deaths - 1))]
    died = sum(killed_after(instant, videos, out) for instant in instants)
    assert died >= 1
    packed(videos, out, max_per_shard=1, shuffle=True)
    assert hashes(out) == hashes(tmp_path / "undisturbed")
    assert not list(out.glob(".*.tmp"))


@pytest.mark.parametrize("stride", [50, pytest.param(1, marks=pytest.mark.long)])
def test_so_it_does_after_death_at_file_operations(
    stride: int, videos: Path, tmp_path: Path
) -> None:
    def dies_at(operation: int, out: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(DYING), str(videos), str(out), str(operation)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    total = int(dies_at(-1, tmp_path / "undisturbed").stdout)
    assert total > 20
    want = hashes(tmp_path / "undisturbed")
    for operation in range(1, total + 1, stride):
        out = tmp_path / f"{operation}"
        assert dies_at(operation, out).returncode == -signal.SIGKILL, operation
        dies_at(operation // 2 or 1, out)  # and once more, where there is something
        done = dies_at(-1, out)
        assert done.returncode == 0, done.stderr
        assert hashes(out) == want, operation
        assert not list(out.glob(".*.tmp"))


@pytest.mark.parametrize("how", ["mount", "limit"])
def test_a_full_disk_is_a_clear_error_and_the_next_run_goes_on(
    how: str, videos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "disk"
    out.mkdir()
    if how == "mount" and not may_mount(out):
        pytest.skip("no file system may be mounted here; the other case still fills up")
    packed(videos, tmp_path / "undisturbed", max_per_shard=3, check=False)
    sizes = sorted(p.stat().st_size for p in (tmp_path / "undisturbed").glob("*.tar"))
    limit = sizes[-1] - 1 if how == "limit" else 2 * sizes[-1]
    fill, more = (
        (f"ulimit -f {limit // 1024}", "true")  # kB that a file may have
        if how == "limit"
        else (f"mount -t tmpfs -o size={limit} tmpfs {out}", f"mount -o remount,size=9M {out}")
    )
    words = [*COMMAND, str(videos), str(out), "--max-per-shard", "3", "--no-check"]
    script = f"""
        ({fill if how == "limit" else "true"}; {shlex.join(words)})
        test $? = 1 || exit 3
        ls {out}/.*.tmp 2>/dev/null && exit 4
        {more}
        {shlex.join(words)} || exit 5
        cp {out}/*.tar {tmp_path}
    """
    command = ["sh", "-c", script if how == "limit" else f"{fill}; {script}"]
    done = subprocess.run(
        command if how == "limit" else [*namespace(), *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "takes no more" in done.stderr
    assert "run the same command again; what was committed is kept" in done.stderr
    assert hashes(tmp_path) == hashes(tmp_path / "undisturbed")


def test_sigterm_stops_at_a_clean_point_and_it_goes_on(videos: Path, tmp_path: Path) -> None:
    for i in range(20):
        (videos / f"more-{i:02}.mp4").write_bytes(render(4))
    out = tmp_path / "out"
    command = [*COMMAND, videos, out, "--max-per-shard", "1", "--workers", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("pack: "):
                break
        process.terminate()
        rest = process.stderr.read()
    assert process.returncode == ExitCode.INTERRUPTED, rest
    assert "the same command goes on" in rest
    assert not list(out.glob(".*.tmp"))
    packed(videos, out, max_per_shard=1)
    packed(videos, tmp_path / "undisturbed", max_per_shard=1)
    assert hashes(out) == hashes(tmp_path / "undisturbed")


def test_two_at_once_are_refused(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    class Meanwhile:
        """Progress that packs into the same folder."""

        def start(self, *_: object) -> int:
            with pytest.raises(UsageError, match="another process packs"):
                packed(videos, out)
            return 0

        def advance(self, *_: object, **__: object) -> None: ...
        def finish(self, _: int) -> None: ...

    pack(str(videos), str(out), settings=PackSettings(check=False), progress=Meanwhile())
