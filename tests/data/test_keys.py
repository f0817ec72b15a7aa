"""Keys of samples: whatever files are called, webdataset finds each under its own key."""

import io
import os
import tarfile

from hypothesis import given
from hypothesis import strategies as st
from other_readers import webdataset_samples

from kdhiera.data.keys import make_keys
from kdhiera.data.packing import ShardWriter, describe_sample

# Any name that a disk may hold: any bytes but "/" and NUL, and no "." or "..".
raw = st.binary(min_size=1, max_size=30).map(os.fsdecode)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
part = st.one_of(raw, texts).filter(lambda p: not {"/", "\0"} & {*p} and p not in (".", ".."))
names = st.lists(part, min_size=1, max_size=3).map("/".join)


@given(st.lists(names, unique=True, max_size=12))
def test_every_file_is_found_under_its_own_key(paths: list[str]) -> None:
    keys = make_keys(paths)
    assert len({key.casefold() for key in keys}) == len(paths)
    shard = io.BytesIO()
    writer = ShardWriter(shard)
    for number, (path, key) in enumerate(zip(paths, keys, strict=True)):
        assert not {".", "\n", " ", "'", '"', "\\"} & {*key}
        assert not key.startswith("/")
        writer.add(key, "mp4", b"%d" % number, describe_sample({"n": str(number)}, path))
    writer.close()
    shard.seek(0)
    with tarfile.open(fileobj=shard) as tar:
        assert len(tar.getmembers()) == 2 * len(paths)
    samples = webdataset_samples(shard.getvalue())
    assert [sample["__key__"] for sample in samples] == keys
    for number, (path, sample) in enumerate(zip(paths, samples, strict=True)):
        assert sample["mp4"] == b"%d" % number
        assert sample["json"]["labels"] == {"n": str(number)}
        assert sample["json"]["path"] == path


@given(st.lists(names, unique=True, max_size=8), st.randoms())
def test_keys_do_not_depend_on_the_order(paths: list[str], random) -> None:
    shuffled = list(paths)
    random.shuffle(shuffled)
    assert dict(zip(paths, make_keys(paths), strict=True)) == dict(
        zip(shuffled, make_keys(shuffled), strict=True)
    )


def test_plain_names_stay_as_they_are() -> None:
    assert make_keys(["a/b_1-x.mp4", "c.mp4"]) == ["a/b_1-x", "c"]
    assert make_keys(["été/猫 と犬.mp4", "take.001.mp4"]) == ["été/猫_と犬", "take_001"]


def test_paths_that_would_share_a_key_all_get_a_mark() -> None:
    one, other, alone = make_keys(["a b.mp4", "a_b.mp4", "c.mp4"])
    assert alone == "c"
    assert one.startswith("a_b-")
    assert other.startswith("a_b-")
    assert one != other


def test_no_key_is_one_of_webdatasets_own() -> None:
    assert make_keys(["__meta__/x.mp4", "__x__.mp4"]) == ["meta/x", "x"]
