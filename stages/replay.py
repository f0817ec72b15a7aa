"""Stored rows made again from their videos, to see whether they come out the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kdhiera.cache.arrays import read_array
from kdhiera.cache.commit import Cache
from kdhiera.cache.encoding import error_bound
from kdhiera.cache.layout import PartId, column_group, parse_column
from kdhiera.cache.reader import read_base
from kdhiera.cache.records import PartCommits
from kdhiera.cache.stats import from_npz
from kdhiera.cache.table import Row
from kdhiera.config import RunConfig
from kdhiera.data.clip import Clip, ClipRequest
from kdhiera.data.patterns import expand
from kdhiera.data.sandbox import Sandbox
from kdhiera.data.shards import ShardIndex, read_sample, try_index_shards
from kdhiera.devices import resolve_device
from kdhiera.errors import KdhieraError
from kdhiera.featurize import Featurizer
from kdhiera.stages.assemble import columns_of, decode_limits, featurizer_of
from kdhiera.views import RowStatus

ARITHMETIC = {"fp32": 1e-6, "bf16": 1e-2}  # share of the centred variance that kernels may move


@dataclass(frozen=True, kw_only=True)
class ColumnReplay:
    """How one column came out.

    Args:
        column: Column id.
        rows: Rows compared.
        worst_cosine: Lowest cosine of a stored token and the one made again.
        error: Energy of the difference as a share of the centred variance.
    """

    column: str
    rows: int
    worst_cosine: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """How some rows came out.

    Args:
        rows: Rows that were made again.
        pixels_equal: Those whose pixels are what is stored.
        columns: What became of the features of the equal ones.
    """

    rows: int
    pixels_equal: int
    columns: tuple[ColumnReplay, ...]

    def describe(self) -> str:
        """For people."""
        lines = [f"pixels equal in {self.pixels_equal} of {self.rows} rows"]
        lines += [
            f"{c.column}: worst cosine {c.worst_cosine:.6f}, error {c.error:.2e} of the variance"
            for c in self.columns
        ]
        return "; ".join(lines)


def replay_rows(
    config: RunConfig, cache: Cache, *, num_rows: int, columns: Sequence[str]
) -> Replayed:
    """Decode good rows again by their recorded views and run the teachers again.

    Args:
        config: The run; precisions are resolved.
        cache: Its cache.
        num_rows: Rows, spread evenly over the committed parts whose shards can be read.
        columns: Committed columns of the config to compare.

    Raises:
        KdhieraError: If the shard of no committed part is among `data.shards`.
    """
    indices = try_index_shards(expand(config.data.shards))
    shards = {s.shard_id: s for s in indices if isinstance(s, ShardIndex)}
    parts = [
        (part, commits)
        for part, commits in cache.commits().items()
        if part.shard_id in shards and commits.base.array_rows
    ]
    if not parts:
        raise KdhieraError(
            f"no row of the cache in {cache.url} can be made again: none of its shards is in "
            "data.shards; add one, or set extract.probe_rows=0 to go on without a comparison"
        )
    chosen = [parts[i * len(parts) // num_rows] for i in range(num_rows)]
    device = resolve_device(config.extract.device)
    featurizer = featurizer_of(config, device=device, plan=cache.mask_plan)
    equal = 0
    lost: dict[str, list[tuple[float, float, float]]] = {c: [] for c in columns}
    with Sandbox(decode_limits(config.decode), num_children=1) as sandbox:
        for number, (part, commits) in enumerate(chosen):
            good = number * 7919 % commits.base.array_rows
            stored = read_base(cache, commits.base)
            row = [r for r in stored.rows if r.status is RowStatus.OK][good]
            clip = _decode(config, sandbox, shards[part.shard_id], part, row)
            if clip is None or clip.crc32c != row.clip_crc32c:
                continue
            equal += 1
            units = stored.units[good : good + 1]
            for column, found in _compare(config, cache, featurizer, commits, clip, units, good):
                if column in lost:
                    lost[column].append(found)
    return Replayed(
        rows=len(chosen),
        pixels_equal=equal,
        columns=tuple(
            ColumnReplay(
                column=column,
                rows=len(found),
                worst_cosine=min(f[0] for f in found),
                error=sum(f[1] for f in found) / max(sum(f[2] for f in found), 1e-30),
            )
            for column, found in lost.items()
            if found
        ),
    )


def beyond_bounds(config: RunConfig, replayed: Replayed) -> tuple[str, ...]:
    """What came out differently, in words; empty if nothing did.

    Features may differ by their encoding's error and by what another order of summation
    does: far less than either is a change that matters.
    """
    problems = []
    if replayed.pixels_equal < replayed.rows:
        problems.append(f"pixels are equal in {replayed.pixels_equal} of {replayed.rows} rows")
    for column in replayed.columns:
        name = parse_column(column.column)
        encoded = error_bound(name.encoding, error=config.cache.compact_error)
        bound = encoded + ARITHMETIC[config.teachers[name.teacher].precision]
        if not column.error <= bound:
            problems.append(
                f"{column.column} differs by {column.error:.2e} of its variance (bound {bound:.0e})"
            )
    return tuple(problems)


def _decode(
    config: RunConfig, sandbox: Sandbox, shard: ShardIndex, part: PartId, row: Row
) -> Clip | None:
    ordinal = next(s.ordinal for s in shard.samples if shard.uid(s) == row.uid)
    sample = read_sample(
        shard,
        ordinal,
        video_extensions=config.data.video_extensions,
        max_video_bytes=config.decode.max_video_bytes,
    )
    if sample.video is None:
        return None
    request = ClipRequest(
        uid=row.uid,
        view=part.view,
        policy=config.view_policy,
        replay=row.view,
        replay_decoder=row.decoder,
    )
    outcome = sandbox.submit(sample.video, request).result()
    return outcome if isinstance(outcome, Clip) else None


def _compare(
    config: RunConfig,
    cache: Cache,
    featurizer: Featurizer,
    commits: PartCommits,
    clip: Clip,
    units: np.ndarray,
    row: int,
) -> Iterator[tuple[str, tuple[float, float, float]]]:
    """Worst cosine, energy of the difference and centred energy of every column of a row."""
    there = {c: key for c, key in columns_of(config).items() if c in commits.columns}
    layers: dict[str, list[str]] = {}
    for teacher, layer in there.values():
        layers.setdefault(teacher, []).append(layer)
    part = commits.base.part
    out = featurizer(clip.frames[None], uids=[""], view=part.view, layers=layers, units=units)
    numbers = torch.from_numpy(units.astype(np.int64))
    kept = numbers[0] >= 0
    for column, key in there.items():
        commit = commits.columns[column]
        codec = cache.columns.codec(column, commit.width)
        group = column_group(column)
        arrays = {
            name: torch.from_numpy(read_array(cache, commit, f"{group}/{name}")[row : row + 1])
            for name in codec.specs(cache.max_kept)
        }
        before = codec.decode(arrays, numbers)[0, kept].double()
        now = out.features[key].cpu()[0, kept].double()
        statistics = from_npz(cache.read_file(commit, "stats.npz"), column)
        mean = torch.from_numpy(statistics.mean)
        cosine = torch.nn.functional.cosine_similarity(before, now, dim=-1).min()
        yield (
            column,
            (
                float(cosine),
                float((before - now).square().sum()),
                float((now - mean).square().sum()),
            ),
        )
