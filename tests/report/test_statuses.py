import numpy as np
import pytest
from texts import assert_words_are_apart, text_boxes

from kdhiera.cache.layout import ColumnStatus
from kdhiera.report.statuses import MEANINGS, Offender, StatusPicture, show_statuses
from kdhiera.views import RowStatus


def _offender(status: str, num_frames: int, message: str = "the file is cut short") -> Offender:
    frame = np.full((64, 96, 3), 90, np.uint8)
    return Offender(
        status=status,
        key="a/$key_of^some",
        where="shard-000123456789-abcdef012345, view 1, column image.12.compact",
        message=message,
        frames=(frame,) * num_frames,
        frames_note=f"frames 1, 2, 3 of {num_frames}" if num_frames else "",
    )


ROWS = {"corrupt_frames": 3, "ok": 1234567, "decode_error": 12345}
COLUMNS = {
    "image.12.int8": {"ok": 1234560, "nonfinite": 7},
    "video.3.int8": {"ok": 1234567},
}


@pytest.mark.parametrize(("columns", "num"), [({}, 0), (COLUMNS, 1), ({}, 8)])
def test_words_are_apart(columns, num):
    offenders = tuple(
        _offender(status, i % 4, "a long message " * i)
        for i, status in zip(range(num), [*RowStatus, "nonfinite"] * 2, strict=False)
    )
    picture = StatusPicture(title="demo", rows=ROWS, columns=columns, offenders=offenders)
    figure = show_statuses(picture)
    assert_words_are_apart(figure)
    frames = [axes for axes in figure.axes if axes.images]
    assert len(frames) == sum(min(len(o.frames), 3) for o in offenders)
    empty = [words for words, _ in text_boxes(figure) if words == "nothing to show"]
    assert len(empty) == sum(not o.frames for o in offenders)


def test_bars_are_the_counts_good_rows_first():
    figure = show_statuses(StatusPicture(title="demo", rows=ROWS, columns=COLUMNS, offenders=()))
    rows, columns = figure.axes
    assert [bar.get_width() for bar in rows.patches] == [1234567, 12345, 3]
    names = [label.get_text() for label in rows.get_yticklabels()]
    assert names == ["ok", "decode_error", "corrupt_frames"]
    assert [bar.get_width() for bar in columns.patches] == [7]
    assert [label.get_text() for label in columns.get_yticklabels()] == ["image.12.int8 nonfinite"]
    assert [t.get_text() for t in rows.texts] == [
        "1,234,567 (99.0 %)", "12,345 (1.0 %)", "3 (0.0 %)"
    ]  # fmt: skip


def test_every_status_has_a_meaning():
    statuses = {status.value for status in RowStatus}
    assert MEANINGS.keys() == statuses | {s.name.lower() for s in ColumnStatus}


def test_long_words_are_cut_with_an_ellipsis():
    offender = _offender("decode_error", 3, "x" * 300)
    figure = show_statuses(
        StatusPicture(title="demo", rows=ROWS, columns={}, offenders=(offender,))
    )
    assert_words_are_apart(figure)
    assert any(words.endswith("…") for words, _ in text_boxes(figure))
