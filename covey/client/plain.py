"""Small calls over plain connections that stay open: HTTP/1.1 as our servers and balancers speak it.

A node says a few hundred bytes at a time, and a process may play hundreds of nodes: what a general client does for
each request (cookies, redirects, proxies, streams) costs more there than the call. So a request is written in one
piece, and its answer is gathered until it is whole. What this does not speak (`takes` says so) is left to the general
client: TLS, addresses with credentials, names that need quoting.

An answer's body is as long as its Content-Length says, comes in chunks, or ends with the connection.
"""

import asyncio
import socket
import time
import urllib.parse
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple, cast

import aiohappyeyeballs
import multidict

IDLE_S = 60.0  # a connection that was not used for so long is not used again
_DELAY_S = 0.25  # before another of a name's addresses is tried beside the first (RFC 8305)
_HEAD_BYTES = 1 << 16
_END = b"\r\n\r\n"


class Answer(NamedTuple):
    status: int
    headers: multidict.CIMultiDict[str]
    body: bytes


class Broken(Exception):
    """The connection ended before the answer did, or what came is no HTTP. Nobody knows what the server did."""


class Unreachable(Exception):
    """There is no connection, so nothing was sent. Its cause is the OSError or TimeoutError."""


class Place(NamedTuple):
    """A server as its URL says it. `prefix`: what comes before each path."""

    host: str
    port: int
    prefix: str
    name: str  # of the Host header


class Lines:
    """Connections to any number of servers, the one used last first."""

    def __init__(self, connect_s: float) -> None:
        self._connect_s = connect_s
        self._places: dict[str, Place | None] = {}
        self._free: dict[Place, deque[_Line]] = {}
        self._open: set[_Line] = set()

    def takes(self, url: str, path: str, headers: Mapping[str, str]) -> bool:
        """Whether this can carry the request as it is."""
        if url not in self._places:
            self._places[url] = _place(url)
        plain = path.isascii() and path.isprintable() and " " not in path
        return plain and self._places[url] is not None and all(map(_is_plain, headers.values()))

    async def send(self, url: str, method: str, path: str, data: bytes | None, headers: Mapping[str, str]) -> Answer:
        """The answer. For what it `takes`. Raises Unreachable or Broken; cancelling gives the connection up."""
        place = cast(Place, self._places[url])
        lines = [f"{method} {place.prefix}{path} HTTP/1.1", f"Host: {place.name}", "User-Agent: covey", "Accept: */*"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if data is not None or method not in ("GET", "HEAD", "DELETE"):
            lines.append(f"Content-Length: {len(data or b'')}")
        request = "\r\n".join(lines).encode() + _END + (data or b"")
        line = await self._line(place)
        try:
            answer = await line.ask(request, method == "HEAD")
        except BaseException:
            line.close()
            raise
        if line.reusable:
            line.used_s = time.monotonic()
            self._free[place].append(line)
        else:
            line.close()
        return answer

    async def close(self) -> None:
        for line in list(self._open):
            line.close()
        await asyncio.sleep(0)  # transports end in the loop's next round
        self._free.clear()

    async def _line(self, place: Place) -> "_Line":
        free = self._free.setdefault(place, deque())
        horizon_s = time.monotonic() - IDLE_S
        while free:
            line = free.pop()
            if line.reusable and line.used_s > horizon_s:
                return line
            line.close()
        try:
            async with asyncio.timeout(self._connect_s):
                return await self._connect(place)
        except (TimeoutError, OSError) as error:
            raise Unreachable from error

    async def _connect(self, place: Place) -> "_Line":
        loop = asyncio.get_running_loop()
        found = _literal(place) or await loop.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
        sock = await aiohappyeyeballs.start_connection(
            found, happy_eyeballs_delay=_DELAY_S if len(found) > 1 else None, loop=loop
        )
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _, line = await loop.create_connection(lambda: _Line(self._open), sock=sock)
        except BaseException:
            sock.close()
            raise
        return line


class _Line(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, others: "set[_Line]") -> None:
        self.used_s = 0.0
        self._others = others
        self._transport: asyncio.Transport | None = None
        self._waiting: asyncio.Future[Answer] | None = None
        self._received = bytearray()
        self._head: tuple[int, multidict.CIMultiDict[str]] | None = None
        self._bodiless = False
        self._size: int | None = None  # None: until the end of the connection; -1: in chunks
        self._keeps = True

    @property
    def reusable(self) -> bool:
        return self._keeps and self._transport is not None and not self._transport.is_closing()

    def ask(self, request: bytes, bodiless: bool) -> "asyncio.Future[Answer]":
        self._waiting = asyncio.get_running_loop().create_future()
        self._received.clear()
        self._head, self._bodiless = None, bodiless
        if self._transport is None:
            self._waiting.set_exception(Broken("the server closed the connection"))
        else:
            self._transport.write(request)
        return self._waiting

    def close(self) -> None:
        self._keeps = False
        if self._transport is not None:
            self._transport.abort()

    # ---- what the event loop tells ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._others.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._others.discard(self)
        if self._waiting is None or self._waiting.done():
            return
        if self._head is not None and self._size is None and error is None:
            self._finish(bytes(self._received))
        else:
            self._break(f"{type(error).__name__} {error}" if error else "the server closed the connection")

    def data_received(self, data: bytes) -> None:
        if self._waiting is None or self._waiting.done():  # nobody asked
            self.close()
            return
        self._received += data
        try:
            while self._head is None:
                if not self._read_head():
                    return
            self._read_body()
        except (ValueError, IndexError):
            self._break("the answer is no HTTP")

    def _read_head(self) -> bool:
        """Take the head off what came, once it is whole. What only announces the answer (1xx) is passed over."""
        end = self._received.find(_END)
        if end < 0:
            if len(self._received) > _HEAD_BYTES:
                raise ValueError
            return False
        first, *fields = bytes(self._received[:end]).decode("latin-1").split("\r\n")
        del self._received[: end + len(_END)]
        version, status = first.split(" ", 2)[:2]
        if not version.startswith("HTTP/1."):
            raise ValueError
        if 100 <= int(status) < 200:
            return True
        headers = multidict.CIMultiDict(_field(text) for text in fields)
        self._head = int(status), headers
        connection = headers.get("Connection", "").lower()
        self._keeps = connection != "close" and (version == "HTTP/1.1" or connection == "keep-alive")
        if self._bodiless or int(status) in (204, 304):
            self._size = 0
        elif "chunked" in headers.get("Transfer-Encoding", "").lower():
            self._size = -1
        else:
            length = headers.get("Content-Length")
            self._size = None if length is None else int(length)
            self._keeps = self._keeps and length is not None
        return True

    def _read_body(self) -> None:
        if self._size is None:
            return
        if self._size >= 0:
            if len(self._received) >= self._size:
                self._keeps = self._keeps and len(self._received) == self._size
                self._finish(bytes(self._received[: self._size]))
        elif (body := _unchunked(self._received)) is not None:
            self._finish(body)

    def _finish(self, body: bytes) -> None:
        if self._head is not None and self._waiting is not None:
            self._waiting.set_result(Answer(*self._head, body))

    def _break(self, why: str) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(Broken(why))
        self.close()


def _place(url: str) -> Place | None:
    """None: not ours to serve."""
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "http" or "@" in parts.netloc or not parts.hostname or not url.isascii() or parts.query:
            return None
        return Place(parts.hostname, parts.port or 80, parts.path.rstrip("/"), parts.netloc)
    except ValueError:
        return None


def _literal(place: Place) -> "list[aiohappyeyeballs.AddrInfoType]":
    """An IPv4 address needs no look-up, which would take a thread."""
    try:
        socket.inet_pton(socket.AF_INET, place.host)
    except OSError:
        return []
    return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (place.host, place.port))]


def _is_plain(value: str) -> bool:
    return value.isascii() and value.isprintable()


def _field(text: str) -> tuple[str, str]:
    name, mark, value = text.partition(":")
    if not mark:
        raise ValueError
    return name, value.strip()


def _unchunked(received: bytearray) -> bytes | None:
    """The body, when its last chunk and the trailer are there. Raises ValueError."""
    parts: list[bytes] = []
    at = 0
    while (end := received.find(b"\r\n", at)) >= 0:
        size = int(received[at:end].partition(b";")[0], 16)
        if size < 0:
            raise ValueError
        if size == 0:
            whole = received.startswith(b"\r\n", end + 2) or received.find(_END, end + 2) >= 0
            return b"".join(parts) if whole else None
        if len(received) < end + 2 + size + 2:
            return None
        parts.append(bytes(received[end + 2 : end + 2 + size]))
        at = end + 2 + size + 2
    return None
