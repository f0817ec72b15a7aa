r"""What the covariance of PHI-S should be of: variances of the targets that training is shown.

Needs the features of all units of some clips:

    kdhiera extract-teachers configs/demo.yaml cache.dir=caches/all-units cache.encoding=fp16 \
        masks.keep=all views.num=1
    python -m benchmarks.phi_s caches/all-units
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from kdhiera.cache.commit import Cache
from kdhiera.cache.reader import CacheReader
from kdhiera.config import RunConfig, load
from kdhiera.masking import draw_mask
from kdhiera.objective.phi_s import Scatter, phi_s_matrix
from kdhiera.stages.assemble import columns_of

CPU = torch.device("cpu")
ROWS = 32


def scatter_of(
    reader: CacheReader, samples: np.ndarray, column: str, config: RunConfig, draws: int
) -> Scatter:
    """Of the units that some draws of the config's mask show; all units for no draws."""
    scatter = Scatter(reader.width(column), CPU)
    for start in range(0, len(samples), ROWS):
        rows = reader.read(samples[start : start + ROWS], view=0, columns=(column,))
        units = torch.from_numpy(rows.units.astype(np.int64))
        arrays = {name: torch.from_numpy(array) for name, array in rows.columns[column].items()}
        features = reader.codec(column).decode(arrays, units)
        for clip, uid, scores in zip(features, rows.uids, rows.scores, strict=True):
            shown = [
                draw_mask(config.mask_schedule.widest, scores, uid=uid, view=0, draw=draw)
                for draw in range(draws)
            ]
            scatter.update(clip[np.unique(np.concatenate(shown))] if shown else clip)
    return scatter


def corrected(kept: np.ndarray, all_units: np.ndarray) -> np.ndarray:
    """Correlations of the kept units under the variances of all."""
    factor = np.sqrt(np.diagonal(all_units) / np.diagonal(kept))
    scaled: np.ndarray = kept * np.outer(factor, factor)
    return scaled


def main() -> None:
    """Print mean and deviation, over dimensions, of the variance of the shown targets."""
    config = load("configs/demo.yaml")
    wide = load("configs/demo.yaml", ["cache.encoding=fp16"])
    columns = tuple(columns_of(wide))
    reader = CacheReader(Cache.open(sys.argv[1]), num_views=1, columns=columns)
    count = reader.num_samples
    every = np.arange(count)
    print(f"{count} clips; mean and deviation of the variances of what one draw shows\n")
    print("| column | covariance of | 64 clips | 256 clips |\n|---|---|---|---|")
    for column in columns:
        shown = scatter_of(reader, every, column, config, 1).covariance
        everything = scatter_of(reader, every, column, config, 0).covariance
        ways: dict[str, list[np.ndarray]] = {}
        for size in (64, 256):
            spread = np.linspace(0, count - 1, size).round().astype(np.int64)
            kept = scatter_of(reader, spread, column, config, config.mask_schedule.draws).covariance
            first = scatter_of(
                reader, every[:size], column, config, config.mask_schedule.draws
            ).covariance
            ways.setdefault("kept units of the first clips", []).append(first)
            ways.setdefault("kept units of clips spread evenly", []).append(kept)
            ways.setdefault("the same, variances of all tokens", []).append(
                corrected(kept, everything)
            )
        ways["all tokens of all clips"] = [everything]
        for name, covariances in ways.items():
            cells = []
            for covariance in covariances:
                matrix = phi_s_matrix(covariance)
                variances = np.diagonal(matrix @ shown @ matrix.T)
                cells.append(f"{variances.mean():.3f} +- {variances.std():.3f}")
            print(f"| {column} | {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
