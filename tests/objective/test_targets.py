import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler

from kdhiera.errors import UsageError
from kdhiera.objective.targets import ChannelMoments, normalise


def features() -> torch.Tensor:
    return torch.randn(3, 5, 4, 12, generator=torch.Generator().manual_seed(0)) * 3 + 1


def test_layer_norm_gives_every_token_mean_0_and_variance_1() -> None:
    raw = features().double().numpy()
    centred = raw - raw.mean(-1, keepdims=True)
    wanted = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    torch.testing.assert_close(normalise(features(), "layer_norm"), torch.tensor(wanted).float())


def test_standardize_is_sklearns_standard_scaler() -> None:
    raw = features()
    scaler = StandardScaler().fit(raw.reshape(-1, 12).numpy())
    moments = ChannelMoments(
        mean=torch.tensor(scaler.mean_), std=torch.tensor(scaler.scale_), count=60
    )
    wanted = scaler.transform(raw.reshape(-1, 12).numpy()).reshape(raw.shape)
    found = normalise(raw, "standardize", moments)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, torch.from_numpy(wanted), atol=1e-5, rtol=1e-5)


def test_a_channel_that_never_varies_stays_finite() -> None:
    raw = torch.full((2, 3), 5.0)
    moments = ChannelMoments(mean=torch.full((3,), 5.0), std=torch.zeros(3), count=2)
    assert normalise(raw, "standardize", moments).abs().max() == 0


def test_l2_keeps_the_direction() -> None:
    found = normalise(features(), "l2")
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3, 5, 4))
    assert torch.allclose(found * features().norm(dim=-1, keepdim=True), features(), atol=1e-5)


def test_none_is_the_feature_itself() -> None:
    assert torch.equal(normalise(features(), "none"), features())


@pytest.mark.parametrize("kind", ["standardize", "phi_s"])
def test_kinds_that_need_statistics_are_refused_without(kind: str) -> None:
    with pytest.raises(UsageError, match=rf"objective\.normalise={kind} needs statistics"):
        normalise(features(), kind)


def test_statistics_of_another_kind_are_not_taken() -> None:
    moments = ChannelMoments(mean=torch.zeros(12), std=torch.ones(12), count=60)
    with pytest.raises(UsageError, match=r"objective\.normalise=phi_s needs statistics"):
        normalise(features(), "phi_s", moments)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="layer_norm, standardize, phi_s, l2 or none"):
        normalise(features(), "whiten")
