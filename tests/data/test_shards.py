"""Tar shards, whole and broken, against tarfile and webdataset."""

import gzip
import hashlib
import io
import json
import os
import pickle
import tarfile

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from places import Place
from webdataset.tariterators import group_by_keys, tar_file_iterator

from kdhiera.data.ranges import SourceError
from kdhiera.data.shards import (
    ShardPass,
    index_shard,
    index_shards,
    read_sample,
    read_shard,
    shard_sha256,
    try_index_shards,
)
from kdhiera.data.tars import ShardError
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
def shard(place):
    """Writes bytes, or files as a tar, to a shard on a disk or in a bucket and indexes it."""

    def write(content, name="shard-000000.tar"):
        data = content if isinstance(content, bytes) else tar(content)
        return index_shard(place.put(name, data))

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


def test_what_a_streaming_reader_passes_over_in_silence_is_reported(shard):
    """webdataset alone: a flipped header byte or a cut ends the shard without a word."""
    whole = tar(FILES)
    flipped = bytearray(whole)
    flipped[2560] ^= 1  # in the header of two.mp4
    for name, content in {"flipped": bytes(flipped), "cut": whole[:2560]}.items():
        index = shard(content, f"{name}.tar")
        silent = list(tar_file_iterator(io.BytesIO(content)))
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


def test_keys_are_names_and_never_paths(shard, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    index = shard([("../../etc/x.mp4", b"1"), ("/abs/y.mp4", b"2"), ("z\n\x1b[31m.mp4", b"3")])
    samples = read(index)
    assert [s.key for s in samples] == ["../../etc/x", "/abs/y", "z\n\x1b[31m"]
    assert [s.video for s in samples] == [b"1", b"2", b"3"]
    assert os.listdir() == []
    assert set(os.listdir(tmp_path)) <= {"here", "place"}


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


def test_only_regular_files_are_members(shard):
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


def sha256(index):
    with ShardPass(index, video_extensions=("mp4",)) as opened:
        list(opened.samples())
        found = opened.sha256()
    assert shard_sha256(index) == found
    return found


def test_identity_is_that_of_the_index(shard):
    index = shard(FILES)
    assert index.shard_id.startswith("shard-000000-")
    moved = shard(FILES, "moved/shard-000000.tar")
    assert (moved.shard_id, moved.samples) == (index.shard_id, index.samples)
    other = [("a/one.mp4", b"9" * 700), *FILES[1:]]
    same = shard(other)  # the index cannot tell: the hash of the file does
    assert same.shard_id == index.shard_id
    assert sha256(same) != sha256(moved)
    assert sha256(moved) == hashlib.sha256(tar(FILES)).hexdigest()
    assert shard(FILES[:-1]).shard_id != index.shard_id
    assert shard([("b/one.mp4", b"1" * 700), *FILES[1:]]).shard_id != index.shard_id
    strange = shard(FILES, "..  a b;$(x).tar")
    assert strange.shard_id.rpartition("-")[0] == "__a_b___x_"


@pytest.mark.parametrize("content", [b"", b"text\n" * 300, b"\xff\xd8\xff" + bytes(2000)])
def test_a_file_that_is_no_tar_is_refused(shard, content):
    with pytest.raises(ShardError, match="is no tar archive"):
        shard(content)


def test_a_compressed_tar_is_refused_whatever_its_name(shard):
    bomb = gzip.compress(bytes(30_000_000))
    with pytest.raises(ShardError, match="is compressed \\(gzip\\): unpack it"):
        shard(bomb)


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


def test_a_shard_that_changed_is_noticed(shard, place):
    index = shard(FILES)
    for changed in (tar(FILES) + b"x", tar(FILES)[:-1]):
        place.put("shard-000000.tar", changed)
        with pytest.raises(SourceError, match="not the file that was indexed any more"):
            read(index)
        with pytest.raises(SourceError, match="not the file that was indexed any more"):
            read_sample(index, 0, video_extensions=("mp4",))
    place.remove("shard-000000.tar")
    with pytest.raises(SourceError, match="cannot be read"):
        read(index)


def test_another_shard_of_the_same_size_is_noticed(shard, place):
    """On a disk nothing but the headers tells them apart: they are read with every member."""
    index = shard(FILES)
    other = tar([("a/one.mp4", b"1" * 700), ("a/one.json", FILES[1][1]), ("two.cls", b"7")])
    place.put("shard-000000.tar", other + bytes(len(tar(FILES)) - len(other)))
    with pytest.raises(SourceError, match="indexed"):
        read(index)
    with pytest.raises(SourceError, match="indexed"):
        read_sample(index, 1, video_extensions=("mp4",))


def test_a_shard_is_the_same_wherever_it_lies(tmp_path, s3_url):
    """Whole or damaged in whatever way: index, samples and hash, all but the address."""
    files = [*FILES, ("long/" + "n" * 90 + "/é.mp4", b"5" * 600)]
    whole = tar(files, format=tarfile.PAX_FORMAT)
    flipped = bytearray(whole)
    flipped[2560] ^= 1
    kinds = [whole, bytes(flipped), whole + whole, *(whole[:n] for n in range(600, 9000, 1177))]
    for content in kinds:
        found = []
        for root in (str(tmp_path), s3_url):
            index = index_shard(Place(root).put("x y.tar", content))
            assert index.path == f"{root}/x y.tar"
            same = index.shard_id, index.num_bytes, index.samples, index.problems
            found.append((same, read(index), sha256(index)))
        assert found[0] == found[1]
        assert found[0][2] == hashlib.sha256(content).hexdigest()


def test_a_pass_reads_members_in_any_order_and_hashes_what_it_passes_over(shard):
    files = [("x.mp4", b"1" * 50_000), ("x.json", b'{"a": 1}'), ("x.cls", b"3"), ("y.cls", b"4")]
    index = shard(files)
    for limit, video in ((None, b"1" * 50_000), (10, None)):
        with ShardPass(index, video_extensions=("mp4",), max_video_bytes=limit) as opened:
            first, second = opened.samples()
            assert opened.sha256() == hashlib.sha256(tar(files)).hexdigest()
        assert (first.video, dict(first.labels)) == (video, {"a": 1, "cls": 3})
        assert dict(second.labels) == {"cls": 4}


@pytest.fixture
def bucket(s3, s3_url):
    """Puts a tar of members of given sizes into a bucket; returns its address."""

    def put(sizes):
        members = []
        for i, size in enumerate(sizes):
            members += [(f"{i:04d}.mp4", bytes([i]) * size), (f"{i:04d}.json", b'{"a": 1}')]
        address = Place(s3_url).put("x.tar", tar(members))
        s3.requests.clear()
        return address

    return put


def asked_bytes(s3):
    spans = [r.range.removeprefix("bytes=").split("-") for r in s3.asked("x.tar")]
    return sum(int(stop) - int(start) + 1 for start, stop in spans)


def test_large_members_are_not_fetched_to_index_a_shard(s3, bucket):
    index = index_shard(bucket([2_000_000] * 8))
    assert len(index.samples) == 8
    assert index.problems == ()
    assert len(s3.asked("x.tar")) <= 2 * 8 + 2
    assert asked_bytes(s3) < 400_000
    assert len(s3.asked("x.tar", "HEAD")) == 1


def test_a_shard_of_small_members_is_indexed_with_few_requests(s3, bucket):
    index = index_shard(bucket([2000] * 250))
    assert len(index.samples) == 250
    assert len(s3.asked("x.tar")) <= 5


def test_a_single_sample_is_one_request(s3, bucket):
    index = index_shard(bucket([2_000_000] * 3))
    s3.requests.clear()
    sample = read_sample(index, 1, video_extensions=("mp4",))
    assert (sample.video, dict(sample.labels)) == (bytes([1]) * 2_000_000, {"a": 1})
    assert [r.method for r in s3.requests] == ["GET"]
    assert asked_bytes(s3) < 2_010_000


def test_a_header_that_claims_the_whole_archive_is_not_read(shard, monkeypatch):
    monkeypatch.setattr("kdhiera.data.tars._MAX_HEADER_BYTES", 100_000)
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 10**6
    content = tar([("a.mp4", b"1")])[:1024] + info.tobuf(format=tarfile.USTAR_FORMAT)
    index = shard(content + bytes(10**6))
    assert [s.key for s in index.samples] == ["a"]
    assert "a header claims 1000448 bytes" in index.problems[0]


def test_many_shards_are_indexed_in_order_and_the_first_bad_one_is_named(place):
    paths = [place.put(f"{i}.tar", tar([(f"{i}.mp4", b"v")])) for i in range(20)]
    assert [i.path for i in index_shards(paths)] == paths
    place.put("7.tar", b"no tar" * 500)
    place.remove("9.tar")
    found = list(try_index_shards(paths))
    assert [i for i, index in enumerate(found) if isinstance(index, ShardError)] == [7, 9]
    with pytest.raises(ShardError, match=r"7\.tar is no tar archive"):
        index_shards(paths)
