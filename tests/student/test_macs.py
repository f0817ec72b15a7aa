"""Equal compute: torch's count against formulas, and the two kinds against one another."""

import pytest

from kdhiera.config import StudentConfig
from kdhiera.grid import Grid
from kdhiera.student import vit
from kdhiera.student.macs import visible_macs, whole_macs

DEMO = Grid(num_frames=8, height=128, width=128)
FULL = Grid(num_frames=16, height=224, width=224)
GRIDS = {size: DEMO if size == "nano" else FULL for size in vit.SIZES}


def student(kind: str, size: str) -> StudentConfig:
    return StudentConfig.model_validate({"kind": kind, "size": size})


@pytest.mark.parametrize("size", GRIDS)
def test_a_vit_costs_what_the_hiera_of_its_name_costs(size: str) -> None:
    grid, ours, theirs = GRIDS[size], student("vit", size), student("hiera", size)
    assert abs(visible_macs(ours, grid, 0.8) / visible_macs(theirs, grid, 0.8) - 1) < 0.05
    assert abs(whole_macs(ours, grid) / whole_macs(theirs, grid) - 1) < 0.05


def vit_macs(size: str, tokens: int) -> int:
    """Patches, then per block q, k, v, projection and MLP (12 w^2), and n x n attention twice."""
    w, depth = vit.SIZES[size]["width"], vit.SIZES[size]["depth"]
    return tokens * 2 * 16 * 16 * 3 * w + depth * (12 * tokens * w**2 + 2 * tokens**2 * w)


@pytest.mark.parametrize("size", ["nano", "base"])
def test_a_vit_costs_what_the_formula_says(size: str) -> None:
    grid, config = GRIDS[size], student("vit", size)
    k = {"nano": 4 * 3, "base": 8 * 10}[size]  # a fifth of 16 and of 49 units in every slot
    assert visible_macs(config, grid, 0.8) == vit_macs(size, 4 * k)
    assert whole_macs(config, grid) == vit_macs(size, 4 * grid.num_units)


def hiera_nano_macs(units: int) -> int:
    """Block by block at `q_pool=2`, of 64, 16, 4 and 4 tokens a unit and widths 32 to 256.

    Attention stays within a unit in backbone stages 1 and 2 and the first block of 3. Where the
    width doubles, q, k and v come from the finer tokens, queries are pooled after that (not at
    stage 4), and a projection of the skip connection comes on top.
    """

    def block(n: int, n_out: int, keys: int, w: int, w_out: int) -> int:
        """`n` tokens in, `n_out` out, each attending to `keys`."""
        skip = n * w * w_out if w != w_out else 0
        qkv, proj, mlp = n * w * 3 * w_out, n_out * w_out**2, n_out * 8 * w_out**2
        return skip + qkv + 2 * n_out * keys * w_out + proj + mlp

    a, b, c = 64 * units, 16 * units, 4 * units
    total = a * 3 * 3 * 7 * 7 * 32
    total += block(a, a, 64, 32, 32)
    total += block(a, b, 64, 32, 64)
    total += block(b, c, 16, 64, 128)
    total += 4 * block(c, c, c, 128, 128)
    total += block(c, c, c, 128, 256)
    return total + block(c, c, c, 256, 256)


def test_a_hiera_costs_what_its_blocks_add_up_to() -> None:
    config = student("hiera", "nano")
    assert visible_macs(config, DEMO, 0.8) == hiera_nano_macs(12)
    assert whole_macs(config, DEMO) == hiera_nano_macs(64)
