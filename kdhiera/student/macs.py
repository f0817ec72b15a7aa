"""What a forward pass of a student costs, to compare students at equal compute."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from kdhiera.config import StudentConfig
from kdhiera.grid import TUBELET_FRAMES, UNIT_PX, Grid
from kdhiera.masking import num_visible
from kdhiera.student.base import Student, set_fused_attention
from kdhiera.student.build import build_student


def visible_macs(config: StudentConfig, grid: Grid, ratio: float) -> int:
    """Multiply-accumulates of one clip's forward pass in pre-training.

    Counted by torch on a forward pass without values: convolutions, linear maps and both
    products of attention. Norms, softmax, GELU, sums, gathers and max pooling are not, nor are
    heads and decoders.

    Args:
        config: The student.
        grid: Clip geometry.
        ratio: Mask ratio, 0 <= ratio < 1; the same share of every slot is hidden.
    """
    k = grid.slots * num_visible(ratio, grid.units_per_slot)
    with torch.device("meta"):
        student = _student(config, grid)
        pixels = torch.empty(1, k, TUBELET_FRAMES, UNIT_PX, UNIT_PX, 3, dtype=torch.uint8)
        units = torch.arange(k)[None]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            student(pixels, units)
    return int(counter.get_total_flops()) // 2


def whole_macs(config: StudentConfig, grid: Grid) -> int:
    """Multiply-accumulates of a whole clip's forward pass; see `visible_macs`.

    Args:
        config: The student.
        grid: Clip geometry.
    """
    with torch.device("meta"):
        student = _student(config, grid)
        clip = torch.empty(1, grid.num_frames, grid.height, grid.width, 3, dtype=torch.uint8)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            student.dense(clip)
    return int(counter.get_total_flops()) // 2


def _student(config: StudentConfig, grid: Grid) -> Student:
    student = build_student(config, grid, seed=0).eval()
    set_fused_attention(student, False)  # the counter does not know every fused kernel
    return student
