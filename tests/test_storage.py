import errno
import json
import multiprocessing
import os
from pathlib import Path

import google_crc32c
import pytest

from kdhiera.errors import KdhieraError
from kdhiera.storage import (
    atomic_file,
    disk_errors,
    file_crc32c,
    make_folder,
    put_if_absent,
    sync_folder,
    write_atomic,
)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path: Path):
    write_atomic(tmp_path / "a", b"old")
    write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def test_failed_atomic_write_keeps_the_old_file(tmp_path: Path):
    write_atomic(tmp_path / "a", b"old")
    with (
        pytest.raises(TypeError),
        atomic_file(tmp_path / "a") as file,
    ):
        file.writelines([b"half of the ne", None])  # type: ignore[list-item]
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_put_if_absent_never_replaces(tmp_path: Path):
    assert put_if_absent(tmp_path / "new" / "folder" / "a", b"first")
    assert not put_if_absent(tmp_path / "new" / "folder" / "a", b"second")
    assert (tmp_path / "new" / "folder" / "a").read_bytes() == b"first"
    assert names(tmp_path / "new" / "folder") == ["a"]


def _race(folder: str, me: int, start) -> None:
    won = []
    for i in range(50):
        start.wait()
        if put_if_absent(Path(folder, "x", str(i)), f"{me}".encode() * 1000):
            won.append(i)
    Path(folder, f"won-{me}.json").write_text(json.dumps(won))


def test_of_racing_processes_exactly_one_creates_each_file(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(3)
    racers = [context.Process(target=_race, args=(str(tmp_path), i, start)) for i in range(3)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    won = [json.loads((tmp_path / f"won-{i}.json").read_text()) for i in range(3)]
    assert sorted(i for files in won for i in files) == list(range(50))
    for me, files in enumerate(won):
        assert all((tmp_path / "x" / str(i)).read_bytes() == f"{me}".encode() * 1000 for i in files)
    assert len(names(tmp_path / "x")) == 50


def test_make_folder_makes_all_parents_and_is_idempotent(tmp_path: Path):
    make_folder(tmp_path / "a" / "b" / "c")
    make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_is_one_sentence_with_what_is_free(tmp_path: Path, code: int):
    with (
        pytest.raises(KdhieraError, match=r"takes no more \(.*; [\d,]+ bytes free\)"),
        disk_errors(tmp_path / "not" / "there"),
    ):
        raise OSError(code, os.strerror(code))


def test_forbidden_folder_is_one_sentence(tmp_path: Path):
    with (
        pytest.raises(KdhieraError, match=r"cannot write to .*Permission denied"),
        disk_errors(tmp_path),
    ):
        raise OSError(errno.EACCES, "")


def test_other_errors_pass(tmp_path: Path):
    with pytest.raises(OSError, match="bad"), disk_errors(tmp_path):
        raise OSError(errno.EIO, "bad")


def test_sync_lists_every_file_with_size_and_checksum(tmp_path: Path):
    make_folder(tmp_path / "a" / "b")
    big = os.urandom(5 << 20)
    (tmp_path / "a" / "b" / "big").write_bytes(big)
    (tmp_path / "z").write_bytes(b"")
    listed = sync_folder(tmp_path)
    assert listed == {"a/b/big": (5 << 20, google_crc32c.value(big)), "z": (0, 0)}
    assert list(listed) == sorted(listed)
    assert file_crc32c(tmp_path / "a" / "b" / "big") == google_crc32c.value(big)
