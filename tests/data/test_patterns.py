"""Patterns of shards, against the standard library's glob where there is one."""

import glob
import os

import pytest
from places import Place

from kdhiera.data.patterns import expand
from kdhiera.errors import UsageError

NAMES = [
    "a-0.tar",
    "a-1.tar",
    "b.tar",
    "v/a-0.tar",
    "v/w/a-0.tar",
    "v/.h.tar",
    "w/b.tar",
    "[x].tar",
]


@pytest.fixture
def paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "a-000.tar",
        "a-001.tar",
        "a-002.tar",
        "b-9.tar",
        "b-10.tar",
        "[x].tar",
        "c d.tar",
    ):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["a-{000..002}.tar"], ["a-000.tar", "a-001.tar", "a-002.tar"]),
        (["a-{002..000}.tar"], ["a-002.tar", "a-001.tar", "a-000.tar"]),
        (["b-{9..10}.tar"], ["b-9.tar", "b-10.tar"]),
        (["{b-9,a-{000..001}}.tar"], ["b-9.tar", "a-000.tar", "a-001.tar"]),
        (["b-*.tar", "a-00?.tar"], ["b-10.tar", "b-9.tar", "a-000.tar", "a-001.tar", "a-002.tar"]),
        (["a-001.tar", "a-*.tar"], ["a-001.tar", "a-000.tar", "a-002.tar"]),
        (["[x].tar"], ["[x].tar"]),
        (["./a-000.tar", "sub/../a-000.tar"], ["a-000.tar"]),
        (["**/a-000.tar"], ["a-000.tar"]),
    ],
)
def test_patterns(paths, patterns, names):
    (paths / "sub").mkdir()
    assert expand(patterns) == [str(paths / name) for name in names]


def test_file_addresses_and_links(paths):
    assert expand([f"file://{paths}/c%20d.tar"]) == [str(paths / "c d.tar")]
    (paths / "link.tar").symlink_to(paths / "a-000.tar")
    assert expand(["link.tar", "a-000.tar"]) == [str(paths / "link.tar")]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("nothing-*.tar", "no file matches 'nothing-*.tar'"),
        ("a-{000..003}.tar", "no file matches 'a-003.tar' (of 'a-{000..003}.tar'"),
        ("pipe:touch owned", "has the scheme 'pipe:'"),
        ("http://127.0.0.1/x.tar", "has the scheme 'http:'"),
        ("x\n.tar", "'x\\n.tar'"),
    ],
)
def test_patterns_that_are_refused(paths, pattern, words):
    with pytest.raises(UsageError) as caught:
        expand(["a-000.tar", pattern])
    assert words in str(caught.value)
    assert not (paths / "owned").exists()


def test_a_compressed_shard_is_refused_by_its_name(place):
    place.put("x.tar.gz", b"anything")
    with pytest.raises(UsageError, match=r"x\.tar\.gz' is compressed"):
        expand([f"{place.root}/*.gz"])


@pytest.mark.parametrize(
    "pattern",
    [
        "*.tar",
        "a-?.tar",
        "a-[0-9].tar",
        "a-[!0].tar",
        "*/a-0.tar",
        "v/*",
        "**/a-0.tar",
        "**/*.tar",
        "v/**",
        "v/**/a-0.tar",
        "?/w/*.tar",
        "[[]x].tar",
        "[x].tar",
        "v/.*",
    ],
)
def test_globs_mean_the_same_in_a_bucket(tmp_path, s3_url, pattern):
    for name in NAMES:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
        Place(s3_url).put(name, b"x")
    exact = tmp_path / pattern
    local = [str(exact)] if exact.exists() else glob.glob(str(exact), recursive=True)
    wanted = sorted(os.path.relpath(p, tmp_path) for p in local if os.path.isfile(p))
    assert wanted
    assert expand([f"{s3_url}/{pattern}"]) == [f"{s3_url}/{name}" for name in wanted]


def test_braces_and_lists_of_both_kinds(tmp_path, s3_url):
    for name in NAMES:
        Place(s3_url).put(name, b"x")
    (tmp_path / "c.tar").touch()
    found = expand([f"{s3_url}/a-{{1..0}}.tar", f"{tmp_path}/*.tar", f"{s3_url}/{{v,w}}/*.tar"])
    keys = ["a-1.tar", "a-0.tar", None, "v/a-0.tar", "w/b.tar"]
    assert found == [f"{s3_url}/{k}" if k else str(tmp_path / "c.tar") for k in keys]


def test_more_objects_than_a_page(s3_url):
    from concurrent.futures import ThreadPoolExecutor

    names = [f"p-{i:04d}.tar" for i in range(1005)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: Place(s3_url).put(name, b"x"), names))
    assert expand([f"{s3_url}/p-*.tar"]) == [f"{s3_url}/{name}" for name in names]


def test_globs_list_only_the_folders_that_can_match(s3, s3_url):
    for name in NAMES:
        Place(s3_url).put(name, b"x")
    s3.requests.clear()
    assert expand([f"{s3_url}/v/a-*.tar"]) == [f"{s3_url}/v/a-0.tar"]
    assert len([r for r in s3.requests if r.method == "GET"]) == 1


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("{root}/a-9.tar", "no object matches '{root}/a-9.tar' (of '{root}/a-9.tar'): correct"),
        (
            "{root}/a-{{0..2}}.tar",
            "no object matches '{root}/a-2.tar' (of '{root}/a-{{0..2}}.tar')",
        ),
        ("{root}/nothing-*.tar", "no object matches '{root}/nothing-*.tar'"),
        (
            "s3://nobody/x.tar",
            "data.shards: s3://nobody: there is no such bucket: correct the name",
        ),
        (
            "s3://nobody/*.tar",
            "data.shards: s3://nobody: there is no such bucket: correct the name",
        ),
        ("s3://bucket", "names no object: write s3://bucket/KEY.tar"),
        ("s3://bucket/", "names no object: write s3://bucket/KEY.tar"),
        ("s3:///x.tar", "names no bucket"),
        ("{root}//a-0.tar", "has an empty part"),
        ("{root}/x.tar?X-Amz-Signature=secret", "credentials or a query"),
        ("pipe:aws s3 cp s3://u:secret@bucket/x -", "has the scheme 'pipe:'"),
        ("https://host/x.tar?sig=secret", "has the scheme 'https:'"),
        ("gs://bucket/x.tar", "has the scheme 'gs:'"),
        ("S3://bucket/x.tar", "has the scheme 'S3:'"),
    ],
)
def test_addresses_that_are_refused_in_one_clear_sentence(s3_url, pattern, words):
    for name in ("a-0.tar", "a-1.tar"):
        Place(s3_url).put(name, b"x")
    with pytest.raises(UsageError) as caught:
        expand([pattern.format(root=s3_url)])
    assert words.format(root=s3_url) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_without_credentials(s3, monkeypatch):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UsageError, match="no credentials for s3://: set AWS_ACCESS_KEY_ID"):
        expand(["s3://bucket/x.tar"])
