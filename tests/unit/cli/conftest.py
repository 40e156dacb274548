"""A server that answers as it is told and remembers what it was asked: commands talk to it over a real socket."""

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from covey.cli import main
from tests.support import ran


class Asked(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: Any


class Cloud:
    """`answers`: (method, path, with its query or without) → (HTTP status, envelope).
    A list is played in order, its last answer for ever."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[Asked] = []
        self.headers: dict[str, dict[str, str]] = {}  # path → headers of its answer
        self.answers: dict[tuple[str, str], list[tuple[int, dict[str, Any]]]] = {}

    def ok(self, method: str, path: str, *bodies: object) -> None:
        self.answers[method, path] = [(200, {"status": "OK", "message": "", "body": body}) for body in bodies]

    def fail(self, method: str, path: str, message: str, status: int = 200) -> None:
        self.answers[method, path] = [(status, {"status": "FAIL", "message": message})]

    def answer(self, asked: Asked) -> tuple[int, dict[str, Any]]:
        self.asked.append(asked)
        known = self.answers.get((asked.method, asked.path)) or self.answers.get(
            (asked.method, asked.path.partition("?")[0])
        )
        if not known:
            return 404, {"status": "FAIL", "message": f"there is nothing at {asked.path}"}
        return known.pop(0) if len(known) > 1 else known[0]

    def bodies(self, method: str, path: str) -> list[Any]:
        return [asked.body for asked in self.asked if (asked.method, asked.path) == (method, path)]


def _handler(cloud: Cloud) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked = Asked(self.command, self.path, dict(self.headers), json.loads(raw) if raw else None)
            status, envelope = cloud.answer(asked)
            content = json.dumps(envelope).encode()
            self.send_response(status)
            for name, text in cloud.headers.get(self.path, {}).items():
                self.send_header(name, text)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_DELETE = do_PUT = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    one = Cloud()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(one))
    one.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("COVEY_CONFIG", "/dev/null")
    monkeypatch.setenv("COVEY_CONTROLLER", one.url)
    monkeypatch.setenv("COVEY_REGISTRY", one.url)
    yield one
    server.shutdown()
    thread.join()
    server.server_close()


Ran = ran.Ran
Covey = Callable[..., Ran]


@pytest.fixture
def covey(capsys: pytest.CaptureFixture[str]) -> Covey:
    """Run `covey` with these arguments."""

    def run(*argv: object) -> Ran:
        capsys.readouterr()
        code = main.run([str(arg) for arg in argv])
        said = capsys.readouterr()
        return Ran(code, said.out, said.err)

    return run
