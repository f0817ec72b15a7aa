import glob
import os
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdhiera.addresses import expand_braces, matches, redact, refuse_secrets, scheme_of
from kdhiera.config import load
from kdhiera.errors import UsageError

NAMES = ["a", "b", "ab", "a-0.tar", "a-1.tar", ".a", "x[1]"]
PATTERNS = ["*", "?", "a*", "*.tar", "a-[0-9].tar", "[!b]*", ".*", "**", "a", "ab", "x[[]1]"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder that holds every name, three deep; a path is a file where it ends."""
    root = tmp_path_factory.mktemp("tree")
    for name in NAMES:
        for below in NAMES[:4]:
            folder = root / f"{name}.d" / f"{below}.d"
            folder.mkdir(parents=True)
            for file in (root / name, root / f"{name}.d" / below, folder / "a-0.tar"):
                file.touch()
    return root


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*PATTERNS, "a.d", "a*.d", "*.d"]), min_size=1, max_size=4))
def test_matches_are_globs(tree, words):
    """The standard library's `glob` over real files is the reference."""
    pattern = f"{tree}/{'/'.join(words)}"
    found = {p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)}
    files = [str(p) for p in tree.rglob("*") if p.is_file()]
    assert {path for path in files if matches(path, pattern)} == found


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("x", ["x"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{2..0}", ["2", "1", "0"]),
        ("s3://b/{a,b}-{x,y}", [f"s3://b/{i}-{j}" for i in "ab" for j in "xy"]),
    ],
)
def test_braces(pattern, paths):
    assert expand_braces(pattern) == paths


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("a/b c.tar", "a/b c.tar"),
        ("/data/x.tar?not-a-query", "/data/x.tar?not-a-query"),
        ("https://host:8080/x.tar?sig=secret&e=1#f", "https://host:8080/x.tar"),
        ("s3://user:secret@bucket/k/x.tar", "s3://bucket/k/x.tar"),
        ("s3://user:sec/ret+x@bucket/k/x.tar", "s3://bucket/k/x.tar"),
        ("s3://user:secret", "s3://..."),
        ("s3://bucket/a b/x.tar?X-Amz-Signature=secret&a=b", "s3://bucket/a b/x.tar"),
        ("s3://bucket/part-?.tar", "s3://bucket/part-?.tar"),
        ("s3://bucket/part-?/day=1/#1@home.tar", "s3://bucket/part-?/day=1/#1@home.tar"),
        ("pipe:curl https://u:secret@host/x?sig=secret | cat", "pipe:curl https://host/x | cat"),
        ("GET http://u:secret@host/x failed", "GET http://host/x failed"),
    ],
)
def test_secrets_of_addresses_are_cut(path, shown):
    assert redact(path) == shown
    if path == shown:
        refuse_secrets(path, "it")
    else:
        with pytest.raises(UsageError, match="was given with credentials or a query") as caught:
            refuse_secrets(path, "it")
        assert "secret" not in str(caught.value)


@given(st.text(string.ascii_letters + string.digits + "+/=", min_size=16, max_size=40))
def test_no_secret_key_is_shown(secret):
    for address in (f"s3://AKIA:{secret}@bucket/x.tar", f"s3://bucket/x?X-Amz-Credential={secret}"):
        assert secret not in redact(address)


@pytest.mark.parametrize(
    ("address", "scheme"),
    [
        ("s3://b/x", "s3:"),
        ("S3://b/x", "S3:"),
        ("pipe:cat", "pipe:"),
        ("/a:b/x", ""),
        ("a/b", ""),
        ("file:///x", "file:"),
    ],
)
def test_schemes(address, scheme):
    assert scheme_of(address) == scheme


@pytest.mark.parametrize(
    "override",
    [
        "data.shards=s3://AKIA:secret@bucket/x.tar",
        "data.shards=[a.tar, 's3://bucket/x.tar?X-Amz-Signature=secret']",
        "cache.dir=s3://AKIA:secret@bucket/cache",
        "evaluate.train=s3://AKIA:secret@bucket/x.tar",
    ],
)
def test_a_config_with_a_secret_in_an_address_is_refused_without_showing_it(override):
    with pytest.raises(UsageError, match="credentials or a query") as caught:
        load("configs/demo.yaml", [override])
    assert "secret" not in str(caught.value)
    assert override.partition("=")[0] in str(caught.value)
