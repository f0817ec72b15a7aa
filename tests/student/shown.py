"""Random clips and what a mask shows of them."""

import torch

from kdhiera.grid import Grid

GRID = Grid(num_frames=6, height=96, width=64)


def random_clips(grid: Grid, b: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (b, grid.num_frames, grid.height, grid.width, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def random_units(grid: Grid, b: int, k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(grid.num_units, generator=generator)[:k].sort()[0] for _ in range(b)]
    return torch.stack(rows)


def pixels_of(grid: Grid, clips: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    cubes = grid.frames_to_units(clips)
    return torch.stack([cube[row] for cube, row in zip(cubes, units, strict=True)])


def keep_mask(grid: Grid, units: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(units), grid.num_units, dtype=torch.bool).scatter(1, units, True)
