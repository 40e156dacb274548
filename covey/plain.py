"""Small requests that arrive whole, past the general HTTP machinery.

Nearly all that a controller hears are a few hundred bytes that come in one piece and are answered by a few hundred. A
general server (streams, chunks, upgrades, half-read bodies) spends more on such a request than what is asked for costs.
So `parse` takes what is certainly one whole plain request and nothing else; anything that is not, down to a header that
it need not understand, is left to the general parser, which then keeps the connection.

    GET | POST | PUT | DELETE, a path without escapes, HTTP/1.1, headers of printable ASCII, each on one line,
    no Transfer-Encoding, Connection (but keep-alive), Expect or Upgrade, at most one Content-Length

`render` is the other way: head and body of an answer that is all there.
"""

import email.utils
import functools
import http
import re
import urllib.parse
from enum import Enum
from typing import Protocol

import multidict

from covey import answer, room

LIMIT_BYTES = 1 << 16  # of a body, and of what may wait behind a request that is not answered yet
_HEAD_BYTES = 8000  # what the general parser takes of one line

_REQUEST = re.compile(
    rb"(GET|POST|PUT|DELETE) (/[A-Za-z0-9/_~.-]*)(?:\?([A-Za-z0-9=&_~.-]*))? HTTP/1\.1\r\n"
    rb"((?:[A-Za-z0-9-]+:[ -~]*\r\n){0,100})\r\n"
)
_HEADER = re.compile(r"([A-Za-z0-9-]+): *([ -~]*?) *\r\n")
_NOT_PLAIN = ("Transfer-Encoding", "Expect", "Upgrade")
_SIZE = re.compile(r"[0-9]{1,8}")


class More(Enum):
    """A plain request whose body is still coming."""

    TO_COME = "to come"


class Line(Protocol):
    """The connection that a request came over."""

    @property
    def peer(self) -> str: ...

    def gone(self) -> bool: ...


class Request:
    """A `serve.Request` of which everything is here."""

    __slots__ = ("_left", "_line", "_query", "headers", "method", "path", "whole")

    direct = False

    def __init__(
        self, line: Line, method: str, path: str, query: str, headers: multidict.CIMultiDict[str], body: bytes
    ) -> None:
        self.method = method
        self.path = path
        self.headers = headers
        self.whole = body
        self._query = query
        self._left = body
        self._line = line

    @property
    def query(self) -> multidict.MultiMapping[str]:
        return multidict.MultiDict(urllib.parse.parse_qsl(self._query, keep_blank_values=True))

    @property
    def peer(self) -> str:
        return self._line.peer

    @property
    def has_body(self) -> bool:
        return bool(self.whole)

    @property
    def size_bytes(self) -> int:
        return len(self.whole)

    def gone(self) -> bool:
        return self._line.gone()

    async def piece(self) -> bytes:
        body, self._left = self._left, b""
        return body

    async def fill(self, into: room.Room) -> None:
        self._left = bytes(into.take(memoryview(self._left)))

    async def go_ahead(self) -> None:
        return


def parse(data: bytes, line: Line) -> Request | More | None:
    """The one request that `data` is. None: something else, or more than that."""
    found = _REQUEST.match(data)
    if found is None:
        return None
    method, path, query, block = found.groups()
    if found.end() > _HEAD_BYTES or b"/." in path:
        return None
    headers = multidict.CIMultiDict(_HEADER.findall(block.decode("ascii")))
    size = _size(headers)
    if size is None:
        return None
    missing = found.end() + size - len(data)
    if missing:
        return More.TO_COME if missing > 0 else None
    return Request(line, method.decode(), path.decode(), (query or b"").decode(), headers, data[found.end() :])


def _size(headers: multidict.CIMultiDict[str]) -> int | None:
    """Of the body; None when the request is not plain."""
    if any(name in headers for name in _NOT_PLAIN):
        return None
    if headers.get("Connection", "keep-alive").lower() != "keep-alive":
        return None
    sizes = headers.getall("Content-Length", ["0"])
    if len(sizes) != 1 or not _SIZE.fullmatch(sizes[0]):
        return None
    size = int(sizes[0])
    return size if size <= LIMIT_BYTES else None


def render(reply: answer.Plain, at_s: int, *, last: bool) -> bytes:
    """The head of an answer. `last`: the connection ends with it."""
    head = _head(reply.status, tuple(reply.headers.items()), at_s)
    return b"%sContent-Length: %d\r\n%s\r\n" % (head, len(reply.body), b"Connection: close\r\n" if last else b"")


@functools.lru_cache(maxsize=64)
def _head(status: int, headers: tuple[tuple[str, str], ...], at_s: int) -> bytes:
    phrase = http.HTTPStatus(status).phrase
    lines = [f"HTTP/1.1 {status} {phrase}", *(f"{name}: {value}" for name, value in headers)]
    if any(not line.isprintable() for line in lines):
        raise ValueError("a header of an answer is not printable")
    return "\r\n".join((*lines, f"Date: {email.utils.formatdate(at_s, usegmt=True)}", "")).encode()
