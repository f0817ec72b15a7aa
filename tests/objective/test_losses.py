import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score

from kdhiera.errors import UsageError
from kdhiera.objective.losses import (
    RunningMean,
    cosine,
    draw_drops,
    loss,
    sample_losses,
    total,
)
from kdhiera.objective.targets import TargetSpec, normalise
from kdhiera.views import stable_uniforms


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        2 * torch.randn(2, 3, 4, 5, generator=generator),
        2 * torch.randn(2, 3, 4, 5, generator=generator) + 0.5,
    )


def slow_loss(predicted: torch.Tensor, target: torch.Tensor, kind: str, beta: float) -> float:
    p, t = predicted.double().reshape(-1, 5).tolist(), target.double().reshape(-1, 5).tolist()
    terms = []
    for a, b in zip(p, t, strict=True):
        cos = sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
        far = [abs(x - y) for x, y in zip(a, b, strict=True)]
        huber = [d * d / (2 * beta) if d < beta else d - beta / 2 for d in far]
        terms.append(
            {
                "mse": sum(d * d for d in far) / len(far),
                "smooth_l1": sum(huber) / len(huber),  # MVD
                "cosine": 2 - 2 * cos,  # UMT
                "cosine_smooth_l1": 0.5 * (1 - cos) + 0.5 * sum(huber) / len(huber),  # UNIC
            }[kind]
        )
    return sum(terms) / len(terms)


KINDS = ("smooth_l1", "mse", "cosine", "cosine_smooth_l1")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_losses_equal_the_slow_formula(kind: str, beta: float) -> None:
    predicted, target = pair()
    wanted = slow_loss(predicted, target, kind, beta)
    assert loss(predicted, target, kind, beta=beta).item() == pytest.approx(wanted, rel=1e-5)


def test_cosine_loss_is_the_squared_distance_of_unit_vectors() -> None:
    predicted, target = pair()
    units = [x / x.norm(dim=-1, keepdim=True) for x in (predicted, target)]
    distance = (units[0] - units[1]).square().sum(-1).mean()
    torch.testing.assert_close(loss(predicted, target, "cosine"), distance)
    torch.testing.assert_close(cosine(predicted, predicted), torch.tensor(1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_every_samples_loss_is_that_of_the_sample_alone(kind: str) -> None:
    predicted, target = pair()
    each = sample_losses(predicted, target, kind, beta=0.7)
    alone = [loss(predicted[i], target[i], kind, beta=0.7) for i in range(2)]
    torch.testing.assert_close(each, torch.stack(alone))
    torch.testing.assert_close(each.mean(), loss(predicted, target, kind, beta=0.7))


def test_umts_loss_is_the_cosine_one_on_l2_targets() -> None:
    """UMT regresses unit vectors: mean squared distance over tokens, summed over channels."""
    predicted, raw = pair()
    target = normalise(raw, "l2")
    student = predicted / predicted.square().sum(-1, keepdim=True).sqrt()
    wanted = (student - target).square().sum(-1).mean()
    torch.testing.assert_close(loss(predicted, target, "cosine"), wanted)
    torch.testing.assert_close(loss(predicted, raw, "cosine"), wanted)  # the length is no matter


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(UsageError, match="smooth_l1, mse, cosine or cosine_smooth_l1"):
        loss(*pair(), "huber")


def target(teacher: str, layer: str, weight: float = 1.0, layer_weight: float = 1.0) -> TargetSpec:
    return TargetSpec(
        teacher=teacher, layer=layer, tap="stage4.end", column=f"{teacher}-{layer}", width=5,
        weight=weight, layer_weight=layer_weight, decode=lambda arrays, units: arrays["codes"],
    )  # fmt: skip


def test_total_is_the_weighted_sum_of_teachers_means() -> None:
    targets = [target("image", "6", 0.5), target("video", "3", 2.0), target("image", "12", 0.5)]
    losses = {
        "image/6": torch.tensor(1.0),
        "image/12": torch.tensor(3.0),
        "video/3": torch.tensor(7.0),
    }
    assert total(losses, targets).item() == 0.5 * 2.0 + 2.0 * 7.0


def test_layers_share_their_teachers_weight_in_proportion() -> None:
    targets = [
        target("image", "6", 0.5, 3.0), target("image", "12", 0.5, 1.0), target("video", "3", 2.0)
    ]  # fmt: skip
    losses = {
        "image/6": torch.tensor(1.0),
        "image/12": torch.tensor(3.0),
        "video/3": torch.tensor(7.0),
    }
    assert total(losses, targets).item() == 0.5 * (0.75 * 1.0 + 0.25 * 3.0) + 2.0 * 7.0
    doubled = [replace(spec, layer_weight=2 * spec.layer_weight) for spec in targets]
    assert total(losses, doubled).item() == total(losses, targets).item()


TEACHERS = [target("image", "6", 0.5), target("image", "12", 0.5), target("video", "3", 2.0)]


def slow_drop(
    losses: dict[str, list[float]], samples: list[int], p: float, *, seed: int, step: int
) -> float:
    """UNIC's rule, sample by sample, with the noise of the (seed, step, sample)."""
    terms = []
    for place, sample in enumerate(samples):
        each = {
            "image": (losses["image/6"][place] + losses["image/12"][place]) / 2,
            "video": losses["video/3"][place],
        }
        noise = stable_uniforms(2, "teacher_drop", seed, step, sample)
        for teacher, weight, u in zip(("image", "video"), (0.5, 2.0), noise, strict=True):
            if u >= p or each[teacher] == max(each.values()):
                terms.append(weight * each[teacher])
    return sum(terms) / len(samples)


@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_teacher_drop_keeps_the_worst_and_drops_others_by_chance(p: float) -> None:
    samples = list(range(40))
    rng = np.random.default_rng(0)
    losses = {spec.name: rng.random(40).astype(np.float32) for spec in TEACHERS}
    dropped = draw_drops(("video", "image"), samples, p, seed=3, step=7)
    found = total({n: torch.from_numpy(v) for n, v in losses.items()}, TEACHERS, dropped)
    wanted = slow_drop({n: v.tolist() for n, v in losses.items()}, samples, p, seed=3, step=7)
    assert found.item() == pytest.approx(wanted, rel=1e-5)
    if p == 0:
        means = {n: torch.from_numpy(v).mean() for n, v in losses.items()}
        torch.testing.assert_close(found, total(means, TEACHERS))


def test_what_is_dropped_has_no_gradient() -> None:
    losses = {spec.name: torch.rand(30, requires_grad=True) for spec in TEACHERS}
    total(
        losses, TEACHERS, draw_drops(("image", "video"), range(30), 1.0, seed=0, step=0)
    ).backward()
    image, video = (losses[n].grad != 0 for n in ("image/12", "video/3"))
    worse = (losses["image/6"] + losses["image/12"]) / 2 > losses["video/3"]
    assert torch.equal(image, worse)
    assert torch.equal(video, ~worse)


def test_a_teacher_without_weight_takes_no_sample_from_the_others() -> None:
    losses = {spec.name: torch.rand(30) for spec in TEACHERS}
    losses["video/3"] += 1  # the worst of every sample
    silent = [replace(s, weight=0.0) if s.teacher == "video" else s for s in TEACHERS]
    dropped = draw_drops(("image", "video"), range(30), 1.0, seed=0, step=0)
    without = total(losses, silent, dropped)
    torch.testing.assert_close(without, total(losses, [s for s in silent if s.weight], dropped))
    assert without > 0


def test_drops_are_a_function_of_seed_step_and_sample() -> None:
    names = ("image", "video")
    samples = list(range(500))
    flags = draw_drops(names, samples, 0.3, seed=1, step=2)
    halves = [
        draw_drops(names[::-1], part, 0.3, seed=1, step=2) for part in (samples[::-2], samples[::2])
    ]
    for name in names:
        assert torch.equal(flags[name][1::2].flip(0), halves[0][name])
        assert torch.equal(flags[name][::2], halves[1][name])
        assert 0.2 < flags[name].float().mean() < 0.4
        assert not torch.equal(flags[name], draw_drops(names, samples, 0.3, seed=1, step=3)[name])
        assert not torch.equal(flags[name], draw_drops(names, samples, 0.3, seed=2, step=2)[name])
    assert not torch.equal(flags["image"], flags["video"])


def test_running_mean_is_the_mean_of_all_tokens_before() -> None:
    running = RunningMean(5, torch.device("cpu"))
    assert running.mean.abs().max() == 0
    sizes, seen = (2, 7, 1), []
    for seed, size in enumerate(sizes):
        batch = torch.randn(size, 3, 5, generator=torch.Generator().manual_seed(seed)) + seed
        running.update(batch)
        seen.append(batch.reshape(-1, 5).double().numpy())
        wanted = np.concatenate(seen).mean(0)
        np.testing.assert_allclose(running.mean.numpy(), wanted, rtol=1e-5, atol=1e-6)
    assert running.count == 3 * sum(sizes)


def test_explained_variance_of_mse_is_r2_against_the_running_mean() -> None:
    """With the batch's own mean as the constant it is scikit-learn's pooled R^2."""
    predicted, target = pair()
    running = RunningMean(5, torch.device("cpu"))
    running.update(target)
    p, t = predicted.reshape(-1, 5).numpy(), target.reshape(-1, 5).numpy()
    wanted = r2_score(t, p, multioutput="variance_weighted")
    found = running.explained_variance(predicted, target, "mse").item()
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_explained_variance_equals_the_slow_formula(kind: str) -> None:
    predicted, target = pair()
    running = RunningMean(5, torch.device("cpu"))
    running.update(pair(seed=4)[1])
    constant = torch.stack([running.mean] * 24).reshape(target.shape)
    wanted = 1 - slow_loss(predicted, target, kind, 0.7) / slow_loss(constant, target, kind, 0.7)
    found = running.explained_variance(predicted, target, kind, beta=0.7).item()
    assert found == pytest.approx(wanted, rel=1e-4)
    assert running.explained_variance(constant, target, kind).item() == pytest.approx(0, abs=1e-6)
    assert running.explained_variance(target, target, kind).item() == pytest.approx(1, abs=1e-6)


def test_running_mean_goes_on_from_its_state() -> None:
    first, second = RunningMean(5, torch.device("cpu")), RunningMean(5, torch.device("cpu"))
    first.update(pair(1)[0])
    second.load_state_dict(first.state_dict())
    first.update(pair(2)[0])
    second.update(pair(2)[0])
    assert torch.equal(first.mean, second.mean)
    assert first.count == second.count
