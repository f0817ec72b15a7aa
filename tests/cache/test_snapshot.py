import contextlib
import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_cache import COLUMNS, add_column, assert_holds, content, make_cache, write_part

from kdhiera.cache import snapshot as snapshot_module
from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import PartId, commit_file
from kdhiera.cache.reader import CacheReader
from kdhiera.cache.snapshot import SNAPSHOT_FILE, Snapshot, load_snapshot, save_snapshot
from kdhiera.errors import DamagedError, MismatchError

A, B, C = (PartId(shard_id=s, view=0) for s in ("a-0", "b-0", "c-0"))


def reader_of(cache: Cache, snapshot: Snapshot | None = None, num_views: int = 1) -> CacheReader:
    return CacheReader(cache, num_views=num_views, columns=COLUMNS, snapshot=snapshot)


def test_a_grown_cache_reads_as_it_was(tmp_path: Path):
    cache = make_cache(tmp_path)
    write_part(cache, B)
    write_part(cache, C)
    first = reader_of(cache)
    write_part(cache, A)  # sorts before the others: it would renumber all samples
    write_part(cache, PartId(shard_id="b-0", view=1))
    add_column(cache, "image.norm.int8")
    base = cache.part_commits(B).base
    write_part(cache, B, columns=["image.norm.int8"], base=base)
    assert reader_of(cache).num_samples == 15

    again = reader_of(Cache.open(tmp_path), first.snapshot)
    assert again.num_samples == 10
    assert again.snapshot == first.snapshot
    assert again.snapshot_sha256 == first.snapshot_sha256
    assert_holds(again, {B: content(B), C: content(C)})
    for column in COLUMNS:
        before, after = first.statistics(column), again.statistics(column)
        assert before.count == after.count
        assert np.array_equal(before.mean, after.mean)
        assert np.array_equal(before.m2, after.m2)


def test_what_a_partial_cache_lacked_stays_out(tmp_path: Path):
    cache = make_cache(tmp_path)
    write_part(cache, A)
    write_part(cache, B, columns=COLUMNS[:1])
    first = CacheReader(cache, num_views=1, columns=COLUMNS, allow_partial=True)
    base = cache.part_commits(B).base
    write_part(cache, B, columns=COLUMNS[1:], base=base)
    assert_holds(reader_of(cache, first.snapshot), {A: content(A)})


def rewrite(cache: Cache) -> None:
    """The same part by another attempt."""
    cache.store.delete_folder("commits/a-0")
    write_part(cache, A)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.store.delete_folder("commits/a-0"), r"base of a-0 view 0 .* is gone"),
        (
            lambda c: c.store.delete([commit_file(A, COLUMNS[1])]),
            r"column video\.2\.int8 .* is gone",
        ),
        (rewrite, r"base of a-0 view 0 .* was replaced by another one"),
        (
            lambda c: c.store.delete_folder(f"columns/{COLUMNS[0]}"),
            r"column image\.1\.int8 .* is gone",
        ),
    ],
    ids=["part", "column record", "rewritten", "column"],
)
def test_a_commit_that_is_not_there_any_more_is_refused(
    tmp_path: Path, change: Callable[[Cache], None], message: str
):
    cache = make_cache(tmp_path)
    write_part(cache, A)
    write_part(cache, B)
    snapshot = reader_of(cache).snapshot
    change(cache)
    with pytest.raises(MismatchError, match=message) as raised:
        snapshot.find(Cache.open(tmp_path))
    assert "start again with --overwrite" in str(raised.value)


def test_other_views_or_columns_are_refused(tmp_path: Path):
    cache = make_cache(tmp_path)
    write_part(cache, A)
    snapshot = reader_of(cache).snapshot
    with pytest.raises(MismatchError, match=r"began with 1 views of .* asks for 2 views"):
        reader_of(cache, snapshot, num_views=2)
    with pytest.raises(MismatchError, match=r"asks for 1 views of image\.1\.int8: go back"):
        CacheReader(cache, num_views=1, columns=COLUMNS[:1], snapshot=snapshot)
    swapped = CacheReader(cache, num_views=1, columns=COLUMNS[::-1], snapshot=snapshot)
    assert swapped.snapshot == snapshot


def try_load(folder: Path, snapshot: Snapshot) -> None:
    """Refused, or the same: some bits of gzip's header say nothing."""
    with contextlib.suppress(DamagedError):
        assert load_snapshot(folder) == snapshot


@pytest.mark.parametrize("gzip_above", [0, 2**20])
def test_a_run_folder_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gzip_above: int):
    monkeypatch.setattr(snapshot_module, "_GZIP_ABOVE", gzip_above)
    cache = make_cache(tmp_path / "cache")
    write_part(cache, A)
    snapshot = reader_of(cache).snapshot
    assert load_snapshot(tmp_path) is None
    save_snapshot(tmp_path, snapshot)
    assert load_snapshot(tmp_path) == snapshot
    data = (tmp_path / SNAPSHOT_FILE).read_bytes()
    text = gzip.decompress(data) if gzip_above == 0 else data
    base = cache.part_commits(A).base
    assert base.sha256.encode() in text
    for cut in range(0, len(data), 7):
        flipped = bytearray(data)
        flipped[cut] ^= 1
        for broken in (data[:cut], bytes(flipped)):
            (tmp_path / SNAPSHOT_FILE).write_bytes(broken)
            try_load(tmp_path, snapshot)
    (tmp_path / SNAPSHOT_FILE).write_bytes(data[:100])
    with pytest.raises(DamagedError, match=r"is damaged: restore it .* --overwrite"):
        load_snapshot(tmp_path)
