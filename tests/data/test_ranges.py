"""One contract for files read by ranges, and the reading of a whole one."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
from places import Place

from kdhiera.data.ranges import Forward, SourceError, is_there, open_ranged
from kdhiera.stores import FileVersion

DATA = np.random.default_rng(0).bytes(1_000_003)


@pytest.fixture
def name(place):
    return place.put("a b/é.tar", DATA)


class TestContract:
    def test_exactly_the_bytes_that_are_asked_for(self, name):
        with closing(open_ranged(name)) as file:
            assert file.version.num_bytes == len(DATA)
            for start, stop in ((0, 1), (0, len(DATA)), (512, 70_000), (len(DATA) - 1, len(DATA))):
                assert file.read(start, stop) == DATA[start:stop]
            assert file.read(7, 7) == b""

    def test_from_several_threads(self, name):
        starts = range(0, len(DATA) - 1000, 9973)
        with closing(open_ranged(name)) as file, ThreadPoolExecutor(8) as pool:
            read = pool.map(lambda start: file.read(start, start + 1000), starts)
            assert list(read) == [DATA[start : start + 1000] for start in starts]

    def test_a_known_version_is_opened_again(self, name):
        version = open_ranged(name).version
        with closing(open_ranged(name, version=version)) as file:
            assert file.version == version
            assert file.read(5, 9) == DATA[5:9]

    def test_one_of_another_size_is_refused(self, place, name):
        version = open_ranged(name).version
        place.put("a b/é.tar", DATA + b"x")
        with pytest.raises(SourceError, match="not the file that was indexed any more"):
            open_ranged(name, version=version).read(0, 10)

    def test_one_that_changes_in_place_while_it_is_open_is_refused(self, place, name):
        with closing(open_ranged(name)) as file:
            assert file.read(0, 10) == DATA[:10]
            place.overwrite("a b/é.tar", DATA[::-1])
            with pytest.raises(SourceError, match="leave shards alone while they are read"):
                file.read(0, 10)

    def test_an_empty_file(self, place):
        with closing(open_ranged(place.put("empty.tar", b""))) as file:
            assert file.version.num_bytes == 0
            assert file.read(0, 0) == b""

    def test_whether_it_is_there(self, place, name):
        assert is_there(name)
        assert not is_there(f"{place.root}/nothing.tar")

    def test_one_that_is_not_there(self, place):
        with pytest.raises(SourceError, match=r"nothing\.tar cannot be read: "):
            open_ranged(f"{place.root}/nothing.tar")

    def test_no_file_but_a_folder(self, place, name):
        with pytest.raises(SourceError, match="cannot be read"):
            open_ranged(name.rpartition("/")[0])


class TestForward:
    @pytest.fixture
    def forward(self, name, monkeypatch):
        monkeypatch.setattr("kdhiera.data.ranges._BLOCK_BYTES", 40_000)
        made = Forward(open_ranged(name), hashed=True)
        yield made
        made.close()

    def test_bytes_in_order_and_then_the_hash_of_all(self, forward):
        at = 0
        rng = np.random.default_rng(1)
        while at < len(DATA):
            start = min(at + int(rng.integers(0, 60_000)), len(DATA))
            stop = min(start + int(rng.integers(0, 90_000)), len(DATA))
            assert forward.read(start, stop) == DATA[start:stop]
            at = stop
        assert forward.sha256() == hashlib.sha256(DATA).hexdigest()

    def test_the_hash_is_of_all_even_if_little_was_read(self, forward):
        assert forward.read(100, 300) == DATA[100:300]
        assert forward.sha256() == hashlib.sha256(DATA).hexdigest()

    def test_a_change_on_the_way_is_noticed_and_there_is_no_hash(self, place, forward):
        assert forward.read(0, 10) == DATA[:10]
        place.overwrite("a b/é.tar", DATA[::-1])
        with pytest.raises(SourceError, match="not the file that was indexed any more"):
            forward.sha256()


def test_a_pipe_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(SourceError, match="it is no regular file"):
        open_ranged(str(tmp_path / "pipe.tar"))


@pytest.fixture
def in_bucket(s3, s3_url):
    name = Place(s3_url).put("x.tar", DATA)
    s3.requests.clear()
    return name


def test_every_byte_is_fetched_once(s3, in_bucket, monkeypatch):
    monkeypatch.setattr("kdhiera.data.ranges._BLOCK_BYTES", 100_000)
    with closing(Forward(open_ranged(in_bucket), hashed=True)) as file:
        for start in range(0, len(DATA) - 1000, 1000):
            file.read(start, start + 1000)
        file.sha256()
    ranges = [r.range for r in s3.asked("x.tar")]
    assert sorted(ranges, key=lambda r: int(r[6:].partition("-")[0])) == [
        f"bytes={start}-{min(start + 100_000, len(DATA)) - 1}"
        for start in range(0, len(DATA), 100_000)
    ]


def test_a_pass_that_is_left_early_fetches_no_more(s3, in_bucket, monkeypatch):
    monkeypatch.setattr("kdhiera.data.ranges._BLOCK_BYTES", 1000)
    with closing(Forward(open_ranged(in_bucket), hashed=True)) as file:
        file.read(0, 10)
    assert 1 <= len(s3.asked("x.tar")) <= 5


def test_answers_that_break_off_are_asked_for_again(s3, in_bucket):
    for kind in ("cut", "refused"):
        fault = s3.fault(kind, "x.tar", times=2, method="GET")
        assert open_ranged(in_bucket).read(10, 900_000) == DATA[10:900_000]
        assert fault.hits == 2


def test_a_bucket_that_never_answers_is_one_clear_sentence(s3, in_bucket):
    file = open_ranged(in_bucket)
    s3.fault("refused", "x.tar", times=1000, method="GET")
    with pytest.raises(SourceError, match=rf"^{in_bucket}: \S") as caught:
        file.read(0, 10)
    assert "\n" not in str(caught.value)


def test_a_server_that_ignores_conditions_is_not_believed(in_bucket):
    """Every answer says which object it is of; the condition alone is not relied on."""
    other = FileVersion(num_bytes=len(DATA), tag="no etag at all")  # sent as no condition
    with pytest.raises(SourceError, match="not the file that was indexed"):
        open_ranged(in_bucket, version=other).read(0, 10)


def test_without_credentials(s3, monkeypatch):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(SourceError, match="no credentials for s3://"):
        open_ranged("s3://bucket/x.tar")
