"""A store in a bucket: whole objects, published by conditional PUT (`If-None-Match: *`)."""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import S3Store

from kdhiera import staging
from kdhiera.addresses import refuse_secrets
from kdhiera.buckets import Access, access, clear_errors, connect
from kdhiera.errors import KdhieraError, UsageError
from kdhiera.storage import file_crc32c
from kdhiera.stores import Entry, Files, FileVersion

_THREADS = 16
_PIECE_BYTES = 1 << 22
_LARGE_THREADS = 4  # files of up to 256 MB share the line, each within its time
_LARGE_BYTES = 8 * 2**20
_CREATE_TRIES = 5
_CREATE_WAIT_SECONDS = 0.2  # doubled with every try
_PAGE = 1000


_conditional: set[tuple[str, Access]] = set()  # buckets whose server honours conditions


class ObjectChangedError(KdhieraError):
    """An object that is not the one that was asked for."""


class ObjectStore:
    """Objects below a prefix of a bucket.

    Server and identity come from the usual environment: AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL.

    Args:
        url: `s3://bucket/prefix`; the prefix may be empty.

    Raises:
        UsageError: If the address names no bucket.
    """

    def __init__(self, url: str) -> None:
        refuse_secrets(url, "the address of a bucket")
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if not url.startswith("s3://") or not bucket:
            raise UsageError(f"'{url}' names no bucket: write s3://bucket/prefix")
        self.bucket = bucket
        self.prefix = prefix.strip("/")

    def __repr__(self) -> str:
        return f"ObjectStore({self.url!r})"

    @property
    def url(self) -> str:
        """The address, without a slash at its end."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def writes_late(self) -> bool:
        """A request whose answer was lost may still be on its way."""
        return True

    def read(self, key: str) -> bytes:
        """Contents of an object."""
        with clear_errors(self.url):
            return bytes(obstore.get(self._store(), self._path(key)).bytes())

    def read_many(self, keys: Iterable[str]) -> list[bytes | None]:
        """Contents of many objects, 16 at once."""
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(self._read_or_none, keys))

    def read_ends(self, sizes: Mapping[str, int], num_bytes: int) -> list[bytes | None]:
        """The last bytes of many objects, 16 at once."""

        def read(item: tuple[str, int]) -> bytes | None:
            key, size = item
            start = max(0, size - num_bytes)
            try:
                with clear_errors(self._address(key)):
                    return bytes(
                        obstore.get_range(self._store(), self._path(key), start=start, end=size)
                    )
            except FileNotFoundError:
                return None

        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(read, sizes.items()))

    def version(self, key: str) -> FileVersion:
        """Which object is there now.

        Raises:
            FileNotFoundError: If there is none.
        """
        with clear_errors(self._address(key)):
            return _version(obstore.head(self._store(), self._path(key)))

    def read_range(self, key: str, start: int, stop: int, *, version: FileVersion) -> bytes:
        """Bytes `start` to `stop` of an object, if it is still the one that is meant.

        The server is told which one (`If-Match`), and its word is checked.

        Args:
            key: Name of the object.
            start: First byte, below `stop`.
            stop: Byte after the last, no more than there are.
            version: From `version`.

        Raises:
            FileNotFoundError: If there is no such object.
            ObjectChangedError: If there is another one.
        """
        options: dict[str, Any] = {"range": (start, stop)}
        if version.tag.startswith('"'):  # a strong one
            options["if_match"] = version.tag
        with clear_errors(self._address(key)):
            try:
                found = obstore.get(self._store(), self._path(key), options=options)  # type: ignore[arg-type]
            except PreconditionError:
                raise ObjectChangedError(f"{self._address(key)} has changed") from None
            if _version(found.meta) != version:
                raise ObjectChangedError(f"{self._address(key)} has changed")
            return bytes(found.bytes())

    def checksum(self, key: str) -> tuple[int, int]:
        """Size and crc32c of an object, as it streams past."""
        size = crc32c = 0
        with clear_errors(self._address(key)):
            found = obstore.get(self._store(), self._path(key))
            for piece in found.stream(min_chunk_size=_PIECE_BYTES):
                data = bytes(piece)
                size, crc32c = size + len(data), google_crc32c.extend(crc32c, data)
        return size, crc32c

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        try:
            self.version(key)
        except FileNotFoundError:
            return False
        return True

    def write(self, key: str, data: bytes) -> None:
        """Put a whole object in place."""
        with clear_errors(self.url):
            obstore.put(self._store(), self._path(key), data, use_multipart=False)

    def create(self, key: str, data: bytes) -> bool:
        """Put a whole object in place by conditional PUT; see `Store`.

        A lost answer makes the client send again and be told that the name is taken: only
        what is there says who won.
        """
        for tries in range(_CREATE_TRIES):
            failure: Exception | None = None
            try:
                obstore.put(
                    self._store(), self._path(key), data, mode="create", use_multipart=False
                )
                self._require_conditions(key, data)
                return True
            except (AlreadyExistsError, PreconditionError):
                pass
            except (BaseError, OSError) as error:
                failure = error
            there = self._read_or_none(key)
            if there is not None:
                return there == data
            if failure is not None:
                with clear_errors(self.url):
                    raise failure
            time.sleep(_CREATE_WAIT_SECONDS * 2**tries)  # another's write is not done (409)
        raise KdhieraError(f"{self.url}: {key} is refused as taken and is not there: run again")

    def _require_conditions(self, key: str, data: bytes) -> None:
        """Refuse a server that lets the last writer win: asked once, after a first success.

        Its own bytes are sent again, which changes nothing wherever they are taken.
        """
        server = self.bucket, access()
        if server in _conditional:
            return
        try:
            obstore.put(self._store(), self._path(key), data, mode="create", use_multipart=False)
        except (AlreadyExistsError, PreconditionError):
            _conditional.add(server)
        except (BaseError, OSError):
            return  # no clear answer; the next success is followed up
        else:
            raise KdhieraError(
                f"{self.url}: the server ignores conditions on writes (If-None-Match), so runs "
                "could overwrite one another's commits: put the cache in a bucket of a server that "
                "honours them, or in a folder"
            )

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects one after the other."""
        for key in keys:
            with contextlib.suppress(FileNotFoundError), clear_errors(self.url):
                obstore.delete(self._store(), self._path(key))

    def delete_folder(self, folder: str) -> None:
        """Remove everything below a folder, a thousand objects a request."""
        for page in self._pages(folder):
            with clear_errors(self.url):
                obstore.delete(self._store(), [path for path, _, _ in page])

    def names(self, folder: str) -> list[str]:
        """Names in a folder, from a listing with a delimiter."""
        folders, objects = self._list(folder)
        return sorted({*folders, *objects})

    def folders(self, folder: str) -> list[str]:
        """Names of common prefixes, from a listing with a delimiter."""
        return sorted(self._list(folder)[0])

    def objects(self, folder: str) -> list[str]:
        """Names of objects, from a listing with a delimiter."""
        return sorted(self._list(folder)[1])

    def walk(self, folder: str) -> Iterator[Entry]:
        """All objects below a folder, by pages of a thousand."""
        skip = len(self.prefix) + 1 if self.prefix else 0
        for page in self._pages(folder):
            for path, num_bytes, modified in page:
                yield Entry(key=path[skip:], num_bytes=num_bytes, modified=modified)

    def unfinished(self) -> Iterator[Entry]:
        """None: an object is whole or not listed."""
        return iter(())

    def prune(self, folder: str) -> None:
        """Nothing: a bucket has no folders."""

    def stage(self, folder: str) -> Path:
        """A temporary folder of this machine (TMPDIR)."""
        return staging.new_folder()

    def keep(self, folder: str, staged: Path) -> Files:
        """Upload a staged folder, have the bucket list it, and remove the local copy.

        Every file is one PUT, so that a process that dies leaves no half upload that no
        listing shows, and carries the SHA-256 of its bytes, which the server checks.
        """
        paths = sorted(p for p in staged.rglob("*") if p.is_file())
        sizes = {p.relative_to(staged).as_posix(): p.stat().st_size for p in paths}

        def send(name: str) -> tuple[str, tuple[int, int]]:
            path, large = staged / name, sizes[name] > _LARGE_BYTES
            entry = sizes[name], file_crc32c(path)
            with clear_errors(self._address(f"{folder}/{name}")):
                obstore.put(
                    self._store(large=large),
                    self._path(f"{folder}/{name}"),
                    _mapped(path),
                    use_multipart=False,
                )
            return name, entry

        large = [name for name, size in sizes.items() if size > _LARGE_BYTES]
        small = [name for name, size in sizes.items() if size <= _LARGE_BYTES]
        with ThreadPoolExecutor(_LARGE_THREADS) as slow, ThreadPoolExecutor(_THREADS) as quick:
            both = slow.map(send, large), quick.map(send, small)
            sent = dict(entry for results in both for entry in results)
        listed = {entry.key: entry.num_bytes for entry in self.walk(folder)}
        for name, num_bytes in sizes.items():
            if (has := listed.get(f"{folder}/{name}")) != num_bytes:
                raise KdhieraError(
                    f"{self.url}/{folder}/{name} was sent with {num_bytes} bytes and the bucket "
                    f"lists {has}: run the same command again"
                )
        staging.remove_folder(staged)
        return {name: sent[name] for name in sizes}

    def discard(self, folder: str, staged: Path) -> None:
        """Remove the temporary folder and what was uploaded of it."""
        staging.remove_folder(staged)
        with contextlib.suppress(KdhieraError):
            self.delete_folder(folder)

    def kvstore(self, folder: str) -> Mapping[str, Any]:
        """The s3 driver, which takes the keys from the environment itself."""
        how = access()
        kinds = {"environment": "environment", "role": "default", "anonymous": "anonymous"}
        path = self._path(folder)
        spec: dict[str, Any] = {
            "driver": "s3",
            "bucket": self.bucket,
            "path": f"{path}/" if path else "",
            "aws_region": how.region,
            "aws_credentials": {"type": kinds[how.signing]},
        }
        return spec | ({} if how.endpoint is None else {"endpoint": how.endpoint})

    def _path(self, key: str) -> str:
        return "/".join(filter(None, (self.prefix, key)))

    def _address(self, key: str) -> str:
        return f"s3://{self.bucket}/{self._path(key)}"

    def _store(self, *, large: bool = False) -> S3Store:
        return connect(self.bucket, large=large)

    def _list(self, folder: str) -> tuple[list[str], list[str]]:
        """Names of the folders and of the objects directly in `folder`."""
        with clear_errors(self.url):
            found = obstore.list_with_delimiter(self._store(), self._path(folder) or None)
        paths = found["common_prefixes"], [meta["path"] for meta in found["objects"]]
        folders, objects = ([p.rstrip("/").rpartition("/")[2] for p in some] for some in paths)
        return folders, objects

    def _pages(self, folder: str) -> Iterator[list[tuple[str, int, float]]]:
        """(path, size, time of writing) of what lies below a folder, a page at a time."""
        with clear_errors(self.url):
            for page in obstore.list(self._store(), self._path(folder) or None, chunk_size=_PAGE):
                yield [(m["path"], m["size"], m["last_modified"].timestamp()) for m in page]

    def _read_or_none(self, key: str) -> bytes | None:
        try:
            return self.read(key)
        except FileNotFoundError:
            return None


def _version(meta: Mapping[str, Any]) -> FileVersion:
    """What tells an object from another: its ETag, or else when it was written."""
    return FileVersion(num_bytes=meta["size"], tag=meta["e_tag"] or str(meta["last_modified"]))


def _mapped(path: Path) -> bytes | mmap.mmap:
    """A file's bytes without a copy in this process's memory."""
    if not path.stat().st_size:
        return b""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
