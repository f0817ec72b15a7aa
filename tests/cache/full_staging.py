"""Fill the disk where parts for a bucket are staged, free some room and go on.

Run by test_full_disk.py. Usage: full_staging.py FOLDER mount|limit s3://CACHE

`mount` puts a small file system on FOLDER (in this process's own mount namespace);
`limit`, where that is not allowed, lets no file grow beyond a size instead.
FOLDER is where parts are staged.
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from tiny_cache import COLUMNS, assert_holds, content, make_cache, write_part

from kdhiera.cache.layout import PartId
from kdhiera.cache.reader import CacheReader
from kdhiera.errors import KdhieraError

SMALL, LARGE = 3_000_000, 50_000_000
LIMIT = 1_000_000


def allow(folder: Path, how: str, *, large: bool) -> None:
    """Set the room that there is."""
    if how == "mount":
        size = f"size={LARGE if large else SMALL}"
        options = f"remount,{size}" if large else size
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    else:
        limit = resource.RLIM_INFINITY if large else LIMIT
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def main(folder: Path, how: str, url: str) -> None:
    """Commit a part, fail at the next, which is larger, and do it after all."""
    allow(folder, how, large=False)
    first, second = (PartId(shard_id=shard, view=0) for shard in ("a-0", "b-0"))
    small, large = content(first, 5), content(second, 250)
    tempfile.tempdir = str(folder)
    cache = make_cache(url)
    write_part(cache, first, small)
    try:
        write_part(cache, second, large)
    except KdhieraError as error:
        print(error)
    else:
        raise SystemExit("the disk was not full")
    assert list(cache.commits()) == [first]
    assert_holds(CacheReader(cache, num_views=1, columns=COLUMNS), {first: small})
    assert cache.store.names("parts/b-0/0") == [], "leftovers"
    assert list(folder.iterdir()) == [], "leftovers"
    allow(folder, how, large=True)
    write_part(cache, second, large)
    reader = CacheReader(cache, num_views=1, columns=COLUMNS)
    assert_holds(reader, {first: small, second: large})
    print("went on")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
