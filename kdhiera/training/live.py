"""Clips from live teachers: decoder and teachers in the training loop.

The usual loop of masked feature distillation, through the same `featurize` that fills the
cache: the baseline for exactness and for the speed-up.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Int

from kdhiera.cache.layout import column_id
from kdhiera.cache.rows import KeptRows
from kdhiera.data.clip import Clip, ClipRequest, DecodeFailure
from kdhiera.data.ordered import decode_samples
from kdhiera.data.sandbox import Sandbox
from kdhiera.data.shards import ShardIndex, read_sample, read_shard
from kdhiera.errors import KdhieraError, UsageError
from kdhiera.featurize import Featurizer, Layers
from kdhiera.training.ranks import ALONE, Ranks
from kdhiera.views import ViewPolicy

logger = logging.getLogger(__name__)

LIVE_ENCODING = "fp32"
SCAN_CLIPS = 32  # decoded ahead while looking for bad clips
READ_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class _Sample:
    shard: ShardIndex
    ordinal: int


class LiveSource:
    """A `ClipSource` that decodes and teaches whatever is read.

    Its samples are those that decode in every view, in the order of a cache's: sorted
    shards, then the order of the tar. Finding them costs one decoding pass.

    Args:
        shards: Indices of the shards.
        video_extensions: Members with these extensions are videos.
        max_video_bytes: Larger videos are left out.
        policy: What views are drawn from.
        num_views: Views that are used.
        sandbox: Decoding children.
        featurizer: Teachers, scores, mask plan.
        layers: Layers that train the student, by teacher.
        ranks: Who trains together; each tries a share of the clips.
    """

    def __init__(
        self,
        shards: Sequence[ShardIndex],
        *,
        video_extensions: Sequence[str],
        max_video_bytes: int,
        policy: ViewPolicy,
        num_views: int,
        sandbox: Sandbox,
        featurizer: Featurizer,
        layers: Layers,
        ranks: Ranks = ALONE,
    ) -> None:
        self._reading: dict[str, Any] = {
            "video_extensions": video_extensions,
            "label_extensions": (),
            "max_video_bytes": max_video_bytes,
        }
        self._policy = policy
        self._sandbox = sandbox
        self._featurizer = featurizer
        self._layers = layers
        self._samples = self._decodable(sorted(shards, key=lambda s: s.shard_id), num_views, ranks)
        if not self._samples:
            raise UsageError("no clip of data.shards decodes: nothing to train on")

    @property
    def num_samples(self) -> int:
        """Samples that decode in every view."""
        return len(self._samples)

    @property
    def widths(self) -> Mapping[tuple[str, str], int]:
        """Channels by (teacher, layer)."""
        return self._featurizer.widths(self._layers)

    def read(self, samples: Int[np.ndarray, " b"], *, view: int) -> KeptRows:
        """Decode, run the teachers and keep what the plan asks for.

        Raises:
            KdhieraError: If a clip that decoded before does not, or a feature is not finite.
        """
        chosen = [self._samples[int(i)] for i in samples]
        with ThreadPoolExecutor(READ_THREADS) as readers:  # a bucket takes its time to answer
            futures = list(readers.map(lambda sample: self._submit(sample, view), chosen))
        clips, uids = [], []
        for uid, future in futures:
            outcome = future.result()
            if not isinstance(outcome, Clip):
                raise KdhieraError(f"{uid} decoded before and now fails: {outcome.message}")
            clips.append(outcome.frames)
            uids.append(uid)
        out = self._featurizer(np.stack(clips), uids=uids, view=view, layers=self._layers)
        for (teacher, layer), finite in out.finite.items():
            if not finite.all():
                bad = uids[int(np.argmin(finite))]
                raise KdhieraError(f"teacher {teacher} layer {layer} is not finite on {bad}")
        return KeptRows(
            uids=tuple(uids),
            units=out.units,
            scores=out.scores,
            pixels=out.pixels,
            columns={
                column_id(teacher, layer, LIVE_ENCODING): {"codes": features.cpu().numpy()}
                for (teacher, layer), features in out.features.items()
            },
        )

    def _submit(self, sample: _Sample, view: int) -> tuple[str, Future[Clip | DecodeFailure]]:
        found = read_sample(sample.shard, sample.ordinal, **self._reading)
        request = ClipRequest(uid=found.uid, view=view, policy=self._policy)
        assert found.video is not None, "only samples that decode are read"
        return found.uid, self._sandbox.submit(found.video, request)

    def _decodable(
        self, shards: Sequence[ShardIndex], num_views: int, ranks: Ranks
    ) -> list[_Sample]:
        """Samples whose clips decode in all views, in order; all ranks agree on them."""
        wanted = (
            (sample, ClipRequest(uid=sample.uid, view=view, policy=self._policy))
            for shard in shards
            for sample in islice(read_shard(shard, **self._reading), ranks.rank, None, ranks.size)
            for view in range(num_views)
        )
        bad = {
            sample.uid: outcome
            for sample, outcome in decode_samples(self._sandbox, wanted, in_flight=SCAN_CLIPS)
            if not isinstance(outcome, Clip)
        }
        bad = {uid: failure for part in ranks.gather(bad) for uid, failure in part.items()}
        for uid, failure in bad.items():
            logger.warning("left out: %s: %s (%s)", uid, failure.status.value, failure.message)
        return [
            _Sample(shard=shard, ordinal=ref.ordinal)
            for shard in shards
            for ref in shard.samples
            if shard.uid(ref) not in bad
        ]
