import math

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score

from kdhiera.errors import UsageError
from kdhiera.objective.losses import RunningMean, cosine, loss, total
from kdhiera.objective.targets import TargetSpec


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
        if kind == "cosine":
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            terms.append(2 - 2 * dot / math.hypot(*a) / math.hypot(*b))
            continue
        for x, y in zip(a, b, strict=True):
            d = abs(x - y)
            if kind == "mse":
                terms.append(d * d)
            else:
                terms.append(d * d / (2 * beta) if d < beta else d - beta / 2)
    return sum(terms) / len(terms)


@pytest.mark.parametrize("kind", ["smooth_l1", "mse", "cosine"])
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


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(UsageError, match="smooth_l1, mse or cosine"):
        loss(*pair(), "huber")


def test_total_is_the_weighted_sum_of_teachers_means() -> None:
    def target(teacher: str, layer: str, weight: float) -> TargetSpec:
        return TargetSpec(
            teacher=teacher, layer=layer, tap="stage4.end", column=f"{teacher}-{layer}", width=5,
            weight=weight, decode=lambda arrays: arrays["codes"],
        )  # fmt: skip

    targets = [target("image", "6", 0.5), target("video", "3", 2.0), target("image", "12", 0.5)]
    losses = {
        "image/6": torch.tensor(1.0),
        "image/12": torch.tensor(3.0),
        "video/3": torch.tensor(7.0),
    }
    assert total(losses, targets).item() == 0.5 * 2.0 + 2.0 * 7.0


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


@pytest.mark.parametrize("kind", ["smooth_l1", "mse", "cosine"])
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
