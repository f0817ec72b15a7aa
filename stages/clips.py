"""Decoded clips of shards, batch by batch, for stages that keep no cache of them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from kdhiera.config import RunConfig
from kdhiera.data.clip import Clip, ClipRequest
from kdhiera.data.ordered import decode_samples
from kdhiera.data.sandbox import Sandbox
from kdhiera.data.shards import Sample, ShardIndex, read_shard
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


def _batch(pairs: Sequence[tuple[Clip, Sample]]) -> ClipBatch:
    return ClipBatch(
        frames=np.stack([clip.frames for clip, _ in pairs]),
        uids=tuple(sample.uid for _, sample in pairs),
        labels=tuple(sample.labels for _, sample in pairs),
    )
