"""Unpacking of archives that are made here, byte by byte where needed."""

import gzip
import hashlib
import io
import re
import tarfile
import zipfile
from pathlib import Path

import pytest

from kdhiera.demo.archives import AssetFile, unpack
from kdhiera.errors import DamagedError

TEXT = b"hello" * 100


def asset(member: str, content: bytes, path: str = "out/file") -> AssetFile:
    sha256 = hashlib.sha256(content).hexdigest()
    return AssetFile(member=member, path=path, sha256=sha256, num_bytes=len(content))


def make_wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return path


def make_deb(path: Path, files: dict[str, bytes]) -> Path:
    """An `ar` archive as dpkg writes it: debian-binary, control.tar.xz, data.tar.xz."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    archive = b"!<arch>\n"
    # An odd length, so that the padding byte between entries is there.
    for name, content in (
        ("debian-binary", b"2.0\n"),
        ("control.tar.xz", b"odd"),
        ("data.tar.xz", data.getvalue()),
    ):
        archive += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        archive += content + b"\n" * (len(content) % 2)
    path.write_bytes(archive)
    return path


def test_wheel_gives_only_the_named_files(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "a.whl", {"pkg/a.txt": TEXT, "pkg/b.txt": b"unwanted"})
    unpack(wheel, (asset("pkg/a.txt", TEXT),), tmp_path / "root")
    assert [p.name for p in (tmp_path / "root").rglob("*") if p.is_file()] == ["file"]
    assert (tmp_path / "root/out/file").read_bytes() == TEXT


def test_deb_gives_the_named_file_and_gunzips_it(tmp_path: Path) -> None:
    files = {"./usr/b": b"unwanted", "./usr/a.gz": gzip.compress(TEXT)}
    unpack(make_deb(tmp_path / "a.deb", files), (asset("./usr/a.gz", TEXT),), tmp_path)
    assert (tmp_path / "out/file").read_bytes() == TEXT


def test_member_name_never_becomes_a_path(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "a.whl", {"../evil": TEXT})
    unpack(wheel, (asset("../evil", TEXT, path="safe"),), tmp_path / "root")
    assert (tmp_path / "root/safe").read_bytes() == TEXT
    assert not (tmp_path / "evil").exists()


def test_other_content_is_one_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "a.whl", {"pkg/a.txt": b"tampered"})
    with pytest.raises(DamagedError, match=r"out/file has sha256 [0-9a-f]{64}, wanted the pinned"):
        unpack(wheel, (asset("pkg/a.txt", TEXT),), tmp_path)
    assert not (tmp_path / "out").exists()


def test_missing_member_is_named(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "a.whl", {})
    with pytest.raises(DamagedError, match=re.escape("a.whl does not hold pkg/a.txt")):
        unpack(wheel, (asset("pkg/a.txt", TEXT),), tmp_path)


def test_text_with_the_name_of_a_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.deb").write_bytes(TEXT)
    with pytest.raises(DamagedError, match="not a Debian package"):
        unpack(tmp_path / "a.deb", (asset("x", TEXT),), tmp_path)
