"""What no commit names goes, nothing else does, and nobody who reads or writes is harmed."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_cache import (
    COLUMNS,
    add_column,
    assert_holds,
    begin,
    catch_up,
    content,
    fill,
    folder_of,
    gc,
    make_cache,
    write_part,
)
from turns import SteppedStore, Turns, run_in_turns

from kdhiera.cache import layout
from kdhiera.cache.commit import Cache
from kdhiera.cache.drop import drop_column
from kdhiera.cache.garbage import LEASE_SECONDS, Kind
from kdhiera.cache.layout import PartId, commit_file, commit_folder, part_folder
from kdhiera.cache.reader import CacheReader
from kdhiera.cache.records import seal, unseal
from kdhiera.cache.verify import verify
from kdhiera.errors import DamagedError
from kdhiera.stores import open_store

PART = PartId(shard_id="a-0", view=0)
OTHER = PartId(shard_id="b-0", view=1)
IMAGE, VIDEO = COLUMNS
DAY = 24 * 3600.0
LEASE = 1000.0


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (
        str(tmp_path / "cache") if request.param == "local" else request.getfixturevalue("s3_url")
    )


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    made = make_cache(tmp_path / "cache")
    for part in (PART, OTHER):
        write_part(made, part)
    return made


def listing(url: str) -> dict[str, int]:
    return {entry.key: entry.num_bytes for entry in open_store(url).walk("")}


def assert_right(cache: Cache, columns: tuple[str, ...] = COLUMNS) -> None:
    opened = Cache.open(cache.url)
    assert not verify(opened).problems
    reader = CacheReader(opened, num_views=1, columns=columns, shards=["a-0"])
    assert_holds(reader, {PART: content(PART)}, columns)


def died(cache: Cache, columns: tuple[str, ...] = COLUMNS) -> str:
    """An attempt at `PART` whose process is gone; returns its folder."""
    attempt = begin(cache, PART, columns, lease_seconds=LEASE)
    fill(attempt, content(PART), columns)
    return str(attempt._key)


def test_a_whole_cache_has_no_garbage(url: str):
    cache = make_cache(url)
    assert gc(cache).garbage == ()  # nor has an empty one
    write_part(cache, PART)
    before = listing(url)
    found = gc(cache, later=100 * DAY)
    assert (found.garbage, found.waiting, found.problems) == ((), (), ())
    assert listing(url) == before


def test_a_dropped_column_is_freed_at_once_and_to_the_byte(url: str):
    cache = make_cache(url)
    for part in (PART, OTHER):
        write_part(cache, part)
    frees = drop_column(cache, IMAGE).num_bytes
    before = listing(url)
    looked = gc(cache, remove=False)
    assert listing(url) == before
    collected = gc(cache)
    gone = {key: size for key, size in before.items() if key not in listing(url)}
    assert all("/image/" in key for key in gone)  # stats.npz and the rows serve the other column
    assert sum(gone.values()) == looked.num_bytes == collected.num_bytes == frees > 0
    assert len(gone) == looked.num_files == collected.num_files
    assert not [key for key in listing(url) if "/image/" in key]
    assert {item.kind for item in looked.garbage} == {Kind.ENDED}
    assert gc(cache).garbage == ()
    assert_right(cache, (VIDEO,))
    again = make_cache(url)
    catch_up(again, PART)
    assert_right(again)


def test_a_base_that_was_repaired_away_goes_whole(url: str):
    cache = make_cache(url)
    write_part(cache, PART)
    write_part(cache, OTHER)
    names = [f"{commit_folder(PART)}/{n}" for n in cache.store.names(commit_folder(PART))]
    cache.store.delete(names)
    found = gc(cache)
    assert [item.folder.rpartition("/")[0] for item in found.garbage] == [part_folder(PART)]
    assert not [key for key in listing(url) if key.startswith(f"{part_folder(PART)}/")]
    assert cache.store.names("parts") in (["a-0", "b-0"], ["b-0"])
    assert Cache.open(url).commits()[OTHER].columns.keys() == set(COLUMNS)


def test_an_attempt_that_died_waits_for_twice_its_lease(url: str):
    """On a bucket it has sent nothing until it commits; here it died after that."""
    cache = make_cache(url)
    write_part(cache, PART)
    attempt = begin(cache, PART, lease_seconds=LEASE)
    fill(attempt, content(PART))
    attempt._finish()
    cache.store.keep(attempt._key, attempt.folder)
    for later in (0.0, LEASE, 2 * LEASE - 60):
        found = gc(cache, later=later)
        assert found.garbage == ()
        (waiting,) = found.waiting
        assert waiting.folder == attempt._key
        assert waiting.until == pytest.approx(time.time() + 2 * LEASE, abs=60)
        assert waiting.num_bytes == sum(
            size for key, size in listing(url).items() if key.startswith(attempt._key)
        )
    found = gc(cache, later=2 * LEASE + 60)
    assert [(g.folder, g.kind) for g in found.garbage] == [(attempt._key, Kind.EXPIRED)]
    assert not [key for key in listing(url) if key.startswith(attempt._key)]
    assert_right(cache)


@pytest.mark.parametrize("damage", ["missing", "empty", "flipped", "another record"])
def test_an_attempt_that_cannot_say_its_lease_waits_two_days(cache: Cache, damage: str):
    root = Path(cache.url)
    path = root / died(cache) / "attempt.json"
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    contents = {
        "empty": b"",
        "flipped": bytes(data),
        "another record": (root / commit_file(PART, None)).read_bytes(),
    }
    path.unlink()
    if damage in contents:
        path.write_bytes(contents[damage])
    assert len(gc(cache, later=2 * LEASE_SECONDS - 60).waiting) == 1
    found = gc(cache, later=2 * LEASE_SECONDS + 60)
    assert [item.kind for item in found.garbage] == [Kind.EXPIRED]
    assert not path.parent.exists()
    assert_right(cache)


def test_one_that_died_between_two_records_keeps_what_they_name(cache: Cache):
    """Its column that was not published goes, the published one and the rows stay."""
    root = Path(cache.url)
    base = cache.commits()[PART].base
    folder = folder_of(cache, base)
    lease = unseal((folder / "attempt.json").read_bytes(), "")
    (folder / "attempt.json").write_bytes(seal({**lease, "ended": False}))
    (root / commit_file(PART, IMAGE)).unlink()
    assert [item.folder for item in gc(cache).waiting] == [cache.folder(base)]
    found = gc(cache, later=2 * DAY)
    assert [item.kind for item in found.garbage] == [Kind.EXPIRED]
    assert not (folder / "targets.zarr/image").exists()
    assert_right(cache, (VIDEO,))
    assert gc(cache, later=100 * DAY).garbage == ()


def test_folders_and_files_of_processes_that_died_early(cache: Cache):
    root = Path(cache.url)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    empty = root / part_folder(PART) / f"{stamp}-0123456789ab" / "base.zarr"
    empty.mkdir(parents=True)
    unfinished = [
        root / folder / f".x.json.{'0f' * 16}.tmp"
        for folder in ("", commit_folder(PART), f"columns/{IMAGE}", "shards", died(cache))
    ]
    for path in unfinished:
        path.write_bytes(b"half")
    assert gc(cache, later=2 * DAY - 60).garbage != ()  # the attempt, whose lease was short
    assert [path.exists() for path in unfinished] == [True] * 4 + [False]
    assert empty.exists()
    found = gc(cache, later=2 * DAY + 60)
    assert sorted(item.kind for item in found.garbage) == sorted(
        [Kind.EXPIRED, *[Kind.UNFINISHED] * 4]
    )
    assert not any(path.exists() for path in unfinished)
    assert not empty.parent.exists()
    assert_right(cache)


def test_what_is_not_of_a_cache_is_never_touched(cache: Cache):
    root = Path(cache.url)
    mine = [
        "thesis.tex",
        ".git/config",
        "parts/README",
        "parts/a-0/notes.txt",
        "parts/a-0/0/notes.txt",
        "parts/a-0/0/backup/rows.parquet",
        "parts/a-0/007/20200101T000000Z-0123456789ab/rows.parquet",
        "parts/a-0/0/20209901T000000Z-0123456789ab/rows.parquet",
        "commits/a-0/0/notes.txt.bak",
        f"columns/{IMAGE}/notes.txt",
        "columns/old/basis.npz",
        "shards/never-0123456789ab",
        "shards/.hidden",
    ]
    for name in mine:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"important")
        os.utime(root / name, (0, 0))
    gc(cache, later=1000 * DAY)
    assert all((root / name).read_bytes() == b"important" for name in mine)


def test_a_part_with_a_damaged_record_is_left_alone(cache: Cache):
    root = Path(cache.url)
    folders = [died(cache), str(folder_of(cache, cache.commits()[PART].base))]
    drop_column(cache, IMAGE)
    record = root / commit_file(PART, VIDEO)
    for data in (
        record.read_bytes()[:-1],
        b"",
        (root / commit_file(OTHER, VIDEO)).read_bytes(),
        (root / "columns" / VIDEO / "column.json").read_bytes(),
    ):
        record.write_bytes(data)
        before = {k for k in listing(cache.url) if k.startswith("parts/a-0")}
        found = gc(cache, later=100 * DAY)
        assert len(found.problems) == 1
        assert f"part {PART} is left alone" in found.problems[0]
        assert commit_file(PART, VIDEO) in found.problems[0]
        assert {k for k in listing(cache.url) if k.startswith("parts/a-0")} == before
    assert all((root / folder).exists() for folder in folders)
    assert not list(root.glob("parts/b-0/1/*/targets.zarr/image"))  # other parts are freed


def test_records_of_a_column_that_lost_its_identity_are_kept(cache: Cache):
    """It may come back: extraction writes the identity anew, and all of it is there again."""
    (Path(cache.url) / "columns" / IMAGE / "column.json").unlink()
    before = listing(cache.url)
    found = gc(cache, later=100 * DAY)
    assert listing(cache.url) == before
    assert len(found.problems) == 1
    assert IMAGE in found.problems[0]
    assert f"kdhiera cache drop {cache.url} {IMAGE}" in found.problems[0]
    add_column(cache, IMAGE)
    assert_right(cache)


def test_a_basis_goes_when_nothing_needs_it(cache: Cache):
    column = "image.1.compact"
    add_column(cache, column)
    folder = Path(cache.url) / "columns" / column
    write_part(cache, PART, columns=(column,), base=cache.commits()[PART].base)
    (folder / "basis-0123456789ab.npz").write_bytes(b"of an identity that is no more")
    (garbage,) = gc(cache).garbage
    assert (garbage.kind, garbage.num_files) == (Kind.BASIS, 1)
    assert_right(cache, (*COLUMNS, column))
    identity = (folder / "column.json").read_bytes()
    (folder / "column.json").unlink()
    assert gc(cache).garbage == ()  # a record still needs it
    (folder / "column.json").write_bytes(identity)
    assert_right(cache, (*COLUMNS, column))
    drop_column(cache, column)
    folder.mkdir(exist_ok=True)
    (folder / "basis-0123456789ab.npz").write_bytes(b"left behind")
    assert [item.kind for item in gc(cache).garbage if item.folder.startswith("columns")] == [
        Kind.BASIS
    ]
    assert not folder.exists()


def test_a_basis_never_serves_a_column_made_in_another_way(cache: Cache):
    """After a drop that was killed, or a column.json that was lost, with what was there."""
    column = "image.1.compact"
    add_column(cache, column)
    first = cache.columns.basis_key(column)
    (Path(cache.url) / "columns" / column / "column.json").unlink()
    other = Cache.open(cache.url)
    add_column(other, column, weights="33")
    second = other.columns.basis_key(column)
    assert first != second
    assert {e.key for e in cache.store.walk(f"columns/{column}")} >= {first, second}
    assert [item.num_files for item in gc(other).garbage] == [1]
    assert not cache.store.exists(first)
    assert other.columns.has_basis(column)


@pytest.fixture
def row_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even the tiny rows of these tests are chunks of their own, which a reader does not keep."""
    monkeypatch.setattr(layout, "SMALL_ROW_BYTES", 64)


@pytest.mark.usefixtures("row_chunks")
def test_training_says_that_its_column_was_dropped(cache: Cache):
    """Before anything of the part was read, and with its files open; other columns go on."""
    both = CacheReader(cache, num_views=1, columns=COLUMNS, shards=["a-0"])
    opened = CacheReader(cache, num_views=1, columns=COLUMNS, shards=["a-0"])
    other = CacheReader(cache, num_views=1, columns=(VIDEO,), shards=["a-0"])
    opened.read(np.array([0]), view=0)
    drop_column(Cache.open(cache.url), IMAGE)
    assert opened.read(np.array([1]), view=0).uids  # dropped is not yet gone
    gc(Cache.open(cache.url))
    for reader in (both, opened):
        with pytest.raises(DamagedError, match=rf"column {IMAGE} of part a-0 view 0 was removed"):
            reader.read(np.arange(5), view=0)
    with pytest.raises(DamagedError, match=rf"column {IMAGE} of part a-0 view 0 was removed"):
        both.statistics(IMAGE)
    assert_holds(other, {PART: content(PART)}, (VIDEO,))


def test_a_reader_with_a_snapshot_and_a_running_extraction_are_not_harmed(cache: Cache):
    reader = CacheReader(cache, num_views=1, columns=COLUMNS, shards=["a-0"])
    third = PartId(shard_id="c-0", view=0)
    with begin(cache, third) as attempt:
        gc(cache)
        fill(attempt, content(third))
        gc(cache)
        attempt.commit()
    gc(cache, later=100 * DAY)
    assert_holds(reader, {PART: content(PART)})
    again = CacheReader(cache, num_views=1, columns=COLUMNS, snapshot=reader.snapshot)
    assert_holds(again, {PART: content(PART)})
    assert_holds(
        CacheReader(cache, num_views=1, columns=COLUMNS, shards=["c-0"]), {third: content(third)}
    )


WRITER = [("create", commit_folder(PART)), ("exists", f"{part_folder(PART)}/")]
COLLECTOR = [
    ("read", f"{part_folder(PART)}/"),  # whether it has ended
    ("names", commit_folder(PART)),
    ("delete", f"{part_folder(PART)}/"),
]
STEPS = [
    "".join("C" if i in c else "W" for i in range(9)) for c in itertools.combinations(range(9), 5)
]


@pytest.mark.usefixtures("unchecked")
def test_a_writer_that_wakes_up_while_it_is_collected(memory: Path):
    """Every order of what it publishes and looks at, and what is looked at and removed."""
    what = content(PART, 1)
    column = "image.1.fp32"
    ends = {"kept": 0, "withdrawn": 0}
    for number, order in enumerate(STEPS):
        root = memory / str(number)
        cache = make_cache(root, (column,))
        attempt = begin(cache, PART, (column,))
        fill(attempt, what, (column,))
        turns = Turns(order)
        cache.store = SteppedStore(root, "W", turns, WRITER)
        collecting = Cache.open(root)
        collecting.store = SteppedStore(root, "C", turns, COLLECTOR)
        failed = run_in_turns(
            turns,
            {"W": attempt.commit, "C": lambda c=collecting: gc(c, later=10 * DAY)},
        )
        assert set(failed) <= {"W"}, failed
        if failed:
            assert "removed as garbage" in str(failed["W"])
        ends["withdrawn" if failed else "kept"] += 1
        opened = Cache.open(root)
        assert not verify(opened).problems, order
        commits = opened.part_commits(PART)
        if not failed:
            assert commits is not None
            assert set(commits.columns) == {column}
        catch_up(make_cache(root, (column,)), PART, (column,), what)
        reader = CacheReader(Cache.open(root), num_views=1, columns=(column,))
        assert_holds(reader, {PART: what}, (column,))
    assert min(ends.values()) > 0, ends


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from kdhiera.cli import main; main()", "cache", "gc"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


def test_the_command_looks_first_and_removes_when_told(cache: Cache):
    drop_column(cache, IMAGE)
    folder = died(cache)
    before = listing(cache.url)
    looked = cli(cache.url)
    assert looked.returncode == 0, looked.stderr
    assert listing(cache.url) == before
    lines = [line.split(maxsplit=1) for line in looked.stdout.splitlines()]
    assert [line[0] for line in lines] == ["cache", "garbage", "waiting", "result"]
    size = lines[1][1].partition(" bytes")[0]
    assert lines[3][1] == f"nothing was removed; --yes removes {size} bytes in 16 files"
    done = cli(cache.url, "--yes", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["removed"] is True
    assert f"{result['num_bytes']:,}" == size
    assert [item["folder"] for item in result["waiting"]] == [folder]
    assert {item["kind"] for item in result["garbage"]} == {"ended"}
    assert sum(before.values()) - sum(listing(cache.url).values()) == result["num_bytes"]
    assert cli(cache.url).stdout.splitlines()[-1] == "result    nothing to remove"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere"], 2, "no cache in nowhere"),
        ([], 2, "Missing argument 'CACHE'"),
        (["nowhere.yaml"], 2, "no config file at nowhere.yaml"),
    ],
)
def test_wrong_input_is_one_sentence(arguments: list[str], code: int, words: str):
    done = cli(*arguments)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_what_keeps_garbage_is_said_with_code_1(cache: Cache):
    (Path(cache.url) / commit_file(PART, None)).write_bytes(b"")
    done = cli(cache.url)
    assert done.returncode == 1
    assert f"problem   part {PART} is left alone" in done.stdout
