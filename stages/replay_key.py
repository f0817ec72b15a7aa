"""One sample of a cache made again, with all that there is to say about it on the way.

    key -> row(s) of the cache -> shard -> sample -> look (demux, frame by frame, FFmpeg's words)
        -> decode the recorded view -> teachers -> compare with what is stored

A row that was bad is decoded as extraction would decode it now.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdhiera.addresses import scheme_of
from kdhiera.cache.arrays import read_array
from kdhiera.cache.commit import Cache
from kdhiera.cache.info import natural_order
from kdhiera.cache.layout import ColumnStatus, column_group
from kdhiera.cache.table import Row
from kdhiera.config import RunConfig
from kdhiera.data.clip import Clip, ClipRequest, DecodeFailure, LookRequest, VideoInfo, shown
from kdhiera.data.ordered import decode_samples
from kdhiera.data.patterns import expand
from kdhiera.data.ranges import SourceError
from kdhiera.data.sandbox import Sandbox
from kdhiera.data.shards import Sample, ShardIndex, read_sample
from kdhiera.devices import resolve_device
from kdhiera.errors import UsageError
from kdhiera.progress import counted, human_bytes
from kdhiera.stages.assemble import decode_limits, featurizer_of
from kdhiera.stages.extraction.recorded import (
    NOT_RECORDED,
    ColumnTeachers,
    column_teachers,
    recorded_config,
    working_in,
)
from kdhiera.stages.replaying.choose import ShardFinder
from kdhiera.stages.replaying.findings import KeyReplay, RowReplay, Step
from kdhiera.stages.replaying.replay import replay_chosen
from kdhiera.stages.replaying.rows import FoundRow, find_rows

_SAID = 10  # lines of FFmpeg for people; JSON and --debug have all


def replay_key(
    url: str,
    key: str,
    *,
    config: RunConfig | None = None,
    view: int | None = None,
    debug: bool = False,
) -> KeyReplay:
    """Make all rows of a sample again.

    Args:
        url: Folder or address of the cache.
        key: Key of the sample, or its identity (`SHARD/OFFSET/KEY`).
        config: The run that names shards and teachers; None takes what the cache records.
        view: Only this view; None for all.
        debug: Keep every line that FFmpeg said.

    Raises:
        UsageError: If there is no cache, or no such row.
        MismatchError: If the config is not the cache's.
        DamagedError: If a file of the rows is missing or damaged.
    """
    local = scheme_of(url) == ""
    cache = Cache.open(Path(url).resolve() if local else url)
    found = find_rows(cache, key, view=view)
    usual = config or recorded_config(cache)
    if usual is None:
        raise UsageError(NOT_RECORDED)
    teachers, left_out = column_teachers(cache, config)
    lay = dict.fromkeys(one.commits.base.source.path for one in found)
    replayer = _Replayer(
        cache=cache,
        config=usual,
        teachers=teachers,
        left_out=left_out,
        shards=ShardFinder([*_there(usual), *lay]),
        debug=debug,
    )
    return KeyReplay(cache=cache.url, key=key, rows=tuple(replayer.row(one) for one in found))


@dataclass(frozen=True, kw_only=True)
class _Replayer:
    cache: Cache
    config: RunConfig
    teachers: Sequence[ColumnTeachers]
    left_out: Mapping[str, str]
    shards: ShardFinder
    debug: bool

    def row(self, found: FoundRow) -> RowReplay:
        part = found.commits.base.part
        return RowReplay(part=part, uid=found.row.uid, steps=tuple(self._steps(found)))

    def _steps(self, found: FoundRow) -> Iterator[Step]:
        yield _stored(self.cache, found)
        shard, step = self._shard(found)
        yield step
        if shard is None:
            return
        sample, step = self._sample(shard, found.row)
        yield step
        if sample is None:
            return
        with Sandbox(decode_limits(self.config.decode), num_children=1) as sandbox:
            if sample.video is not None:
                yield self._look(sandbox, sample.video, found.row)
            outcome, step = self._decode(sandbox, sample, found)
            yield step
        if isinstance(outcome, Clip):
            yield self._teach(shard, found, outcome)

    def _shard(self, found: FoundRow) -> tuple[ShardIndex | None, Step]:
        source = found.commits.base.source
        started = time.monotonic()
        shard = self.shards.find(found.commits.base.part.shard_id)
        if shard is None:
            words = f"not there: neither in data.shards nor where it lay ({shown(source.path)})"
            return None, _step("shard", [words], {"path": None}, same=False)
        lines = [f"{shown(shard.path)}, {human_bytes(shard.num_bytes)}"]
        lines += [f"problem: {shown(problem)}" for problem in shard.problems]
        values = {"path": shard.path, "problems": list(shard.problems)}
        return shard, _step("shard", lines, values, started=started)

    def _sample(self, shard: ShardIndex, row: Row) -> tuple[Sample | None, Step]:
        started = time.monotonic()
        ref = next(ref for ref in shard.samples if shard.uid(ref) == row.uid)
        members = [
            {"extension": m.extension, "offset": m.offset, "bytes": m.num_bytes}
            for m in ref.members
        ]
        try:
            sample = read_sample(
                shard,
                ref.ordinal,
                video_extensions=self.config.data.video_extensions,
                max_video_bytes=self.config.decode.max_video_bytes,
            )
        except SourceError as error:
            lines = [shown(str(error))]
            return None, _step("sample", lines, {"members": members}, same=False)
        names = ", ".join(
            f".{shown(m.extension, 20)} {human_bytes(m.num_bytes)}" for m in ref.members
        )
        lines = [f"byte {ref.offset:,} to {ref.offset + ref.num_bytes:,}: {names}"]
        if sample.message:
            lines.append(shown(sample.message))
        labels = dict(sample.labels)
        if labels:
            lines.append(f"labels {shown(json.dumps(labels))}")
        values = {"members": members, "labels": labels, "message": sample.message}
        return sample, _step("sample", lines, values, started=started)

    def _look(self, sandbox: Sandbox, video: bytes, row: Row) -> Step:
        started = time.monotonic()
        indices = tuple(sorted(set(row.view.frame_indices))) if row.view else None
        look = sandbox.look(video, LookRequest(indices=indices)).result()
        if isinstance(look, DecodeFailure):
            words = f"{look.status}: {look.message}"
            return _step("look", [words], {"failure": words, "said": []}, started=started)
        lines = [_info_line(look.info)] if look.info else []
        if look.failure:
            lines.append(f"{look.failure.status}: {look.failure.message}")
        flaws = [frame for frame in look.frames if frame.flaw]
        if look.frames:
            good = len(look.frames) - len(flaws)
            lines.append(f"{good} of {len(look.frames)} frames decode one by one")
        lines += [frame.flaw for frame in flaws]
        said = [
            f"{line}{f' ({n} times)' if n > 1 else ''}" for line, n in Counter(look.said).items()
        ]
        lines += [f"FFmpeg: {line}" for line in said[: None if self.debug else _SAID]]
        if len(said) > _SAID and not self.debug:
            lines.append(f"FFmpeg said {len(said) - _SAID:,} other things: --debug")
        values = {
            "info": look.info and _info_values(look.info),
            "failure": look.failure and f"{look.failure.status}: {look.failure.message}",
            "frames": {frame.index: frame.flaw for frame in look.frames},
            "said": list(look.said),
        }
        return _step("look", lines or ["nothing to see"], values, started=started)

    def _decode(
        self, sandbox: Sandbox, sample: Sample, found: FoundRow
    ) -> tuple[Clip | DecodeFailure, Step]:
        started = time.monotonic()
        row = found.row
        request = ClipRequest(
            uid=row.uid,
            view=found.commits.base.part.view,
            policy=self.config.view_policy,
            replay=row.view,
            replay_decoder=row.decoder or None,
        )
        ((_, outcome),) = decode_samples(sandbox, [(sample, request)], in_flight=1)
        if isinstance(outcome, DecodeFailure):
            same = outcome.status == row.status
            as_before = "as it is stored" if same else f"stored is {row.status}"
            lines = [f"{outcome.status} ({as_before}): {outcome.message}"]
            failed = {"status": outcome.status.value, "message": outcome.message}
            return outcome, _step("decode", lines, failed, same=same, started=started)
        same = outcome.crc32c == row.clip_crc32c
        known = row.clip_crc32c is not None
        words = "the same frames as stored" if same else "OTHER FRAMES than stored"
        lines = [
            f"ok with {outcome.decoder}, {words if known else f'stored is {row.status}'} "
            f"(crc32c {outcome.crc32c:08x})",
            *_view_lines(outcome.view.frame_indices, outcome.pts_seconds),
        ]
        values: dict[str, Any] = {
            "status": "ok",
            "decoder": outcome.decoder,
            "crc32c": outcome.crc32c,
            "num_frames": outcome.num_frames,
            "frame_indices": list(outcome.view.frame_indices),
            "pts_seconds": list(outcome.pts_seconds),
            "crop": list(outcome.view.crop),
            "flip": outcome.view.flip,
        }
        return outcome, _step("decode", lines, values, same=same, started=started)

    def _teach(self, shard: ShardIndex, found: FoundRow, clip: Clip) -> Step:
        """All columns that can be made again; those that are good are compared."""
        started = time.monotonic()
        lines: list[str] = []
        values: dict[str, Any] = {}
        same: bool | None = None
        for teachers in self.teachers:
            with working_in(teachers.folder):
                more, found_values, agrees = self._columns(teachers, shard, found, clip)
            lines += more
            values |= found_values
            same = agrees if same is None else (same and agrees is not False)
        lines += [f"{column}: left out, {why}" for column, why in self.left_out.items()]
        values |= {column: {"left_out": why} for column, why in self.left_out.items()}
        lines = lines or ["the cache has no column"]
        return _step("teachers", lines, {"columns": values}, same=same, started=started)

    def _columns(
        self, teachers: ColumnTeachers, shard: ShardIndex, found: FoundRow, clip: Clip
    ) -> tuple[list[str], dict[str, Any], bool | None]:
        config, commits = teachers.config, found.commits
        columns = {c: k for c, k in teachers.columns.items() if c in commits.columns}
        stored = _column_statuses(self.cache, found)
        layers: dict[str, list[str]] = {}
        for name, layer in sorted(set(teachers.columns.values())):
            layers.setdefault(name, []).append(layer)
        featurizer = featurizer_of(
            config, device=resolve_device(config.extract.device), plan=self.cache.mask_plan
        )
        out = featurizer(
            clip.frames[None], uids=[found.row.uid], view=commits.base.part.view, layers=layers
        )
        lines: list[str] = []
        values: dict[str, Any] = {}
        same = True
        for column, key in sorted(columns.items(), key=lambda item: natural_order(item[0])):
            now = "ok" if bool(out.finite[key][0]) else "nonfinite"
            was = stored.get(column)
            values[column] = {"status": now, "stored": was}
            if was is not None and was != "ok":
                lines.append(f"{column}: {now}, stored is {was}")
                same = same and now == was
            elif was is None:
                lines.append(f"{column}: {now}, nothing is stored to compare with")
        good = {c: columns[c] for c, was in stored.items() if c in columns and was == "ok"}
        if found.array_row is None or found.row.clip_crc32c != clip.crc32c:
            return lines, values, None if found.array_row is None else same
        rows = [found.array_row]
        wanted: dict[str | None, Sequence[int]] = dict.fromkeys((None, *good), rows)
        part = commits.base.part
        replayed = replay_chosen(
            config, self.cache, chosen={part: (commits, shard, wanted)}, columns=good
        )
        for one in replayed.columns:
            lines.append(
                f"{one.column}: worst cosine {one.worst_cosine:.6f}, error {one.error:.1e} of the "
                f"variance (bound {one.bound:.0e})"
            )
            values[one.column] |= {
                "worst_cosine": one.worst_cosine,
                "error": one.error,
                "bound": one.bound,
            }
        lines += [f"DIFFERS: {shown(what)}" for what in replayed.beyond]
        values["beyond"] = list(replayed.beyond)
        return lines, values, same and not replayed.beyond


def _step(
    name: str,
    lines: Sequence[str],
    values: Mapping[str, Any],
    *,
    same: bool | None = None,
    started: float | None = None,
) -> Step:
    seconds = 0.0 if started is None else time.monotonic() - started
    return Step(name=name, same=same, lines=tuple(lines), values=values, seconds=seconds)


def _stored(cache: Cache, found: FoundRow) -> Step:
    """What the cache says of a row."""
    row, base = found.row, found.commits.base
    lines = [f"{row.status}{f': {shown(row.message)}' if row.message else ''}"]
    if row.view:
        lines += _view_lines(row.view.frame_indices, row.pts_seconds)
        y, x, height, width = row.view.crop
        lines.append(
            f"{row.num_frames} frames in all; crop {width} x {height} px at ({x}, {y}), "
            f"{'mirrored' if row.view.flip else 'not mirrored'}; decoder {row.decoder}"
        )
    columns = _column_statuses(cache, found)
    lines += [f"{column}: {status}" for column, status in columns.items() if status != "ok"]
    made = ", ".join(f"{package} {version}" for package, version in base.versions)
    lines.append(f"sample {found.number + 1} of {base.num_rows}, made by {made}")
    values = {
        "status": row.status.value,
        "message": row.message,
        "array_row": found.array_row,
        "num_frames": row.num_frames,
        "decoder": row.decoder,
        "clip_crc32c": row.clip_crc32c,
        "frame_indices": list(row.view.frame_indices) if row.view else None,
        "crop": list(row.view.crop) if row.view else None,
        "flip": row.view.flip if row.view else None,
        "columns": columns,
        "versions": dict(base.versions),
    }
    return _step("stored", lines, values)


def _column_statuses(cache: Cache, found: FoundRow) -> dict[str, str]:
    """Status of a good row in every column of its part."""
    if found.array_row is None:
        return {}
    statuses = {}
    for column, commit in sorted(found.commits.columns.items(), key=lambda c: natural_order(c[0])):
        status = read_array(cache, commit, f"{column_group(column)}/status")
        statuses[column] = ColumnStatus(int(status[found.array_row])).name.lower()
    return statuses


def _view_lines(indices: Sequence[int], seconds: Sequence[float]) -> list[str]:
    times = f", {seconds[0]:.2f} to {seconds[-1]:.2f} s" if seconds else ""
    return [f"frames {' '.join(map(str, indices))}{times}"]


def _info_values(info: VideoInfo) -> dict[str, Any]:
    last = info.pts_seconds[-1] if info.pts_seconds else 0.0
    names = (
        "container", "codec", "pix_fmt", "height", "width", "num_frames", "start_seconds",
        "upright", "closed", "num_packets", "num_key_frames",
    )  # fmt: skip
    return {**{name: getattr(info, name) for name in names}, "last_frame_seconds": last}


def _info_line(info: VideoInfo) -> str:
    last = info.pts_seconds[-1] if info.pts_seconds else 0.0
    return (
        f"{info.container}, {info.codec}, {info.pix_fmt}, {info.width} x {info.height} px"
        f"{'' if info.upright else ' when turned upright'}; {counted(info.num_frames, 'frame')} "
        f"over {last:.2f} s, from {counted(info.num_packets, 'packet')}, "
        f"{info.num_key_frames} of them key frames"
        f"{'' if info.closed else '; open groups of pictures'}"
    )


def _there(config: RunConfig) -> list[str]:
    """The config's shards, as far as there are any."""
    try:
        return expand(config.data.shards)
    except UsageError:
        return []
