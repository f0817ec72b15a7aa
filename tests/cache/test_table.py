from dataclasses import replace

import pytest
from tiny_cache import content

from kdhiera.cache.layout import PartId
from kdhiera.cache.table import (
    count_statuses,
    from_parquet,
    read_columns,
    rows_digest,
    samples_digest,
    to_parquet,
)
from kdhiera.views import RowStatus

PART = PartId(shard_id="a-0", view=0)
ROWS = content(PART, 5, bad=(1, 3)).rows
KEPT = (10, 20, 30)


def test_rows_come_back_and_good_ones_are_numbered():
    data = to_parquet(ROWS, KEPT)
    assert from_parquet(data) == list(ROWS)
    table = read_columns(data, ["array_row", "kept_crc32c", "key"]).to_pydict()
    assert table["array_row"] == [0, None, 1, None, 2]
    assert table["kept_crc32c"] == [10, None, 20, None, 30]


def test_no_rows_are_rows_too():
    assert from_parquet(to_parquet([], [])) == []


def test_statuses_are_counted():
    assert count_statuses(ROWS) == {"decode_error": 2, "ok": 3}


def changed(index: int, **changes: object) -> list:
    rows = list(ROWS)
    rows[index] = replace(rows[index], **changes)
    return rows


@pytest.mark.parametrize(
    "rows",
    [
        changed(0, key="other"),
        changed(0, uid="other"),
        changed(0, source_offset=7),
        ROWS[:-1],
        [ROWS[1], ROWS[0], *ROWS[2:]],
    ],
)
def test_samples_digest_says_which_samples_in_which_order(rows: list):
    assert samples_digest(rows) != samples_digest(ROWS)


def test_samples_digest_does_not_depend_on_what_became_of_them():
    assert samples_digest(changed(0, status=RowStatus.TOO_SHORT)) == samples_digest(ROWS)


def test_rows_digest_says_what_a_column_depends_on():
    same = rows_digest(ROWS, KEPT)
    assert rows_digest(changed(0, message="x", labels={}, num_frames=1), KEPT) == same
    assert rows_digest(ROWS, (10, 21, 30)) != same
    assert rows_digest(changed(1, status=RowStatus.DECODE_TIMEOUT), KEPT) != same
    assert rows_digest(changed(4, status=RowStatus.DECODE_ERROR), KEPT[:2]) != same
