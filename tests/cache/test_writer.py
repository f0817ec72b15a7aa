import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import tensorstore as ts
import torch
import zarr
from tiny_cache import (
    COLUMNS,
    SOURCE,
    WIDTHS,
    assert_holds,
    begin,
    content,
    fill,
    folder_of,
    make_cache,
    write_part,
)

from kdhiera.cache import layout
from kdhiera.cache.commit import Cache
from kdhiera.cache.encoding import make_codec
from kdhiera.cache.layout import ColumnStatus, PartId
from kdhiera.cache.reader import CacheReader, read_base
from kdhiera.cache.records import unseal
from kdhiera.cache.stats import ChannelStatistics
from kdhiera.errors import KdhieraError, MismatchError
from kdhiera.stores import LocalStore

PART = PartId(shard_id="a-0", view=0)
ALL = tuple(WIDTHS)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return make_cache(tmp_path / "cache", ALL)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of 4 rows, so that a few rows make several; rows of codes are chunks as well."""
    monkeypatch.setattr(layout, "ZARR_SHARD_ROWS", 4)
    monkeypatch.setattr(layout, "SMALL_ROW_BYTES", 64)


def attempts(cache: Cache, part: PartId = PART) -> list[Path]:
    folder = Path(cache.url) / "parts" / part.shard_id / str(part.view)
    return sorted(folder.iterdir()) if folder.is_dir() else []


def stored_arrays(cache: Cache) -> Iterator[tuple[Path, np.ndarray]]:
    """Every array that a part should hold, with its values."""
    what = content(PART, 11, bad=(0, 5))
    commits = cache.commits()[PART]
    base = folder_of(cache, commits.base) / "base.zarr"
    yield base / "units", what.units
    yield base / "scores", what.scores
    yield base / "pixels", what.pixels
    for column, commit in commits.columns.items():
        group = folder_of(cache, commit) / layout.column_group(column)
        yield group / "status", np.zeros(len(what.units), np.uint8)
        features = torch.from_numpy(what.features[column])
        units = torch.from_numpy(what.units.astype(np.int64))
        codec = make_codec(layout.parse_column(column).encoding, width=features.shape[-1])
        for name, values in codec.encode(features, units).arrays.items():
            yield group / name, values.numpy()


@pytest.mark.usefixtures("small_blocks")
def test_plain_zarr_and_tensorstore_read_what_was_written(cache: Cache):
    write_part(cache, PART, content(PART, 11, bad=(0, 5)), ALL)
    checked = 0
    for path, expected in stored_arrays(cache):
        array = zarr.open_array(path, mode="r")
        np.testing.assert_array_equal(array[...], expected)
        assert array.dtype == expected.dtype
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
        np.testing.assert_array_equal(ts.open(spec).result().read().result(), expected)
        checked += 1
    assert checked == 3 + 3 * 3 + 2


@pytest.mark.usefixtures("small_blocks")
def test_a_part_is_two_plain_zarr_groups_that_describe_themselves(cache: Cache):
    write_part(cache, PART, content(PART, 11), ALL)
    folder = attempts(cache)[0]
    assert sorted(p.name for p in folder.iterdir()) == [
        "attempt.json",
        "base.zarr",
        "rows.parquet",
        "stats.npz",
        "targets.zarr",
    ]
    targets = zarr.open_group(folder / "targets.zarr", mode="r")
    assert sorted(targets["image"]) == ["1.fp32", "1.int8", "norm.int8"]
    group = targets["image/1.int8"]
    assert group.attrs["teacher"] == "image"
    assert group.attrs["fingerprint"] == cache.columns.fingerprint("image.1.int8")
    codes = group["codes"]
    assert codes.metadata.dimension_names == ("row", "kept_unit", "token", "channel")
    assert codes.shards == (4, 4, 4, 8)
    assert codes.chunks == (1, 4, 4, 8)
    assert [type(c).__name__ for c in codes.compressors] == ["BloscCodec", "Crc32cCodec"]
    assert (group["scale"].shards, group["scale"].chunks) == (None, (4, 4, 4))
    assert [type(c).__name__ for c in group["scale"].compressors] == ["BloscCodec", "Crc32cCodec"]
    blosc = codes.compressors[0]
    assert (blosc.cname.value, blosc.shuffle.value) == ("zstd", "shuffle")


@pytest.mark.usefixtures("small_blocks")
def test_blocks_reach_the_disk_as_they_fill(cache: Cache):
    what = content(PART, 11)
    with begin(cache, PART, ()) as attempt:
        for row in range(9):
            some = slice(row, row + 1)
            attempt.append_rows(
                what.rows[some],
                units=what.units[some],
                scores=what.scores[some],
                pixels=what.pixels[some],
            )
        on_disk = {p.name for p in (attempt.folder / "base.zarr" / "pixels").glob("c.*")}
        assert "c.0.0.0.0.0.0" in on_disk  # the second block may still be on its way


def test_no_pad_garbage_is_stored(cache: Cache):
    what = content(PART, 30)
    write_part(cache, PART, what, ALL)  # garbage stands at padded units
    rows = CacheReader(cache, num_views=1, columns=ALL).read(np.arange(30), view=0)
    padded = rows.units < 0
    assert padded.any()
    assert not rows.pixels[padded].any()
    assert not rows.columns["image.1.fp32"]["codes"][padded].any()


def test_a_part_of_bad_rows_only_is_zero_rows(cache: Cache):
    write_part(cache, PART, content(PART, 3, bad=(0, 1, 2)), ALL)
    reader = CacheReader(cache, num_views=1, columns=ALL)
    assert reader.num_samples == 0
    assert reader.coverage.rows == {"decode_error": 3}
    rows = reader.read(np.arange(0), view=0)
    assert rows.pixels.shape == (0, 4, 2, 32, 32, 3)
    assert reader.statistics("image.1.int8").count == 0
    for path, expected in ((p, e) for p, e in stored_arrays(cache)):
        assert zarr.open_array(path, mode="r").shape == (0, *expected.shape[1:])


def test_an_empty_shard_is_zero_samples(cache: Cache):
    write_part(cache, PART, content(PART, 0))
    assert CacheReader(cache, num_views=1, columns=COLUMNS).coverage.num_samples == 0


def test_rows_come_back_for_a_replay(cache: Cache):
    what = content(PART, 6, bad=(2,))
    write_part(cache, PART, what)
    commits = cache.part_commits(PART)
    assert commits is not None
    found = read_base(cache, commits.base)
    assert found.rows == list(what.rows)
    np.testing.assert_array_equal(found.units, what.units)
    np.testing.assert_array_equal(found.scores, what.scores)


def test_a_column_is_added_to_a_committed_base(cache: Cache):
    what = content(PART, 6, bad=(2,))
    first = write_part(cache, PART, what, ("image.1.int8",))
    assert first.won_base
    commits = cache.part_commits(PART)
    assert commits is not None
    result = write_part(cache, PART, what, ALL[1:], base=commits.base)
    assert not result.won_base
    assert result.published == ALL[1:]
    assert len(attempts(cache)) == 2
    assert len(list(Path(cache.url).rglob("base.zarr"))) == 1
    assert_holds(CacheReader(cache, num_views=1, columns=ALL), {PART: what}, ALL)


def test_values_that_are_not_finite_lose_their_row_in_that_column_only(cache: Cache):
    what = content(PART, 6)
    kept = np.argmax(what.units >= 0, axis=1)
    broken = {k: v.copy() for k, v in what.features.items()}
    broken["image.1.int8"][1, kept[1], 2, 3] = np.nan
    broken["image.1.int8"][4, kept[4], 0, 0] = -np.inf
    write_part(cache, PART, replace(what, features=broken))
    reader = CacheReader(cache, num_views=1, columns=COLUMNS)
    assert reader.coverage.columns["image.1.int8"] == {"nonfinite": 2, "ok": 4}
    assert reader.uids(np.arange(4)) == [what.rows[i].uid for i in (0, 2, 3, 5)]
    other = CacheReader(cache, num_views=1, columns=("video.2.int8",))
    assert_holds(other, {PART: what}, ("video.2.int8",))
    group = folder_of(cache, cache.commits()[PART].columns["image.1.int8"])
    codes = zarr.open_array(group / "targets.zarr/image/1.int8/codes", mode="r")
    assert not codes[1].any()


def test_statuses_of_the_caller_are_kept(cache: Cache):
    what = content(PART, 5)
    with begin(cache, PART, COLUMNS[:1]) as attempt:
        fill(attempt, what, ())
        features = torch.full((5, 4, 4, 8), float("nan"))
        status = np.array([3, 4, 1, 2, 0], np.uint8)
        attempt.append_features(COLUMNS[0], features, status)
        attempt.commit()
    commit = cache.commits()[PART].columns[COLUMNS[0]]
    assert commit.bad == ((0, 5),)
    assert commit.statuses == {
        "nonfinite": 2,
        "overflow": 1,
        "teacher_error": 1,
        "replay_mismatch": 1,
    }
    assert status.tolist() == [3, 4, 1, 2, 0], "the caller's array was changed"
    path = folder_of(cache, cache.commits()[PART].base) / "targets.zarr/image/1.int8/status"
    assert zarr.open_array(path, mode="r")[...].tolist() == [3, 4, 1, 2, ColumnStatus.NONFINITE]


def test_statistics_that_are_not_finite_are_refused(cache: Cache):
    broken = ChannelStatistics(count=1, mean=np.full(8, np.nan), m2=np.zeros(8))
    with begin(cache, PART) as attempt, pytest.raises(ValueError, match="not finite"):
        attempt.append_statistics("image.1.int8", broken)


def test_leaving_without_commit_leaves_nothing(cache: Cache):
    with begin(cache, PART) as attempt:
        fill(attempt, content(PART))
    assert attempts(cache) == []
    assert cache.commits() == {}
    with pytest.raises(RuntimeError, match="teacher"), begin(cache, PART):  # noqa: PT012
        assert len(attempts(cache)) == 1
        raise RuntimeError("teacher")
    assert attempts(cache) == []


def test_an_attempt_that_took_longer_than_its_lease_publishes_nothing(cache: Cache):
    with begin(cache, PART, lease_seconds=0.01) as attempt:
        fill(attempt, content(PART))
        time.sleep(0.02)
        with pytest.raises(KdhieraError, match=r"longer than extract\.lease_seconds = 0\.01"):
            attempt.commit()
    assert cache.commits() == {}
    assert attempts(cache) == []


def lease(folder: Path) -> dict[str, object]:
    return unseal((folder / "attempt.json").read_bytes(), "")


def test_an_attempt_says_that_it_has_ended(cache: Cache):
    with begin(cache, PART, COLUMNS[:1]) as attempt:
        assert lease(attempt.folder)["ended"] is False
        fill(attempt, content(PART), COLUMNS[:1])
        attempt.commit()
    assert lease(attempt.folder)["ended"] is True
    assert lease(attempt.folder)["lease_seconds"] == 1000.0


@pytest.mark.parametrize("clock", ["time", "monotonic"])
def test_a_lease_runs_out_by_whichever_clock_went_on(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, clock: str
):
    """The monotonic one stands still while a machine sleeps, the other may be set back."""
    original = getattr(time, clock)
    with begin(cache, PART) as attempt:
        fill(attempt, content(PART))
        monkeypatch.setattr(time, clock, lambda: original() + 1001)
        with pytest.raises(KdhieraError, match=r"longer than extract\.lease_seconds"):
            attempt.commit()
    assert cache.commits() == {}


@pytest.mark.usefixtures("small_blocks")
def test_files_that_are_taken_for_garbage_meanwhile_are_one_clear_error(cache: Cache):
    """At any moment of the attempt, in whichever library notices first."""
    what = content(PART, 5)
    for taken in ("begun", "filled"):
        with begin(cache, PART) as attempt:
            if taken == "filled":
                fill(attempt, what)
            shutil.rmtree(attempt.folder)
            with pytest.raises(KdhieraError, match="were removed as garbage"):  # noqa: PT012
                if taken == "begun":
                    fill(attempt, what)
                attempt.commit()
    assert cache.commits() == {}
    write_part(cache, PART, what)
    assert_holds(CacheReader(cache, num_views=1, columns=COLUMNS), {PART: what})


@pytest.mark.usefixtures("small_blocks")
def test_an_attempt_that_cannot_begin_leaves_nothing(cache: Cache):
    with pytest.raises(KdhieraError, match=r"column image\.1\.fp16 was removed"):
        begin(cache, PART, ("image.1.fp16",))
    assert attempts(cache) == []


@pytest.mark.usefixtures("small_blocks")
def test_what_is_still_being_written_is_gone_too(cache: Cache):
    what = content(PART, 40)
    for _ in range(10):
        with begin(cache, PART) as attempt:
            fill(attempt, what, batch=40)
        assert attempts(cache) == []


def test_a_base_that_is_removed_at_once_is_one_clear_error(cache: Cache):
    """By a repair, between its publication and the columns'."""
    store = cache.store

    class Removing(type(store)):
        def create(self, key, data):
            done = super().create(key, data)
            self.delete([key])
            return done

    cache.store = Removing(store.root)
    with begin(cache, PART) as attempt:
        fill(attempt, content(PART))
        with pytest.raises(KdhieraError, match="removed from the cache while it was being"):
            attempt.commit()
    assert cache.commits() == {}
    assert attempts(cache) == []


def test_a_loser_with_equal_rows_binds_its_columns_to_the_winner(cache: Cache):
    what = content(PART, 6, bad=(1,))
    with begin(cache, PART, COLUMNS[:1]) as winner, begin(cache, PART, COLUMNS) as loser:
        fill(winner, what, COLUMNS[:1])
        fill(loser, what, COLUMNS)
        won = winner.commit()
        lost = loser.commit()
    assert (won.won_base, won.adopted, won.published) == (True, False, COLUMNS[:1])
    assert (lost.won_base, lost.adopted, lost.published) == (False, True, COLUMNS[1:])
    assert not lost.replay_needed
    commits = cache.commits()[PART]
    assert commits.base.attempt == winner.attempt
    assert [commits.columns[c].attempt for c in COLUMNS] == [winner.attempt, loser.attempt]
    assert not (loser.folder / "base.zarr").exists()
    assert_holds(CacheReader(cache, num_views=1, columns=COLUMNS), {PART: what})


def test_a_loser_that_brings_nothing_new_leaves_nothing(cache: Cache):
    what = content(PART)
    with begin(cache, PART) as winner, begin(cache, PART) as loser:
        fill(winner, what)
        fill(loser, what)
        winner.commit()
        lost = loser.commit()
    assert (lost.won_base, lost.adopted, lost.published) == (False, True, ())
    assert (lost.num_bytes, lost.replay_needed) == (0, False)
    assert attempts(cache) == [winner.folder]


def test_a_winner_keeps_no_column_that_another_published_first(cache: Cache):
    """Another attempt bound its column to this base before this one came to it."""
    what = content(PART)
    first, second = COLUMNS
    with begin(cache, PART) as winner:
        fill(winner, what)
        publish = winner._publish_column

        def after_another(column, files, base):
            if column == second:
                write_part(cache, PART, what, (second,), base=base)
            return publish(column, files, base)

        winner._publish_column = after_another  # type: ignore[method-assign]
        assert winner.commit().published == (first,)
    assert not (winner.folder / "targets.zarr/video").exists()
    assert_holds(CacheReader(cache, num_views=1, columns=COLUMNS), {PART: what})


def test_a_loser_with_other_rows_discards_them_and_replays_the_winners(cache: Cache):
    first, other = content(PART, 6, bad=(1,)), content(PART, 6, bad=(1, 4), seed=9)
    with begin(cache, PART, COLUMNS[:1]) as winner, begin(cache, PART, COLUMNS) as loser:
        fill(winner, first, COLUMNS[:1])
        fill(loser, other, COLUMNS)
        winner.commit()
        lost = loser.commit()
    assert (lost.won_base, lost.adopted, lost.published) == (False, False, ())
    assert lost.replay_needed
    assert attempts(cache) == [winner.folder]
    commits = cache.part_commits(PART)
    assert commits is not None
    assert cache.missing(PART, COLUMNS).columns == COLUMNS[1:]
    write_part(cache, PART, first, COLUMNS[1:], base=commits.base)
    assert_holds(CacheReader(cache, num_views=1, columns=COLUMNS), {PART: first})


def test_a_loser_whose_pixels_alone_differ_discards_its_columns(cache: Cache):
    first = content(PART)
    pixels = first.pixels.copy()
    pixels[0, 0, 0, 0, 0, 0] ^= 1
    with begin(cache, PART, ()) as winner, begin(cache, PART) as loser:
        fill(winner, first, ())
        fill(loser, replace(first, pixels=pixels))
        winner.commit()
        assert loser.commit().replay_needed


def test_an_error_between_base_and_column_keeps_the_base(cache: Cache):
    what = content(PART)
    obstacle = Path(cache.url) / layout.commit_file(PART, COLUMNS[0])
    with begin(cache, PART) as attempt:
        fill(attempt, what)
        obstacle.mkdir(parents=True)
        with pytest.raises(IsADirectoryError):
            attempt.commit()
    obstacle.rmdir()
    assert cache.missing(PART, COLUMNS).columns == COLUMNS
    commits = cache.part_commits(PART)
    assert commits is not None
    write_part(cache, PART, what, base=commits.base)
    assert_holds(CacheReader(cache, num_views=1, columns=COLUMNS), {PART: what})


def test_views_of_one_shard_come_from_the_same_bytes(cache: Cache):
    """The hash is that of the bytes that were read, so it is known at the end and not before."""
    one, rest = COLUMNS[:1], COLUMNS[1:]
    write_part(cache, PART, columns=one)
    base = cache.commits()[PART].base
    other = PartId(shard_id="a-0", view=1)
    unread = replace(SOURCE, path="https://u:p@host/shard.tar?key=1", sha256=None)
    for part, columns, bound in ((other, COLUMNS, None), (PART, rest, base)):
        with begin(cache, part, columns, base=bound, source=unread) as attempt:
            fill(attempt, content(part), columns, rows=bound is None)
            words = r"source_changed: https://host/shard\.tar has the"
            with pytest.raises(MismatchError, match=words):
                attempt.commit(source_sha256="cd" * 32)
        assert not attempt.folder.exists()
    assert list(cache.commits()) == [PART]
    assert set(cache.commits()[PART].columns) == set(one)
    for part, columns, bound in ((other, COLUMNS, None), (PART, rest, base)):
        with begin(cache, part, columns, base=bound, source=unread) as attempt:
            fill(attempt, content(part), columns, rows=bound is None)
            attempt.commit(source_sha256=SOURCE.sha256)
    assert {s.sha256 for s in cache.sources("a-0")} == {SOURCE.sha256}
    assert [s.path for s in cache.sources("a-0")] == [SOURCE.path, "https://host/shard.tar"]


def test_views_of_different_bytes_that_were_published_at_once_are_not_trained_on(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
):
    """Each looked at the other's source before either was there; the reader looks again."""
    other = PartId(shard_id="a-0", view=1)
    create = LocalStore.create
    with begin(cache, PART) as first, begin(cache, other) as second:
        fill(first, content(PART))
        fill(second, content(other))

        def between(self: LocalStore, key: str, data: bytes) -> bool:
            monkeypatch.setattr(LocalStore, "create", create)
            second.commit(source_sha256="cd" * 32)
            return self.create(key, data)

        monkeypatch.setattr(LocalStore, "create", between)
        first.commit()
    CacheReader(cache, num_views=1, columns=COLUMNS)
    with pytest.raises(MismatchError, match=r"sha256 abababababab; a-0 view 1 .* cdcdcdcdcdcd"):
        CacheReader(cache, num_views=2, columns=COLUMNS)
    shutil.rmtree(f"{cache.url}/{layout.commit_folder(other)}")
    write_part(cache, other)
    CacheReader(cache, num_views=2, columns=COLUMNS)


def test_signed_urls_are_not_recorded(cache: Cache):
    url = replace(SOURCE, path="https://user:hunter2@host/shard.tar?signature=hunter2")
    with begin(cache, PART, source=url) as attempt:
        fill(attempt, content(PART))
        attempt.commit()
    assert cache.commits()[PART].base.source.path == "https://host/shard.tar"
    for path in Path(cache.url).rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes()


def test_records_list_every_file_with_size_and_checksum(cache: Cache):
    write_part(cache, PART)
    commits = cache.commits()[PART]
    listed: dict[str, list[int]] = {}
    for commit in (commits.base, *commits.columns.values()):
        listed |= cache.read_record(commit)["files"]
    folder = folder_of(cache, commits.base)
    on_disk = {
        p.relative_to(folder).as_posix(): [
            p.stat().st_size,
            google_crc32c.value(p.read_bytes()),
        ]
        for p in folder.rglob("*")
        if p.is_file() and p.name != "attempt.json"
    }
    assert listed == on_disk


def test_what_does_not_read_back_is_not_committed(cache: Cache):
    with begin(cache, PART) as attempt:
        fill(attempt, content(PART))
        array = attempt._base["pixels"]
        finish = array.finish

        def finish_on_a_bad_disk() -> None:
            finish()
            path = array.path / "c.0.0.0.0.0.0"
            data = bytearray(path.read_bytes())
            data[100] ^= 1
            path.write_bytes(data)

        array.finish = finish_on_a_bad_disk  # type: ignore[method-assign]
        with pytest.raises(KdhieraError, match=r"reads back differently \(pixels: .*DATA_LOSS"):
            attempt.commit()
    assert cache.commits() == {}


def test_two_encodings_of_a_layer_lie_side_by_side(cache: Cache):
    what = content(PART)
    write_part(cache, PART, what, ("image.1.int8", "image.1.fp32"))
    reader = CacheReader(cache, num_views=1, columns=("image.1.int8", "image.1.fp32"))
    assert_holds(reader, {PART: what}, reader.columns)
