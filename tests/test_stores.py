"""One contract for all stores, and what only a bucket can do wrong."""

import http.client
import multiprocessing
import pickle
import socket
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import numpy as np
import pytest
import tensorstore
from moto.s3.responses import S3Response
from s3_server import Server

from kdhiera.errors import KdhieraError, UsageError
from kdhiera.objects import ObjectStore
from kdhiera.storage import file_crc32c, temporary_path
from kdhiera.stores import LocalStore, open_store

ODD = ["a b/c d", "é/ü.json", "100%/x%20y", "a+b=c&d?e#f", "~tilde/(x)/[y]", "x" * 200]


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path):
    if request.param == "local":
        return LocalStore(tmp_path / "root")
    return open_store(request.getfixturevalue("s3_url"))


@pytest.fixture
def bucket_store(s3_url):
    return ObjectStore(s3_url)


def test_unfinished_files_are_those_of_atomic_writes(tmp_path):
    store = LocalStore(tmp_path / "root")
    store.write("a/b", b"1")
    written = temporary_path(tmp_path / "root/a/b")
    written.write_bytes(b"half")
    for other in ("a/.b.tmp", "a/.git", "a/b.tmp", ".hidden"):
        (tmp_path / "root" / other).write_bytes(b"mine")
    (entry,) = store.unfinished()
    assert (entry.key, entry.num_bytes) == (f"a/{written.name}", 4)
    assert abs(entry.modified - time.time()) < 60
    assert {e.key for e in store.walk("a")} == {"a/b", "a/b.tmp"}


def prune_forever(root, ready):
    """Remove empty folders again and again; runs in a spawned process."""
    store = LocalStore(root)
    while True:
        for i in range(5):
            store.prune(f"a/{i}/b")
        ready.set()
        time.sleep(0.0005)  # a folder lives long enough for a file to be put into it


def test_folders_that_are_pruned_beside_writers_are_made_again(tmp_path):
    """Writers make a folder and then a file in it; pruning may come between."""
    store = LocalStore(tmp_path / "root")
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    pruning = spawn.Process(target=prune_forever, args=(store.root, ready), daemon=True)
    pruning.start()
    try:
        assert ready.wait(60)
        for i in range(1000):
            assert store.create(f"a/{i % 5}/b/c", b"1")
            store.delete([f"a/{i % 5}/b/c"])
            store.write(f"a/{i % 5}/b/d", b"1")
            store.delete([f"a/{i % 5}/b/d"])
            store.stage(f"a/{i % 5}/b/{i}")  # empty, so it may be gone again
    finally:
        pruning.kill()
        pruning.join()


def race(store, name, barrier, queue, keys):
    """Create every key with one's own name in it; runs in a spawned process."""
    barrier.wait()
    queue.put((name, [key for key in keys if store.create(key, f"{name} {key}".encode())]))


class TestContract:
    def test_created_once(self, store):
        assert store.create("a/b", b"1")
        assert store.create("a/b", b"1")
        assert not store.create("a/b", b"2")
        assert store.read("a/b") == b"1"

    def test_written_read_and_replaced(self, store):
        store.write("a/b", b"1")
        store.write("a/b", b"22")
        assert store.read("a/b") == b"22"
        assert store.exists("a/b")
        for absent in ("a", "a/c", "a/b/c", "nothing"):
            assert not store.exists(absent)
            with pytest.raises(FileNotFoundError):
                store.read(absent)
        store.write("empty", b"")
        assert store.read("empty") == b""

    def test_listings(self, store):
        assert store.names("a") == []
        assert list(store.walk("a")) == []
        before = time.time() - 5
        for key in ("a/x", "a/b/y", "a/b/z", "ab/w", "top"):
            store.write(key, key.encode())
        assert store.names("a") == ["b", "x"]
        assert store.names("") == ["a", "ab", "top"]
        found = {entry.key: entry for entry in store.walk("a")}
        assert sorted(found) == ["a/b/y", "a/b/z", "a/x"]
        assert {e.num_bytes for e in found.values()} == {3, 5}
        assert all(before < e.modified < time.time() + 5 for e in found.values())
        assert sorted(entry.key for entry in store.walk("")) == [
            "a/b/y",
            "a/b/z",
            "a/x",
            "ab/w",
            "top",
        ]

    def test_folders_are_told_from_files(self, store):
        for key in ("a/x", "a/b/y", "a/c/d/z"):
            store.write(key, b"1")
        assert store.folders("") == ["a"]
        assert store.folders("a") == ["b", "c"]
        assert store.folders("a/b") == store.folders("a/x") == store.folders("nothing") == []

    def test_checksums_are_those_of_the_whole(self, store):
        data = np.random.default_rng(0).bytes((1 << 22) + 12345)  # more than a piece
        store.write("a/b", data)
        store.write("empty", b"")
        assert store.checksum("a/b") == (len(data), google_crc32c.value(data))
        assert store.checksum("empty") == (0, 0)
        for absent in ("a", "a/c", "a/b/c", "nothing"):
            with pytest.raises(FileNotFoundError):
                store.checksum(absent)

    def test_deleted(self, store):
        for key in ("a/x", "a/y", "a/z/w", "ab/x"):
            store.write(key, b"1")
        store.delete(["a/x", "a/nothing", "no/folder"])
        assert store.names("a") == ["y", "z"]
        store.delete_folder("a")
        store.delete_folder("a")
        assert [entry.key for entry in store.walk("")] == ["ab/x"]

    def test_staged_kept_and_discarded(self, store):
        staged = store.stage("parts/one")
        (staged / "c").mkdir()
        contents = {"c/0": b"0" * 70_000, "zarr.json": b"{}", "c/1": b""}
        for name, data in contents.items():
            (staged / name).write_bytes(data)
        expected = {n: (len(d), file_crc32c(staged / n)) for n, d in sorted(contents.items())}
        files = store.keep("parts/one", staged)
        assert files == expected
        assert list(files) == sorted(files)
        assert {n: store.read(f"parts/one/{n}") for n in contents} == contents
        store.discard("parts/one", staged)
        assert list(store.walk("")) == []
        assert not staged.exists()

    def test_read_many(self, store):
        store.write("a", b"1")
        store.write("c/d", b"2")
        assert store.read_many(["a", "b", "c/d", "a"]) == [b"1", None, b"2", b"1"]
        assert store.read_many([]) == []

    def test_read_ends(self, store):
        store.write("a/long", b"0123456789")
        store.write("short", b"xy")
        sizes = {"a/long": 10, "short": 2, "nothing": 5, "a/nothing": 1}
        assert store.read_ends(sizes, 4) == [b"6789", b"xy", None, None]
        assert store.read_ends({}, 4) == []

    def test_unfinished_and_pruned(self, store):
        store.write("a/b/c", b"1")
        store.create("a/d", b"1")
        assert list(store.unfinished()) == []
        store.delete(["a/b/c"])
        store.prune("a/b")
        assert store.names("a") == ["d"]
        store.prune("a")
        store.prune("nothing/there")
        assert store.read("a/d") == b"1"
        store.delete(["a/d"])
        store.prune("a")
        assert store.names("") == []
        store.write("a/b/c", b"2")
        assert store.read("a/b/c") == b"2"

    @pytest.mark.parametrize("key", ODD)
    def test_odd_names(self, store, key):
        assert store.create(key, key.encode())
        assert store.read(key) == key.encode()
        assert [entry.key for entry in store.walk("")] == [key]
        store.delete([key])
        assert not store.exists(key)

    def test_more_than_a_page(self, store):
        keys = [f"many/{i:04d}" for i in range(1100)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: store.write(key, b"x"), keys))
        assert store.names("many") == [key.removeprefix("many/") for key in keys]
        assert sorted(entry.key for entry in store.walk("many")) == keys
        store.delete_folder("many")
        assert store.names("many") == []

    def test_pickled(self, store):
        store.write("a", b"1")
        again = pickle.loads(pickle.dumps(store))
        assert again.url == store.url
        assert again.read("a") == b"1"
        assert open_store(store.url).read("a") == b"1"

    def test_two_processes_never_both_win(self, store):
        context = multiprocessing.get_context("spawn")
        keys = [f"race/{i}" for i in range(60)]
        barrier, queue = context.Barrier(2), context.Queue()
        racers = [
            context.Process(target=race, args=(store, name, barrier, queue, keys)) for name in "ab"
        ]
        for racer in racers:
            racer.start()
        won = dict(queue.get(timeout=60) for _ in racers)
        for racer in racers:
            racer.join()
        assert sorted(won["a"] + won["b"]) == sorted(keys)
        for name, mine in won.items():
            assert store.read_many(mine) == [f"{name} {key}".encode() for key in mine]

    def test_zarr_through_tensorstore(self, store):
        spec = {"driver": "zarr3", "kvstore": dict(store.kvstore("array"))}
        data = np.arange(40).reshape(5, 8)
        made = tensorstore.open(spec, create=True, dtype="int64", shape=[5, 8]).result()
        made.write(data).result()
        assert "zarr.json" in store.names("array")
        assert np.array_equal(tensorstore.open(spec).result().read().result(), data)


@pytest.mark.parametrize("serialised", [True, False])
def test_conditional_puts_of_the_server_are_one_step_behind_its_lock_only(
    s3, monkeypatch, serialised
):
    """moto looks first and writes then; given time between the two, many pass at once.

    That is why races go through the lock: there exactly one of them is told 200.
    """
    look = S3Response._get_checksum  # what moto does after it has looked

    def slowly(self, *args):
        time.sleep(0.02)
        return look(self, *args)

    monkeypatch.setattr(S3Response, "_get_checksum", slowly)
    server = s3 if serialised else Server(serialised=False)
    told = [race_codes(server.address) for _ in range(5)]
    if serialised:
        assert told == [[200] + [412] * 7] * 5
    else:  # 500: overwritten by another while it was being written
        assert all(sum(code in (200, 500) for code in codes) > 1 for codes in told), told
        server.stop()


def race_codes(address, clients=8):
    """What each of several conditional PUTs of one key at once is told."""
    barrier = threading.Barrier(clients)
    key = f"/bucket/race/{uuid.uuid4().hex}"
    scope = "testing/20260101/us-east-1/s3/aws4_request"
    signed = f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=unchecked"
    headers = {"If-None-Match": "*", "Authorization": signed}

    def put(number):
        connection = http.client.HTTPConnection(*address)
        connection.connect()
        barrier.wait()
        connection.request("PUT", key, b"%d" % number, headers)
        code = connection.getresponse().status
        connection.close()
        return code

    with ThreadPoolExecutor(clients) as pool:
        return sorted(pool.map(put, range(clients)))


def test_a_lost_answer_to_ours_is_success(s3, bucket_store):
    fault = s3.fault("lost", "lost/ours")
    assert bucket_store.create("lost/ours", b"1")
    assert fault.hits == 1
    assert bucket_store.read("lost/ours") == b"1"


def test_a_lost_answer_to_anothers_is_defeat(s3, bucket_store):
    assert bucket_store.create("lost/theirs", b"theirs")
    fault = s3.fault("lost", "lost/theirs")
    assert not bucket_store.create("lost/theirs", b"mine")
    assert fault.hits == 1
    assert bucket_store.read("lost/theirs") == b"theirs"


def test_no_answer_at_all_is_settled_by_reading(s3, bucket_store):
    fault = s3.fault("lost", "lost/always", times=1000)
    assert bucket_store.create("lost/always", b"1")
    assert fault.hits >= 1


def test_a_busy_server_is_asked_again(s3, bucket_store):
    fault = s3.fault("refused", "busy", times=2)
    assert bucket_store.create("busy", b"1")
    assert fault.hits == 2
    s3.fault("refused", "never", times=1000)
    start = time.monotonic()
    with pytest.raises(KdhieraError, match="s3://bucket"):
        bucket_store.create("never", b"1")
    assert time.monotonic() - start < 15
    assert not bucket_store.exists("never")


ACTIONS = {
    "create": lambda store: store.create("a", b"1"),
    "read": lambda store: store.read("a"),
    "write": lambda store: store.write("a", b"1"),
    "names": lambda store: store.names(""),
    "walk": lambda store: list(store.walk("")),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_no_such_bucket(s3, action):
    with pytest.raises(KdhieraError, match="s3://nobody/x: there is no such bucket") as caught:
        ACTIONS[action](ObjectStore("s3://nobody/x"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("action", ["create", "names"])
def test_nothing_listens(s3, monkeypatch, action):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(KdhieraError, match="nothing answers: check AWS_ENDPOINT_URL"):
            ACTIONS[action](ObjectStore("s3://bucket/x"))
        assert time.monotonic() - start < 15


def test_no_credentials(s3, monkeypatch):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UsageError, match="no credentials for s3://: set AWS_ACCESS_KEY_ID"):
        ObjectStore("s3://bucket/x").names("")


@pytest.mark.parametrize("url", ["s3://", "s3:///x", "bucket/x"])
def test_an_address_without_a_bucket(url):
    with pytest.raises(UsageError, match="names no bucket"):
        ObjectStore(url)


def test_a_name_that_another_write_is_busy_with_is_asked_for_again(s3, bucket_store):
    """S3 answers 409 while another conditional write of the name is not decided."""
    fault = s3.fault("conflict", "busy-name", times=3)
    assert bucket_store.create("busy-name", b"1")
    assert fault.hits == 3
    assert bucket_store.read("busy-name") == b"1"


def test_large_files_are_one_put_each(s3, bucket_store):
    staged = bucket_store.stage("a")
    data = {name: bytes([i]) * 9_000_000 for i, name in enumerate("xyz")} | {"small": b"1"}
    for name, content in data.items():
        (staged / name).write_bytes(content)
    s3.requests.clear()
    files = bucket_store.keep("a", staged)
    assert {n: size for n, (size, _) in files.items()} == {n: len(d) for n, d in data.items()}
    assert {n: bucket_store.read(f"a/{n}") for n in data} == data
    sent = [r for r in s3.requests if r.method in ("PUT", "POST")]
    assert sorted((r.method, r.num_bytes) for r in sent) == [("PUT", 1), *[("PUT", 9_000_000)] * 3]


@pytest.mark.parametrize("url", ["s3://AKIA:secret@bucket/x", "s3://bucket/x?X-Amz-Key=secret"])
def test_an_address_with_credentials_is_refused_without_showing_them(url):
    with pytest.raises(UsageError, match="was given with credentials or a query") as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


def test_a_server_that_ignores_conditions_is_refused(s3, bucket_store, monkeypatch):
    """Its first success is followed up, before anything relies on it."""
    monkeypatch.setattr("kdhiera.objects._conditional", set())
    fault = s3.fault("unconditional", "ignored", times=1000)
    with pytest.raises(KdhieraError, match="the server ignores conditions on writes"):
        bucket_store.create("ignored", b"1")
    assert fault.hits == 2
    s3.faults.clear()
    s3.requests.clear()
    for name in ("first", "second"):
        assert bucket_store.create(name, name.encode())
    assert [r.path[-6:] for r in s3.asked("", "PUT")] == ["/first", "/first", "second"]


def test_a_folders_names_are_one_listing(s3, bucket_store):
    for key in ("f/a", "f/b/c"):
        bucket_store.write(key, b"1")
    s3.requests.clear()
    assert bucket_store.names("f") == ["a", "b"]
    assert bucket_store.folders("f") == ["b"]
    assert bucket_store.objects("f") == ["a"]
    assert [r.method for r in s3.requests] == ["GET"] * 3
