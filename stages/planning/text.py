"""A plan on one screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdhiera.progress import counted, human_bytes, human_seconds
from kdhiera.report.tables import Table, to_text

if TYPE_CHECKING:
    from kdhiera.stages.planning.figures import RunPlan


_BUSY = 0.8  # share of the CPUs; with less, others are at work


def screen(plan: RunPlan) -> str:
    """What a run takes, for people."""
    return "\n".join(
        [
            *_clips(plan),
            "",
            *_bytes(plan),
            *_space(plan),
            "",
            *_extraction(plan),
            "",
            *_training(plan),
            "",
            *_alternatives(plan),
            *(f"problem   {problem}" for problem in plan.problems),
        ]
    )


def _clips(plan: RunPlan) -> list[str]:
    clips = plan.num_samples * plan.num_views
    there = f"          {human_bytes(plan.there_bytes)} are there already"
    return [
        f"clips     {counted(plan.num_samples, 'sample')} of {counted(plan.num_shards, 'shard')} "
        f"x {counted(plan.num_views, 'view')} = {counted(clips, 'clip')}; of {plan.tried} that "
        f"were tried {plan.good} decode",
        plan.extract.describe(),
        *([there] if plan.there_bytes else []),
    ]


def _bytes(plan: RunPlan) -> list[str]:
    rows = [
        (p.name, *(human_bytes(b) for b in (p.clip_bytes, p.whole_bytes, p.missing_bytes)))
        for p in plan.bytes
    ]
    a_clip = sum(p.clip_bytes for p in plan.bytes)
    total = (human_bytes(b) for b in (a_clip, plan.whole_bytes, plan.missing_bytes))
    table = Table(
        headers=("stored", "a clip", "all clips", "missing"),
        rows=(*rows, ("in all", *total)),
        numeric=frozenset({1, 2, 3}),
    )
    return to_text(table).splitlines()


def _space(plan: RunPlan) -> list[str]:
    space = plan.space
    line = (
        f"space     {human_bytes(space.needed_bytes)} needed, {human_bytes(space.free_bytes)} "
        f"free in {space.folder}"
    )
    if space.fits:
        return [line]
    return [
        line,
        "warning   it does not fit: free some space, set cache.dir to another disk (TMPDIR before "
        "a bucket), or choose a smaller way to store it below",
    ]


def _extraction(plan: RunPlan) -> list[str]:
    found = plan.extraction
    of_clip = [f"decode {_short(found.decode_seconds)}"]
    of_clip += [f"{t.name} {_short(t.seconds)} ({_macs(t.macs)})" for t in found.teachers]
    of_clip.append(f"store {_short(found.store_seconds)}")
    on = f"{counted(found.workers, 'worker')} on {found.device}"
    if not found.seconds:
        what = "nothing to do"
    else:
        what = (
            f"{human_seconds(found.seconds)} with {on}, {human_seconds(found.start_seconds)} of it "
            "to load teachers"
        )
    busy = []
    if found.cpu_share < _BUSY:
        busy = [
            f"          other work takes {100 * (1 - found.cpu_share):.0f} % of the CPUs now: with "
            f"nothing else running, about {human_seconds(found.cpu_share * found.seconds)}"
        ]
    return [
        f"extract   {what}",
        *busy,
        f"          a clip, with {on} at it: {', '.join(of_clip)}",
        f"          every further view of all clips: {human_seconds(found.view_seconds)}, "
        f"{human_bytes(plan.whole_bytes / plan.num_views)}",
    ]


def _training(plan: RunPlan) -> list[str]:
    found = plan.training
    steps = ", ".join(
        f"{_short(seconds)} at ratio {ratio:g} ({_macs(found.clip_macs[ratio])} a clip, forward)"
        for ratio, seconds in found.step_seconds.items()
    )
    times = found.live_epoch_seconds / found.cached_epoch_seconds
    lines = [
        f"train     {human_seconds(found.seconds)} on {found.device}: {found.steps:,} steps in "
        f"{found.epochs:g} epochs; a step takes {steps}",
        f"epoch     {_short(found.cached_epoch_seconds)} from the cache, "
        f"{_short(found.live_epoch_seconds)} with live teachers: {times:.1f} times as long",
    ]
    cached = plan.extraction.seconds + found.seconds
    live = found.live_epoch_seconds * found.epochs
    lines.append(
        f"all       {human_seconds(cached)} with the cache, {human_seconds(live)} with live "
        f"teachers; even after {counted(found.break_even_epochs, 'epoch')}"
    )
    return lines


def _alternatives(plan: RunPlan) -> list[str]:
    """Encodings down, kept units across."""
    by = {(a.encoding, a.keep): a for a in plan.alternatives}
    rows = []
    for encoding in dict.fromkeys(a.encoding for a in plan.alternatives):
        cells = [
            human_bytes(value) + (" *" if (encoding, keep) == (plan.encoding, plan.keep) else "")
            for keep in ("plan", "all")
            for value in (by[encoding, keep].clip_bytes, by[encoding, keep].whole_bytes)
        ]
        rows.append((encoding, *cells))
    table = Table(
        headers=(
            "encoding",
            "a clip, masks.keep=plan",
            "all clips",
            "a clip, keep=all",
            "all clips",
        ),
        rows=tuple(rows),
        numeric=frozenset({1, 2, 3, 4}),
    )
    return [*to_text(table).splitlines(), "          * what the run does"]


def _short(seconds: float) -> str:
    """`12 ms`, `1.23 s` or `3:20`."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 60 else human_seconds(seconds)


def _macs(macs: int) -> str:
    return f"{macs / 1e9:.3g} GMACs"
