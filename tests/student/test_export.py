import importlib
import json
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from einops import rearrange
from safetensors.torch import load_file

from kdhiera.config import StudentConfig
from kdhiera.errors import DamagedError, UsageError
from kdhiera.grid import Grid
from kdhiera.student.base import Student, normalise_pixels
from kdhiera.student.build import build_student
from kdhiera.student.export import export, load_exported

GRID = Grid(num_frames=4, height=64, width=96)
PROVENANCE = {
    "teachers": {
        "image": {
            "kind": "timm",
            "model": "vit_small_patch14_dinov2",
            "weights": "image.safetensors",
            "weights_sha256": "0123456789abcdef" * 4,
            "layers": ["6", "9"],
            "weight": 1.0,
            "licence": "CC-BY-NC-4.0",
        }
    },
    "data": {
        "shards": ["videos-*.tar"],
        "licence": None,
        "coverage": "24 of 25 samples",
        "views": 2,
        "steps": 30,
        "batch_size": 8,
        "masks": "attention masks at ratio 0.8",
    },
}


@pytest.fixture(params=["hiera", "vit"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config(kind: str) -> StudentConfig:
    return StudentConfig.model_validate({"kind": kind, "size": "nano"})


@pytest.fixture
def student(config: StudentConfig) -> Student:
    return build_student(config, GRID, seed=1).eval()


@pytest.fixture
def folder(tmp_path: Path, student: Student, config: StudentConfig) -> Path:
    target = tmp_path / "run" / "export"
    export(student, config, target, name="a student", provenance=PROVENANCE, measured="| 42 % |")
    return target


def clips() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (2, GRID.num_frames, GRID.height, GRID.width, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def pairs(layout: str) -> dict[str, int]:
    """Two frames a slot, where the layout tells them apart."""
    return {"f": 2} if "f" in layout else {}


@torch.no_grad()
def test_timm_builds_it_from_the_files_alone(folder: Path, student: Student) -> None:
    config = json.loads((folder / "config.json").read_text())
    module, _, name = config["class"].rpartition(".")
    model = getattr(importlib.import_module(module), name)(**config["model_args"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    layout = config["pixels"]["layout"]
    frames = "(t f)" if "f" in layout else "t"
    x = rearrange(normalise_pixels(clips()), f"b {frames} h w c -> {layout}", **pairs(layout))
    assert torch.equal(model.eval()(x), student.backbone(x))
    torch.testing.assert_close(model(x), student.features(clips()), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_loading_gives_the_same_student(folder: Path, student: Student) -> None:
    loaded = load_exported(folder)
    assert type(loaded) is type(student)
    assert not loaded.training
    assert loaded.grid == GRID
    assert torch.equal(loaded.features(clips()), student.features(clips()))


@torch.no_grad()
def test_q_pool_3_loads_strictly_and_is_nothing_to_a_vit(folder: Path, kind: str) -> None:
    loaded = load_exported(folder, q_pool=3)
    assert loaded.tap_shape(loaded.last_tap)[0] == {"hiera": 1, "vit": 4}[kind]
    assert loaded.features(clips()).shape == (2, loaded.num_features)


@torch.no_grad()
def test_timm_loads_it_by_name(folder: Path, student: Student) -> None:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    layout = json.loads((folder / "config.json").read_text())["pixels"]["layout"]
    frames = "(t f)" if "f" in layout else "t"
    x = rearrange(normalise_pixels(clips()), f"b {frames} h w c -> {layout}", **pairs(layout))
    assert torch.equal(model(x), student.backbone(x))
    assert getattr(model, "q_pool", 2) == getattr(student.backbone, "q_pool", 2)
    assert torch.equal(model.forward_features(x), student.backbone.forward_features(x))
    classifier = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=5).eval()
    assert classifier(x).shape == (2, 5)
    torch.testing.assert_close(
        classifier.forward_head(classifier.forward_features(x)), classifier(x)
    )
    weights = classifier.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in student.backbone.state_dict().items())


@torch.no_grad()
def test_timm_gives_features_of_stages(folder: Path, student: Student, kind: str) -> None:
    """Of the Hiera: what its taps are, with every unit shown, on the grid of each stage."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()
    if kind == "vit":
        x = torch.zeros(2, 6, 2 * 64, 96)
        assert [f.shape for f in model(x)] == [(2, 192, 2 * 4, 6)] * 3
        return
    x = rearrange(normalise_pixels(clips()), "b t h w c -> b c t h w")
    found = model(x)
    assert [tuple(f.shape[1:]) for f in found] == [
        (channels, 2, 64 // reduction, 96 // reduction)
        for channels, reduction in zip(
            model.feature_info.channels(), model.feature_info.reduction(), strict=True
        )
    ]
    dense = student.dense(clips())
    torch.testing.assert_close(found[-1].movedim(1, -1), dense, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("block", [0, 1])
def test_the_model_card_runs(
    folder: Path, student: Student, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """On a clip of noise in place of its black one, so that the order of pixels counts."""
    card = (folder / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[block]
    monkeypatch.chdir(folder)
    names: dict[str, torch.Tensor] = {}
    torch.save(clips()[:1], "noise.pt")
    exec(re.sub(r"clips = torch.zeros\(.*", 'clips = torch.load("noise.pt")', code), names)
    wanted = student.features(clips()[:1])
    torch.testing.assert_close(names["features"], wanted, atol=1e-5, rtol=1e-4)


def test_the_model_card_says_what_made_it(folder: Path, kind: str) -> None:
    card = (folder / "README.md").read_text()
    assert "| image | vit_small_patch14_dinov2 | 6, 9 | 1 | image.safetensors | 0123456789" in card
    assert "- `videos-*.tar`\n\nTrained on 24 of 25 samples, for 30 steps of 8 clips" in card
    assert "## Measured\n\n| 42 % |" in card
    assert "- teacher image: CC-BY-NC-4.0\n- data: not stated" in card
    assert ("`q_pool=2`" in card) == (kind == "hiera")
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "timm"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UsageError, match=name):
        load_exported(folder)


def test_cut_weights_are_an_error(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedError, match="kdhiera distill"):
        load_exported(folder)


def test_weights_of_another_size_are_an_error(folder: Path, kind: str) -> None:
    path = folder / "config.json"
    before, after = {"hiera": ("32", "64"), "vit": ("192", "384")}[kind]
    text = path.read_text()
    path.write_text(text.replace(f'"embed_dim": {before}', f'"embed_dim": {after}'))
    with pytest.raises(DamagedError, match="size mismatch"):
        load_exported(folder)


def change(folder: Path, **values: str | None) -> None:
    """Of config.json; None takes one out."""
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.mark.parametrize("kind", ["hiera"], indirect=True)
def test_an_export_that_names_no_kind_is_a_hiera(folder: Path, student: Student) -> None:
    change(folder, kind=None)
    loaded = load_exported(folder)
    with torch.no_grad():
        assert torch.equal(loaded.features(clips()), student.features(clips()))


@pytest.mark.parametrize(
    ("other", "words"), [("mamba", "unknown kind of student 'mamba'"), (None, "unexpected keyword")]
)
@pytest.mark.parametrize("kind", ["vit"], indirect=True)
def test_a_kind_that_is_not_the_weights_is_an_error(
    folder: Path, other: str | None, words: str
) -> None:
    change(folder, kind=other)
    with pytest.raises(DamagedError, match=words):
        load_exported(folder)


def test_what_trains_is_what_trained_before(folder: Path, student: Student) -> None:
    """Drop-path and pooling change no weight, and fixed positions stay fixed."""
    loaded = load_exported(folder, q_pool=3, drop_path=0.2)
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in student.named_parameters()
    }
    assert loaded.backbone.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    for (name, value), other in zip(
        student.state_dict().items(), loaded.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name
