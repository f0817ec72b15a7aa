"""Figure 4: stored bytes a clip view against dense fp16 of all tokens of the same layers.

Real clips and teachers, two views, masks at ratio 0.8. Bases are made from clips of another
shard than those that are stored, so that the error of `compact` is not that of its calibration.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.material import Taught, demo_config, make_cache, teach, write_part
from benchmarks.peers import folder_bytes, write_dense, write_theia
from benchmarks.report import publish
from kdhiera.cache.commit import Cache
from kdhiera.cache.encoding import ENCODINGS
from kdhiera.cache.reader import CacheReader
from kdhiera.cache.records import Commit
from kdhiera.config import RunConfig
from kdhiera.stages.assemble import columns_of

CLIPS, VIEWS = 128, 2
CALIBRATION = 64  # as `extract.calibration_rows`
PLANS = {"1 draw": "masks.draws=1", "2 draws": "masks.draws=2", "all units": "masks.keep=all"}


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What an encoding loses of a layer.

    Args:
        layer_norm: Energy of the difference after layer norm, as a share.
        variance: Energy of the difference as a share of the centred variance.
        cosine: Of the worst token.
    """

    layer_norm: float
    variance: float
    cosine: float


def run() -> None:
    """Write the same clips in every encoding and mask plan, and in two other layouts."""
    config = demo_config()
    calibration = teach(config, shard=-1, view=0, num_clips=CALIBRATION)
    views = [teach(config, shard=0, view=view, num_clips=CLIPS) for view in range(VIEWS)]
    num_clips = sum(len(view.rows) for view in views)
    dense = sum(2 * values.numel() for view in views for values in view.features.values())
    sizes: dict[str, dict[str, float]] = {}
    losses: dict[str, dict[str, float]] = {}
    for encoding in ENCODINGS:
        for plan, change in PLANS.items():
            found = demo_config(f"cache.encoding={encoding}", change, f"views.num={VIEWS}")
            with tempfile.TemporaryDirectory() as folder:
                cache = make_cache(Path(folder), found, calibration)
                for taught in views:
                    write_part(cache, found, "stored", taught)
                stored = _sizes(cache)
                if plan == "1 draw":
                    losses |= _describe(encoding, _losses(cache, found, views))
            kilobytes = {what: size / num_clips / 1000 for what, size in stored.items()}
            times = {"dense/targets": dense / stored["targets"]}
            sizes[f"{encoding}, {plan}"] = {**times, **kilobytes}
    for name, size in _others(views, config).items():
        kilobytes = {"targets": size / num_clips / 1000}
        sizes[name] = {"dense/targets": dense / size, **kilobytes}
    publish(
        "cache_size",
        {},
        {
            "clip views": num_clips,
            "dense fp16, kB a clip view": dense / num_clips / 1000,
            "int8, 1 draw: dense / targets": sizes["int8, 1 draw"]["dense/targets"],
            "int8: worst error after layer norm": losses["int8, worst"]["layer norm"],
            "compact, 1 draw: dense / targets": sizes["compact, 1 draw"]["dense/targets"],
            "compact: worst error after layer norm": losses["compact, worst"]["layer norm"],
        },
        {"kB a clip view": sizes, "what is lost": losses},
    )


def _sizes(cache: Cache) -> Counter[str]:
    """Stored bytes by what they are of; targets are codes and what decodes them."""
    sizes: Counter[str] = Counter()
    for part, commits in cache.commits().items():
        every: list[Commit] = [commits.base, *commits.columns.values()]
        for commit in every:
            for name, (size, _) in cache.read_record(commit)["files"].items():
                sizes[_kind(name)] += size
        sizes["records"] += sum(
            entry.num_bytes for entry in cache.store.walk(f"commits/{part.shard_id}/{part.view}")
        )
    return sizes


def _kind(name: str) -> str:
    path = name.split("/")
    if path[-1] == "zarr.json" or len(path) == 1 or path[-2] == "status":
        return "rows, metadata"
    return "targets" if path[0] == "targets.zarr" else path[-2]


def _losses(
    cache: Cache, config: RunConfig, views: Sequence[Taught]
) -> dict[tuple[str, str], Loss]:
    """What every column loses of its stored tokens."""
    columns = columns_of(config)
    reader = CacheReader(cache, num_views=len(views), columns=tuple(columns))
    numbers = np.arange(reader.num_samples)
    losses = {}
    for column, key in columns.items():
        before, after = [], []
        for taught in views:
            rows = reader.read(numbers, view=taught.view, columns=[column])
            units = torch.from_numpy(rows.units.astype(np.int64))
            arrays = {n: torch.from_numpy(a) for n, a in rows.columns[column].items()}
            kept = units >= 0
            after.append(reader.codec(column).decode(arrays, units)[kept].flatten(0, 1))
            every = torch.arange(len(units))[:, None]
            before.append(taught.features[key][every, units.clamp(min=0)][kept].flatten(0, 1))
        mean = torch.from_numpy(reader.statistics(column).mean)
        losses[key] = _loss(torch.cat(before), torch.cat(after), mean)
    return losses


def _loss(before: Tensor, after: Tensor, mean: Tensor) -> Loss:
    a, b = before.double(), after.double()
    ln_a, ln_b = (F.layer_norm(x, x.shape[-1:], eps=1e-6) for x in (a, b))
    return Loss(
        layer_norm=float((ln_a - ln_b).square().sum() / ln_a.square().sum()),
        variance=float((a - b).square().sum() / (a - mean).square().sum()),
        cosine=float(F.cosine_similarity(a, b, dim=-1).min()),
    )


def _describe(encoding: str, losses: Mapping[tuple[str, str], Loss]) -> dict[str, dict[str, float]]:
    """Every layer's losses and the worst of each."""
    rows = {f"{encoding}, {teacher}/{layer}": loss for (teacher, layer), loss in losses.items()}
    rows[f"{encoding}, worst"] = Loss(
        layer_norm=max(loss.layer_norm for loss in losses.values()),
        variance=max(loss.variance for loss in losses.values()),
        cosine=min(loss.cosine for loss in losses.values()),
    )
    return {
        name: {
            "layer norm": loss.layer_norm,
            "of variance": loss.variance,
            "worst cosine": loss.cosine,
        }
        for name, loss in rows.items()
    }


def _others(views: Sequence[Taught], config: RunConfig) -> dict[str, int]:
    """Bytes of the targets in other layouts."""
    sizes = {"Theia's tars": 0, "dense fp16 in Zarr": 0}
    for taught in views:
        with tempfile.TemporaryDirectory() as folder:
            theia, dense = Path(folder) / "theia", Path(folder) / "dense"
            write_theia(theia, taught, config.clip.grid, clips_a_shard=1000, by_slot=True)
            sizes["Theia's tars"] += folder_bytes(theia) - folder_bytes(theia / "frames")
            write_dense(dense, taught.features)
            sizes["dense fp16 in Zarr"] += folder_bytes(dense)
    return sizes
