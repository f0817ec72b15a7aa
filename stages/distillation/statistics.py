"""Statistics of cached features that targets are normalised with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from kdhiera.cache.encoding import Codec
from kdhiera.cache.reader import CacheReader
from kdhiera.config import ObjectiveConfig
from kdhiera.errors import UsageError
from kdhiera.objective.phi_s import Scatter, phi_s_matrix
from kdhiera.objective.targets import ChannelMoments, PhiS, Statistics

_ROWS = 32  # read at once


def statistics_of(
    reader: CacheReader,
    columns: Mapping[tuple[str, str], str],
    objective: ObjectiveConfig,
    device: torch.device,
) -> dict[tuple[str, str], Statistics]:
    """What `objective.normalise` needs to know of every column; nothing for most kinds.

    Args:
        reader: Of the run's columns.
        columns: Column ids by (teacher, layer).
        objective: Says how targets are normalised.
        device: Where they will be.
    """
    if objective.normalise == "standardize":
        return {key: _channel_moments(reader, column, device) for key, column in columns.items()}
    if objective.normalise == "phi_s":
        return {
            key: _phi_s(reader, column, objective.calibration_rows, device)
            for key, column in columns.items()
        }
    return {}


def _channel_moments(reader: CacheReader, column: str, device: torch.device) -> ChannelMoments:
    """Over all tokens of all parts, as extraction saw them."""
    found = reader.statistics(column)
    return ChannelMoments(
        mean=torch.tensor(found.mean, device=device),
        std=torch.tensor(found.std, device=device),
        count=found.count,
    )


def _phi_s(reader: CacheReader, column: str, num_rows: int, device: torch.device) -> PhiS:
    """From the kept units of clips spread evenly over the cache, views in turn."""
    codec: Codec = reader.codec(column).to(device)
    scatter = Scatter(reader.width(column), device)
    for samples, view in calibration_reads(reader.num_samples, reader.num_views, num_rows):
        rows = reader.read(samples, view=view, columns=(column,))
        units = torch.from_numpy(rows.units.astype(np.int64)).to(device)
        arrays = {n: torch.from_numpy(a).to(device) for n, a in rows.columns[column].items()}
        scatter.update(codec.decode(arrays, units)[units >= 0])
    if scatter.count < 2:
        raise UsageError(
            f"objective.normalise=phi_s needs features of column {column} to turn, and the cache "
            "keeps fewer than two: choose layer_norm"
        )
    return PhiS(
        mean=torch.from_numpy(scatter.mean).to(device),
        matrix=torch.from_numpy(phi_s_matrix(scatter.covariance)).to(device),
        count=scatter.count,
    )


def calibration_reads(
    num_samples: int, num_views: int, num_rows: int
) -> list[tuple[np.ndarray, int]]:
    """Which samples are read in which view, some at a time.

    Args:
        num_samples: Samples of the cache.
        num_views: Views that the clips are taken from in turn.
        num_rows: Clips wanted; each sample gives one at most.
    """
    chosen = np.unique(np.linspace(0, num_samples - 1, min(num_rows, num_samples)).round())
    numbers = chosen.astype(np.int64)
    return [
        (numbers[view::num_views][start : start + _ROWS], view)
        for view in range(num_views)
        for start in range(0, len(numbers[view::num_views]), _ROWS)
    ]
