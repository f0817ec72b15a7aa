"""A cache of two shards in two views for tests of verify: a plain column, one with a basis."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_cache
import torch
from tiny_cache import assert_holds, content, write_part

from kdhiera.cache.commit import Cache
from kdhiera.cache.encoding import basis_to_npz, calibrate
from kdhiera.cache.layout import PartId, commit_file
from kdhiera.cache.problems import Verified
from kdhiera.cache.reader import CacheReader
from kdhiera.cache.records import unseal
from kdhiera.cache.repair import repair_at
from kdhiera.cache.verify import verify

INT8, COMPACT = "image.1.int8", "video.2.compact"
COLUMNS = (INT8, COMPACT)
PARTS = tuple(PartId(shard_id=shard, view=view) for shard in ("a-0", "b-0") for view in (0, 1))
WHAT = {"a-0": {"bad": (2,)}, "b-0": {}}
A0, A1, B0, B1 = PARTS
A0_BASE = commit_file(A0, None)


def of(part: PartId) -> tiny_cache.Content:
    return content(part, **WHAT[part.shard_id])


def extract(url: str | Path) -> Cache:
    """What extraction does: identities, bases of columns, then whatever parts lack."""
    cache = tiny_cache.make_cache(url, COLUMNS)
    if not cache.columns.has_basis(COMPACT):
        tokens = of(B0).tokens[COMPACT].reshape(-1, 8, 4, 6)
        basis = calibrate("compact", torch.from_numpy(tokens), error=0.01)
        cache.columns.publish_basis(COMPACT, basis_to_npz(basis))
    for part in PARTS:
        missing = cache.missing(part, COLUMNS)
        found = cache.part_commits(part)
        if missing:
            base = found.base if found else None
            write_part(cache, part, of(part), missing.columns, base=base)
    return cache


def basis_key(root: Path) -> str:
    (found,) = (root / "columns" / COMPACT).glob("basis-*.npz")
    return found.relative_to(root).as_posix()


def check(root: Path | str) -> Verified:
    return verify(Cache.open(root))


def assert_heals(root: Path, found: Verified) -> None:
    """Repair leaves nothing wrong, and extraction brings back the same content."""
    mended = repair_at(found)
    assert mended.left == ()
    again = check(root) if (root / "cache.json").exists() else None
    assert again is None or not [p for p in again.problems if p.mendable]
    assert_complete(extract(root))


def assert_complete(cache: Cache) -> None:
    assert verify(cache).problems == ()
    reader = CacheReader(Cache.open(cache.url), num_views=2, columns=COLUMNS)
    assert_holds(reader, {part: of(part) for part in PARTS}, (INT8,))
    for column in COLUMNS:
        assert reader.statistics(column).count == 18 * 32  # one sample is bad in both views


def only(found: Verified) -> Any:
    assert len(found.problems) == 1, [p.what for p in found.problems]
    return found.problems[0]


def named_files(root: Path) -> dict[str, set[str | None]]:
    """Files of part a-0 view 0 with the columns (None: the base) whose records name them."""
    owners: dict[str, set[str | None]] = {}
    for column in (None, *COLUMNS):
        body = unseal((root / commit_file(A0, column)).read_bytes(), "")
        for name in body["files"]:
            key = f"parts/a-0/0/{body['attempt']}/{name}"
            owners.setdefault(key, set()).add(column)
    return owners


def expected_drops(owners: set[str | None]) -> set[str]:
    columns = COLUMNS if None in owners else owners - {None}
    return {commit_file(A0, c) for c in columns} | ({A0_BASE} if None in owners else set())


DAMAGES: dict[str, Callable[[Path], object]] = {
    "remove": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "lengthen": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "flip": lambda path: path.write_bytes(flipped(path.read_bytes())),
}


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@contextlib.contextmanager
def widths() -> Iterator[None]:
    """Let contents have the compact column as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_cache.WIDTHS, COMPACT, 6)
        yield
