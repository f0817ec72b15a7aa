"""The screen of `kdhiera cache info`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdhiera.progress import counted, human_bytes, human_seconds

if TYPE_CHECKING:
    from kdhiera.cache.info import ColumnInfo, Info, MadeBy
    from kdhiera.cache.totals import Gaps

_NAMED = 3  # of what is missing, and of hosts
_LEFT = 3  # columns of the table that are words
_HEAD = ("column", "teacher", "in", "width", "parts", "rows", "stored", "raw", "bits", "dense")


def screen(info: Info) -> Iterator[str]:
    """Lines for people."""
    yield f"cache     {info.cache} (format {info.format}, base {info.fingerprint[:12]})"
    yield f"clips     {_clips(info.identity)}"
    yield f"scores    {_scores(info.identity)}"
    yield f"masks     {info.keeps}"
    yield f"units     {_units(info)}"
    yield f"holds     {_holds(info)}"
    yield from _table(info.columns, info.num_parts)
    yield from _sizes(info)
    yield f"complete  {_completeness(info)}"
    if info.made_by:
        yield from _made(info.made_by)
    if info.damaged:
        yield (
            f"damaged   {counted(len(info.damaged), 'record')}, such as {info.damaged[0]}: run "
            f"`kdhiera cache verify {info.cache}`"
        )


def clip_size(identity: Mapping[str, Any]) -> str:
    """Frames, height and width of a base's clips."""
    clip = identity["clip"]
    return f"{clip['num_frames']} x {clip['height']} x {clip['width']}"


def some(names: Sequence[str], separator: str = ", ") -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _NAMED
    shown = separator.join(names[:_NAMED])
    return f"{shown}{separator}and {more:,} more" if more > 0 else shown


def aligned(rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """A table as lines.

    Args:
        rows: Cells of every row, the head first.
        left: Columns that are aligned to the left; the others are numbers.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _clips(identity: Mapping[str, Any]) -> str:
    views = identity["views"]
    stride = f" at stride {views['frame_stride']}" if "frame_stride" in views else ""
    scale = views.get("crop_scale")
    crop = f" {scale[0]:g} to {scale[1]:g}" if scale else ""
    flips = ", every second view mirrored" if views["flip"] else ""
    short = ", short videos repeat frames" if views["allow_short"] else ""
    return (
        f"{clip_size(identity)}, {views['frames']} frames{stride}, crop {views['crop']}{crop}, "
        f"view seed {views['seed']}{flips}{short}"
    )


def _scores(identity: Mapping[str, Any]) -> str:
    scores = identity["scores"]
    teacher = scores.get("teacher", {})
    made = [str(teacher[k]) for k in ("model", "factory", "precision") if k in teacher]
    return f"{scores['source']} of {', '.join(made)}" if made else str(scores["source"])


def _units(info: Info) -> str:
    if info.kept_units is None:
        return f"at most {info.max_kept} of {info.num_units} are kept of a clip"
    looked = (
        "" if info.kept_from == info.num_parts else f" (seen in {counted(info.kept_from, 'part')})"
    )
    return (
        f"{info.kept_units:.1f} of {info.num_units} are kept of a clip, at most "
        f"{info.max_kept}{looked}"
    )


def _holds(info: Info) -> str:
    rows = sum(info.statuses.values())
    bad = ", ".join(f"{n:,} {s}" for s, n in info.statuses.items() if s != "ok")
    state = f"{info.statuses.get('ok', 0):,} good, {bad}" if bad else "all good"
    return (
        f"{counted(info.num_shards, 'shard')} in {counted(info.num_views, 'view')}, "
        f"{counted(info.num_samples, 'sample')}: {counted(rows, 'row')}"
        + (f", {state}" if rows else "")
    )


def _table(columns: Sequence[ColumnInfo], num_parts: int) -> Iterator[str]:
    if not columns:
        yield "columns   none"
        return
    rows = [_HEAD, *(_cells(column, num_parts) for column in columns)]
    yield f"columns   {len(columns)} (bits: of a kept value; dense: all tokens in fp16)"
    yield from (f"  {line}" for line in aligned(rows, left=_LEFT))


def _cells(column: ColumnInfo, num_parts: int) -> tuple[str, ...]:
    bad = ", ".join(f"{n:,} {s}" for s, n in column.statuses.items() if s != "ok")
    rows = f"{column.statuses.get('ok', 0):,}" + (f" ({bad})" if bad else "")
    bits = "" if column.bits_per_value is None else f"{column.bits_per_value:.2f}"
    times = column.dense_bytes / column.stored_bytes if column.stored_bytes else 0.0
    return (
        column.column,
        column.teacher,
        column.precision,
        f"{column.width}",
        f"{column.parts:,}" + ("" if column.parts == num_parts else f" of {num_parts:,}"),
        rows,
        human_bytes(column.stored_bytes),
        human_bytes(column.raw_bytes),
        bits,
        f"1/{times:.1f}" if times else "",
    )


def _sizes(info: Info) -> Iterator[str]:
    base = ", ".join(f"{name} {human_bytes(size)}" for name, size in info.base_bytes.items())
    raw = sum(info.base_raw_bytes.values())
    columns = f"columns {human_bytes(info.column_bytes)}"
    if info.column_bytes:
        columns += f" ({info.dense_bytes / info.column_bytes:.1f} times smaller than dense fp16)"
    yield f"base      {base}; its arrays {human_bytes(raw)} before compression"
    yield (
        f"size      {human_bytes(info.stored_bytes)}: {columns}, base "
        f"{human_bytes(sum(info.base_bytes.values()))}, statistics and descriptions "
        f"{human_bytes(info.other_bytes)}"
    )
    free = f": `kdhiera cache gc {info.cache}` tells what can go" if info.unnamed_bytes else ""
    yield f"          {human_bytes(info.unnamed_bytes)} that no commit names{free}"


def gap_words(gaps: Gaps) -> str:
    """What is missing, with the first few by name."""
    said = []
    if unreached := gaps.unreached:
        said.append(f"{counted(len(unreached), 'shard')} without rows ({some(unreached)})")
    if missing := gaps.missing:
        first = [f"{part} lacks {', '.join(lacks)}" for part, lacks in missing.items()]
        said.append(f"{counted(len(missing), 'part')} not whole ({some(first, '; ')})")
    return "; ".join(said)


def _completeness(info: Info) -> str:
    if info.gaps:
        return f"no: {gap_words(info.gaps)}"
    return "yes: every shard has every view and column" if info.num_parts else "empty"


def _made(made: MadeBy) -> Iterator[str]:
    hosts = sorted({process.rpartition("/")[0] or process for process in made.processes})
    first, last = (
        time.strftime("%Y-%m-%d %H:%M", time.localtime(when)) for when in (made.first, made.last)
    )
    yield (
        f"made      {first} to {last} ({human_seconds(made.last - made.first)}) by "
        f"{counted(len(made.processes), 'process')} on {some(hosts)}"
    )
    versions = ", ".join(f"{package} {' or '.join(v)}" for package, v in made.versions.items())
    if versions:
        yield f"with      {versions}"
