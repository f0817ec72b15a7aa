"""Hostile input through the installed command: canaries prove that nothing of it was done.

A canary file is watched by inotify, a local server counts its requests, and code that would
write a file is put wherever somebody might run it.
"""

import ctypes
import gzip
import http.server
import io
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numbered
import pytest
import torch
import yaml
from odd_videos import texts
from real_runs import kdhiera, write_config

from kdhiera.cache.commit import Cache
from kdhiera.config import load
from kdhiera.errors import UsageError
from kdhiera.stages.extraction.recorded import recorded_config
from kdhiera.stages.list_bad import list_bad
from kdhiera.stages.replay_key import replay_key

IN_ACCESS, IN_OPEN, IN_CREATE, IN_DELETE = 0x1, 0x20, 0x100, 0x200
HOSTILE_KEYS = {
    "../../../escape": "../../../escape",
    "/tmp/absolute-canary": "/tmp/absolute-canary",
    "title\x1b]0;owned\x07": "title\\x1b]0;owned\\x07",
    "red\x1b[31m\nerror: fake line": "red\\x1b[31m\\nerror: fake line",
    "right\u202eot-left": "right\\u202eot-left",
}


class Code:
    """Pickles into something that writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A folder with a video and a pipe in it; whoever opens or adds something fails the test."""
    folder = tmp_path / "canary"
    folder.mkdir()
    (folder / "video.mp4").write_bytes(numbered.render(20))
    os.mkfifo(folder / "pipe")
    libc = ctypes.CDLL(None)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    events = IN_ACCESS | IN_OPEN | IN_CREATE | IN_DELETE
    assert libc.inotify_add_watch(watch, os.fsencode(folder), events) >= 0
    yield folder
    with pytest.raises(BlockingIOError):
        os.read(watch, 4096)
    (folder / "video.mp4").read_bytes()
    assert os.read(watch, 4096)  # so it would have been seen
    os.close(watch)


@pytest.fixture
def server() -> Iterator[str]:
    """A server whose every request fails the test."""
    seen: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as there:
        thread = threading.Thread(target=there.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{there.server_port}"
        there.shutdown()
    assert seen == []


def config(folder: Path, **sections: Any) -> Path:
    usual = {
        "data": {"shards": [str(folder / "hostile.tar")], "max_bad_fraction": 1.0},
        "clip": {"num_frames": 8, "height": 64, "width": 64},
        "views": {"num": 1, "frame_stride": 2},
        "teachers": {"hog": {"kind": "hog"}},
        "scores": {"teacher": "hog", "source": "uniform"},
        "masks": {"ratio": 0.5, "draws": 1},
        "cache": {"encoding": "fp32"},
        "extract": {"batch_size": 4, "device": "cpu"},
        "ray": {"enabled": False},
    }
    return write_config(folder, usual, "hostile", **sections)


def hostile_shard(folder: Path, canary: Path, address: str) -> None:
    good = numbered.render(24)
    code = pickle.dumps(Code(canary / "ran"))
    with tarfile.open(folder / "hostile.tar", "w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        add("pickles.mp4", good)
        for extension in ("pyd", "pickle", "pth", "pkl", "npy", "pt", "cls", "json", "py", "sh"):
            add(f"pickles.{extension}", code)
        add("pickle-as-video.mp4", code)
        places = (f"{address}/x.ts", str(canary / "video.mp4"), f"file:{canary}/pipe")
        for number, place in enumerate(places):
            for name, text in texts(place).items():
                kind = name.split()[-1].strip("()")
                add(f"{kind}{number}.mp4", text)
                add(f"{kind}{number}-ftyp.mp4", b"\0\0\0\x14ftypisom" + text)
        for key in HOSTILE_KEYS:
            add(f"{key}.mp4", good)
            add(f"{key} bad.mp4", b"\x1b[31mred\x07 \x9b31m")
        for name, kind in (("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(f"{name}.mp4")
            info.type, info.linkname = kind, str(canary / "video.mp4")
            tar.addfile(info)
        for name, kind in (("pipe", tarfile.FIFOTYPE), ("device", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(f"{name}.mp4")
            info.type, info.devmajor, info.devminor = kind, 1, 5
            tar.addfile(info)


def printable(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


def test_nothing_in_a_shard_is_run_opened_contacted_or_printed_raw(
    tmp_path: Path, canary: Path, server: str
) -> None:
    hostile_shard(tmp_path, canary, server)
    path = config(tmp_path)
    before = set(tmp_path.iterdir())
    done = kdhiera("extract-teachers", path)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in set(tmp_path.iterdir()) - before} == {"cache", "run-hostile"}
    assert {p.name for p in (tmp_path / "run-hostile").iterdir()} == {"environment.json"}
    assert not Path("/tmp/absolute-canary.mp4").exists()
    cache = Cache.open(load(path).cache.dir)
    (part,) = cache.commits().values()
    status = {row.key: row.status for row in cache.rows(part.base)}
    good = {"pickles", *HOSTILE_KEYS}
    assert {key for key, found in status.items() if found == "ok"} == good
    assert not {"link", "hard", "pipe", "device"} & set(status)
    listed = list_bad(cache).describe()
    replayed = "\n".join(
        replay_key(cache.url, key, debug=True).describe()
        for key in (*HOSTILE_KEYS, *(f"{key} bad" for key in HOSTILE_KEYS))
    )
    with pytest.raises(UsageError) as unknown:
        replay_key(cache.url, "title\x1b]0;")
    for escaped in HOSTILE_KEYS.values():
        assert f"{escaped} bad" in listed
        assert escaped in replayed
    for text in (done.stdout, done.stderr, listed, replayed, str(unknown.value)):
        assert printable(text)


def test_addresses_that_are_commands_or_carry_secrets_start_nothing(
    tmp_path: Path, canary: Path, server: str
) -> None:
    for shards in (
        f"pipe:touch {canary}/ran",
        f"pipe:cat {canary}/video.mp4",
        f"{server}/x.tar",
        f"{server.replace('http', 'ftp')}/x.tar",
        "s3://AKIA0000:hush@bucket/x.tar",
        "s3://bucket/x.tar?X-Amz-Signature=hush",
        f"{server.replace('//', '//user:hush@')}/x.tar?sig=hush",
    ):
        with pytest.raises(UsageError) as caught:
            extract_of(config(tmp_path, data={"shards": [shards]}))
        assert "hush" not in str(caught.value)
    for place in (f"pipe:touch {canary}/ran", f"{server}/cache", "s3://A:hush@bucket/cache"):
        with pytest.raises(UsageError) as caught:
            extract_of(config(tmp_path, cache={"dir": place}))
        assert "hush" not in str(caught.value)


def extract_of(path: Path) -> None:
    from kdhiera.progress import make_progress
    from kdhiera.stages.extract_teachers import extract

    with make_progress() as progress:
        extract(load(path), progress=progress)


def test_a_compressed_shard_is_refused_and_not_unpacked(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "hostile.tar", "wb", compresslevel=1) as bomb:
        for _ in range(300):
            bomb.write(bytes(10**6))
    assert (tmp_path / "hostile.tar").stat().st_size < 3 * 10**6
    started = time.monotonic()
    with pytest.raises(UsageError, match=r"is compressed \(gzip\): unpack it"):
        extract_of(config(tmp_path))
    assert time.monotonic() - started < 60


def test_pickles_as_weights_and_tags_in_a_config_do_nothing(tmp_path: Path, canary: Path) -> None:
    hostile_shard(tmp_path, canary, "http://127.0.0.1:9")
    weights = tmp_path / "weights.pth"
    torch.save({"model": Code(canary / "ran")}, weights)
    bare = tmp_path / "bare.pth"
    bare.write_bytes(pickle.dumps(Code(canary / "ran")))
    for file in (weights, bare):
        teachers = {
            "image": {
                "kind": "timm",
                "model": "vit_small_patch14_dinov2",
                "weights": str(file),
                "layers": [6],
            }
        }
        path = config(tmp_path, teachers=teachers, scores={"teacher": "image"})
        with pytest.raises(UsageError, match="weights"):
            extract_of(path)
    for tag in ("!!python/object/apply:os.system", "!!python/object/new:os.system"):
        text = yaml.safe_dump({"name": "x"}) + f"run_dir: {tag} ['touch {canary}/ran']\n"
        (tmp_path / "tagged.yaml").write_text(text)
        with pytest.raises(UsageError, match="is not valid YAML"):
            load(tmp_path / "tagged.yaml")
        with pytest.raises(UsageError):
            load(config(tmp_path), [f"run_dir={tag} ['touch {canary}/ran']"])


def test_no_secret_of_the_environment_ends_up_in_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    monkeypatch.setenv("HF_TOKEN", "hush-hush")
    with tarfile.open(tmp_path / "hostile.tar", "w") as tar:
        data = numbered.render(24)
        info = tarfile.TarInfo("a.mp4")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    path = config(tmp_path)
    extract_of(path)
    assert recorded_config(Cache.open(load(path).cache.dir)) is not None
    for file in (tmp_path / "cache").rglob("*"):
        assert not file.is_file() or b"hush-hush" not in file.read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")
def test_the_kernel_keeps_a_decode_child_from_talking_writing_and_running(
    tmp_path: Path, canary: Path
) -> None:
    script = f"""
import os, socket
from kdhiera.data.confine import confine
assert confine()
def refused(what):
    try:
        what()
    except PermissionError:
        return True
    return False
print(*map(refused, (
    socket.socket,
    lambda: socket.create_connection(("127.0.0.1", 9)),
    lambda: os.execv("/bin/touch", ["touch", "{canary}/ran"]),
    lambda: open("{canary}/ran", "w"),
    lambda: open("{canary}/video.mp4", "a"),
    lambda: os.unlink("{canary}/video.mp4"),
    lambda: os.rename("{canary}/video.mp4", "{canary}/other"),
    lambda: os.mkdir("{canary}/folder"),
    lambda: os.truncate("{canary}/video.mp4", 0),
)))
left, right = socket.socketpair()
left.send(b"x")
print(right.recv(1) == b"x", len(open("/proc/self/stat").read()) > 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["True"] * 11, done.stderr
    with socket.socket():  # this process is as free as before
        pass
