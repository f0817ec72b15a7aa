"""How videos are packed: the settings, and the split and place that each video gets by them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kdhiera.config.videos import DataConfig
from kdhiera.data.clip import shown
from kdhiera.data.folders import VideoFile
from kdhiera.errors import UsageError
from kdhiera.views import stable_uniforms

EXTENSIONS: tuple[str, ...] = DataConfig.model_fields["video_extensions"].default
WHOLE = "videos"  # what shards are called where there are no splits
REST = "train"  # the split of what no share takes
_SPLIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,40}")


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """How videos are packed; each of these changes the shards, but for `num_children`.

    Args:
        shard_bytes: A shard is ended before it has more; a larger video has a shard of its own.
        max_per_shard: Most samples of a shard.
        folder_labels: Whether the first folder below the source is the label `class`.
        splits: Share of the videos by name of split, in (0, 1); the rest is `train`. A video's
            split depends on its path and the seed alone.
        split_column: Column of the table that names the split instead.
        shuffle: Mix the videos, so that shards are alike; otherwise they are in order of path.
        seed: Of the mixing and the splits.
        check: Look at every video and leave out those that cannot be read.
        extensions: Files with these are videos, in lower case.
        max_bad_fraction: More skipped videos than this share are too many, of 20 at least.
        num_children: Processes that look; 0 means one a CPU.
    """

    shard_bytes: int = 256 * 10**6
    max_per_shard: int = 1000
    folder_labels: bool = False
    splits: Mapping[str, float] = field(default_factory=dict)
    split_column: str | None = None
    shuffle: bool = False
    seed: int = 0
    check: bool = True
    extensions: tuple[str, ...] = EXTENSIONS
    max_bad_fraction: float = 0.1
    num_children: int = 0

    def __post_init__(self) -> None:
        for name, share in self.splits.items():
            if not _SPLIT.fullmatch(name) or name == REST:
                raise UsageError(
                    f"--split {shown(name)}={share:g}: a split is named with letters, digits, _ "
                    f"and -, and `{REST}` is what the others leave: write --split validation=0.1"
                )
            if not 0 < share < 1:
                raise UsageError(f"--split {name}={share:g}: a share lies between 0 and 1")
        if sum(self.splits.values()) >= 1:
            raise UsageError(f"the splits leave nothing for `{REST}`: make their shares smaller")
        if self.splits and self.split_column is not None:
            raise UsageError("splits come from shares or from a column: use only one of the two")

    def identity(self) -> dict[str, Any]:
        """All that changes the shards."""
        values = asdict(self)
        for name in ("max_bad_fraction", "num_children"):
            values.pop(name)
        return {**values, "extensions": sorted(self.extensions)}


def queues_of(
    videos: Sequence[VideoFile], settings: PackSettings
) -> dict[str, tuple[VideoFile, ...]]:
    """Videos by split, each in the order they are packed."""
    names = [WHOLE]
    if settings.splits:
        names = [REST, *settings.splits]
    elif settings.split_column is not None:
        names = sorted({video.split for video in videos})
        wrong = [name for name in names if not _SPLIT.fullmatch(name)]
        if wrong:
            raise UsageError(
                f"column {settings.split_column} names the split '{shown(wrong[0], 60)}': use "
                "letters, digits, _ and -, for files are called so"
            )
    queues: dict[str, list[VideoFile]] = {name: [] for name in names}
    for video in videos:
        queues[_split_of(video, settings)].append(video)
    if settings.shuffle:
        for queue in queues.values():
            queue.sort(key=lambda video: _draw("order", settings.seed, video))
    return {name: tuple(queue) for name, queue in queues.items()}


def _split_of(video: VideoFile, settings: PackSettings) -> str:
    if not settings.splits:
        return video.split or WHOLE
    drawn = _draw("split", settings.seed, video)
    for name, share in settings.splits.items():
        if drawn < share:
            return name
        drawn -= share
    return REST


def _draw(what: str, seed: int, video: VideoFile) -> float:
    """A number in (0, 1) that is the video's own, whatever other videos there are."""
    return float(stable_uniforms(1, f"pack {what}", seed, video.name)[0])
