"""The reader that docs/cache.md gives, which knows nothing of kdhiera, against kdhiera's own."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import ColumnStatus
from kdhiera.cache.reader import CacheReader
from kdhiera.views import RowStatus

ROOT = Path(__file__).parents[2]
CACHE = Path(__file__).parent / "fixtures" / "v1" / "cache"
PAGE = (ROOT / "docs" / "cache.md").read_text()
COLUMN = "image.9.int8"


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    names: dict[str, Any] = {}
    code = [c for c in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "def read_part" in c]
    assert "kdhiera" not in code[0]
    exec(code[0], names)
    return names


@pytest.mark.parametrize("view", [0, 1])
def test_the_reader_on_the_page_reads_what_ours_reads(page: dict[str, Any], view: int) -> None:
    cache = Cache.open(CACHE)
    reader = CacheReader(cache, num_views=2, columns=(COLUMN,))
    rows = reader.read(np.arange(reader.num_samples), view=view)
    ours = {k: torch.from_numpy(v) for k, v in rows.columns[COLUMN].items()}
    wanted = reader.codec(COLUMN).decode(ours, torch.from_numpy(rows.units)).numpy()
    found = page["read_part"](CACHE, "videos-0123456789ab", view, COLUMN)
    assert set(rows.uids) <= set(found)
    for i, uid in enumerate(rows.uids):
        kept = rows.units[i] >= 0
        units, pixels, features = found[uid]
        np.testing.assert_array_equal(units, rows.units[i][kept])
        np.testing.assert_array_equal(pixels, rows.pixels[i][kept])
        np.testing.assert_allclose(features, wanted[i][kept], rtol=1e-6)


def test_a_changed_record_is_noticed_by_it(page: dict[str, Any], tmp_path: Path) -> None:
    whole = (CACHE / "commits" / "videos-0123456789ab" / "0" / "base.json").read_bytes()
    (tmp_path / "base.json").write_bytes(whole.replace(b'"view":0', b'"view":1'))
    with pytest.raises(AssertionError):
        page["record"](tmp_path / "base.json")


def test_every_column_of_the_rows_is_told() -> None:
    table = pq.read_table(next(CACHE.rglob("rows.parquet")))
    told = set(
        re.findall(r"`(\w+)`", PAGE.partition("| in `rows.parquet`")[2].partition("\n\n")[0])
    )
    assert told >= set(table.column_names)


def test_every_status_is_told() -> None:
    page = (ROOT / "docs" / "statuses.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == {s.value for s in RowStatus}


def test_every_status_of_a_column_is_told() -> None:
    page = (ROOT / "docs" / "statuses.md").read_text()
    told = {int(n): s for n, s in re.findall(r"^\| (\d) \| `(\w+)` \|", page, re.MULTILINE)}
    assert told == {s.value: s.name.lower() for s in ColumnStatus}
