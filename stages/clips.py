"""Decoded clips of shards, batch by batch, for stages that keep no cache of them."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from kdhiera.config import RunConfig
from kdhiera.data.clip import Clip, ClipRequest
from kdhiera.data.ordered import decode_samples
from kdhiera.data.patterns import expand
from kdhiera.data.sandbox import Sandbox
from kdhiera.data.shards import Sample, ShardIndex, index_shards, read_sample, read_shard
from kdhiera.stages.assemble import decode_limits
from kdhiera.views import ViewPolicy

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ClipBatch:
    """Good clips with what their samples say of them.

    Args:
        frames: RGB clips.
        uids: Identities of the samples.
        labels: What each sample's JSON says.
    """

    frames: UInt8[np.ndarray, "b f y x 3"]
    uids: tuple[str, ...]
    labels: tuple[Mapping[str, Any], ...]


def clip_batches(
    config: RunConfig,
    shards: Sequence[ShardIndex],
    *,
    policy: ViewPolicy,
    sandbox: Sandbox,
    batch_size: int,
) -> Iterator[ClipBatch]:
    """Decode view 0 of every sample; bad samples are left out and counted in the log.

    Args:
        config: The run.
        shards: Their indices.
        policy: What views are drawn from.
        sandbox: Decoding children.
        batch_size: Clips in a batch; the last one may be smaller.

    Raises:
        SourceError: If a shard cannot be read, or is not the one that was indexed.
    """
    wanted = (
        (sample, ClipRequest(uid=sample.uid, view=0, policy=policy))
        for shard in shards
        for sample in read_shard(
            shard,
            video_extensions=config.data.video_extensions,
            max_video_bytes=config.decode.max_video_bytes,
        )
    )
    bad: Counter[str] = Counter()
    batch: list[tuple[Clip, Sample]] = []
    for sample, outcome in decode_samples(sandbox, wanted, in_flight=2 * batch_size):
        if not isinstance(outcome, Clip):
            bad[outcome.status.value] += 1
            continue
        batch.append((outcome, sample))
        if len(batch) == batch_size:
            yield _batch(batch)
            batch = []
    if batch:
        yield _batch(batch)
    if bad:
        kinds = ", ".join(f"{n} {s}" for s, n in sorted(bad.items()))
        logger.warning("clips left out of %s: %s", ", ".join(s.path for s in shards), kinds)


def spread_clips(config: RunConfig, num_clips: int) -> Iterator[tuple[Sample, Clip]]:
    """The first clip that decodes at each of `num_clips` places spread over `data.shards`.

    Args:
        config: The run; clips are those that extraction would store of view 0.
        num_clips: Places; fewer clips come where none decodes.

    Raises:
        UsageError: If a pattern matches no shard.
        ValueError: If a shard is no tar.
    """
    shards = index_shards(expand(config.data.shards))
    places = [(shard, i) for shard in shards for i in range(len(shard.samples))]
    starts = [i * len(places) // num_clips for i in range(min(num_clips, len(places)))]
    with Sandbox(decode_limits(config.decode), num_children=1) as sandbox:
        for start, end in zip(starts, [*starts[1:], len(places)], strict=True):
            wanted = _requests(config, places[start:end])
            decoded = decode_samples(sandbox, wanted, in_flight=1)
            clips = ((s, outcome) for s, outcome in decoded if isinstance(outcome, Clip))
            yield from itertools.islice(clips, 1)


def _requests(
    config: RunConfig, places: Iterable[tuple[ShardIndex, int]]
) -> Iterator[tuple[Sample, ClipRequest]]:
    for shard, ordinal in places:
        sample = read_sample(
            shard,
            ordinal,
            video_extensions=config.data.video_extensions,
            max_video_bytes=config.decode.max_video_bytes,
        )
        yield sample, ClipRequest(uid=sample.uid, view=0, policy=config.view_policy)


def _batch(pairs: Sequence[tuple[Clip, Sample]]) -> ClipBatch:
    return ClipBatch(
        frames=np.stack([clip.frames for clip, _ in pairs]),
        uids=tuple(sample.uid for _, sample in pairs),
        labels=tuple(sample.labels for _, sample in pairs),
    )
