"""Small calls over plain connections that stay open: HTTP/1.1 as our servers and balancers speak it.

A node says a few hundred bytes at a time, and a process may play hundreds of nodes: what a general client does for
each request (cookies, redirects, proxies, streams) costs more there than the call. So a request is written in one
piece, and an answer that comes in one, with a length and nothing out of the ordinary, is taken as it is. Any other is
gathered by aiohttp's parser until it is whole. What this does not speak (`takes` says so) is left to the general
client: TLS, addresses with credentials, names that need quoting.
"""

import asyncio
import re
import socket
import time
import urllib.parse
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple, cast

import aiohappyeyeballs
import multidict
from aiohttp import base_protocol, http_exceptions, streams
from aiohttp import http as aiohttp_http

IDLE_S = 60.0  # a connection that was not used for so long is not used again
_DELAY_S = 0.25  # before another of a name's addresses is tried beside the first (RFC 8305)
_GATHER_BYTES = 1 << 30  # of a body, before the parser would ask us to read slower; servers bound their answers

_ANSWER = re.compile(rb"HTTP/1\.1 ([2-5][0-9]{2}) [ -~]*\r\n((?:[A-Za-z0-9-]+:[ -~]*\r\n){1,100})\r\n")
_BODILESS = (b"204", b"304")  # whatever their length says
_HEADER = re.compile(r"([A-Za-z0-9-]+): *([ -~]*?) *\r\n")
_SIZE = re.compile(r"[0-9]{1,8}")
_HEAD_ENDS = b"\r\n\r\n"
_HEADS = 100  # that are remembered, of those read lately …
_HEAD_BYTES = 1000  # … if they are no longer
_NOT_SIMPLE = ("Transfer-Encoding", "Connection", "Upgrade", "Content-Encoding")


class Answer(NamedTuple):
    """A server's answer, whatever its status."""

    status: int
    headers: Mapping[str, str]
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
        self._heads: dict[bytes, _Head] = {}

    def takes(self, url: str, path: str, headers: Mapping[str, str]) -> bool:
        """Whether this can carry the request as it is."""
        if url not in self._places:
            self._places[url] = _place(url)
        plain = path.isascii() and path.isprintable() and " " not in path
        return plain and self._places[url] is not None and all(map(_is_plain, headers.values()))

    async def send(
        self, url: str, method: str, path: str, data: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> Answer:
        """The answer. For what it `takes`. Raises Unreachable, Broken, or TimeoutError when there is none in time;
        cancelling gives the connection up."""
        begun = self.begin(url, method, path, data, headers, timeout_s)
        if begun is not None:
            return await begun
        until_s = time.monotonic() + timeout_s
        place = cast(Place, self._places[url])
        line = await self._new(place, timeout_s)
        return await line.ask(
            _request(place, method, path, data, headers), method == "HEAD", until_s - time.monotonic()
        )

    def begin(
        self, url: str, method: str, path: str, data: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> "asyncio.Future[Answer] | None":
        """As `send`, without a task, where a connection is open and free; None: there is none."""
        place = cast(Place, self._places[url])
        line = self._kept(place)
        if line is None:
            return None
        return line.ask(_request(place, method, path, data, headers), method == "HEAD", timeout_s)

    async def close(self) -> None:
        for line in list(self._open):
            line.close()
        await asyncio.sleep(0)  # transports end in the loop's next round
        self._free.clear()

    def _kept(self, place: Place) -> "_Line | None":
        """A connection that is there already."""
        free = self._free.get(place)
        horizon_s = time.monotonic() - IDLE_S
        while free:
            line = free.pop()
            if line.reusable and line.used_s > horizon_s:
                return line
            line.close()
        return None

    async def _new(self, place: Place, limit_s: float) -> "_Line":
        try:
            async with asyncio.timeout(min(self._connect_s, limit_s)):
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
            free = self._free.setdefault(place, deque())
            _, line = await loop.create_connection(lambda: _Line(loop, self._open, free, self._heads), sock=sock)
        except BaseException:
            sock.close()
            raise
        return line


class _Line(base_protocol.BaseProtocol):
    """One connection, one request at a time."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        others: "set[_Line]",
        free: "deque[_Line]",
        heads: "dict[bytes, _Head]",
    ) -> None:
        """`heads`: simple ones that were read lately; to be filled."""
        super().__init__(loop)
        self._heads = heads
        self.used_s = 0.0
        self._others = others
        self._free = free
        self._waiting: asyncio.Future[Answer] | None = None
        self._bodiless = False
        self._parser: aiohttp_http.HttpResponseParser | None = None  # of an answer that is not simple
        self._answer: tuple[aiohttp_http.RawResponseMessage, streams.StreamReader] | None = None
        self._keeps = True
        self._timer: asyncio.TimerHandle | None = None

    @property
    def reusable(self) -> bool:
        return self._keeps and self.transport is not None and not self.transport.is_closing()

    def ask(self, request: bytes, bodiless: bool, limit_s: float) -> "asyncio.Future[Answer]":
        """The answer; it fails with Broken or TimeoutError. Cancelling it gives the connection up."""
        self._waiting = self._loop.create_future()
        self._waiting.add_done_callback(self._answered)
        self._timer = self._loop.call_later(max(limit_s, 0.0), self._late)  # much cheaper than asyncio.timeout
        self._answer, self._parser, self._bodiless = None, None, bodiless
        if self.transport is None:
            self._waiting.set_exception(Broken("the server closed the connection"))
        else:
            self.transport.write(request)
        return self._waiting

    def _answered(self, waiting: "asyncio.Future[Answer]") -> None:
        """Before whoever waits goes on: the connection is free again, or of no use any more."""
        if not waiting.cancelled() and waiting.exception() is None and self.reusable:
            self.used_s = time.monotonic()
            self._free.append(self)
        else:
            self.close()

    def close(self) -> None:
        self._keeps = False
        self._untime()
        if self.transport is not None:
            self.transport.abort()

    def _late(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(TimeoutError())

    def _untime(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ---- what the event loop tells ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._others.add(self)

    def connection_lost(self, error: BaseException | None) -> None:
        super().connection_lost(error)
        self._others.discard(self)
        if self._waiting is None or self._waiting.done():
            return
        if self._parser is not None and self._answer is not None and error is None:
            try:
                self._parser.feed_eof()  # ends a body that is as long as the connection
            except http_exceptions.HttpProcessingError:
                self._answer = None
            if self._finish():
                return
        self._break(f"{type(error).__name__} {error}" if error else "the server closed the connection")

    def data_received(self, data: bytes) -> None:
        if not data:  # aiohttp's reader says so that it has room again
            return
        if self._waiting is None or self._waiting.done():  # nobody asked
            self.close()
            return
        if self._parser is None:
            simple = None if self._bodiless else _simple(data, self._heads)
            if simple is not None:
                self._untime()
                self._waiting.set_result(simple)
                return
            self._parser = self._general_parser()
        try:
            messages, _, _ = self._parser.feed_data(data)
        except http_exceptions.HttpProcessingError:
            self._break("the answer is no HTTP")
            return
        for message, body in messages:
            if message.code >= 200:  # what only announces the answer (1xx) is passed over
                self._keeps = self._keeps and self._answer is None and not message.should_close
                self._answer = self._answer or (message, body)
        if self._answer is not None and self._answer[1].is_eof():
            self._keeps = self._keeps and self._parser.feed_eof() is None  # else more than the answer came
            self._finish()

    def _general_parser(self) -> aiohttp_http.HttpResponseParser:
        return aiohttp_http.HttpResponseParser(
            self,
            self._loop,
            _GATHER_BYTES,
            response_with_body=not self._bodiless,
            read_until_eof=True,
            auto_decompress=False,  # nothing packed was asked for
        )

    def _finish(self) -> bool:
        """Hand over what came, if it is whole."""
        if self._answer is None or self._waiting is None or not self._answer[1].is_eof():
            return False
        message, body = self._answer
        if body.exception() is not None:
            return False
        self._untime()
        self._waiting.set_result(Answer(message.code, message.headers, body.read_nowait()))
        return True

    def _break(self, why: str) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(Broken(why))
        self.close()


def _request(place: Place, method: str, path: str, data: bytes | None, headers: Mapping[str, str]) -> bytes:
    more = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if data is not None or method not in ("GET", "HEAD", "DELETE"):
        more += f"Content-Length: {len(data or b'')}\r\n"
    head = f"{method} {place.prefix}{path} HTTP/1.1\r\nHost: {place.name}\r\n"
    return f"{head}User-Agent: covey\r\nAccept: */*\r\n{more}\r\n".encode() + (data or b"")


class _Head(NamedTuple):
    """What comes before the body of a simple answer. `size`: of the body."""

    status: int
    headers: Mapping[str, str]
    size: int


def _simple(data: bytes, heads: dict[bytes, _Head]) -> Answer | None:
    """The one answer that `data` is, after which the connection stays open. None: something else, or not all of it.
    Within a second a server's heads are the same wherever bodies are as long."""
    end = data.find(_HEAD_ENDS) + len(_HEAD_ENDS)
    text = data[:end]
    head = heads.get(text) or _read_head(text)
    if head is None or len(data) != end + head.size:
        return None
    if end <= _HEAD_BYTES:
        if len(heads) >= _HEADS:
            heads.clear()
        heads[text] = head
    return Answer(head.status, head.headers, data[end:])


def _read_head(text: bytes) -> _Head | None:
    found = _ANSWER.fullmatch(text)
    if found is None or found[1] in _BODILESS:
        return None
    headers = multidict.CIMultiDict(_HEADER.findall(found[2].decode("ascii")))
    sizes = headers.getall("Content-Length", [])
    if len(sizes) != 1 or not _SIZE.fullmatch(sizes[0]) or any(name in headers for name in _NOT_SIMPLE):
        return None
    return _Head(int(found[1]), multidict.CIMultiDictProxy(headers), int(sizes[0]))


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
