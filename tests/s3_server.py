"""A local S3 server for tests: moto behind a lock for writes, with faults on request.

The `s3` fixture serves it from a thread of the test process, on a port of its own.
"""

import http.client
import re
import socket
import threading
from dataclasses import dataclass, field
from urllib.parse import unquote

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@dataclass
class Fault:
    """What happens to some PUTs.

    `lost`: done, and the connection is cut before the answer. `refused`: 503, not done.
    """

    kind: str
    pattern: str
    times: int
    hits: int = 0


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *args, **kwargs):
        """Say nothing."""


@dataclass
class Server:
    """A running server; `lock` makes each write one step, as it is on S3."""

    serialised: bool = True
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self):
        self._lock = threading.Lock()
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = ThreadedWSGIServer("127.0.0.1", 0, self._serve, handler=_Quiet)
        self._server.daemon_threads = True
        self.address = ("127.0.0.1", self._server.port)
        self.url = f"http://127.0.0.1:{self._server.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self):
        """Shut down and close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def bucket(self, name):
        """Make a bucket."""
        client = boto3.client("s3", endpoint_url=self.url, region_name="us-east-1")
        client.create_bucket(Bucket=name)
        client.close()

    def fault(self, kind, pattern, times=1):
        """Let the next `times` PUTs of matching keys fail."""
        fault = Fault(kind=kind, pattern=pattern, times=times)
        self.faults.append(fault)
        return fault

    def _fault_of(self, path):
        with self._lock:
            for fault in self.faults:
                if fault.hits < fault.times and re.search(fault.pattern, path):
                    fault.hits += 1
                    return fault.kind
        return None

    def _serve(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], unquote(environ["PATH_INFO"])
        self.requests.append((method, path))
        kind = self._fault_of(path) if method == "PUT" else None
        if kind == "refused":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            reason = http.client.responses[503]
            start_response(f"503 {reason}", [("Content-Length", "0")])
            return [b""]
        if kind == "lost":
            with self._lock:
                list(self._app(environ, lambda *_: None))
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            start_response("200 OK", [("Content-Length", "0")])
            return [b""]
        if self.serialised and method == "PUT":
            with self._lock:
                return list(self._app(environ, start_response))
        return self._app(environ, start_response)
