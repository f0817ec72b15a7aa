"""The connection to a bucket: server and identity from the environment, errors in words."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from obstore.exceptions import BaseError
from obstore.store import S3Store

from kdhiera.addresses import redact
from kdhiera.errors import KdhieraError, UsageError

_CONNECT = timedelta(seconds=3)
_REQUEST = timedelta(seconds=120)
_LARGE_REQUEST = timedelta(minutes=15)  # 256 MB at 300 kB/s
_RETRIES = 5
_RETRY_FOR = timedelta(seconds=60)
_ROLES = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
)
_UNADDRESSABLE = (
    "a name there has an empty part (`//`), or `.` or `..` for one, which cannot be addressed: "
    "correct the address, or rename the object"
)
_ADVICE = (  # (what the answer says, what it means and what to do), the first that fits
    ("NoSuchBucket", "there is no such bucket: correct the name, or create it"),
    ("301 Moved", "the bucket is in another region: set AWS_REGION to its region"),
    ("InvalidAccessKeyId", "the access key is not known there: check AWS_ACCESS_KEY_ID"),
    ("SignatureDoesNotMatch", "the secret key is wrong: check AWS_SECRET_ACCESS_KEY"),
    ("ExpiredToken", "the session token has expired: renew AWS_SESSION_TOKEN"),
    ("RequestTimeTooSkewed", "the clock of this machine is wrong: set it"),
    (
        "403 Forbidden",
        "access is denied: give these credentials the right to list, read and write there",
    ),
    ("401 Unauthorized", "access is denied: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    (" path segment", _UNADDRESSABLE),  # "contained empty ...", "whilst parsing ..."
    ("error sending request", "nothing answers: check AWS_ENDPOINT_URL and the network"),
    ("connect", "nothing answers: check AWS_ENDPOINT_URL and the network"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """Which server and which identity; holds no secret.

    Args:
        endpoint: Address of the server; None is AWS.
        region: Region of the bucket.
        signing: `environment`, `role` or `anonymous`.
    """

    endpoint: str | None
    region: str
    signing: str


def access() -> Access:
    """What the environment says now.

    Raises:
        UsageError: If it holds no credentials.
    """
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
    return Access(
        endpoint=env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or None,
        region=env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or "us-east-1",
        signing=signing,
    )


def connect(bucket: str, *, large: bool = False) -> S3Store:
    """The connections of this process to a bucket, as the environment is now.

    Args:
        bucket: Its name.
        large: For requests that carry hundreds of megabytes, which may take their time.

    Raises:
        UsageError: If there are no credentials.
    """
    return _client(bucket, access(), os.environ.get("AWS_ACCESS_KEY_ID"), os.getpid(), large)


@functools.lru_cache(maxsize=16)
def _client(bucket: str, access: Access, key_id: str | None, pid: int, large: bool) -> S3Store:
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
        client_options={
            "allow_http": plain,
            "connect_timeout": _CONNECT,
            "timeout": _LARGE_REQUEST if large else _REQUEST,
        },
        retry_config={
            "max_retries": _RETRIES,
            "retry_timeout": _LARGE_REQUEST if large else _RETRY_FOR,
            "backoff": {
                "init_backoff": timedelta(milliseconds=100),
                "max_backoff": timedelta(seconds=2),
                "base": 2,
            },
        },
    )


@contextlib.contextmanager
def clear_errors(url: str) -> Iterator[None]:
    """Turn what a bucket answers into one sentence; a missing object stays what it is.

    Args:
        url: What was asked for.

    Raises:
        KdhieraError: With the sentence.
        FileNotFoundError: If there is no such object.
    """
    try:
        yield
    except (BaseError, FileNotFoundError, PermissionError, OSError, ValueError) as error:
        said = str(error)
        if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in said:
            raise
        advice = next((text for mark, text in _ADVICE if mark in said), None)
        if advice is None:
            advice = f"{type(error).__name__}: {redact(' '.join(said.split()))[:300]}"
        raise KdhieraError(f"{url}: {advice}") from None
