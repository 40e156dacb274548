"""An S3 server for tests: moto in a process of its own on loopback, one for each test runner.

    with s3.running() as server:
        bucket = server.fresh_bucket()                     # a name nobody used
        store = s3_bucket.Bucket(server.config(bucket), server.environ, world.System())

It keeps everything in memory. `call` speaks to it without a line of the library under test.
"""

import contextlib
import hashlib
import os
import select
import subprocess
import sys
import threading
import urllib.request
import uuid
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from typing import Any

from covey.registry import s3_bucket

READY_S = 60.0
KEY, SECRET = "test-key", "test-secret-never-shown"
_SIGNED = f"AWS4-HMAC-SHA256 Credential={KEY}/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


class Server:
    """An S3 store at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.environ: Mapping[str, str] = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }

    def fresh_bucket(self) -> str:
        name = f"covey-{uuid.uuid4().hex[:12]}"
        self.call("PUT", f"/{name}")
        return name

    def bucket_of(self, text: str) -> str:
        """The same one for the same text."""
        name = f"covey-{hashlib.sha256(text.encode()).hexdigest()[:20]}"
        self.call("PUT", f"/{name}")
        return name

    def config(self, bucket: str, **more: Any) -> s3_bucket.Config:
        return s3_bucket.Config(bucket=bucket, path_style=True, **{"part_size_bytes": 5 << 20, **more})

    def call(self, method: str, path: str, body: bytes = b"") -> bytes:
        """One bare request; moto looks at no signature."""
        request = urllib.request.Request(  # noqa: S310
            self.url + path,
            data=body if method == "PUT" else None,
            method=method,
            headers={"Authorization": _SIGNED, "Content-Type": "application/octet-stream"},
        )
        with urllib.request.urlopen(request, timeout=READY_S) as answer:  # noqa: S310
            content: bytes = answer.read()
        return content

    def keys(self, bucket: str, prefix: str = "") -> dict[str, int]:
        """Objects and their sizes."""
        return {
            _text(item, "Key"): int(_text(item, "Size"))
            for item in _items(self.call("GET", f"/{bucket}?list-type=2&max-keys=1000&prefix={prefix}"), "Contents")
        }

    def unfinished(self, bucket: str) -> list[str]:
        """Keys of multipart uploads that were begun and neither completed nor aborted."""
        return [_text(item, "Key") for item in _items(self.call("GET", f"/{bucket}?uploads"), "Upload")]


def _items(xml: bytes, name: str) -> list[ElementTree.Element]:
    return [item for item in ElementTree.fromstring(xml).iter() if item.tag.rpartition("}")[2] == name]  # noqa: S314


def _text(item: ElementTree.Element, name: str) -> str:
    return next(child.text or "" for child in item if child.tag.rpartition("}")[2] == name)


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """Started from the main thread; ends with it, also when the runner is killed."""
    child = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "tests.support.s3"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    try:
        ready, _, _ = select.select([child.stdout], [], [], READY_S)
        assert ready, "moto did not start"
        yield Server(child.stdout.readline().decode().strip())
    finally:
        child.kill()
        child.communicate()


def _serve() -> None:
    """What `running` runs: says its URL, serves until it is killed."""
    os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    sys.stdout.write(f"http://{host}:{port}\n")
    sys.stdout.flush()
    threading.Event().wait()


if __name__ == "__main__":
    _serve()
