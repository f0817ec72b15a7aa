"""The original Hiera: its outputs, its names, its checkpoints in and out."""

import json
import logging
from pathlib import Path

import numpy as np
import original
import pytest
import torch
from original import GOLDEN, GRID, STRIDES, UNITS, digest, seeded
from safetensors.torch import save_file
from timm.models.hiera import Hiera

from kdhiera.config import StudentConfig
from kdhiera.errors import UsageError
from kdhiera.grid import Grid
from kdhiera.student.export import export, export_hiera
from kdhiera.student.hiera import HieraStudent, build, hiera_args
from kdhiera.student.official import (
    load_init,
    official_names,
    resample_positions,
    timm_names,
    weights_sha256,
)

NANO = StudentConfig(size="nano", drop_path=0.0)
STAGES = [f"stage{number}.end" for number in (1, 2, 3, 4)]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def names(golden: dict[str, np.ndarray]) -> dict[str, dict[str, list[int]]]:
    loaded: dict[str, dict[str, list[int]]] = json.loads(str(golden["names"]))
    return loaded


@pytest.fixture(scope="module")
def checkpoint(
    names: dict[str, dict[str, list[int]]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A file as the original's, of nano size and with seeded weights."""
    path = tmp_path_factory.mktemp("official") / "hiera_nano.pth"
    state = {name: seeded(name, shape) for name, shape in names["nano"].items()}
    torch.save({"model_state": state}, path)
    return path


@pytest.fixture(scope="module")
def autoencoder(
    names: dict[str, dict[str, list[int]]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("official") / "mae_hiera_nano.pth"
    state = {name: seeded(name, shape) for name, shape in names["mae_nano"].items()}
    torch.save({"model_state": state}, path)
    return path


def student(path: Path, grid: Grid = GRID, *, q_pool: int = 2, seed: int = 5) -> HieraStudent:
    backbone = build(NANO, grid, q_pool=q_pool, seed=seed)
    load_init(backbone, str(path), grid)
    return HieraStudent(backbone, grid, STAGES).eval()


def visible(clips: torch.Tensor) -> torch.Tensor:
    cubes = GRID.frames_to_units(clips)
    return torch.stack([cube[row] for cube, row in zip(cubes, UNITS, strict=True)])


@pytest.mark.parametrize("q_pool", [2, 3])
@torch.no_grad()
def test_outputs_equal_the_original_implementations(
    golden: dict[str, np.ndarray], checkpoint: Path, q_pool: int
) -> None:
    """fp32, to 1e-5 of values of order 1, masked and whole."""
    ours = student(checkpoint, q_pool=q_pool)
    clips = original.clips()
    masked = ours(visible(clips), torch.tensor(UNITS))
    for number, stride in enumerate(STRIDES, 1):
        wanted = torch.from_numpy(golden[f"q{q_pool}/stage{number}"])
        found = masked[f"stage{number}.end"][..., ::stride]
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        assert wanted.std() > 0.1
    tolerance = {"atol": 1e-5, "rtol": 1e-5}
    whole = torch.from_numpy(golden[f"q{q_pool}/whole"])
    torch.testing.assert_close(ours.dense(clips)[..., :: STRIDES[-1]], whole, **tolerance)
    pooled = torch.from_numpy(golden[f"q{q_pool}/pooled"])
    torch.testing.assert_close(ours.features(clips), pooled, **tolerance)


@pytest.mark.parametrize("size", original.VIDEO_SIZES)
def test_names_and_shapes_are_the_official_checkpoints(
    names: dict[str, dict[str, list[int]]], size: str
) -> None:
    with torch.device("meta"):
        ours = Hiera(**hiera_args(StudentConfig(size=size), original.FULL))
    shapes = original.shapes_of(official_names(ours.state_dict()))
    width = ours.num_features
    classifier = {"head.projection.weight": [400, width], "head.projection.bias": [400]}
    assert digest({**shapes, **classifier}) == names[f"hiera_{size}_16x224"]
    encoder = {name: shape for name, shape in shapes.items() if not name.startswith("norm.")}
    assert digest(encoder) == names[f"mae_hiera_{size}_16x224"]


def test_an_export_holds_the_originals_names_and_comes_back(
    names: dict[str, dict[str, list[int]]], checkpoint: Path, tmp_path: Path
) -> None:
    first = student(checkpoint)
    export_hiera(first, tmp_path / "out" / "student.pth")
    written = torch.load(tmp_path / "out" / "student.pth", weights_only=True)
    state = written["model_state"]
    wanted = {n: s for n, s in names["nano"].items() if not n.startswith("head.projection.")}
    assert original.shapes_of(state) == wanted
    assert all(torch.equal(state[name], seeded(name, shape)) for name, shape in wanted.items())
    again = student(tmp_path / "out" / "student.pth", seed=6).backbone.state_dict()
    assert all(torch.equal(again[n], value) for n, value in first.backbone.state_dict().items())


def test_an_autoencoder_gives_its_encoder(
    autoencoder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        loaded = student(autoencoder, seed=5).backbone
    fresh = build(NANO, GRID, seed=5).state_dict()
    for name, value in loaded.state_dict().items():
        norm = name.startswith("head.norm.")
        assert torch.equal(value, fresh[name] if norm else seeded(name, value.shape)), name
    assert "not loaded: decoder_blocks" in caplog.text
    assert "no norm after the last block; it starts fresh" in caplog.text


def test_our_own_exports_are_taken_too(checkpoint: Path, tmp_path: Path) -> None:
    """A folder or its weights; the grid, which is not square here, is known from it."""
    first = student(checkpoint)
    export(first, NANO, tmp_path / "export", name="x", provenance={})
    for path in (tmp_path / "export", tmp_path / "export" / "model.safetensors"):
        again = student(path, seed=6).backbone.state_dict()
        assert all(torch.equal(again[n], v) for n, v in first.backbone.state_dict().items())
    turned = Grid(num_frames=4, height=96, width=64)  # as many tokens, another grid
    positions = student(tmp_path / "export", turned).backbone.pos_embed_spatial
    assert not torch.equal(positions, first.backbone.pos_embed_spatial)


def test_positions_of_another_clip_size_are_resampled_and_said_so(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export(student(checkpoint), NANO, tmp_path / "export", name="x", provenance={})
    larger = Grid(num_frames=8, height=128, width=96)
    with caplog.at_level(logging.INFO):
        resized = student(tmp_path / "export", larger)
    assert "resampled from 16 x 24 to 32 x 24 tokens" in caplog.text
    assert "resampled from 2 to 4 slots" in caplog.text
    temporal = seeded("pos_embed_temporal", (1, 2, 32))[0]
    wanted = [temporal[0], *torch.lerp(temporal[:1], temporal[1:], torch.tensor([[0.25], [0.75]]))]
    found = resized.backbone.pos_embed_temporal[0]
    torch.testing.assert_close(found, torch.stack([*wanted, temporal[1]]))
    kept = resized.backbone.state_dict()["blocks.3.mlp.fc1.weight"]
    assert torch.equal(kept, seeded("blocks.3.mlp.fc1.weight", kept.shape))


def field(rows: int, columns: int, size: tuple[int, int]) -> torch.Tensor:
    """A smooth field over `size` windows' worth of space and a pattern of every window."""
    y = (torch.arange(8 * rows) + 0.5) / (8 * rows) * size[0]
    x = (torch.arange(8 * columns) + 0.5) / (8 * columns) * size[1]
    smooth = torch.sin(1.1 * y)[:, None] + torch.cos(0.9 * x)
    pattern = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    return (smooth + (pattern - pattern.mean()).tile(rows, columns))[..., None]


@pytest.mark.parametrize("size", [(4, 4), (9, 5), (8, 8)])
def test_what_repeats_with_the_window_stays_with_the_window(size: tuple[int, int]) -> None:
    """A pattern of every mask unit and a smooth field: each goes where it belongs."""
    before, wanted = field(7, 7, (7, 7)), field(*size, (7, 7))
    found = resample_positions(before, (8 * size[0], 8 * size[1]))
    assert found.shape == wanted.shape
    error = (found - wanted).square().mean().sqrt()
    stretched = torch.nn.functional.interpolate(
        before[..., 0][None, None], found.shape[:2], mode="bicubic", antialias=True
    )[0, 0, ..., None]
    plain = (stretched - wanted).square().mean().sqrt()
    assert error < 0.2
    assert error < plain / 4


def test_positions_of_the_same_grid_come_back() -> None:
    positions = torch.randn(16, 24, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(resample_positions(positions, (16, 24)), positions)


def test_a_grid_that_nothing_tells_is_refused_unless_it_fits(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student(checkpoint)
    assert "taken as 16 x 24, the student's" in caplog.text
    with pytest.raises(UsageError, match="384 spatial positions are no square of mask units"):
        student(checkpoint, Grid(num_frames=4, height=128, width=128))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks.9.proj.weight": (8, 8)}, r"holds a Hiera of width 32 and .*size nano: set st"),
        ({"extra.weight": (3,)}, r"no video Hiera .* unknown \['extra.weight'\], missing \[\]"),
        ({"blocks.4.attn.qkv.bias": None}, r"missing \['blocks.4.attn.qkv.bias'\]"),
        ({"blocks.4.attn.qkv.bias": (7,)}, r"blocks.4.attn.qkv.bias has shape \(7,\), and the st"),
        ({"patch_embed.proj.weight": (32, 3, 7, 7)}, r"is an image Hiera: name a video checkpoint"),
        ({"pos_embed_temporal": None}, r"is an image Hiera"),
        ({"patch_embed.proj.weight": None}, r"is no Hiera: it has blocks.0"),
    ],
)
def test_another_model_is_refused(
    names: dict[str, dict[str, list[int]]],
    tmp_path: Path,
    change: dict[str, tuple[int, ...] | None],
    words: str,
) -> None:
    shapes = {**names["nano"], **change}
    state = {name: torch.zeros(shape) for name, shape in shapes.items() if shape is not None}
    torch.save({"model_state": state}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=words):
        student(tmp_path / "x.pth")


def test_another_size_is_named(tmp_path: Path) -> None:
    with torch.device("meta"):
        tiny = Hiera(**hiera_args(StudentConfig(size="tiny"), GRID))
    state = {name: torch.zeros(value.shape) for name, value in tiny.state_dict().items()}
    save_file(state, tmp_path / "tiny.safetensors")
    with pytest.raises(UsageError, match=r"of size tiny, and the student is one of size nano"):
        student(tmp_path / "tiny.safetensors")


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no weights at student.init="):
        student(tmp_path / "nothing.pth")
    for name in ("cut.pth", "cut.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 cut off")
        with pytest.raises(UsageError, match="cannot be read"):
            student(tmp_path / name)
    torch.save({"model_state": {"epoch": 3}}, tmp_path / "odd.pth")
    with pytest.raises(UsageError, match="is no state dict of tensors"):
        student(tmp_path / "odd.pth")


def test_half_precision_files_load_as_float32(checkpoint: Path, tmp_path: Path) -> None:
    state = timm_names(torch.load(checkpoint, weights_only=True)["model_state"])
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "half.pth")
    loaded = student(tmp_path / "half.pth").backbone.state_dict()
    assert {value.dtype for value in loaded.values()} == {torch.float32}
    assert torch.equal(loaded["head.norm.bias"], state["head.norm.bias"].half().float())


def test_the_hash_is_of_the_file_whatever_it_is_called(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "other.pth"
    copy.write_bytes(checkpoint.read_bytes())
    assert weights_sha256(str(copy)) == weights_sha256(str(checkpoint))
