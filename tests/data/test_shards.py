"""Tar shards, whole and broken, against tarfile and webdataset."""

import gzip
import hashlib
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_iterator

from kdhiera.data.shards import (
    ShardError,
    expand,
    index_shard,
    read_sample,
    read_shard,
)
from kdhiera.errors import DamagedError, UsageError
from kdhiera.storage import file_sha256
from kdhiera.views import RowStatus

FILES = [
    ("a/one.mp4", b"1" * 700),
    ("a/one.json", b'{"labels": {"class": "cat", "way": 3}}'),
    ("two.mp4", b"22"),
    ("two.cls", b"7"),
    ("three.json", b"{}"),
    ("four.MP4", b"4444"),
]


def tar(files, **kinds):
    """Bytes of a tar archive; `kinds` is passed to tarfile."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", **kinds) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture
def shard(tmp_path):
    """Writes bytes, or files as a tar, to a shard and indexes it."""

    def write(content, name="shard-000000.tar"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else tar(content))
        return index_shard(str(path))

    return write


def read(index, **options):
    return list(read_shard(index, video_extensions=("mp4", "avi"), **options))


def test_every_sample_becomes_a_row_in_tar_order(shard):
    index = shard(FILES)
    assert index.problems == ()
    assert [sample.ordinal for sample in index.samples] == [0, 1, 2, 3]
    samples = read(index)
    assert [s.key for s in samples] == ["a/one", "two", "three", "four"]
    assert [s.video for s in samples] == [b"1" * 700, b"22", None, b"4444"]
    assert [s.status for s in samples] == [RowStatus.OK] * 2 + [
        RowStatus.MISSING_MEMBER,
        RowStatus.OK,
    ]
    assert samples[2].message == "no member ends in mp4, avi; there is .json"
    assert [dict(s.labels) for s in samples] == [{"class": "cat", "way": 3}, {"cls": 7}, {}, {}]
    assert [s.offset for s in samples] == [0, 2560, 4608, 5632]
    assert len({s.uid for s in samples}) == 4
    assert samples[1].uid == f"{index.shard_id}/2560/two"
    for sample in samples:
        assert read_sample(index, sample.ordinal, video_extensions=("mp4", "avi")) == sample


NAMES = st.text("ab./_-é", min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NAMES, st.binary(max_size=40)), min_size=1, max_size=12))
def test_grouping_is_webdatasets(tmp_path_factory, files):
    """Whatever webdataset's reader makes of a sound tar, the index does too."""
    path = tmp_path_factory.mktemp("shard") / "x.tar"
    path.write_bytes(tar(files))
    index = index_shard(str(path))
    with open(path, "rb") as file:
        members = [{**m, "__url__": "x"} for m in tar_file_iterator(file)]
    seen = [(s.key, [m.extension for m in s.members]) for s in index.samples]
    split = [webdataset.tariterators.base_plus_ext(m["fname"]) for m in members]
    split = [(key, extension.lower()) for key, extension in split if key is not None]
    assert [(key, e) for key, extensions in seen for e in extensions] == split
    try:
        groups = list(group_by_keys(iter(members)))
    except ValueError:  # one extension twice in a sample, which the index keeps apart
        return
    assert seen == [(g.pop("__key__"), [n for n in g if n != "__url__"]) for g in groups]


def test_what_a_streaming_reader_passes_over_in_silence_is_reported(shard, tmp_path):
    """webdataset alone: a flipped header byte or a cut ends the shard without a word."""
    whole = tar(FILES)
    flipped = bytearray(whole)
    flipped[2560] ^= 1  # in the header of two.mp4
    for name, content in {"flipped": bytes(flipped), "cut": whole[:2560]}.items():
        index = shard(content, f"{name}.tar")
        with open(index.path, "rb") as file:
            silent = list(tar_file_iterator(file))
        assert [m["fname"] for m in silent] == ["a/one.mp4", "a/one.json"]
        assert [s.key for s in read(index)] == ["a/one"]
        (problem,) = index.problems
        assert problem.startswith("shard_truncated: readable up to byte 2560 of")


@pytest.mark.parametrize(
    "form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=str
)
def test_a_cut_anywhere_keeps_what_is_before_it_and_is_reported(tmp_path, form):
    files = [*FILES, ("long/" + "n" * 90 + "/é.mp4", b"5" * 600)]
    whole = tar(files, format=form)
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 1024 + 512  # data, and the end-of-archive blocks
    path = tmp_path / "x.tar"
    path.write_bytes(whole)
    complete = index_shard(str(path))
    assert complete.problems == ()
    assert len(complete.samples) == 5
    refs = {ref.offset: ref for ref in complete.samples}
    for cut in [*range(1, end, 61), *range(512, end, 512), *range(511, end, 512)]:
        path.write_bytes(whole[:cut])
        try:
            index = index_shard(str(path))
        except ShardError:
            assert cut < 512
            continue
        assert any(p.startswith("shard_truncated") for p in index.problems), cut
        for sample, ref in zip(read(index), index.samples, strict=True):
            full = refs[ref.offset]
            assert (sample.key, ref.members) == (full.key, full.members[: len(ref.members)])
            for member in ref.members:
                assert member.offset + member.num_bytes <= cut
            if sample.video is not None:
                original = dict(files)
                assert sample.video in (original[n] for n in original if n.lower().endswith("mp4"))
        intact = [r for r in complete.samples if r.offset + r.num_bytes <= cut]
        assert index.samples[: len(intact)] == tuple(intact)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_flipped_bytes_anywhere_never_mix_samples(tmp_path_factory, data):
    whole = bytearray(tar(FILES))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, 6655))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("shard") / "x.tar"
    path.write_bytes(whole)
    try:
        index = index_shard(str(path))
    except ShardError:
        return
    samples = read(index)
    assert len({s.uid for s in samples}) == len(samples) == len(index.samples)
    offsets = [s.offset for s in samples]
    assert offsets == sorted(offsets)
    for sample in samples:
        assert (sample.video is None) == (sample.status is not RowStatus.OK)


def test_data_after_the_end_and_a_missing_end_are_reported(shard):
    whole = tar(FILES)
    assert shard(whole + tar(FILES)).problems[0].startswith("trailing_data")
    body = whole.rstrip(b"\0")
    padded = body + bytes(-len(body) % 512)
    assert shard(padded + bytes(1024)).problems == ()
    for short in (padded, padded + bytes(512)):
        (problem,) = shard(short).problems
        assert problem.endswith("no end-of-archive blocks follow")
    assert len(shard(padded).samples) == 4


def test_samples_that_share_a_key_are_kept_apart(shard):
    twice = [("x.mp4", b"first"), ("x.cls", b"1"), ("x.mp4", b"second"), ("x.cls", b"2")]
    apart = [*twice[:2], ("y.mp4", b"other"), ("x.mp4", b"third"), ("x.cls", b"3")]
    for files, videos in (
        (twice, [b"first", b"second"]),
        (apart, [b"first", b"other", b"third"]),
        ([("x.mp4", b"1"), ("x.mp4", b"2")], [b"1", b"2"]),
    ):
        index = shard(files)
        samples = read(index)
        assert [s.video for s in samples] == videos
        assert len({s.uid for s in samples}) == len(videos)
        assert index.problems == ("duplicate_keys: 1 samples have the key of an earlier one",)
    assert [s.labels for s in read(shard(twice))] == [{"cls": 1}, {"cls": 2}]


def test_keys_are_names_and_never_paths(shard, tmp_path):
    index = shard([("../../etc/x.mp4", b"1"), ("/abs/y.mp4", b"2"), ("z\n\x1b[31m.mp4", b"3")])
    samples = read(index)
    assert [s.key for s in samples] == ["../../etc/x", "/abs/y", "z\n\x1b[31m"]
    assert [s.video for s in samples] == [b"1", b"2", b"3"]
    assert os.listdir(tmp_path) == ["shard-000000.tar"]


def test_names_that_are_no_utf8_can_still_be_written_down(tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        info = tarfile.TarInfo("\udcff\udcfe.mp4")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"v"))
    path = tmp_path / "x.tar"
    path.write_bytes(out.getvalue())
    (sample,) = read(index_shard(str(path)))
    assert sample.key.encode() == b"\\xff\\xfe"
    assert sample.video == b"v"


def test_only_regular_files_are_members(shard, tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, kind in {
            "d": tarfile.DIRTYPE,
            "l.mp4": tarfile.SYMTYPE,
            "f.mp4": tarfile.FIFOTYPE,
        }.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        for name in ("__key__", "README", "v.mp4"):
            info = tarfile.TarInfo(name)
            info.size = 1
            archive.addfile(info, io.BytesIO(b"v"))
    index = shard(out.getvalue())
    assert [s.key for s in read(index)] == ["v"]
    assert index.problems == ("skipped_members: 2 members are links, sparse or special files",)


def test_pickles_are_never_read(shard):
    class Bomb:
        def __reduce__(self):
            return os._exit, (1,)

    bomb = pickle.dumps(Bomb())
    files = [("x.mp4", b"v")] + [(f"x.{e}", bomb) for e in ("pyd", "pickle", "pth", "npy", "cls")]
    (sample,) = read(shard(files))
    assert sample.video == b"v"
    assert sample.labels == {}
    assert "labels left out: .cls cannot be read" in sample.message


@pytest.mark.parametrize(
    ("name", "content", "labels", "words"),
    [
        (
            "json",
            {"labels": {"a": 1, "b": "x", "c": 1.5, "d": None, "e": [1], "f": True}},
            {"a": 1, "b": "x"},
            "",
        ),
        ("json", {"a": 1, "b": "x", "nested": {"c": 2}}, {"a": 1, "b": "x"}, ""),
        ("json", {"labels": [1, 2]}, {}, "its labels are no JSON object"),
        ("json", [1, 2], {}, "no JSON object"),
        ("json", {"a": 2**70, "b": -(2**63)}, {"b": -(2**63)}, ""),
        ("json", b"{broken", {}, "cannot be read"),
        ("json", b"\xff\xfe", {}, "cannot be read"),
        ("json", b"[" * 100_000, {}, "cannot be read"),
        ("json", b"1" * 2_000_000, {}, "2000000 bytes"),
        ("cls", b" 12\n", {"cls": 12}, ""),
        ("cls", b"cat", {}, "cannot be read"),
        ("txt", b" a cat \n", {"txt": "a cat"}, ""),
    ],
)
def test_labels_are_taken_or_left_and_the_video_stays(shard, name, content, labels, words):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    index = shard([("x.mp4", b"v"), (f"x.{name}", data)])
    (sample,) = read(index, label_extensions=("json", "cls", "txt"))
    assert (sample.video, sample.status) == (b"v", RowStatus.OK)
    assert sample.labels == labels
    assert words in sample.message
    assert sample.message.isprintable()
    assert bool(words) == bool(sample.message)


def test_which_member_is_the_video(shard):
    (sample,) = read(shard([("x.jpg", b"no"), ("x.avi", b"second"), ("x.cam0.mp4", b"first")]))
    assert sample.video == b"first"
    (sample,) = read(shard([("x.xmp4", b"no")]))
    assert sample.status is RowStatus.MISSING_MEMBER


def test_a_large_member_is_not_read(shard):
    samples = read(shard([("x.mp4", b"12345"), ("y.mp4", b"1234")]), max_video_bytes=4)
    assert [s.status for s in samples] == [RowStatus.DECODE_LIMIT, RowStatus.OK]
    assert samples[0].video is None
    assert "5 bytes" in samples[0].message


def test_identity_is_that_of_the_index(shard, tmp_path):
    index = shard(FILES)
    assert index.shard_id.startswith("shard-000000-")
    (tmp_path / "moved").mkdir()
    moved = shard(FILES, "moved/shard-000000.tar")
    assert (moved.shard_id, moved.samples) == (index.shard_id, index.samples)
    other = [("a/one.mp4", b"9" * 700), *FILES[1:]]
    same = shard(other)  # the index cannot tell: the hash of the file does
    assert same.shard_id == index.shard_id
    assert file_sha256(Path(same.path)) != file_sha256(Path(moved.path))
    assert file_sha256(Path(moved.path)) == hashlib.sha256(tar(FILES)).hexdigest()
    assert shard(FILES[:-1]).shard_id != index.shard_id
    assert shard([("b/one.mp4", b"1" * 700), *FILES[1:]]).shard_id != index.shard_id
    strange = shard(FILES, "..  a b;$(x).tar")
    assert strange.shard_id.rpartition("-")[0] == "__a_b___x_"


@pytest.mark.parametrize("content", [b"", b"text\n" * 300, b"\xff\xd8\xff" + bytes(2000)])
def test_a_file_that_is_no_tar_is_refused(shard, content):
    with pytest.raises(ShardError, match="is no tar archive"):
        shard(content)


def test_a_compressed_tar_is_refused_whatever_its_name(shard, tmp_path):
    bomb = gzip.compress(bytes(30_000_000))
    with pytest.raises(ShardError, match="is compressed \\(gzip\\): unpack it"):
        shard(bomb)
    (tmp_path / "x.tar.gz").write_bytes(bomb)
    with pytest.raises(UsageError, match=r"x\.tar\.gz' is compressed"):
        expand([str(tmp_path / "*.gz")])


def test_an_empty_archive_is_a_shard_with_a_problem(shard):
    index = shard(tar([]))
    assert index.samples == ()
    assert index.problems == ("no_samples: the archive holds no sample",)
    assert read(index) == []


def test_headers_that_claim_too_much(shard):
    whole = bytearray(tar(FILES))
    info = tarfile.TarInfo("two.mp4")
    for size in (10**12, 2**63):
        info.size = size
        whole[2560:3072] = info.tobuf(format=tarfile.GNU_FORMAT)
        index = shard(bytes(whole))
        assert [s.key for s in index.samples] == ["a/one"]
        assert "the file ends inside member 'two.mp4'" in index.problems[0]
    buffer = bytearray(info.tobuf(format=tarfile.GNU_FORMAT))
    buffer[124:136] = b"\xff" * 12  # -1
    buffer[148:156] = b" " * 8
    buffer[148:156] = b"%06o\0 " % sum(buffer)
    whole[2560:3072] = buffer
    index = shard(bytes(whole))
    assert [s.key for s in index.samples] == ["a/one"]
    assert "a size that makes no sense" in index.problems[0]


def test_a_shard_that_changed_is_noticed(shard):
    index = shard(FILES)
    with open(index.path, "ab") as file:
        file.write(b"x")
    with pytest.raises(DamagedError, match="when it was indexed"):
        read(index)
    os.remove(index.path)
    with pytest.raises(FileNotFoundError):
        read(index)


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
        ("s3://bucket/x.tar", "has the scheme 's3:'"),
        ("http://127.0.0.1/x.tar", "has the scheme 'http:'"),
        ("x\n.tar", "'x\\n.tar'"),
    ],
)
def test_patterns_that_are_refused(paths, pattern, words):
    with pytest.raises(UsageError) as caught:
        expand(["a-000.tar", pattern])
    assert words in str(caught.value)
    assert not (paths / "owned").exists()
