"""`student.init` of a plain ViT, and of the other kind."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdhiera.config import StudentConfig
from kdhiera.errors import UsageError
from kdhiera.grid import Grid
from kdhiera.student.base import Student
from kdhiera.student.build import build_student
from kdhiera.student.export import export
from kdhiera.student.initial import load_init

GRID = Grid(num_frames=4, height=64, width=96)
LARGER = Grid(num_frames=8, height=128, width=96)


def config(kind: str, size: str = "nano") -> StudentConfig:
    return StudentConfig.model_validate({"kind": kind, "size": size})


def student(kind: str, *, seed: int, grid: Grid = GRID) -> Student:
    return build_student(config(kind), grid, seed=seed)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    export(student("vit", seed=1), config("vit"), tmp_path / "vit", name="x", provenance={})
    return tmp_path / "vit"


def assert_equal_but_positions(a: Student, b: Student) -> None:
    ours, theirs = a.backbone.state_dict(), b.backbone.state_dict()
    assert all(torch.equal(ours[n], v) for n, v in theirs.items() if n != "pos_embed")


@pytest.mark.parametrize("file", ["", "model.safetensors"])
def test_a_vit_starts_from_an_export(exported: Path, file: str) -> None:
    found, first = student("vit", seed=6), student("vit", seed=1)
    load_init(found, str(exported / file))
    assert_equal_but_positions(found, first)
    assert torch.equal(found.backbone.pos_embed, first.backbone.pos_embed)
    assert not found.backbone.pos_embed.requires_grad


def test_positions_of_another_clip_size_are_its_own(exported: Path) -> None:
    found, fresh = student("vit", seed=6, grid=LARGER), student("vit", seed=6, grid=LARGER)
    load_init(found, str(exported))
    assert_equal_but_positions(found, student("vit", seed=1))
    assert torch.equal(found.backbone.pos_embed, fresh.backbone.pos_embed)


def test_half_precision_loads_as_float32(exported: Path) -> None:
    path = exported / "model.safetensors"
    save_file({name: value.half() for name, value in load_file(path).items()}, path)
    found = student("vit", seed=6)
    load_init(found, str(path))
    assert {value.dtype for value in found.backbone.state_dict().values()} == {torch.float32}


def test_the_other_kind_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds a plain ViT, and the student is a Hiera: set st"):
        load_init(student("hiera", seed=0), str(exported))
    hiera = tmp_path / "hiera"
    export(student("hiera", seed=1), config("hiera"), hiera, name="x", provenance={})
    with pytest.raises(UsageError, match=r"is no plain ViT of kdhiera: name an export of a run"):
        load_init(student("vit", seed=0), str(hiera))


def test_another_size_is_named(exported: Path) -> None:
    path = exported / "model.safetensors"
    with torch.device("meta"):
        tiny = build_student(config("vit", "tiny"), GRID, seed=0).backbone.state_dict()
    save_file({name: torch.zeros(value.shape) for name, value in tiny.items()}, path)
    with pytest.raises(UsageError, match=r"ViT of size tiny, and the student is one of size nano"):
        load_init(student("vit", seed=0), str(path))


def test_a_parameter_that_is_missing_is_named(exported: Path) -> None:
    path = exported / "model.safetensors"
    state = load_file(path)
    del state["blocks.2.attn.qkv.bias"]
    save_file(state, path)
    with pytest.raises(UsageError, match=r"blocks.2.attn.qkv.bias"):
        load_init(student("vit", seed=0), str(path))


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no weights at student.init="):
        load_init(student("vit", seed=0), str(tmp_path / "nothing"))
