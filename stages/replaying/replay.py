"""Stored rows made again from their videos, to see whether they come out the same.

chosen rows, part by part -> decode the recorded view -> teachers -> compare with what
is stored: pixels bit by bit, features within the bound of their encoding, scores closely
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from kdhiera.cache.arrays import read_rows
from kdhiera.cache.commit import Cache
from kdhiera.cache.encoding import error_bound
from kdhiera.cache.layout import PartId, column_group, parse_column
from kdhiera.cache.records import PartCommits
from kdhiera.cache.stats import from_npz
from kdhiera.cache.table import Row
from kdhiera.config import RunConfig
from kdhiera.data.clip import Clip, ClipRequest
from kdhiera.data.ordered import decode_samples
from kdhiera.data.patterns import expand
from kdhiera.data.sandbox import Sandbox
from kdhiera.data.shards import Sample, ShardIndex, read_sample
from kdhiera.devices import resolve_device
from kdhiera.errors import KdhieraError
from kdhiera.featurize import Featurized, Featurizer
from kdhiera.progress import Progress
from kdhiera.stages.assemble import decode_limits, featurizer_of
from kdhiera.stages.replaying.choose import Columns, ShardFinder, choose_rows
from kdhiera.views import RowStatus

ARITHMETIC = {"fp32": 1e-6, "bf16": 1e-2}  # share of the centred variance that kernels may move
SCORES = {"fp32": 1e-3, "bf16": 2e-2}  # the same of a slot's scores, which sum to 1


class NoSourceError(KdhieraError):
    """None of the shards that a cache was made from can be read."""


@dataclass(frozen=True, kw_only=True)
class ColumnReplay:
    """How one column came out.

    Args:
        column: Column id.
        rows: Rows compared.
        worst_cosine: Lowest cosine of a stored token and the one made again.
        error: Energy of the difference as a share of the centred variance.
        bound: What its encoding and the arithmetic may lose.
    """

    column: str
    rows: int
    worst_cosine: float
    error: float
    bound: float


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """How some rows came out.

    Args:
        rows: Rows that were made again.
        parts: Parts that they are of.
        pixels_equal: Rows whose clip, and the pixels that are stored of it, came out equal.
        unequal: The first of the others, in words.
        columns: What became of the features of rows whose clip came out equal.
        scores_rows: Of these, rows whose scores were compared.
        scores_error: Largest share of a slot's scores that lies elsewhere now.
        scores_bound: What the arithmetic may move of them.
    """

    rows: int
    parts: int
    pixels_equal: int
    unequal: tuple[str, ...]
    columns: tuple[ColumnReplay, ...]
    scores_rows: int
    scores_error: float
    scores_bound: float

    @property
    def beyond(self) -> tuple[str, ...]:
        """What came out differently, in words; empty if nothing did.

        Features may differ by their encoding's error and by what another order of summation
        does: far less than either is a change that matters.
        """
        problems = []
        if self.pixels_equal < self.rows:
            first = f" ({self.unequal[0]})" if self.unequal else ""
            problems.append(f"pixels are equal in {self.pixels_equal} of {self.rows} rows{first}")
        problems += [
            f"{c.column} differs by {c.error:.2e} of its variance (bound {c.bound:.0e})"
            for c in self.columns
            if not c.error <= c.bound
        ]
        if self.scores_rows and not self.scores_error <= self.scores_bound:
            problems.append(
                f"scores differ by {self.scores_error:.2e} (bound {self.scores_bound:.0e})"
            )
        return tuple(problems)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"beyond": list(self.beyond)}

    def describe(self) -> str:
        """For people, in one line."""
        said = [f"pixels equal in {self.pixels_equal} of {self.rows} rows"]
        said += [
            f"{c.column}: worst cosine {c.worst_cosine:.6f}, error {c.error:.2e} of the variance"
            for c in self.columns
        ]
        return "; ".join(said)


@dataclass(kw_only=True)
class _Tally:
    """What is added up while rows are compared."""

    columns: dict[str, list[tuple[float, float, float]]]
    scores: list[float] = field(default_factory=list)
    rows: int = 0
    equal: int = 0
    unequal: list[str] = field(default_factory=list)


def replay_rows(
    config: RunConfig,
    cache: Cache,
    *,
    num_rows: int,
    columns: Columns,
    progress: Progress | None = None,
) -> Replayed:
    """Decode good rows again by their recorded views and run the teachers again.

    Every column is compared on `num_rows` rows, as far as there are so many that are good in
    it and whose shards can be read: the same rows for columns that the same parts have.

    Args:
        config: The run; precisions are what the columns were made with.
        cache: Its cache.
        num_rows: Rows, spread evenly over shards and views.
        columns: Columns to compare, with what makes them.
        progress: Where progress is shown.

    Raises:
        NoSourceError: If the shard of no committed part is among `data.shards` or where it lay.
        DamagedError: If a file of a chosen row is missing or damaged.
    """
    commits = {p: c for p, c in cache.commits().items() if c.base.array_rows}
    lay = dict.fromkeys(part.base.source.path for part in commits.values())
    shards = ShardFinder([*expand(config.data.shards), *lay])
    chosen = choose_rows(cache, commits, shards, columns, num_rows)
    if not chosen:
        raise NoSourceError(
            f"no row of the cache in {cache.url} can be made again: none of its shards is in "
            "data.shards, or where it lay; add one"
        )
    bar = progress.start("recompute", sum(map(len, chosen.values())), "rows") if progress else 0
    found = {part: shard for part in chosen if (shard := shards.find(part.shard_id))}
    replayed = replay_chosen(
        config,
        cache,
        chosen={part: (commits[part], found[part], wanted) for part, wanted in chosen.items()},
        columns=columns,
        on_rows=lambda rows: progress.advance(bar, rows) if progress else None,
    )
    if progress:
        progress.finish(bar)
    return replayed


Chosen = Mapping[PartId, tuple[PartCommits, ShardIndex, Mapping[str | None, Sequence[int]]]]
"""Of every part its commits, its shard, and array rows by column; None is the base."""


def replay_chosen(
    config: RunConfig,
    cache: Cache,
    *,
    chosen: Chosen,
    columns: Columns,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Replayed:
    """The same for rows that are named.

    Args:
        config: The run; precisions are what the columns were made with.
        cache: Its cache.
        chosen: Good rows.
        columns: What makes the columns among them.
        on_rows: Told how many rows were done.

    Raises:
        DamagedError: If a file of a chosen row is missing or damaged.
    """
    device = resolve_device(config.extract.device)
    replay = _Replay(
        config=config,
        cache=cache,
        columns=columns,
        featurizer=featurizer_of(config, device=device, plan=cache.mask_plan),
        tally=_Tally(columns={column: [] for column in columns}),
    )
    children = config.decode.num_children or config.extract.cpus_per_actor
    with Sandbox(decode_limits(config.decode), num_children=children) as sandbox:
        for commits, shard, wanted in chosen.values():
            for done in replay.part(sandbox, commits, shard, wanted):
                on_rows(done)
    return replay.result(num_parts=len(chosen))


@dataclass(frozen=True, kw_only=True)
class _Replay:
    """What all parts share."""

    config: RunConfig
    cache: Cache
    columns: Columns
    featurizer: Featurizer
    tally: _Tally

    def part(
        self,
        sandbox: Sandbox,
        commits: PartCommits,
        shard: ShardIndex,
        wanted: Mapping[str | None, Sequence[int]],
    ) -> Iterator[int]:
        """Compare rows of one part, a batch at a time; yields how many rows were done."""
        base = commits.base
        self.cache.check_files(base, *(commits.columns[c] for c in wanted if c is not None))
        good = [row for row in self.cache.rows(base) if row.status is RowStatus.OK]
        numbers = sorted({number for rows in wanted.values() for number in rows})
        batch_size = self.config.extract.batch_size
        for start in range(0, len(numbers), batch_size):
            batch = numbers[start : start + batch_size]
            clips = self._decode(sandbox, base.part, shard, [good[number] for number in batch])
            same = [i for i, clip in enumerate(clips) if clip is not None]
            self.tally.rows += len(batch)
            if same:
                rows = np.array([batch[i] for i in same])
                frames = np.stack([clip.frames for clip in clips if clip is not None])
                uids = [good[row].uid for row in rows]
                self._compare(commits, wanted, rows, uids, frames)
            yield len(batch)

    def result(self, *, num_parts: int) -> Replayed:
        """What it came to."""
        tally = self.tally
        scorer = self.config.teachers[self.config.scores.teacher].precision
        return Replayed(
            rows=tally.rows,
            parts=num_parts,
            pixels_equal=tally.equal,
            unequal=tuple(tally.unequal),
            columns=tuple(
                ColumnReplay(
                    column=column,
                    rows=len(found),
                    worst_cosine=min(f[0] for f in found),
                    error=sum(f[1] for f in found) / max(sum(f[2] for f in found), 1e-30),
                    bound=self._bound(column),
                )
                for column, found in tally.columns.items()
                if found
            ),
            scores_rows=len(tally.scores),
            scores_error=max(tally.scores, default=0.0),
            scores_bound=SCORES[scorer],
        )

    def _bound(self, column: str) -> float:
        identity = self.cache.columns.identity(column) or {}
        error = float(identity.get("compact_error", self.config.cache.compact_error))
        precision = self.config.teachers[self.columns[column][0]].precision
        return error_bound(parse_column(column).encoding, error=error) + ARITHMETIC[precision]

    def _decode(
        self, sandbox: Sandbox, part: PartId, shard: ShardIndex, rows: Sequence[Row]
    ) -> list[Clip | None]:
        """Clips of rows, each exactly as recorded; None for one that came out differently."""
        ordinals = {shard.uid(sample): sample.ordinal for sample in shard.samples}
        wanted = (
            (
                self._sample(shard, ordinals[row.uid]),
                ClipRequest(
                    uid=row.uid,
                    view=part.view,
                    policy=self.config.view_policy,
                    replay=row.view,
                    replay_decoder=row.decoder,
                ),
            )
            for row in rows
        )
        clips: list[Clip | None] = []
        decoded = decode_samples(sandbox, wanted, in_flight=len(rows))
        for row, (_, outcome) in zip(rows, decoded, strict=True):
            same = isinstance(outcome, Clip) and outcome.crc32c == row.clip_crc32c
            clips.append(outcome if isinstance(outcome, Clip) and same else None)
            if not same:
                why = "other frames" if isinstance(outcome, Clip) else outcome.message
                self.tally.unequal.append(f"{row.uid} view {part.view}: {why}")
        return clips

    def _sample(self, shard: ShardIndex, ordinal: int) -> Sample:
        return read_sample(
            shard,
            ordinal,
            video_extensions=self.config.data.video_extensions,
            max_video_bytes=self.config.decode.max_video_bytes,
        )

    def _compare(
        self,
        commits: PartCommits,
        wanted: Mapping[str | None, Sequence[int]],
        rows: np.ndarray,
        uids: Sequence[str],
        frames: np.ndarray,
    ) -> None:
        base = commits.base
        units = read_rows(self.cache, base, "base.zarr/units", rows)
        layers: dict[str, list[str]] = defaultdict(list)
        for teacher, layer in {self.columns[c] for c in wanted if c is not None}:
            layers[teacher].append(layer)
        out = self.featurizer(
            frames, uids=uids, view=base.part.view, layers=layers, units=units, rescore=True
        )
        self._compare_base(commits, rows, uids, out, own=set(wanted.get(None, ())))
        for column, numbers in wanted.items():
            mine = np.flatnonzero(np.isin(rows, list(numbers)))
            if column is not None and len(mine):
                self.tally.columns[column] += self._compare_column(
                    commits, column, rows[mine], units[mine], out, mine
                )

    def _compare_base(
        self,
        commits: PartCommits,
        rows: np.ndarray,
        uids: Sequence[str],
        out: Featurized,
        *,
        own: set[int],
    ) -> None:
        base = commits.base
        pixels = read_rows(self.cache, base, "base.zarr/pixels", rows)
        scores = read_rows(self.cache, base, "base.zarr/scores", rows)
        for i, row in enumerate(rows):
            equal = np.array_equal(pixels[i], out.pixels[i])
            self.tally.equal += equal
            if not equal:
                self.tally.unequal.append(f"{uids[i]} view {base.part.view}: other stored pixels")
            if int(row) in own and np.isfinite(out.scores[i]).all():
                moved = 0.5 * np.abs(scores[i].astype(np.float64) - out.scores[i]).sum(-1)
                self.tally.scores.append(float(moved.max()))

    def _compare_column(
        self,
        commits: PartCommits,
        column: str,
        rows: np.ndarray,
        units: np.ndarray,
        out: Featurized,
        places: np.ndarray,
    ) -> Iterator[tuple[float, float, float]]:
        """Worst cosine, energy of the difference and centred energy of a column's rows."""
        commit = commits.columns[column]
        codec = self.cache.columns.codec(column, commit.width)
        group = column_group(column)
        arrays = {
            name: torch.from_numpy(read_rows(self.cache, commit, f"{group}/{name}", rows))
            for name in codec.specs(self.cache.max_kept)
        }
        numbers = torch.from_numpy(units.astype(np.int64))
        stored = codec.decode(arrays, numbers).double()
        made = out.features[self.columns[column]].cpu()[torch.from_numpy(places)].double()
        statistics = from_npz(self.cache.read_file(commit, "stats.npz"), column)
        mean = torch.from_numpy(statistics.mean)
        for before, now, kept in zip(stored, made, numbers >= 0, strict=True):
            cosine = torch.nn.functional.cosine_similarity(before[kept], now[kept], dim=-1)
            equal = (before[kept] == now[kept]).all(-1)  # zeros have no direction
            cosine = torch.where(equal, torch.ones_like(cosine), cosine).min()
            lost, energy = (before - now)[kept].square().sum(), (now - mean)[kept].square().sum()
            yield float(cosine), float(lost), float(energy)
