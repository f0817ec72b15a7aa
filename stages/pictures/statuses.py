"""The statuses of a cache's rows as a picture, with frames of the offending samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import PartId
from kdhiera.cache.records import PartCommits
from kdhiera.config import RunConfig
from kdhiera.data.clip import Clip, ClipRequest, shown
from kdhiera.data.ordered import decode_samples
from kdhiera.data.patterns import expand
from kdhiera.data.ranges import SourceError
from kdhiera.data.sandbox import Sandbox
from kdhiera.data.shards import Sample, read_sample
from kdhiera.errors import UsageError
from kdhiera.progress import Progress
from kdhiera.report.statuses import MEANINGS, NUM_THUMBS, Offender, StatusPicture, show_statuses
from kdhiera.stages.assemble import columns_of, decode_limits
from kdhiera.stages.bad_rows import BadRow, RowStatuses, open_for, statuses_of
from kdhiera.stages.replaying.choose import ShardFinder
from kdhiera.views import CropPolicy, FramePolicy, ViewPolicy

A_STATUS, IN_ALL = 3, 8  # offenders shown
TRIED_FRAMES = 8  # of a video that does not decode whole
DEADLINE_SECONDS = 5.0  # a hanging video hangs again


def status_figure(config: RunConfig, *, progress: Progress) -> tuple[Figure, RowStatuses]:
    """Rows by status, and some samples of every bad one.

    Args:
        config: The run.
        progress: Where progress is shown.

    Raises:
        UsageError: If there is no cache.
        MismatchError: If it was made for another config.
        DamagedError: If a file with bad rows is missing or damaged.
    """
    cache, commits = open_for(config)
    statuses = statuses_of(cache, commits, columns=columns_of(config))
    some = _some(statuses.bad)
    bar = progress.start("statuses", len(some), "samples")
    offenders = []
    for offender in _offenders(config, cache, commits, some):
        offenders.append(offender)
        progress.advance(bar)
    progress.finish(bar)
    total, good = sum(statuses.rows.values()), statuses.rows.get("ok", 0)
    figure = show_statuses(
        StatusPicture(
            title=f"{config.name}: {good:,} of {total:,} rows of the cache are ok "
            f"({100 * good / max(total, 1):.1f} %)",
            rows=statuses.rows,
            columns=statuses.columns,
            offenders=tuple(offenders),
        )
    )
    return figure, statuses


def _some(bad: Sequence[BadRow]) -> list[BadRow]:
    """The first of every status and column, then the second, and so on; a sample once each."""
    kinds: dict[tuple[str, str], dict[str, BadRow]] = {}
    for one in bad:
        samples = kinds.setdefault((one.column or "", one.status), {})
        if len(samples) < A_STATUS:
            samples.setdefault(one.row.uid, one)
    rounds = itertools.zip_longest(*(samples.values() for samples in kinds.values()))
    some = [one for turn in rounds for one in turn if one is not None][:IN_ALL]
    return sorted(some, key=lambda one: (one.column or "", one.status))


def _offenders(
    config: RunConfig, cache: Cache, commits: dict[PartId, PartCommits], some: Sequence[BadRow]
) -> Iterator[Offender]:
    """What can be shown of bad rows; their videos are decoded in a child process only."""
    shards = ShardFinder([*_there(config), *{commits[one.part].base.source.path for one in some}])
    limits = decode_limits(config.decode)
    limits = replace(limits, deadline_seconds=min(limits.deadline_seconds, DEADLINE_SECONDS))
    with Sandbox(limits, num_children=1) as sandbox:
        for one in some:
            sample = _sample(config, shards, one)
            if sample is None:
                yield _offender(one, None, "its shard is not there any more")
                continue
            wanted = [(sample, _request(config.view_policy, one))]
            ((_, outcome),) = decode_samples(sandbox, wanted, in_flight=1)
            yield _offender(one, outcome if isinstance(outcome, Clip) else None, "")


def _there(config: RunConfig) -> list[str]:
    """The config's shards, as far as there are any: the cache may be all that is left."""
    try:
        return expand(config.data.shards)
    except UsageError:
        return []


def _sample(config: RunConfig, shards: ShardFinder, one: BadRow) -> Sample | None:
    shard = shards.find(one.part.shard_id)
    if shard is None:
        return None
    ordinal = next(ref.ordinal for ref in shard.samples if shard.uid(ref) == one.row.uid)
    try:
        return read_sample(
            shard,
            ordinal,
            video_extensions=config.data.video_extensions,
            max_video_bytes=config.decode.max_video_bytes,
        )
    except SourceError:
        return None


def _request(policy: ViewPolicy, one: BadRow) -> ClipRequest:
    """The stored clip of a row that has one; else frames from all over the video."""
    if one.row.view is not None:
        return ClipRequest(
            uid=one.row.uid,
            view=one.part.view,
            policy=policy,
            replay=one.row.view,
            replay_decoder=one.row.decoder,
            salvage=True,
        )
    anywhere = replace(
        policy,
        num_frames=TRIED_FRAMES,
        frames=FramePolicy.UNIFORM,
        crop=CropPolicy.CENTER,
        allow_short=True,
        flip=False,
    )
    return ClipRequest(uid=one.row.uid, view=one.part.view, policy=anywhere, salvage=True)


def _offender(one: BadRow, clip: Clip | None, note: str) -> Offender:
    frames: dict[int, int] = {}
    for place, index in enumerate(clip.view.frame_indices if clip else ()):
        frames.setdefault(index, place)
    chosen = _spread(list(frames), NUM_THUMBS)
    column = f", column {one.column}" if one.column else ""
    return Offender(
        status=one.status,
        key=shown(one.row.key, 80),
        where=f"{one.part.shard_id}, view {one.part.view}{column}",
        message=MEANINGS[one.status] if one.column else one.row.message,
        frames=tuple(clip.frames[frames[index]] for index in chosen) if clip else (),
        frames_note=f"frames {', '.join(map(str, chosen))} of {clip.num_frames}" if clip else note,
    )


def _spread(numbers: Sequence[int], count: int) -> Iterable[int]:
    """Up to so many of some numbers, the first and the last among them."""
    if len(numbers) <= count:
        return numbers
    return [numbers[i * (len(numbers) - 1) // (count - 1)] for i in range(count)]
