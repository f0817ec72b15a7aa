"""Addresses of files: what a pattern stands for, and what of an address may be shown."""

from __future__ import annotations

import fnmatch
import re
from urllib.parse import unquote, urlsplit, urlunsplit

from kdhiera.errors import UsageError

GLOB = re.compile(r"[*?[]")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")
_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBERS = re.compile(r"(\d+)\.\.(\d+)")
_QUERY = re.compile(r"\?[\w.~%-]+=.*")  # in a bucket's address a lone `?` is a glob


def scheme_of(address: str) -> str:
    """What stands before the first colon (`s3:`), or nothing for a local path."""
    found = _SCHEME.match(address)
    return found.group() if found else ""


def without_file_scheme(address: str) -> str:
    """The local path that a `file://` address means; anything else as it is."""
    return unquote(address[7:]) if address.startswith("file://") else address


def expand_braces(pattern: str) -> list[str]:
    """Every path that a pattern's braces stand for; the files need not exist."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    if numbers := _NUMBERS.fullmatch(match[1]):
        first, last = int(numbers[1]), int(numbers[2])
        step = 1 if first <= last else -1
        words = [f"{i:0{len(numbers[1])}d}" for i in range(first, last + step, step)]
    else:
        words = match[1].split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [path for word in words for path in expand_braces(head + word + tail)]


def matches(path: str, pattern: str) -> bool:
    """Whether a path is one that a glob stands for, by the rules of `glob`.

    `*`, `?` and `[..]` stay within a folder and pass over names with a dot in front; `**`
    is any number of folders.

    Args:
        path: A path or address.
        pattern: The same with globs; no braces.
    """
    return _match(path.split("/"), pattern.split("/"))


def _match(names: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not names
    first, *rest = patterns
    if first == "**":
        if not rest:
            return bool(names) and not any(name.startswith(".") for name in names)
        return _match(names, rest) or (
            bool(names) and not names[0].startswith(".") and _match(names[1:], patterns)
        )
    return bool(names) and name_matches(names[0], first) and _match(names[1:], rest)


def name_matches(name: str, pattern: str) -> bool:
    """Whether a single name is one that a pattern without slashes stands for."""
    if name.startswith(".") and not pattern.startswith("."):
        return False
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def redact(text: str) -> str:
    """A path, address or sentence without the credentials and queries of its addresses."""
    if _URL.match(text):  # all of it is one address, blanks and all
        return _redact_url(text)
    return _URL.sub(lambda found: _redact_url(found.group()), text)


def _redact_url(address: str) -> str:
    if address.startswith("s3://"):
        bucket, slash, key = _QUERY.sub("", address.removeprefix("s3://")).partition("/")
        if {":", "@"} & set(bucket):  # a bucket's name has neither; a secret may hold slashes
            _, at, rest = f"{bucket}{slash}{key}".rpartition("@")
            bucket, slash, key = rest.partition("/") if at else ("...", "", "")
        return f"s3://{bucket}{slash}{key}"
    url = urlsplit(address)
    return urlunsplit((url.scheme, url.netloc.rpartition("@")[2], url.path, "", ""))


def refuse_secrets(address: str, what: str) -> None:
    """Refuse an address that carries a key: addresses are logged and recorded.

    Args:
        address: Path, address or pattern.
        what: Name of the setting it was given for.

    Raises:
        UsageError: Without what must not be shown.
    """
    if redact(address) != address:
        raise UsageError(
            f"{what}: {redact(address)} was given with credentials or a query in it, which would "
            "end up in logs and records: leave them out (for s3:// set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY)"
        )
