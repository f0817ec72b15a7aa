import torch
from timm.layers.drop import DropPath
from torch import nn

from kdhiera.seeding import seeded
from kdhiera.student.drop_path import GivenDropPath, give_drop_paths, given

CPU = torch.device("cpu")


def two_paths() -> nn.Sequential:
    return nn.Sequential(DropPath(0.3), nn.Identity(), nn.Sequential(DropPath(0.6)))


def test_it_draws_what_timm_draws_at_once_or_ahead() -> None:
    theirs, ours = two_paths(), two_paths()
    paths = give_drop_paths(ours)
    assert [path.rate for path in paths] == [0.3, 0.6]
    assert give_drop_paths(ours) == paths
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(64, 5, 7).to(dtype)
        with seeded("a", device=CPU):
            wanted = theirs(x)
        with seeded("a", device=CPU):
            assert torch.equal(ours(x), wanted)
        with seeded("a", device=CPU):
            factors = [path.draw(64, CPU) for path in paths]
        with given(paths, factors):
            assert torch.equal(ours(x), wanted)
        with given(paths, [each[24:40] for each in factors]):
            assert torch.equal(ours(x[24:40]), wanted[24:40])
        assert all(path.given is None for path in paths)


def test_evaluation_drops_nothing_and_a_rate_of_one_everything() -> None:
    x = torch.randn(8, 3, 2)
    assert torch.equal(GivenDropPath(0.9).eval()(x), x)
    assert not GivenDropPath(1.0)(x).any()
