import re

import numpy as np
import pytest
import torch
from einops import rearrange
from timm.data.mixup import Mixup
from timm.loss import SoftTargetCrossEntropy

from kdhiera.config import StudentConfig
from kdhiera.config.evaluation import FinetuneConfig
from kdhiera.errors import KdhieraError
from kdhiera.evaluation.finetune import Classifier, finetune, layer_groups, mix
from kdhiera.grid import Grid
from kdhiera.student.build import build_student

GRID = Grid(num_frames=4, height=64, width=64)
CPU = torch.device("cpu")
RECIPE = FinetuneConfig(
    epochs=6, batch_size=8, lr=0.03, warmup_epochs=1, mixup=0.2, drop_path=0.1, precision="fp32"
)


def classifier(kind="hiera", *, seed=0, drop_path=0.1):
    config = StudentConfig(kind=kind, size="nano", drop_path=drop_path)
    return Classifier(build_student(config, GRID, q_pool=3, seed=1), 2, seed=seed)


@pytest.mark.parametrize("kind", ["hiera", "vit"])
def test_layer_decay_and_weight_decay_of_every_parameter(kind):
    backbone = classifier(kind).student.backbone
    groups = layer_groups(backbone, weight_decay=0.3, layer_decay=0.8)
    found = {
        id(p): (group["lr_scale"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }
    num_blocks = len(backbone.blocks)
    for name, parameter in backbone.named_parameters():
        block = re.match(r"blocks\.(\d+)\.", name)
        if not parameter.requires_grad:  # a plain ViT's positions are fixed
            continue
        if name.startswith(("head", "fc_norm")):
            scale = 1.0
        elif block:
            scale = 0.8 ** (num_blocks - int(block[1]))
        else:
            scale = 0.8 ** (num_blocks + 1)
        decay = 0.3 if name.endswith("weight") and parameter.ndim > 1 else 0.0
        assert found.pop(id(parameter)) == (pytest.approx(scale), decay), name
    assert not found


def test_mixes_as_timm_does():
    rng = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 256, (6, 2, 3, 3, 3), dtype=torch.uint8, generator=rng)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    timm = Mixup(mixup_alpha=1.0, label_smoothing=0.1, num_classes=4)
    timm._params_per_batch = lambda: (0.3, False)
    wanted, targets = timm(clips.float(), labels)
    pixels, got = mix(clips, labels, share=0.3, num_classes=4, label_smoothing=0.1)
    torch.testing.assert_close(pixels, wanted)
    torch.testing.assert_close(got, targets)


def test_targets_and_loss_follow_the_formula():
    labels, logits = torch.tensor([2, 0]), torch.tensor([[0.5, -1.0, 2.0], [0.1, 0.2, -0.3]])
    clips = torch.zeros(2, 1, 1, 1, 3, dtype=torch.uint8)
    _, targets = mix(clips, labels, share=0.7, num_classes=3, label_smoothing=0.3)
    smooth = 0.7 * np.eye(3)[labels] + 0.1
    wanted = 0.7 * smooth + 0.3 * smooth[::-1]
    np.testing.assert_allclose(targets.numpy(), wanted, atol=1e-6)
    log = logits.numpy() - np.log(np.exp(logits.numpy()).sum(1, keepdims=True))
    loss = SoftTargetCrossEntropy()(logits, targets)
    assert float(loss) == pytest.approx(-(wanted * log).sum(1).mean(), abs=1e-6)


def test_without_mixing_pixels_and_labels_stay():
    clips = torch.arange(24, dtype=torch.uint8).view(2, 1, 2, 2, 3)
    pixels, targets = mix(
        clips, torch.tensor([1, 0]), share=1.0, num_classes=2, label_smoothing=0.0
    )
    assert torch.equal(pixels, clips.float())
    assert targets.tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("kind", ["hiera", "vit"])
def test_the_classifier_is_timms_own_forward(kind):
    made = classifier(kind, drop_path=0.0).eval()
    clips = torch.randint(0, 256, (2, 4, 64, 64, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((clips / 255 - mean) / std).permute(0, 4, 1, 2, 3)
    if kind == "vit":  # slots on top of one another, the two frames of a slot as channels
        pixels = rearrange(pixels, "b c (t f) y x -> b (f c) (t y) x", f=2)
    with torch.no_grad():
        torch.testing.assert_close(made(clips), made.student.backbone(pixels), rtol=1e-4, atol=1e-7)


def coloured(epoch, count=24):
    """Reddish and bluish noise."""
    rng = np.random.default_rng(epoch)
    labels = rng.integers(2, size=count)
    clips = rng.integers(0, 120, (count, 4, 64, 64, 3), dtype=np.uint8)
    clips[labels == 0, ..., 0] += 60
    clips[labels == 1, ..., 2] += 60
    for start in range(0, count, 8):
        yield clips[start : start + 8], labels[start : start + 8]


def trained(kind="hiera", *, seed=0, **changes):
    made = classifier(kind, seed=seed)
    finetune(
        made,
        coloured,
        steps_per_epoch=3,
        num_classes=2,
        settings=RECIPE.model_copy(update=changes),
        layer_decay=0.75,
        seed=seed,
        device=CPU,
        dtype=torch.float32,
    )
    return made


def test_learns_and_follows_from_the_seed_alone():
    state = torch.get_rng_state()
    first = trained()
    assert torch.equal(torch.get_rng_state(), state)
    clips, labels = next(coloured(1000))
    with torch.inference_mode():
        assert (first(torch.from_numpy(clips)).argmax(1).numpy() == labels).all()
    torch.manual_seed(99)
    again = trained()
    assert not again.training
    for (name, value), other in zip(
        first.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name
    fewer = trained(epochs=1), trained(epochs=1, seed=1)
    assert not torch.equal(*(m.student.backbone.head.fc.weight for m in fewer))


def test_a_plain_vit_learns_too():
    made = trained("vit")
    clips, labels = next(coloured(1000))
    with torch.inference_mode():
        assert (made(torch.from_numpy(clips)).argmax(1).numpy() == labels).all()


def test_a_loss_that_is_not_finite_says_what_to_do():
    with pytest.raises(KdhieraError, match=r"not finite at step \d+: lower evaluate\.finetune\.lr"):
        trained(lr=1e20, warmup_epochs=0, clip_grad=None)
