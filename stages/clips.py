"""Decoded clips of shards, batch by batch, for stages that keep no cache of them."""

from __future__ import annotations

import itertools
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt8

from kdhiera.config import RunConfig
from kdhiera.data.clip import Clip, ClipRequest, DecodeFailure
from kdhiera.data.ordered import decode_samples
from kdhiera.data.patterns import expand
from kdhiera.data.sandbox import Sandbox
from kdhiera.data.shards import Sample, ShardIndex, index_shards, read_sample, read_shard
from kdhiera.stages.assemble import decode_limits
from kdhiera.views import ViewPolicy

logger = logging.getLogger(__name__)

READ_THREADS = 8  # a bucket takes its time to answer

_In = TypeVar("_In")
_Out = TypeVar("_Out")
Place = tuple[ShardIndex, int]  # a shard and the ordinal of a sample in it


@dataclass(frozen=True, kw_only=True)
class ClipBatch:
    """Good clips with what their samples say of them.

    Args:
        frames: RGB clips, one or more views of each sample.
        places: Where the samples are.
        uids: Identities of the samples.
        labels: What each sample's JSON says.
    """

    frames: UInt8[np.ndarray, "b v f y x 3"]
    places: tuple[Place, ...]
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
    """Decode every sample; one with a bad view is left out and counted in the log.

    Args:
        config: The run.
        shards: Their indices.
        policy: What views are drawn from; as many as it spreads over a video.
        sandbox: Decoding children.
        batch_size: Clips in a batch, at most, but for one sample's views; the last batch may
            be smaller.

    Raises:
        SourceError: If a shard cannot be read, or is not the one that was indexed.
    """
    views = policy.num_spread
    wanted = (
        (sample, ClipRequest(uid=sample.uid, view=view, policy=policy))
        for shard in shards
        for sample in read_shard(
            shard,
            video_extensions=config.data.video_extensions,
            max_video_bytes=config.decode.max_video_bytes,
        )
        for view in range(views)
    )
    by_id = {shard.shard_id: shard for shard in shards}
    bad: Counter[str] = Counter()
    batch: list[tuple[Sequence[Clip], Sample]] = []
    decoded = decode_samples(sandbox, wanted, in_flight=2 * max(batch_size, views))
    while chunk := list(itertools.islice(decoded, views)):
        sample = chunk[0][0]
        clips = [outcome for _, outcome in chunk if isinstance(outcome, Clip)]
        if len(clips) < views:
            first = next(o for _, o in chunk if not isinstance(o, Clip))
            bad[first.status.value] += 1
            continue
        batch.append((clips, sample))
        if len(batch) == max(1, batch_size // views):
            yield _batch(batch, by_id)
            batch = []
    if batch:
        yield _batch(batch, by_id)
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
            wanted = ((place, 0) for place in places[start:end])
            decoded = clips_at(
                config, wanted, policy=config.view_policy, sandbox=sandbox, in_flight=1
            )
            clips = ((s, outcome) for s, outcome in decoded if isinstance(outcome, Clip))
            yield from itertools.islice(clips, 1)


def clips_at(
    config: RunConfig,
    wanted: Iterable[tuple[Place, int]],
    *,
    policy: ViewPolicy,
    sandbox: Sandbox,
    in_flight: int,
) -> Iterator[tuple[Sample, Clip | DecodeFailure]]:
    """Read and decode views of chosen samples, a bounded number ahead, in the order asked for.

    Args:
        config: The run.
        wanted: Samples and the number of the view.
        policy: What views are drawn from.
        sandbox: Decoding children.
        in_flight: Clips ahead, at least 1.

    Raises:
        SourceError: If a shard cannot be read, or is not the one that was indexed.
    """

    def read(item: tuple[Place, int]) -> tuple[Sample, ClipRequest]:
        (shard, ordinal), view = item
        sample = read_sample(
            shard,
            ordinal,
            video_extensions=config.data.video_extensions,
            max_video_bytes=config.decode.max_video_bytes,
        )
        return sample, ClipRequest(uid=sample.uid, view=view, policy=policy)

    with ThreadPoolExecutor(READ_THREADS) as readers:
        ahead = min(READ_THREADS, in_flight) - 1
        read_samples = (found for _, found in mapped(readers, read, wanted, ahead))
        yield from decode_samples(sandbox, read_samples, in_flight=in_flight)


def spread(places: Sequence[Place], number: int) -> list[Place]:
    """So many of the places, or all of fewer, as far apart as can be."""
    number = min(number, len(places))
    return [places[i * len(places) // number] for i in range(number)]


def labels_at(places: Sequence[Place]) -> list[Mapping[str, str | int]]:
    """Labels of samples; their videos are not read.

    Raises:
        SourceError: If a shard cannot be read, or is not the one that was indexed.
    """
    with ThreadPoolExecutor(READ_THREADS) as pool:
        samples = pool.map(lambda place: read_sample(*place, video_extensions=()), places)
        return [sample.labels for sample in samples]


def mapped(
    pool: ThreadPoolExecutor, function: Callable[[_In], _Out], items: Iterable[_In], ahead: int
) -> Iterator[tuple[_In, _Out]]:
    """Items with what a pool makes of them, in order, no more than `ahead` beyond the current."""
    waiting: deque[tuple[_In, Future[_Out]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) > ahead:
            first, result = waiting.popleft()
            yield first, result.result()
    for first, result in waiting:
        yield first, result.result()


def _batch(
    pairs: Sequence[tuple[Sequence[Clip], Sample]], shards: Mapping[str, ShardIndex]
) -> ClipBatch:
    return ClipBatch(
        frames=np.stack([[clip.frames for clip in clips] for clips, _ in pairs]),
        places=tuple((shards[s.uid.partition("/")[0]], s.ordinal) for _, s in pairs),
        uids=tuple(sample.uid for _, sample in pairs),
        labels=tuple(sample.labels for _, sample in pairs),
    )
