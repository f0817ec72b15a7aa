import os
import signal
import uuid
from pathlib import Path

import pytest
from hypothesis import settings

from kdhiera.demo.prepare import Prepared, prepare

settings.register_profile("kdhiera", deadline=None)  # tests never assert on time
settings.load_profile("kdhiera")

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def own_signals():
    """A command run in this process leaves its signals ignored, as it ends."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def demo() -> Prepared:
    """The demo's data and teachers; made by `make pipeline`, or here if it has not run."""
    return prepare(REPOSITORY / "demo-data")


@pytest.fixture(scope="session")
def s3():
    """A local S3 server that the environment points at, with the bucket `bucket`."""
    from s3_server import KEYS, Server

    server = Server()
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": server.url}.items():
            patch.setenv(name, value)
        server.bucket("bucket")
        yield server
    server.stop()


@pytest.fixture
def s3_url(s3):
    """A prefix of its own in the bucket; faults are gone afterwards."""
    yield f"s3://bucket/{uuid.uuid4().hex}"
    s3.faults.clear()
