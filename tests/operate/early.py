"""A member of etcd that has not read its own log yet, for as long as a test likes.

Its peer address tells the cluster's true id and the members as they were when the cluster began: without names and
client addresses, which etcd learns from its log only.
"""

import contextlib
import dataclasses
import http.server
import json
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass
class Early:
    port: int
    cluster: str
    members: list[dict[str, Any]]
    asked: int = 0

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """At the member's peer address; the member itself has ended."""
        told = self

        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                told.asked += 1
                body = json.dumps(told.members).encode()
                self.send_response(200)
                self.send_header("X-Etcd-Cluster-ID", told.cluster)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *words: object) -> None:
                """Nothing."""

        with http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Answer) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
            thread.start()
            try:
                yield
            finally:
                server.shutdown()
                thread.join()


def of(port: int) -> Early:
    """What the member at this peer port will tell first when it is started again."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/members", timeout=10) as answer:
        members = [{**one, "name": "", "clientURLs": []} for one in json.load(answer)]
        return Early(port, answer.headers["X-Etcd-Cluster-ID"], members)
