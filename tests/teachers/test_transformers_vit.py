"""Models of transformers, small and random, against the library's forward and eager attention."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import (
    CPU,
    GRID,
    SQUARE,
    as_images,
    as_video,
    mean_scores,
    random_clips,
    randomise,
    watched,
    write_json,
)

from kdhiera.config import TeacherConfig
from kdhiera.errors import UsageError
from kdhiera.grid import Grid
from kdhiera.teachers.base import Teacher
from kdhiera.teachers.build import build_teacher
from kdhiera.teachers.scores import ScoreChoice

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3, (0.5,) * 3)
SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
VITS = {**SIZES, "intermediate_size": 96, "image_size": 64}

# Architecture, settings, whether it sees all frames, class and register tokens, patch, colours.
MODELS: dict[str, tuple[str, dict[str, Any], bool, int, int, Any]] = {
    "videomae": (
        "VideoMAE",
        {**VITS, "num_frames": 4, "use_mean_pooling": False},
        True,
        0,
        16,
        IMAGENET,
    ),
    "vjepa2": (
        "VJEPA2",
        {**SIZES, "crop_size": 64, "frames_per_clip": 4}
        | {"pred_hidden_size": 48, "pred_num_attention_heads": 3, "pred_num_hidden_layers": 1},
        True,
        0,
        16,
        IMAGENET,
    ),
    "dinov2": ("Dinov2", {**SIZES, "image_size": 56}, False, 1, 14, IMAGENET),
    "dinov2_with_registers": (
        "Dinov2WithRegisters",
        {**SIZES, "image_size": 56, "patch_size": 14, "num_register_tokens": 4},
        False,
        5,
        14,
        IMAGENET,
    ),
    "vit": ("ViT", VITS, False, 1, 16, HALF),
    "vit_mae": ("ViTMAE", VITS, False, 1, 16, IMAGENET),
}
ALL = pytest.mark.parametrize("kind", MODELS)


def library_model(kind: str, **changes: Any) -> Any:
    """The library's own model with random weights and attention that can be read."""
    name, settings, *_ = MODELS[kind]
    config = getattr(transformers, f"{name}Config")(**(settings | changes))
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}Model")(config)
    randomise(model)
    return model.eval()


def save(model: Any, folder: Path) -> Path:
    """Config and weights as the library writes them."""
    model.save_pretrained(folder)
    return folder


def teacher_of(
    folder: Path, grid: Grid = SQUARE, choice: ScoreChoice | None = None, **changes: Any
) -> Teacher:
    values = {
        "kind": "transformers",
        "weights": str(folder),
        "layers": [1, 2, 3],
        "precision": "fp32",
    }
    config = TeacherConfig.model_validate(values | changes)
    return build_teacher(config, grid=grid, device=CPU, choice=choice)


def direct(kind: str, model: Any, clips: torch.Tensor) -> Any:
    """The library's forward on what the teacher is meant to see."""
    _, _, video, _, patch, (mean, std) = MODELS[kind]
    size = (clips.shape[2] // 16 * patch, clips.shape[3] // 16 * patch)
    pixels = (as_video if video else as_images)(clips, size, mean, std)
    extra: dict[str, Any] = {}
    if kind == "vjepa2":
        extra["skip_predictor"] = True
    if kind == "vit_mae":  # hides 75 % and shuffles the rest, unless told both
        model.config.mask_ratio = 0.0
        extra["noise"] = torch.arange(size[0] * size[1] // patch**2).expand(len(pixels), -1)
    with torch.inference_mode():
        return model(pixels, output_hidden_states=True, output_attentions=True, **extra)


@ALL
def test_every_layer_equals_the_librarys_hidden_states(kind: str, tmp_path: Path):
    model = library_model(kind)
    teacher = teacher_of(save(model, tmp_path))
    clips = random_clips(grid=SQUARE)
    out = teacher(clips, ["1", "2", "3", "norm"], None)
    theirs = direct(kind, model, clips)
    prefix = MODELS[kind][3]
    assert len(theirs.hidden_states) == 4
    for layer in (1, 2, 3):
        expected = theirs.hidden_states[layer][:, prefix:].reshape(2, 2, 4, 4, 48)
        found = out.features[str(layer)]
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max(), layer
    normed = theirs.last_hidden_state[:, prefix:].reshape(2, 2, 4, 4, 48)
    torch.testing.assert_close(out.features["norm"], normed, rtol=1e-4, atol=1e-5)


@ALL
@pytest.mark.parametrize("source", ["cls_attention", "received_attention"])
def test_scores_equal_eager_attention(kind: str, source: str, tmp_path: Path):
    model = library_model(kind)
    teacher = teacher_of(save(model, tmp_path), choice=ScoreChoice(layer="2", heads=(1, 2)))
    clips = random_clips(grid=SQUARE)
    prefix = MODELS[kind][3]
    if source == "cls_attention" and not prefix:
        with pytest.raises(UsageError, match="needs a class token"):
            teacher.check((), source)
        return
    teacher.check((), source)
    maps = direct(kind, model, clips).attentions[1][:, [1, 2]]
    expected = mean_scores(maps, source, prefix, 16)
    found = teacher(clips, [], source).scores
    assert expected.max() > 1.2 * expected.min()
    torch.testing.assert_close(found.reshape(-1, 16).double(), expected, rtol=1e-4, atol=1e-7)


def test_blocks_run_stop_at_the_last_needed(tmp_path: Path):
    teacher = teacher_of(save(library_model("vjepa2"), tmp_path))
    clips = random_clips(grid=SQUARE)
    seen, _ = watched(None, teacher._backbone.blocks, lambda: teacher(clips, ["2"], None))
    assert len(seen) == 2
    seen, _ = watched(
        None, teacher._backbone.blocks, lambda: teacher(clips, [], "received_attention")
    )
    assert len(seen) == 2


def test_vjepa2_on_a_wide_grid_keeps_its_own_positions(tmp_path: Path):
    """Rotary positions of a wide clip: block 1's maps are those of the same tokens on a square.

    Attention between two tokens depends on their distance only, so the left 4 columns of a
    wide grid attend as a 4 x 4 grid does, up to the softmax's denominator.
    """
    model = library_model("vjepa2")
    wide = teacher_of(save(model, tmp_path), grid=GRID)
    square = teacher_of(tmp_path, grid=SQUARE)
    clips = random_clips(grid=GRID)
    left = clips[:, :, :, :64].contiguous()
    columns = torch.arange(48).reshape(2, 4, 6)[:, :, :4].flatten()

    def logits(teacher: Any, seen: torch.Tensor) -> torch.Tensor:
        backbone = teacher._backbone
        with torch.inference_mode():
            tokens, beside = backbone.embed(teacher._frames(seen))
            q, k = backbone.queries_and_keys(1, tokens, beside, slice(None))
            return q @ k.transpose(-1, -2)

    torch.testing.assert_close(
        logits(wide, clips)[:, :, columns][..., columns], logits(square, left), rtol=1e-4, atol=1e-4
    )


@ALL
def test_wide_grids_run(kind: str, tmp_path: Path):
    """Neither height = width nor the checkpoint's own grid is taken for granted."""
    teacher = teacher_of(save(library_model(kind), tmp_path), grid=GRID)
    clips = random_clips(grid=GRID)
    features = teacher(clips, ["3"], None).features["3"]
    assert features.shape == (2, 2, 4, 6, 48)
    if kind != "vjepa2":
        moved = clips.roll(16, dims=3)  # another place for the same patch is another feature
        assert not torch.allclose(
            teacher(moved, ["1"], None).features["1"][:, :, :, 1:],
            teacher(clips, ["1"], None).features["1"][:, :, :, :-1],
            atol=1e-3,
        )


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "vit", "vit_mae"])
def test_positions_are_resampled_as_the_library_does(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """A checkpoint of another grid equals the library's own interpolation at the new size."""
    model = library_model(kind, image_size=8 * MODELS[kind][4])
    clips = random_clips(grid=SQUARE)
    with caplog.at_level(logging.INFO):
        teacher = teacher_of(save(model, tmp_path))
    rule = "bicubic-antialias" if kind == "dinov2_with_registers" else "bicubic"
    assert f"position grid resampled from 1 x 8 x 8 to 1 x 4 x 4 ({rule})" in caplog.text
    forward = model.forward
    if kind in ("vit", "vit_mae"):
        model.forward = lambda *a, **k: forward(*a, interpolate_pos_encoding=True, **k)
    theirs = direct(kind, model, clips).hidden_states[3]
    expected = theirs[:, MODELS[kind][3] :].reshape(2, 2, 4, 4, 48)
    torch.testing.assert_close(
        teacher(clips, ["3"], None).features["3"], expected, rtol=1e-4, atol=1e-4
    )


def test_videomaes_table_is_resampled_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    save(library_model("videomae", num_frames=8, image_size=96), tmp_path)
    with caplog.at_level(logging.INFO):
        teacher = teacher_of(tmp_path)
    assert "position grid resampled from 4 x 6 x 6 to 2 x 4 x 4 (bicubic)" in caplog.text
    assert teacher.identity["settings"]["num_frames"] == 8


def test_a_model_without_final_norm_says_so(tmp_path: Path):
    """VideoMAE with `use_mean_pooling` has no norm that acts on tokens."""
    save(library_model("videomae", use_mean_pooling=True), tmp_path)
    with pytest.raises(UsageError, match=r"'norm' does not exist.*no final norm"):
        teacher_of(tmp_path, layers=["norm"])


def test_checkpoints_of_larger_models_load(tmp_path: Path):
    """A classifier's or pre-training model's checkpoint holds the same backbone."""
    settings = MODELS["videomae"][1] | {"decoder_num_attention_heads": 3}
    settings |= {"decoder_hidden_size": 48, "decoder_num_hidden_layers": 1}
    whole = transformers.VideoMAEForPreTraining(transformers.VideoMAEConfig(**settings)).eval()
    randomise(whole)
    clips = random_clips(grid=SQUARE)
    big = teacher_of(save(whole, tmp_path / "big"))
    bare = teacher_of(save(whole.videomae, tmp_path / "bare"))
    assert big.weights_sha256 == bare.weights_sha256
    assert torch.equal(
        big(clips, ["3"], None).features["3"], bare(clips, ["3"], None).features["3"]
    )


def test_colours_come_from_the_checkpoint_or_the_config(tmp_path: Path):
    folder = save(library_model("dinov2"), tmp_path)
    plain = teacher_of(folder)
    assert plain.identity["mean"] == list(IMAGENET[0])
    write_json(folder / "preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3]})
    assert teacher_of(folder).identity["mean"] == [0.1, 0.2, 0.3]
    own = teacher_of(folder, mean=[0.4, 0.4, 0.4], std=[1, 1, 1])
    assert own.identity["mean"] == [0.4] * 3
    clips = random_clips(grid=SQUARE)
    assert not torch.equal(
        own(clips, ["1"], None).features["1"], plain(clips, ["1"], None).features["1"]
    )


def test_weights_of_a_file_need_an_architecture(tmp_path: Path):
    model = library_model("dinov2")
    save(model, tmp_path / "folder")
    file = tmp_path / "lonely" / "weights.safetensors"
    file.parent.mkdir()
    save_file(load_file(tmp_path / "folder" / "model.safetensors"), file)
    with pytest.raises(UsageError, match=r"no `model_type` in a config.json.*videomae, vjepa2"):
        teacher_of(file)
    with pytest.raises(UsageError, match=r"the weights in .* do not fit dinov2"):
        teacher_of(file, model="dinov2")
    options = MODELS["dinov2"][1]
    teacher = teacher_of(file, model="dinov2", options=options)
    clips = random_clips(grid=SQUARE)
    expected = teacher_of(tmp_path / "folder")(clips, ["3"], None).features["3"]
    assert torch.equal(teacher(clips, ["3"], None).features["3"], expected)
    assert teacher.weights_sha256 == teacher_of(tmp_path / "folder").weights_sha256


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"options": {"hidden_sise": 48}}, "no option 'hidden_sise': did you mean 'hidden_size'"),
        ({"options": {"num_hidden_layers": 4}}, "do not fit dinov2.*is missing"),
        ({"options": {"num_hidden_layers": 2}}, "do not fit dinov2.*is left over"),
        ({"options": {"hidden_size": "wide"}}, "Dinov2Config refuses its settings"),
        ({"options": {"image_size": 70}}, "the weights in .* do not fit dinov2"),
        ({"layers": [4]}, "'4' does not exist: dinov2 has layers 1 to 3 and `norm`"),
    ],
)
def test_what_does_not_fit_is_one_sentence(changes: Any, words: str, tmp_path: Path):
    folder = save(library_model("dinov2"), tmp_path)
    with pytest.raises(UsageError, match=words) as caught:
        teacher_of(folder, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("beside", [False, True])
def test_a_model_that_the_weights_are_not_of_is_refused(beside: bool, tmp_path: Path):
    folder = save(library_model("vjepa2"), tmp_path)
    weights = folder / "model.safetensors" if beside else folder
    with pytest.raises(UsageError, match=r"holds weights of vjepa2, but .*model is videomae: name"):
        teacher_of(weights, model="videomae")
    assert teacher_of(weights, model="vjepa2").identity["model"] == "vjepa2"
    named = teacher_of(weights, model="facebook/vjepa2-vitl-fpc64-256")  # then only a name
    assert named.identity["model"] == "facebook/vjepa2-vitl-fpc64-256"
    assert named.identity["architecture"] == "vjepa2"


def test_unknown_models_are_named(tmp_path: Path):
    folder = save(library_model("dinov2"), tmp_path)
    write_json(folder / "config.json", {"model_type": "swin"})
    with pytest.raises(UsageError, match="a model of type 'swin', which kdhiera does not take"):
        teacher_of(folder)


def test_tubelets_of_other_lengths_are_refused(tmp_path: Path):
    save(library_model("videomae", tubelet_size=4), tmp_path)
    with pytest.raises(UsageError, match="sees 4 frames a token, but a token of the student cov"):
        teacher_of(tmp_path)


def test_an_architecture_has_no_weights_of_its_own():
    values = {"kind": "transformers", "model": "videomae", "layers": [1]}
    with pytest.raises(UsageError, match="model videomae is an architecture without weights"):
        build_teacher(TeacherConfig.model_validate(values), grid=SQUARE, device=CPU)


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"pip install 'kdhiera\[teachers\]'"):
        teacher_of(Path("anywhere"))


def test_loading_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """No report, no bar: a pre-training checkpoint has parts that nobody needs."""
    save(library_model("vjepa2"), tmp_path)
    capfd.readouterr()
    teacher_of(tmp_path)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
