"""A store in a bucket: whole objects, published by conditional PUT (`If-None-Match: *`)."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import google_crc32c
import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import S3Store

from kdhiera.errors import KdhieraError, UsageError
from kdhiera.storage import file_crc32c
from kdhiera.stores import Entry, Files

_THREADS = 16
_PIECE_BYTES = 1 << 22
_CREATE_TRIES = 3
_CONNECT = timedelta(seconds=3)
_REQUEST = timedelta(seconds=120)
_RETRIES = 5
_RETRY_FOR = timedelta(seconds=60)
_ROLES = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
)
_ADVICE = (  # (what the answer says, what it means and what to do), the first that fits
    ("NoSuchBucket", "there is no such bucket: correct the name, or create it"),
    ("301 Moved", "the bucket is in another region: set AWS_REGION to its region"),
    ("InvalidAccessKeyId", "the access key is not known there: check AWS_ACCESS_KEY_ID"),
    ("SignatureDoesNotMatch", "the secret key is wrong: check AWS_SECRET_ACCESS_KEY"),
    ("ExpiredToken", "the session token has expired: renew AWS_SESSION_TOKEN"),
    (
        "403 Forbidden",
        "access is denied: give these credentials the right to list, read and write there",
    ),
    ("401 Unauthorized", "access is denied: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    ("error sending request", "nothing answers: check AWS_ENDPOINT_URL and the network"),
    ("connect", "nothing answers: check AWS_ENDPOINT_URL and the network"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Access:
    """Which server and which identity; holds no secret.

    Args:
        endpoint: Address of the server; None is AWS.
        region: Region of the bucket.
        signing: `environment`, `role` or `anonymous`.
    """

    endpoint: str | None
    region: str
    signing: str


def _access() -> _Access:
    env = os.environ
    if env.get("AWS_SKIP_SIGNATURE", "").lower() == "true":
        signing = "anonymous"
    elif env.get("AWS_ACCESS_KEY_ID") and env.get("AWS_SECRET_ACCESS_KEY"):
        signing = "environment"
    elif any(env.get(name) for name in _ROLES):
        signing = "role"
    else:
        raise UsageError(
            "there are no credentials for s3://: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
            "(or AWS_SKIP_SIGNATURE=true to read a public bucket)"
        )
    return _Access(
        endpoint=env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or None,
        region=env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or "us-east-1",
        signing=signing,
    )


@functools.lru_cache(maxsize=16)
def _client(bucket: str, access: _Access, key_id: str | None, pid: int) -> S3Store:
    """One connection pool a process for everything with the same address and identity."""
    plain = access.endpoint is not None and access.endpoint.startswith("http://")
    config: dict[str, Any] = {"region": access.region, "checksum_algorithm": "SHA256"}
    if access.endpoint is not None:
        config["endpoint"] = access.endpoint
    if access.signing == "anonymous":
        config["skip_signature"] = True
    return S3Store(
        bucket,
        config=config,  # type: ignore[arg-type]
        client_options={"allow_http": plain, "connect_timeout": _CONNECT, "timeout": _REQUEST},
        retry_config={
            "max_retries": _RETRIES,
            "retry_timeout": _RETRY_FOR,
            "backoff": {
                "init_backoff": timedelta(milliseconds=100),
                "max_backoff": timedelta(seconds=2),
                "base": 2,
            },
        },
    )


@contextlib.contextmanager
def _clear(url: str) -> Iterator[None]:
    """Turn what a bucket answers into one sentence; a missing object stays what it is."""
    try:
        yield
    except (BaseError, FileNotFoundError, PermissionError, OSError, ValueError) as error:
        said = str(error)
        if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in said:
            raise
        advice = next((text for mark, text in _ADVICE if mark in said), None)
        if advice is None:
            advice = f"{type(error).__name__}: {' '.join(said.split())[:300]}"
        raise KdhieraError(f"{url}: {advice}") from None


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
        with _clear(self.url):
            return bytes(obstore.get(self._store(), self._path(key)).bytes())

    def read_many(self, keys: Iterable[str]) -> list[bytes | None]:
        """Contents of many objects, 16 at once."""
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(self._read_or_none, keys))

    def read_ends(self, sizes: Mapping[str, int], num_bytes: int) -> list[bytes | None]:
        """The last bytes of many objects, 16 at once."""

        def read(item: tuple[str, int]) -> bytes | None:
            key, size = item
            try:
                return self.read_range(key, max(0, size - num_bytes), size)
            except FileNotFoundError:
                return None

        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(read, sizes.items()))

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of an object, fewer where it ends before; `start` is in it."""
        with _clear(self.url):
            found = obstore.get_range(self._store(), self._path(key), start=start, end=stop)
            return bytes(found)

    def size(self, key: str) -> int:
        """Bytes in an object.

        Raises:
            FileNotFoundError: If there is none.
        """
        with _clear(self.url):
            return int(obstore.head(self._store(), self._path(key))["size"])

    def checksum(self, key: str) -> tuple[int, int]:
        """Size and crc32c of an object, as it streams past."""
        size = crc32c = 0
        with _clear(self.url):
            found = obstore.get(self._store(), self._path(key))
            for piece in found.stream(min_chunk_size=_PIECE_BYTES):
                data = bytes(piece)
                size, crc32c = size + len(data), google_crc32c.extend(crc32c, data)
        return size, crc32c

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        try:
            self.size(key)
        except FileNotFoundError:
            return False
        return True

    def write(self, key: str, data: bytes) -> None:
        """Put a whole object in place."""
        with _clear(self.url):
            obstore.put(self._store(), self._path(key), data, use_multipart=False)

    def create(self, key: str, data: bytes) -> bool:
        """Put a whole object in place by conditional PUT; see `Store`.

        A lost answer makes the client send again and be told that the name is taken: only
        what is there says who won.
        """
        for _ in range(_CREATE_TRIES):
            failure: Exception | None = None
            try:
                obstore.put(
                    self._store(), self._path(key), data, mode="create", use_multipart=False
                )
                return True
            except (AlreadyExistsError, PreconditionError):
                pass
            except (BaseError, OSError) as error:
                failure = error
            there = self._read_or_none(key)
            if there is not None:
                return there == data
            if failure is not None:
                with _clear(self.url):
                    raise failure
        raise KdhieraError(f"{self.url}: {key} is refused as taken and is not there: run again")

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects one after the other."""
        for key in keys:
            with contextlib.suppress(FileNotFoundError), _clear(self.url):
                obstore.delete(self._store(), self._path(key))

    def delete_folder(self, folder: str) -> None:
        """Remove everything below a folder, a thousand objects a request."""
        for page in self._pages(folder):
            with _clear(self.url):
                obstore.delete(self._store(), [path for path, _, _ in page])

    def names(self, folder: str) -> list[str]:
        """Names in a folder, from a listing with a delimiter."""
        folders, objects = self._list(folder)
        return sorted({*folders, *objects})

    def folders(self, folder: str) -> list[str]:
        """Names of common prefixes, from a listing with a delimiter."""
        return sorted(self._list(folder)[0])

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
        return Path(tempfile.mkdtemp(prefix="kdhiera-"))

    def keep(self, folder: str, staged: Path) -> Files:
        """Upload a staged folder, have the bucket list it, and remove the local copy.

        Every PUT carries the SHA-256 of its bytes, which the server checks.
        """
        names = sorted(p.relative_to(staged).as_posix() for p in staged.rglob("*") if p.is_file())

        def send(name: str) -> tuple[str, tuple[int, int]]:
            path = staged / name
            entry = path.stat().st_size, file_crc32c(path)
            with _clear(self.url):
                obstore.put(self._store(), self._path(f"{folder}/{name}"), path)
            return name, entry

        with ThreadPoolExecutor(_THREADS) as pool:
            files = dict(pool.map(send, names))
        listed = {entry.key: entry.num_bytes for entry in self.walk(folder)}
        for name, (num_bytes, _) in files.items():
            if (has := listed.get(f"{folder}/{name}")) != num_bytes:
                raise KdhieraError(
                    f"{self.url}/{folder}/{name} was sent with {num_bytes} bytes and the bucket "
                    f"lists {has}: run the same command again"
                )
        shutil.rmtree(staged, ignore_errors=True)
        return files

    def discard(self, folder: str, staged: Path) -> None:
        """Remove the temporary folder and what was uploaded of it."""
        shutil.rmtree(staged, ignore_errors=True)
        with contextlib.suppress(KdhieraError):
            self.delete_folder(folder)

    def kvstore(self, folder: str) -> Mapping[str, Any]:
        """The s3 driver, which takes the keys from the environment itself."""
        access = _access()
        kinds = {"environment": "environment", "role": "default", "anonymous": "anonymous"}
        path = self._path(folder)
        spec: dict[str, Any] = {
            "driver": "s3",
            "bucket": self.bucket,
            "path": f"{path}/" if path else "",
            "aws_region": access.region,
            "aws_credentials": {"type": kinds[access.signing]},
        }
        return spec | ({} if access.endpoint is None else {"endpoint": access.endpoint})

    def _path(self, key: str) -> str:
        return "/".join(filter(None, (self.prefix, key)))

    def _store(self) -> S3Store:
        return _client(self.bucket, _access(), os.environ.get("AWS_ACCESS_KEY_ID"), os.getpid())

    def _list(self, folder: str) -> tuple[list[str], list[str]]:
        """Names of the folders and of the objects directly in `folder`."""
        with _clear(self.url):
            found = obstore.list_with_delimiter(self._store(), self._path(folder) or None)
        paths = found["common_prefixes"], [meta["path"] for meta in found["objects"]]
        folders, objects = ([p.rstrip("/").rpartition("/")[2] for p in some] for some in paths)
        return folders, objects

    def _pages(self, folder: str) -> Iterator[list[tuple[str, int, float]]]:
        """(path, size, time of writing) of what lies below a folder, a page at a time."""
        with _clear(self.url):
            for page in obstore.list(self._store(), self._path(folder) or None, chunk_size=1000):
                yield [(m["path"], m["size"], m["last_modified"].timestamp()) for m in page]

    def _read_or_none(self, key: str) -> bytes | None:
        try:
            return self.read(key)
        except FileNotFoundError:
            return None
