"""Where training reads clips: a cache that fits the config, or live teachers."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from kdhiera.addresses import expand_braces
from kdhiera.cache.commit import Cache
from kdhiera.cache.encoding import Codec, make_codec
from kdhiera.cache.expected import expected_shards
from kdhiera.cache.fingerprint import declared_base, declared_column, fingerprint
from kdhiera.cache.layout import column_id
from kdhiera.cache.reader import CacheReader
from kdhiera.cache.rows import KeptRows
from kdhiera.cache.snapshot import Snapshot, load_snapshot
from kdhiera.config import RunConfig
from kdhiera.data.patterns import expand
from kdhiera.data.sandbox import Sandbox
from kdhiera.data.shards import index_shards
from kdhiera.devices import resolve_device
from kdhiera.errors import UsageError
from kdhiera.objective.targets import NEEDS_STATISTICS, Statistics
from kdhiera.stages.assemble import decode_limits, featurizer_of
from kdhiera.stages.distillation.statistics import statistics_of
from kdhiera.teachers.build import warn_of_scores
from kdhiera.training.batches import ClipSource
from kdhiera.training.live import LIVE_ENCODING, LiveSource
from kdhiera.training.loop import CHECKPOINTS
from kdhiera.training.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A source of clips and what the targets need to know of it.

    Args:
        source: Where kept units are read.
        coverage: What it holds, in words.
        snapshot: Hash of `commits`, or of what a live run reads.
        commits: What it reads of a cache; None for live teachers.
        encoding: Of its columns.
        widths: Channels by (teacher, layer).
        codecs: How features are stored, by (teacher, layer), on the training device.
        statistics: By (teacher, layer), where `objective.normalise` needs them.
    """

    source: ClipSource
    coverage: str
    snapshot: str
    commits: Snapshot | None
    encoding: str
    widths: Mapping[tuple[str, str], int]
    codecs: Mapping[tuple[str, str], Codec]
    statistics: Mapping[tuple[str, str], Statistics]


@dataclass(frozen=True, kw_only=True)
class _Cached:
    """A `ClipSource` over a cache."""

    reader: CacheReader

    @property
    def num_samples(self) -> int:
        """Trainable samples."""
        return self.reader.num_samples

    def read(self, samples: Int[np.ndarray, " b"], *, view: int) -> KeptRows:
        """Rows of the cache."""
        return self.reader.read(samples, view=view)


@contextlib.contextmanager
def open_source(
    config: RunConfig, snapshot: Snapshot | None, ranks: Ranks = ALONE
) -> Iterator[Opened]:
    """What the config trains from: its cache, or live teachers until the block ends.

    Args:
        config: The run.
        snapshot: What a run that goes on began with; see `open_cache`.
        ranks: Who trains together: with live teachers each has its own, and a share of the
            clips to try at the start.

    Raises:
        UsageError: If there is no cache, or the objective needs one and the mode is live.
        MismatchError: As `open_cache` does.
    """
    if config.cache.mode == "cached":
        yield open_cache(config, snapshot=snapshot)
        return
    check_live(config)
    layers = config.objective_layers
    device = resolve_device(config.train.device)
    with Sandbox(
        decode_limits(config.decode),
        num_children=config.decode.num_children or config.extract.cpus_per_actor,
    ) as sandbox:
        shards = index_shards(expand(config.data.shards))
        featurizer = featurizer_of(config, device=device)
        warn_of_scores(config, featurizer.teachers)
        source = LiveSource(
            shards,
            video_extensions=config.data.video_extensions,
            max_video_bytes=config.decode.max_video_bytes,
            policy=config.view_policy,
            num_views=config.views.num,
            sandbox=sandbox,
            featurizer=featurizer,
            layers=layers,
            ranks=ranks,
        )
        yield Opened(
            source=source,
            coverage=f"{source.num_samples} clips, live teachers",
            snapshot=fingerprint(
                {
                    "base": declared_base(config),
                    "columns": [
                        declared_column(config, teacher, layer)
                        for teacher, chosen in layers.items()
                        for layer in chosen
                    ],
                    "weights": {
                        name: teacher.weights_sha256
                        for name, teacher in featurizer.teachers.items()
                    },
                    "shards": sorted(shard.shard_id for shard in shards),
                }
            ),
            commits=None,
            encoding=LIVE_ENCODING,
            widths=source.widths,
            codecs={k: make_codec(LIVE_ENCODING, width=w) for k, w in source.widths.items()},
            statistics={},
        )


def check_live(config: RunConfig) -> None:
    """What live teachers cannot give."""
    gaps = config.plan_gaps()
    if gaps:
        raise UsageError(f"objective asks for what `masks` does not plan: {'; '.join(gaps)}")
    if config.objective.normalise in NEEDS_STATISTICS:
        raise UsageError(
            f"objective.normalise={config.objective.normalise} needs the statistics of a cache: "
            "with cache.mode=live use layer_norm, l2 or none"
        )


def begun_with(folder: Path) -> Snapshot | None:
    """What the run in a folder reads of its cache, if it has come to a checkpoint."""
    return load_snapshot(folder) if any((folder / CHECKPOINTS).glob("step-*.pt")) else None


def open_cache(config: RunConfig, *, snapshot: Snapshot | None = None) -> Opened:
    """The cache as a source of clips, checked against the config as far as that goes.

    Args:
        config: The run.
        snapshot: What a run that goes on began with; None takes what is committed now.

    Raises:
        UsageError: If there is no cache.
        MismatchError: If it was made for another config (its mask plan included), or lacks
            something that the run asks for or began with.
    """
    device = resolve_device(config.train.device)
    cache = Cache.open(config.cache.dir)
    cache.check(declared_base(config), declared_only=True)
    cache.check_masks(config.mask_schedule)
    columns = {
        (teacher, layer): column_id(teacher, layer, config.cache.encoding)
        for teacher, layers in config.objective_layers.items()
        for layer in layers
    }
    for (teacher, layer), column in columns.items():
        cache.columns.check(column, declared_column(config, teacher, layer), declared_only=True)
    reader = CacheReader(
        cache,
        num_views=config.views.num,
        columns=tuple(columns.values()),
        shards=expected_shards(cache, [p for s in config.data.shards for p in expand_braces(s)]),
        allow_partial=config.cache.allow_partial,
        snapshot=snapshot,
    )
    logger.info("%s", reader.coverage.describe())
    return Opened(
        source=_Cached(reader=reader),
        coverage=reader.coverage.describe(),
        snapshot=reader.snapshot_sha256,
        commits=reader.snapshot,
        encoding=config.cache.encoding,
        widths={key: reader.width(column) for key, column in columns.items()},
        codecs={key: reader.codec(column).to(device) for key, column in columns.items()},
        statistics=statistics_of(reader, columns, config.objective, device),
    )
