import itertools
import multiprocessing
import os
import shutil
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_cache import (
    COLUMNS,
    Content,
    assert_close,
    assert_holds,
    content,
    decoded,
    make_cache,
    write_part,
)

from kdhiera.cache import reader as reader_module
from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import PartId
from kdhiera.cache.reader import CacheReader
from kdhiera.errors import DamagedError, MismatchError

BAD = {("a-0", 0): (1,), ("a-0", 1): (1, 3), ("c-0", 1): (0,)}
SHARDS = {"a-0": 6, "b-0": 0, "c-0": 4, "d-0": 5}


def build(root: Path) -> tuple[Cache, dict[PartId, Content]]:
    """Three views of four shards, some rows bad in some views only."""
    cache = make_cache(root)
    parts = {
        (part := PartId(shard_id=shard, view=view)): content(
            part, rows, bad=BAD.get((shard, view), ())
        )
        for shard, rows in SHARDS.items()
        for view in range(2)
    }
    for part, what in parts.items():
        write_part(cache, part, what)
    return cache, parts


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, dict[PartId, Content]]:
    return build(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def reader(built: tuple[Cache, dict[PartId, Content]]) -> CacheReader:
    return CacheReader(built[0], num_views=2, columns=COLUMNS)


def expected_order(num_views: int = 2) -> list[tuple[str, int]]:
    """(shard, ordinal) of the samples that are good in every view, in order."""
    return [
        (shard, i)
        for shard, rows in SHARDS.items()
        for i in range(rows)
        if not any(i in BAD.get((shard, v), ()) for v in range(num_views))
    ]


def features_of(what: Content, ordinal: int) -> int:
    """Array row of a sample."""
    return [row.uid for row in what.good].index(what.rows[ordinal].uid)


def test_samples_are_numbered_by_shard_then_order_and_good_in_every_view(reader: CacheReader):
    order = expected_order()
    assert reader.num_samples == len(order)
    expected = [f"{shard}/{i * 512}/clip{i:03d}" for shard, i in order]
    assert reader.uids(np.arange(len(order))) == expected
    assert reader.labels(np.array([0, 3])) == [
        {"category": "bird", "number": order[0][1]},
        {"category": "bird", "number": order[3][1]},
    ]


def test_fewer_views_make_more_samples_trainable(built: tuple[Cache, dict[PartId, Content]]):
    one = CacheReader(built[0], num_views=1, columns=COLUMNS)
    assert one.num_samples == len(expected_order(1)) > len(expected_order(2))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data(), view=st.integers(0, 1))
def test_any_request_reads_the_right_rows_in_its_own_order(
    data: st.DataObject,
    view: int,
    reader: CacheReader,
    built: tuple[Cache, dict[PartId, Content]],
):
    order = expected_order()
    samples = np.array(data.draw(st.lists(st.integers(0, len(order) - 1), max_size=12)), np.int64)
    rows = reader.read(samples, view=view)
    assert len(rows.uids) == len(samples)
    features = {column: decoded(reader, rows, column) for column in COLUMNS}
    for k, sample in enumerate(samples):
        shard, ordinal = order[sample]
        what = built[1][PartId(shard_id=shard, view=view)]
        row = features_of(what, ordinal)
        assert rows.uids[k] == what.rows[ordinal].uid
        np.testing.assert_array_equal(rows.units[k], what.units[row])
        np.testing.assert_array_equal(rows.scores[k], what.scores[row])
        np.testing.assert_array_equal(rows.pixels[k], what.pixels[row])
        for column in COLUMNS:
            assert_close(column, features[column][k], what.features[column][row])


def test_only_the_columns_asked_for_are_read(reader: CacheReader):
    assert set(reader.read(np.arange(2), view=0).columns) == set(COLUMNS)
    assert set(reader.read(np.arange(2), view=0, columns=COLUMNS[1:]).columns) == {COLUMNS[1]}
    assert reader.read(np.arange(2), view=0, columns=()).columns == {}


def test_numbers_out_of_range_are_errors(reader: CacheReader):
    for samples in ([-1], [reader.num_samples]):
        with pytest.raises(IndexError, match="samples are numbered"):
            reader.read(np.array(samples), view=0)
    with pytest.raises(IndexError, match="views are numbered 0 to 1, got 2"):
        reader.read(np.array([0]), view=2)


def test_coverage_counts_rows_and_says_so(reader: CacheReader):
    found = reader.coverage
    assert (found.num_shards, found.num_samples, found.trainable) == (4, 15, len(expected_order()))
    assert found.rows == {"decode_error": 4, "ok": 26}
    assert found.columns == {c: {"ok": 26} for c in COLUMNS}
    assert found.describe() == (
        "12 of 15 samples are trainable (80.0 %) in 2 views of 4 shards; bad rows: 4 decode_error"
    )


def test_samples_are_those_good_in_every_view_and_column(tmp_path: Path):
    """Rows bad by chance in some views, and in some columns of some views."""
    rng = np.random.default_rng(0)
    cache = make_cache(tmp_path)
    good: dict[str, np.ndarray] = {}
    parts: dict[PartId, Content] = {}
    for shard, view in itertools.product(("a-0", "b-0", "c-0"), range(2)):
        part = PartId(shard_id=shard, view=view)
        bad = np.flatnonzero(rng.random(20) < 0.2)
        what = content(part, 20, bad=bad.tolist())
        ordinals = np.setdiff1d(np.arange(20), bad)
        features = {name: values.copy() for name, values in what.features.items()}
        for column in COLUMNS:
            broken = rng.random(len(ordinals)) < 0.1
            features[column][broken] = np.nan
            bad = np.union1d(bad, ordinals[broken])
        parts[part] = replace(what, features=features)
        write_part(cache, part, parts[part])
        good[shard] = np.setdiff1d(good.get(shard, np.arange(20)), bad)
    reader = CacheReader(cache, num_views=2, columns=COLUMNS)
    expected = [(shard, int(i)) for shard, left in good.items() for i in left]
    assert 0 < reader.num_samples == len(expected) < 40
    for view in range(2):
        rows = reader.read(np.arange(reader.num_samples), view=view)
        for k, (shard, ordinal) in enumerate(expected):
            what = parts[PartId(shard_id=shard, view=view)]
            assert rows.uids[k] == what.rows[ordinal].uid
            row = features_of(what, ordinal)
            assert np.array_equal(rows.units[k], what.units[row])
            assert np.array_equal(rows.pixels[k], what.pixels[row])
            found = decoded(reader, rows, COLUMNS[0])[k]
            assert_close(COLUMNS[0], found, what.features[COLUMNS[0]][row])


def test_opening_reads_records_alone(built: tuple[Cache, dict[PartId, Content]], tmp_path: Path):
    """Bad rows are named by the records: an index needs no other file."""
    root = shutil.copytree(built[0].url, tmp_path / "cache")
    shutil.rmtree(root / "parts")
    reader = CacheReader(Cache.open(root), num_views=2, columns=COLUMNS)
    assert reader.num_samples == len(expected_order())
    with pytest.raises(DamagedError, match="is missing"):
        reader.read(np.array([0]), view=0)


def test_statistics_cover_all_tokens_of_all_parts(
    reader: CacheReader, built: tuple[Cache, dict[PartId, Content]]
):
    for column in COLUMNS:
        tokens = np.concatenate([w.tokens[column] for w in built[1].values()]).astype(np.float64)
        found = reader.statistics(column)
        assert found.count == len(tokens)
        np.testing.assert_allclose(found.mean, tokens.mean(0), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found.std, tokens.std(0), rtol=1e-10)
        assert reader.width(column) == tokens.shape[1]


def test_missing_parts_and_columns_refuse_and_are_named(tmp_path: Path):
    cache = make_cache(tmp_path)
    write_part(cache, PartId(shard_id="a-0", view=0))
    write_part(cache, PartId(shard_id="b-0", view=0), columns=COLUMNS[:1])
    with pytest.raises(MismatchError, match=r"b-0 view 0 lacks video\.2\.int8.*extract-teachers"):
        CacheReader(cache, num_views=1, columns=COLUMNS)
    assert CacheReader(cache, num_views=1, columns=COLUMNS[:1]).num_samples == 10
    with pytest.raises(MismatchError, match=r"a-0 view 1 lacks base, image.*allow_partial=true"):
        CacheReader(cache, num_views=2, columns=COLUMNS[:1])
    with pytest.raises(MismatchError, match="z-0 view 0 lacks base"):
        CacheReader(cache, num_views=1, columns=(), shards=["a-0", "z-0"])
    with pytest.raises(MismatchError, match="and 5 parts more"):
        CacheReader(cache, num_views=5, columns=())


def test_a_partial_cache_trains_on_the_shards_that_are_whole(tmp_path: Path):
    cache = make_cache(tmp_path)
    with pytest.raises(MismatchError, match="has no shard with 1 views"):
        CacheReader(cache, num_views=1, columns=COLUMNS, allow_partial=True)
    a, b = (PartId(shard_id=s, view=0) for s in ("a-0", "b-0"))
    write_part(cache, a)
    write_part(cache, b, columns=COLUMNS[:1])
    reader = CacheReader(cache, num_views=1, columns=COLUMNS, allow_partial=True)
    assert_holds(reader, {a: content(a)})
    assert reader.coverage.missing == {b: COLUMNS[1:]}
    assert "1 parts are not extracted yet" in reader.coverage.describe()


def test_chosen_shards_are_read_alone(built: tuple[Cache, dict[PartId, Content]]):
    cache, parts = built
    reader = CacheReader(cache, num_views=1, columns=COLUMNS, shards={"d-0"})
    part = PartId(shard_id="d-0", view=0)
    assert_holds(reader, {part: parts[part]})


def test_a_reader_keeps_to_what_was_there_when_it_opened(tmp_path: Path):
    cache = make_cache(tmp_path)
    a, b = (PartId(shard_id=s, view=0) for s in ("a-0", "b-0"))
    write_part(cache, b)
    reader = CacheReader(cache, num_views=1, columns=COLUMNS)
    snapshot = reader.snapshot_sha256
    assert CacheReader(cache, num_views=1, columns=COLUMNS).snapshot_sha256 == snapshot
    write_part(cache, a)
    assert_holds(reader, {b: content(b)})
    assert CacheReader(cache, num_views=1, columns=COLUMNS).snapshot_sha256 != snapshot
    fewer = CacheReader(cache, num_views=1, columns=COLUMNS, shards={"b-0"})
    assert fewer.snapshot_sha256 == snapshot
    other = CacheReader(cache, num_views=1, columns=COLUMNS[:1], shards={"b-0"})
    assert other.snapshot_sha256 != snapshot


def test_views_that_list_other_samples_are_refused(tmp_path: Path):
    cache = make_cache(tmp_path)
    write_part(cache, PartId(shard_id="a-0", view=0))
    other = PartId(shard_id="a-0", view=1)
    write_part(cache, other, content(other, 4))
    with pytest.raises(DamagedError, match="its samples are not those of a-0 view 0"):
        CacheReader(cache, num_views=2, columns=COLUMNS)


def test_parts_that_are_closed_open_again(
    built: tuple[Cache, dict[PartId, Content]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reader_module, "_OPEN_PARTS", 1)
    cache, parts = built
    one = {p: w for p, w in parts.items() if p.view == 0}
    reader = CacheReader(cache, num_views=1, columns=COLUMNS)
    assert_holds(reader, one)
    assert_holds(reader, one)
    assert len(reader._opened) == 1


def test_threads_share_a_reader(reader: CacheReader):
    expected = [reader.read(np.arange(reader.num_samples), view=v) for v in range(2)]
    problems: list[str] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(20):
            view = int(rng.integers(2))
            samples = rng.integers(0, reader.num_samples, 5)
            rows = reader.read(samples, view=view)
            if not np.array_equal(rows.pixels, expected[view].pixels[samples]):
                problems.append(f"{seed}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


class Clips(torch.utils.data.Dataset[torch.Tensor]):
    """Pixels of single samples, as a torch loader wants them."""

    def __init__(self, reader: CacheReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return self.reader.num_samples

    def __getitem__(self, sample: int) -> torch.Tensor:
        return torch.from_numpy(self.reader.read(np.array([sample]), view=0).pixels[0])


def test_a_spawned_process_reads_the_same(reader: CacheReader):
    samples = np.array([3, 0, 3, 7])
    here = reader.read(samples, view=1)  # its files are open when it is sent
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        there = pool.submit(reader.read, samples, view=1).result()
    assert there.uids == here.uids
    np.testing.assert_array_equal(there.pixels, here.pixels)
    for column in COLUMNS:
        for name, array in here.columns[column].items():
            np.testing.assert_array_equal(there.columns[column][name], array)


def test_a_spawned_torch_loader_reads_the_same(reader: CacheReader):
    loader = torch.utils.data.DataLoader(
        Clips(reader), batch_size=5, num_workers=1, multiprocessing_context="spawn"
    )
    pixels = torch.cat(list(loader)).numpy()
    everything = reader.read(np.arange(reader.num_samples), view=0)
    np.testing.assert_array_equal(pixels, everything.pixels)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_memory_and_open_files_stay_flat_over_many_epochs(
    built: tuple[Cache, dict[PartId, Content]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reader_module, "_OPEN_PARTS", 3)  # of 6 that hold rows: always reopening
    reader = CacheReader(built[0], num_views=2, columns=COLUMNS)
    everything = np.arange(reader.num_samples)

    def epochs(count: int) -> None:
        for i in range(count):
            reader.read(everything, view=i % 2)

    epochs(20)
    before = resident_bytes(), len(os.listdir("/proc/self/fd"))
    epochs(100)
    assert resident_bytes() - before[0] < 20e6
    assert len(os.listdir("/proc/self/fd")) <= before[1] + 2
    assert len(reader._opened) == 3
