"""verify and repair while others are at work, interrupted, and in a bucket."""

import errno
import itertools
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forging import attempt_of
from verified_cache import (
    A0,
    A0_BASE,
    COLUMNS,
    COMPACT,
    INT8,
    assert_complete,
    basis_key,
    check,
    expected_drops,
    extract,
    flipped,
    named_files,
    only,
    widths,
)

from kdhiera.cache.commit import Cache
from kdhiera.cache.drop import drop_column
from kdhiera.cache.layout import commit_file
from kdhiera.cache.repair import repair, repair_at
from kdhiera.cache.verify import verify, verify_at
from kdhiera.progress import PlainProgress
from kdhiera.stores import LocalStore


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with widths():
        yield Path(extract(tmp_path_factory.mktemp("pristine") / "cache").url)


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "cache"))


# while others are at work, and interrupted


class Meddled(LocalStore):
    """A folder in which something happens when a file is first read or checked."""

    def __init__(self, root: Path, key: str, then: Callable[[], object]) -> None:
        super().__init__(root)
        self._key, self._then = key, then
        self._lock = threading.Lock()

    def _meddle(self, key: str) -> None:
        with self._lock:
            if key.endswith(self._key):
                self._key = "\0"
                self._then()

    def read(self, key: str) -> bytes:
        self._meddle(key)
        return super().read(key)

    def checksum(self, key: str) -> tuple[int, int]:
        self._meddle(key)
        return super().checksum(key)


def files_that_verify_reads(root: Path) -> list[str]:
    keys = [*named_files(root), *(commit_file(A0, c) for c in (None, *COLUMNS)), "shards/a-0"]
    return [*keys, *(f"columns/{c}/column.json" for c in COLUMNS), basis_key(root)]


def test_a_column_that_is_dropped_and_freed_meanwhile_is_no_damage(pristine: Path, tmp_path: Path):
    def drop_and_free() -> None:
        drop_column(Cache.open(root), INT8)
        shutil.rmtree(attempt_of(root, A0) / "targets.zarr/image")

    for number, key in enumerate(files_that_verify_reads(pristine)[::2]):
        root = Path(shutil.copytree(pristine, tmp_path / str(number)))
        cache = Cache(Meddled(root, key, drop_and_free), Cache.open(root).identity)
        found = verify(cache)
        assert not (root / commit_file(A0, INT8)).exists(), key  # it did happen
        assert found.problems == (), (key, found.describe())
        shutil.rmtree(root)


def test_a_part_that_is_made_anew_meanwhile_is_no_damage(pristine: Path, tmp_path: Path) -> None:
    def make_anew() -> None:
        folder = attempt_of(root, A0)
        for column in (*COLUMNS, None):
            (root / commit_file(A0, column)).unlink()
        shutil.rmtree(folder)
        extract(root)

    for number, key in enumerate(files_that_verify_reads(pristine)[1::4]):
        root = Path(shutil.copytree(pristine, tmp_path / str(number)))
        before = (root / A0_BASE).read_bytes()
        cache = Cache(Meddled(root, key, make_anew), Cache.open(root).identity)
        found = verify(cache)
        assert (root / A0_BASE).read_bytes() != before, key
        assert found.problems == (), (key, found.describe())


def test_repair_leaves_what_was_mended_meanwhile(root: Path) -> None:
    key = next(k for k, owners in named_files(root).items() if owners == {None} and "c." in k)
    (root / key).unlink()
    found = check(root)
    repair(Cache.open(root), found)
    extract(root)
    commits = {p: p.read_bytes() for p in (root / "commits").rglob("*.json")}
    again = repair(Cache.open(root), found)  # by someone who looked earlier
    assert (again.removed, again.left) == ((), ())
    assert {p: p.read_bytes() for p in (root / "commits").rglob("*.json")} == commits


class Failing(LocalStore):
    """A folder in which some files cannot be read."""

    def __init__(self, root: Path, number: int) -> None:
        super().__init__(root)
        self._number = number

    def checksum(self, key: str) -> tuple[int, int]:
        if "pixels/c." in key and "a-0/0" in key:
            raise OSError(self._number, "no")
        return super().checksum(key)


def test_a_file_that_its_disk_cannot_give_back_is_damaged(root: Path) -> None:
    identity = Cache.open(root).identity
    problem = only(verify(Cache(Failing(root, errno.EIO), identity)))
    assert "cannot be read (Input/output error)" in problem.what
    assert set(problem.drops) == expected_drops({None})
    with pytest.raises(OSError, match="no"):  # not allowed to read is not damaged
        verify(Cache(Failing(root, errno.EACCES), identity))


class Dying(LocalStore):
    """A folder whose writer dies at one of its changes."""

    def __init__(self, root: Path, after: int) -> None:
        super().__init__(root)
        self._left = after

    def _change(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt

    def delete(self, keys: Any) -> None:
        for key in keys:
            self._change()
            super().delete([key])

    def write(self, key: str, data: bytes) -> None:
        self._change()
        super().write(key, data)


def test_an_interrupted_repair_leaves_nothing_worse(pristine: Path, tmp_path: Path) -> None:
    for after in itertools.count():
        root = Path(shutil.copytree(pristine, tmp_path / f"{after}"))
        for key in list(named_files(root))[:5]:
            (root / key).unlink()
        (root / basis_key(root)).write_bytes(b"")
        (root / "shards/a-0").unlink()
        found = check(root)
        try:
            repair(Cache(Dying(root, after), Cache.open(root).identity), found)
        except KeyboardInterrupt:
            left = {p.where for p in check(root).problems}
            assert left <= {p.where for p in found.problems}
        else:
            break
        repair(Cache.open(root), check(root))
        if after % 3 == 0:
            assert_complete(extract(root))
    assert after > 6


def test_progress_counts_parts(pristine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import io

    lines = io.StringIO()
    verify(Cache.open(pristine), progress=PlainProgress(lines))
    first, *_, last = lines.getvalue().splitlines()
    assert first.startswith("verify: 0/4 parts")
    assert last.startswith("verify: 4/4 parts (100 %)")
    assert "read " in last


# in a bucket


@pytest.mark.slow
def test_a_cache_in_a_bucket_is_verified_and_mended(s3_url: str, pristine: Path) -> None:
    cache = extract(f"{s3_url}/cache")
    assert verify(cache).problems == ()
    store = cache.store
    keys = [entry.key for entry in store.walk("parts/a-0/0")]
    pixels = next(key for key in keys if "pixels/c." in key)
    scale = next(key for key in keys if "scale/c." in key)
    store.write(pixels, flipped(store.read(pixels)))
    store.delete([scale])
    store.write("shards/b-0", b"")
    found = verify(cache)
    assert [p.where for p in found.problems] == ["shards/b-0", pixels, scale]
    repair(cache, found)
    assert_complete(extract(f"{s3_url}/cache"))
    store.write("cache.json", b"{}")
    found = verify_at(f"{s3_url}/cache")
    assert only(found).where == "cache.json"
    repair_at(found)
    assert_complete(extract(f"{s3_url}/cache"))


def test_dropped_columns_are_gone_and_can_be_made_anew(root: Path) -> None:
    assert drop_column(Cache.open(root), INT8).commits == 4
    opened = Cache.open(root)
    assert all(set(c.columns) == {COMPACT} for c in opened.commits().values())
    assert_complete(extract(root))
