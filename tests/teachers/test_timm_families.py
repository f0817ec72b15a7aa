"""Every timm family, small and random, against timm's own forward and unfused attention."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import (
    TIMM_FAMILIES,
    as_images,
    full_attention_of_timm,
    mean_scores,
    random_clips,
    timm_model,
    timm_teacher,
    watched,
)

from kdhiera.errors import UsageError
from kdhiera.teachers.scores import ScoreChoice

FAMILIES = pytest.mark.parametrize("name", TIMM_FAMILIES)


def seen_by(name):
    """The family's model at the student's grid, and what it sees of the clips."""
    family = TIMM_FAMILIES[name]
    model = timm_model(family, size=family.size)
    settings = model.pretrained_cfg
    clips = random_clips(grid=family.grid)
    return family, model, clips, as_images(clips, family.size, settings["mean"], settings["std"])


@FAMILIES
def test_every_layer_equals_timms_own_forward(name: str, tmp_path: Path):
    family, model, clips, images = seen_by(name)
    teacher = timm_teacher(family, tmp_path)
    out = teacher(clips, ["1", "2", "3"], None)
    blocks, final = watched(model, model.blocks, lambda: model.forward_features(images))
    t, h, w = family.grid.tokens
    for layer, tokens in enumerate(blocks, start=1):
        expected = tokens[:, model.num_prefix_tokens :].reshape(2, t, h, w, 48)
        found = out.features[str(layer)]
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max(), layer
    if isinstance(model.norm, torch.nn.Identity):
        with pytest.raises(UsageError, match="has layers 1 to 3 and no final norm"):
            teacher.check(["norm"], None)
    else:
        teacher.check(["norm"], None)
        expected = final[:, model.num_prefix_tokens :].reshape(2, t, h, w, 48)
        torch.testing.assert_close(
            teacher(clips, ["norm"], None).features["norm"], expected, rtol=1e-4, atol=1e-5
        )


@FAMILIES
@pytest.mark.parametrize("source", ["cls_attention", "received_attention"])
@pytest.mark.parametrize("layer", [None, "2"])
def test_scores_equal_full_softmax_attention(name, source, layer, tmp_path):
    family, model, clips, images = seen_by(name)
    choice = ScoreChoice(layer=layer)
    teacher = timm_teacher(family, tmp_path, choice=choice)
    if source == "cls_attention" and model.cls_token is None:
        with pytest.raises(UsageError, match=r"needs a class token.*has received_attention and"):
            teacher.check((), source)
        return
    teacher.check((), source)
    maps = full_attention_of_timm(model, images)[1 if layer else 2]
    t, h, w = family.grid.tokens
    expected = mean_scores(maps, source, model.num_prefix_tokens, h * w)
    found = teacher(clips, [], source).scores
    assert expected.max() > 1.2 * expected.min()  # not uniform, or the test says nothing
    torch.testing.assert_close(found.reshape(-1, h * w).double(), expected, rtol=1e-4, atol=1e-7)
    assert found.shape == (2, t, h, w)


@pytest.mark.parametrize("name", ["dinov2-reg", "dinov3"])
@pytest.mark.parametrize("source", ["cls_attention", "received_attention"])
def test_heads_are_chosen(name, source, tmp_path):
    family, model, clips, images = seen_by(name)
    teacher = timm_teacher(family, tmp_path, choice=ScoreChoice(heads=(0, 2)))
    teacher.check((), source)
    maps = full_attention_of_timm(model, images)[-1][:, [0, 2]]
    _, h, w = family.grid.tokens
    expected = mean_scores(maps, source, model.num_prefix_tokens, h * w)
    found = teacher(clips, [], source).scores.reshape(-1, h * w)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)


def test_it_stops_at_the_last_block_that_is_needed(tmp_path):
    family = TIMM_FAMILIES["dino"]
    teacher = timm_teacher(family, tmp_path)
    clips = random_clips(grid=family.grid)

    def blocks_run(layers, source):
        seen, _ = watched(None, teacher._backbone.blocks, lambda: teacher(clips, layers, source))
        return len(seen)

    assert blocks_run(["1"], None) == 1
    assert blocks_run(["2", "1"], None) == 2
    assert blocks_run(["3"], None) == blocks_run(["norm"], None) == 3
    assert blocks_run([], "cls_attention") == 2  # what enters the last block is enough
    assert blocks_run(["1"], "received_attention") == 2
    assert blocks_run([], "feature_norm") == 3
    assert blocks_run([], None) == 0


def test_grouped_and_other_attentions_give_no_scores(tmp_path):
    options = {**TIMM_FAMILIES["dino"].options, "attn_layer": "diff"}
    family = replace(TIMM_FAMILIES["dino"], options=options)
    teacher = timm_teacher(family, tmp_path)
    with pytest.raises(UsageError, match=r"does not know the attention of vit_small.*feature_norm"):
        teacher.check((), "received_attention")
    teacher.check((), "feature_norm")
    assert teacher.identity["options"]["attn_layer"] == "diff"


def test_timm_itself_agrees_with_the_hook_oracle():
    """The oracle's hooks see what timm's `forward_intermediates` returns."""
    _, model, _, images = seen_by("dinov2-reg")
    blocks, _ = watched(model, model.blocks, lambda: model.forward_features(images))
    with torch.inference_mode():
        official = model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    for ours, theirs in zip(blocks, official, strict=True):
        assert torch.equal(ours[:, 5:], theirs)
