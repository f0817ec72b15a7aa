"""What became of the rows of a cache, and the samples behind those that are not good."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from kdhiera.report.plots import COLOURS, INK, clean, plain

SOFT = "#606060"
GOOD, BAD = COLOURS[0], COLOURS[1]
# Inches.
WIDTH, EDGE, GUTTER = 13.5, 0.15, 0.4
TOP, BAR, AXIS, HEADING = 0.6, 0.34, 0.75, 0.45
THUMB, THUMB_GAP, NUM_THUMBS, CARD, CARD_GAP = 0.98, 0.04, 3, 1.25, 0.2
CARD_WIDTH = (WIDTH - 2 * EDGE - GUTTER) / 2
LETTER = 0.0095  # mean width of a letter, times its size in points
LINES = 6  # beside the frames
MEANINGS = {
    "ok": "has a clip; training uses it",
    "missing_member": "the shard holds no video of the sample",
    "decode_error": "the file is no video that can be decoded",
    "decode_timeout": "the decoder hangs",
    "decode_limit": "larger or longer than decode.* allows",
    "too_short": "fewer frames than a clip has",
    "corrupt_frames": "a frame that the clip needs is damaged",
    "nonfinite": "the teacher gave NaN or infinity",
    "overflow": "a value is too large for the column's encoding",
    "teacher_error": "the teacher failed on this clip",
    "replay_mismatch": "decoded again, the clip was another one",
}


@dataclass(frozen=True, kw_only=True)
class Offender:
    """A sample with a row that is not good.

    Args:
        status: Of the row, or of the row in a column.
        key: Of the sample.
        where: Shard, view and, for a column's status, the column.
        message: Why, in words; empty where nobody knows more than the status.
        frames: What can be shown of the video; empty if nothing.
        frames_note: Which frames these are.
    """

    status: str
    key: str
    where: str
    message: str
    frames: tuple[UInt8[np.ndarray, "h w 3"], ...]
    frames_note: str


@dataclass(frozen=True, kw_only=True)
class StatusPicture:
    """All that `show_statuses` draws.

    Args:
        title: Which cache, in plain words.
        rows: Rows (a sample in a view) by status.
        columns: Good rows by column and status.
        offenders: Those to be shown, in order.
    """

    title: str
    rows: Mapping[str, int]
    columns: Mapping[str, Mapping[str, int]]
    offenders: tuple[Offender, ...]


def show_statuses(picture: StatusPicture) -> Figure:
    """Bars of rows by status, and below them a card for every offending sample.

    Args:
        picture: What to draw.
    """
    bars = [_bars(picture.rows), _column_bars(picture.columns)]
    chart = BAR * max(map(len, bars))
    lines = math.ceil(len(picture.offenders) / 2)
    cards = HEADING + lines * (CARD + CARD_GAP) if lines else 0.0
    height = TOP + HEADING + chart + AXIS + cards
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    _write(figure, EDGE, height - 0.18, picture.title, size=15, weight="bold", va="top")
    titles = (
        "Rows (a sample in a view)",
        "Good rows that a column cannot use" if bars[1] else "What the statuses mean",
    )
    for number, (values, title) in enumerate(zip(bars, titles, strict=True)):
        left = EDGE + number * (CARD_WIDTH + GUTTER)
        _write(figure, left, height - TOP - 0.25, title, size=11.5)
        if values:
            below = height - TOP - HEADING - BAR * len(values)
            label = 2.1
            box = (left + label, below, CARD_WIDTH - label - 0.9, BAR * len(values))
            axes = figure.add_axes(_share(figure, *box))
            _draw_bars(axes, values, total=sum(picture.rows.values()))
        else:
            for place, status in enumerate(bars[0]):
                y = height - TOP - HEADING - BAR * (place + 0.6)
                _write(figure, left, y, status, size=9.5, color=GOOD if status == "ok" else BAD)
                _write(figure, left + 1.5, y, MEANINGS[status], size=9.5)
    if lines:
        _write(figure, EDGE, cards - 0.2, "Some of the offending samples", size=11.5)
    for number, offender in enumerate(picture.offenders):
        line, side = divmod(number, 2)
        _card(
            figure,
            offender,
            EDGE + side * (CARD_WIDTH + GUTTER),
            cards - HEADING - line * (CARD + CARD_GAP) - CARD,
        )
    return figure


def _bars(rows: Mapping[str, int]) -> dict[str, int]:
    """Good rows first, then the bad by how many there are."""
    bad = {s: n for s, n in rows.items() if s != "ok"}
    ordered = dict(sorted(bad.items(), key=lambda item: -item[1]))
    return {"ok": rows.get("ok", 0), **ordered}


def _column_bars(columns: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    return {
        f"{column} {status}": count
        for column, statuses in columns.items()
        for status, count in statuses.items()
        if status != "ok"
    }


def _draw_bars(axes: Axes, values: Mapping[str, int], *, total: int) -> None:
    places = np.arange(len(values))
    colours = [GOOD if name == "ok" else BAD for name in values]
    axes.barh(places, [*values.values()], 0.66, color=colours)
    for place, count in enumerate(values.values()):
        axes.annotate(
            f"{count:,} ({100 * count / total:.1f} %)", (count, place), (5, 0),
            textcoords="offset points", va="center", fontsize=9.5, color=INK,
        )  # fmt: skip
    clean(axes, grid="x")
    axes.set_xlim(0, max(values.values()) * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_yticks(places, [plain(name) for name in values])
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, labelsize=9.5)
    axes.set_xlabel("rows (share of all rows)", color=SOFT, fontsize=9.5)


def _card(figure: Figure, offender: Offender, left: float, bottom: float) -> None:
    """Two lines of names; below them frames, or a grey box, and the message beside them."""
    top = bottom + CARD
    fits = int(CARD_WIDTH / (LETTER * 11))
    head = textwrap.shorten(f"{offender.status}: {offender.key}", fits, placeholder=" …")
    _write(figure, left, top, head, size=11, weight="bold", va="top", color=BAD)
    strip = NUM_THUMBS * THUMB + (NUM_THUMBS - 1) * THUMB_GAP
    for number, frame in enumerate(offender.frames[:NUM_THUMBS]):
        axes = figure.add_axes(
            _share(figure, left + number * (THUMB + THUMB_GAP), bottom, THUMB, THUMB)
        )
        axes.imshow(frame, interpolation="antialiased")
        axes.set_axis_off()
    if not offender.frames:
        axes = figure.add_axes(_share(figure, left, bottom, strip, THUMB))
        axes.set_facecolor("#d9d9d9")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.text(0.5, 0.5, "nothing to show", ha="center", va="center", size=10, color=SOFT)
    beside = left + strip + 0.15
    letters = int((CARD_WIDTH - strip - 0.15) / (LETTER * 9.5))
    where = _wrapped(offender.where, letters, 2)
    note = _wrapped(offender.frames_note, letters, 1)
    message = _wrapped(offender.message, letters, LINES - len(where) - len(note))
    for number, line in enumerate([*where, *note, *message]):
        colour = SOFT if number < len(where) else INK
        y = bottom + THUMB - number * THUMB / LINES
        _write(figure, beside, y, line, size=9.5, va="top", color=colour)


def _wrapped(text: str, letters: int, lines: int) -> Sequence[str]:
    """Lines of so many letters, the last one with an ellipsis if there is more."""
    return textwrap.wrap(text, letters, max_lines=lines, placeholder=" …")


def _write(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    width, height = figure.get_size_inches()
    style.setdefault("color", INK)
    figure.text(x / width, y / height, plain(text), **style)


def _share(
    figure: Figure, x: float, y: float, width: float, height: float
) -> tuple[float, float, float, float]:
    """A box in inches as shares of the figure."""
    across, up = figure.get_size_inches()
    return x / across, y / up, width / across, height / up
