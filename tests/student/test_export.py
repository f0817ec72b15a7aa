import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.models.hiera import Hiera

from kdhiera.config import StudentConfig
from kdhiera.errors import DamagedError, UsageError
from kdhiera.grid import Grid
from kdhiera.student.base import Student, normalise_pixels
from kdhiera.student.export import export, load_exported
from kdhiera.student.hiera import HieraStudent, build

GRID = Grid(num_frames=4, height=64, width=96)
CONFIG = StudentConfig(size="nano")


@pytest.fixture
def student() -> Student:
    return HieraStudent(build(CONFIG, GRID, seed=1), GRID).eval()


@pytest.fixture
def folder(tmp_path: Path, student: Student) -> Path:
    target = tmp_path / "run" / "export"
    export(student, CONFIG, target, name="a student", provenance={"teachers": ["image"]})
    return target


def clips() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (2, GRID.num_frames, GRID.height, GRID.width, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@torch.no_grad()
def test_timm_builds_it_from_the_files_alone(folder: Path, student: Student) -> None:
    config = json.loads((folder / "config.json").read_text())
    model = Hiera(**config["model_args"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    x = normalise_pixels(clips()).permute(0, 4, 1, 2, 3)
    assert torch.equal(model.eval()(x), student.backbone(x))
    torch.testing.assert_close(model(x), student.features(clips()), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_loading_gives_the_same_student(folder: Path, student: Student) -> None:
    loaded = load_exported(folder)
    assert not loaded.training
    assert loaded.grid == GRID
    assert torch.equal(loaded.features(clips()), student.features(clips()))


@torch.no_grad()
def test_q_pool_3_loads_strictly(folder: Path) -> None:
    loaded = load_exported(folder, q_pool=3)
    assert loaded.tap_shape("stage4.end")[0] == 1
    assert loaded.features(clips()).shape == (2, loaded.num_features)


def test_the_model_card_runs(
    folder: Path, student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (folder / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    monkeypatch.chdir(folder)
    names: dict[str, torch.Tensor] = {}
    exec(code.group(1), names)
    black = torch.zeros_like(clips()[:1])
    torch.testing.assert_close(names["features"], student.features(black))
    assert '"teachers": [\n    "image"\n  ]' in card


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UsageError, match=name):
        load_exported(folder)


def test_cut_weights_are_an_error(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedError, match="export the run again"):
        load_exported(folder)


def test_weights_of_another_size_are_an_error(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"embed_dim": 32', '"embed_dim": 64'))
    with pytest.raises(DamagedError, match="size mismatch"):
        load_exported(folder)
