"""A local S3 server for tests: moto behind a lock for writes, with faults on request.

The `s3` fixture serves it from a thread of the test process, on a port of its own.
"""

import http.client
import re
import socket
import threading
import time
from collections.abc import Callable
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
    """What happens to some requests.

    `lost`: done, and the connection is cut before the answer. `refused`: 503, not done.
    `conflict`: 409, not done. `cut`: the connection is cut in the middle of the body that is
    sent (PUT) or answered (GET). `slow`: done after a second. `unconditional`: done whatever
    its conditions say.
    """

    kind: str
    pattern: str
    times: int
    method: str
    hits: int = 0


@dataclass(frozen=True)
class Request:
    """A request as it came in; `range` is what it asked for of an object."""

    method: str
    path: str
    range: str | None
    num_bytes: int


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *args, **kwargs):
        """Say nothing."""


@dataclass
class Server:
    """A running server; `lock` makes each write one step, as it is on S3."""

    serialised: bool = True
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    before: Callable[[Request], bool] | None = None
    """Called with a request that is not done yet; if it says so, it is never done."""
    after: Callable[[Request], None] | None = None
    """Called with a PUT that is done and not answered yet."""

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

    def fault(self, kind, pattern, times=1, method="PUT"):
        """Let the next `times` requests for matching keys fail."""
        fault = Fault(kind=kind, pattern=pattern, times=times, method=method)
        self.faults.append(fault)
        return fault

    def asked(self, pattern, method="GET"):
        """Requests so far for matching keys."""
        return [r for r in self.requests if r.method == method and re.search(pattern, r.path)]

    def _fault_of(self, method, path):
        with self._lock:
            for fault in self.faults:
                wanted = fault.method == method and re.search(fault.pattern, path)
                if wanted and fault.hits < fault.times:
                    fault.hits += 1
                    return fault.kind
        return None

    def _serve(self, environ, start_response):
        method = environ["REQUEST_METHOD"]
        path = unquote(environ["PATH_INFO"].encode("latin-1").decode())
        num_bytes = int(environ.get("CONTENT_LENGTH") or 0)
        request = Request(method, path, environ.get("HTTP_RANGE"), num_bytes)
        self.requests.append(request)
        if self.before is not None and self.before(request):
            return self._hang_up(environ, start_response)
        kind = self._fault_of(method, path)
        if kind in ("refused", "conflict"):
            environ["wsgi.input"].read(num_bytes)
            code = 503 if kind == "refused" else 409
            start_response(f"{code} {http.client.responses[code]}", [("Content-Length", "0")])
            return [b""]
        if kind == "lost":
            with self._lock:
                list(self._app(environ, lambda *_: None))
            return self._hang_up(environ, start_response)
        if kind == "cut" and method == "PUT":
            environ["wsgi.input"].read(num_bytes // 2)
            return self._hang_up(environ, start_response)
        if kind == "cut":
            return self._half(environ, b"".join(self._app(environ, start_response)))
        if kind == "unconditional":
            environ.pop("HTTP_IF_NONE_MATCH", None)
        if kind == "slow":
            time.sleep(1)
        if self.serialised and method == "PUT":
            with self._lock:
                answer = list(self._app(environ, start_response))
                if self.after is not None:
                    self.after(request)
                return answer
        return self._app(environ, start_response)

    @staticmethod
    def _hang_up(environ, start_response):
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        start_response("200 OK", [("Content-Length", "0")])
        return [b""]

    @staticmethod
    def _half(environ, body):
        yield body[: len(body) // 2]
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
