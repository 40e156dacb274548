"""A pretended controller: it notes what a balancer sends it, and behaves as told.

with upstream.running(lab["c1"], 8090) as server:
    server.break_off.add("/api/v1/vm")       # takes the request, closes without an answer
    server.seen                              # (method, path, headers) of every request but the checks
"""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http import server
from typing import Any, NamedTuple

from tests.support import netlab


class Request(NamedTuple):
    method: str
    path: str
    headers: Mapping[str, str]  # names in lower case


@dataclass
class Upstream:
    """Knobs that may be turned at any time, and what was seen."""

    ready: bool = True
    break_off: set[str] = field(default_factory=set)
    answer_503: set[str] = field(default_factory=set)
    answer_after_s: dict[str, float] = field(default_factory=dict)
    seen: list[Request] = field(default_factory=list)
    body_bytes: int = 0  # of bodies, as they arrive
    checks: int = 0


class _Handler(server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    told: Upstream

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def _any(self) -> None:
        if self.path == "/readyz":
            self.told.checks += 1
            self._answer(200 if self.told.ready else 503)
            return
        self.told.seen.append(
            Request(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
        )
        self._read_body()
        time.sleep(self.told.answer_after_s.get(self.path, 0))
        if self.path in self.told.break_off:
            self.close_connection = True
        else:
            self._answer(503 if self.path in self.told.answer_503 else 200)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _any

    def _read_body(self) -> None:
        left = int(self.headers.get("Content-Length", 0))
        while left and (part := self.rfile.read1(min(left, 65536))):
            left -= len(part)
            self.told.body_bytes += len(part)

    def _answer(self, status: int) -> None:
        body = b'{"status":"OK","message":"","body":null}'
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: Any) -> None:
        """Nothing: `seen` is the log."""


class _Server(server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128


@contextlib.contextmanager
def running(host: netlab.Host, port: int) -> Iterator[Upstream]:
    """It serves in a thread of this process, on a socket of the host's network."""
    told = Upstream()
    handler = type("Handler", (_Handler,), {"told": told})
    made = host.call(lambda: _Server((host.ip, port), handler))
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield told
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


def connected(host: netlab.Host, address: str, port: int) -> socket.socket:
    """A client's connection from `host`."""
    return host.call(lambda: socket.create_connection((address, port), timeout=30))
