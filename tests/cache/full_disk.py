"""Fill a disk while extracting, free some room and go on; run by test_full_disk.py.

Usage: full_disk.py FOLDER pages|inodes|limit

`pages` and `inodes` put a small file system on FOLDER (in this process's own mount
namespace) and let it fill up at every page, or at every file and folder, of the making of a
cache, a column, its basis and a part. `limit`, where nothing may be mounted, lets no file
grow beyond a size instead.
"""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tiny_cache import (
    Content,
    add_column,
    assert_holds,
    catch_up,
    content,
    make_cache,
    write_part,
)

from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import PartId
from kdhiera.cache.reader import CacheReader
from kdhiera.cache.verify import verify
from kdhiera.errors import KdhieraError

LIMIT = 1_000_000
ROOM = 50_000_000
COLUMNS = ("image.1.compact", "video.2.int8")
FIRST, SECOND = (PartId(shard_id=shard, view=0) for shard in ("a-0", "b-0"))


class Disk:
    """A small file system whose room is set in pages or in inodes.

    Args:
        folder: Where it is mounted.
        unit: `pages` or `inodes`.
    """

    def __init__(self, folder: Path, unit: str) -> None:
        self.folder, self.unit = folder, unit
        mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", folder]
        subprocess.run(mount, check=True)

    def leave(self, room: int | None) -> None:
        """Leave so much room beside what is there; None for plenty."""
        used = os.statvfs(self.folder)
        if self.unit == "pages":
            pages = used.f_blocks - used.f_bfree
            options = f"size={ROOM if room is None else (pages + room) * used.f_bsize}"
        else:
            inodes = used.f_files - used.f_ffree
            options = f"nr_inodes={10_000 if room is None else inodes + room}"
        subprocess.run(["mount", "-o", f"remount,{options}", self.folder], check=True)


def extract(root: Path, columns: Sequence[str], parts: dict[PartId, Content]) -> None:
    """What a run does: the cache, columns and their bases, then what parts lack."""
    cache = make_cache(root, ())
    for column in columns:
        add_column(cache, column)
    for part, what in parts.items():
        catch_up(cache, part, columns, what)


def assert_whole(root: Path, columns: Sequence[str], parts: dict[PartId, Content]) -> None:
    cache = Cache.open(root)
    assert not verify(cache).problems
    shards = {part.shard_id for part in parts}
    reader = CacheReader(cache, num_views=1, columns=columns, shards=shards)
    assert_holds(reader, parts, columns)


def fill_up(folder: Path, unit: str) -> None:
    """With ever more room: a clear error and nothing half done, until there is enough."""
    disk = Disk(folder, unit)
    small = {FIRST: content(FIRST, 2)}
    both = {**small, SECOND: content(SECOND, 2)}
    before = folder / "before"
    extract(before, COLUMNS[1:], small)
    errors = 0
    for room in range(1000):
        root = folder / "cache"
        shutil.copytree(before, root)
        disk.leave(room)
        try:
            extract(root, COLUMNS, both)
            break
        except KdhieraError as error:
            errors += 1
            message = str(error)
        assert "takes no more" in message, message
        assert_whole(root, COLUMNS[1:], small)
        cache = Cache.open(root)
        found = cache.commits()
        attempts = {p.name for p in root.glob("parts/*/*/*")}
        named = {c.attempt for f in found.values() for c in (f.base, *f.columns.values())}
        assert attempts == named, f"leftovers {list(root.glob('parts/*/*/*/**/*'))} of {message}"
        assert not list(root.rglob(".*.tmp"))
        disk.leave(None)
        if room % 8 == 0:
            extract(root, COLUMNS, both)
            assert_whole(root, COLUMNS, both)
        shutil.rmtree(root)
    else:
        raise SystemExit("the disk was always full")
    assert_whole(root, COLUMNS, both)
    print(message)
    print(f"went on after {errors} errors")


def limit(folder: Path) -> None:
    """Commit a part, fail at the next, whose files are larger, and do it after all."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))
    parts = {FIRST: content(FIRST, 5), SECOND: content(SECOND, 150)}
    root = folder / "cache"
    cache = make_cache(root, COLUMNS)
    write_part(cache, FIRST, parts[FIRST], COLUMNS)
    try:
        write_part(cache, SECOND, parts[SECOND], COLUMNS)
    except KdhieraError as error:
        print(error)
    else:
        raise SystemExit("the disk was not full")
    assert list(cache.commits()) == [FIRST]
    assert not any((root / "parts" / "b-0" / "0").iterdir()), "leftovers"
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    write_part(cache, SECOND, parts[SECOND], COLUMNS)
    assert_whole(root, COLUMNS, parts)
    print("went on after 1 errors")


if __name__ == "__main__":
    if sys.argv[2] == "limit":
        limit(Path(sys.argv[1]))
    else:
        fill_up(Path(sys.argv[1]), sys.argv[2])
