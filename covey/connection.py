"""Connections of a server: aiohttp's, with our error bodies, and the short way for small requests (`plain`).

A connection begins on the short way and stays there as long as all that comes over it is plain, one request after
another. The first bytes that are not go to aiohttp's parser, and so does everything after them. What comes while a
request is being answered waits, unread beyond a limit.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from aiohttp import http_parser, web, web_protocol

from covey import answer, observe, plain

_KEEPALIVE_S = 150.0  # above 120 s: a client's pooled connection must not be closed under its POST
_LINGER_S = 3.0
_PIECE = 1 << 18  # larger answers are sent in pieces of this size
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

log = observe.log("http")


class Owner(Protocol):
    """The server whose connections they are."""

    open: int
    connection_limit: int

    @property
    def streams(self) -> bool: ...

    def shaken(self) -> bool: ...

    async def serve_plain(self, request: plain.Request, over: "Connection") -> None: ...


class Connection(web_protocol.RequestHandler):
    """aiohttp's connection, with our error bodies and without connections that waited through a gap."""

    __slots__ = ("_answering", "_is_plain", "_owner", "_peer", "_waiting")

    def __init__(self, manager: web.Server, owner: Owner, **settings: Any) -> None:
        super().__init__(manager, loop=asyncio.get_running_loop(), **settings)
        self._owner = owner
        self._is_plain = not owner.streams
        self._answering: asyncio.Task[None] | None = None  # the request on the short way
        self._waiting = b""  # what came after it, or the part of one that has come
        self._peer = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._owner.open += 1
        if self.transport is None:
            return
        if self._owner.shaken():
            self.transport.abort()
        elif self._owner.open > self._owner.connection_limit:
            self.transport.write(_FULL)
            self.transport.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._owner.open -= 1
        super().connection_lost(exc)

    # ---- the short way

    @property
    def peer(self) -> str:
        if not self._peer:
            name = self.peername
            self._peer = name[0] if isinstance(name, tuple) else name or ""
        return self._peer

    def gone(self) -> bool:
        return self.transport is None or self.transport.is_closing()

    def data_received(self, data: bytes) -> None:
        if not self._is_plain or not data:  # aiohttp's reader says by b"" that it has room again
            super().data_received(data)
            return
        if self._force_close or self._close:
            return
        if self._waiting:
            data = self._waiting + data
        if self._answering is not None:
            self._waiting = data
            if len(data) > plain.LIMIT_BYTES:
                self._pause_transport_reading()
            return
        self._take(data)

    def _take(self, data: bytes) -> None:
        """Begin with what came, if it is a request."""
        self._waiting = b""
        found = plain.parse(data, self)
        if isinstance(found, plain.Request):
            self._next_keepalive_close_time = self._loop.time() + _KEEPALIVE_S
            self._answering = self._loop.create_task(self._serve(found))
        elif found is plain.More.TO_COME:
            self._waiting = data
        else:
            self._is_plain = False
            super().data_received(data)

    async def _serve(self, request: plain.Request) -> None:
        try:
            await self._owner.serve_plain(request, self)
        except ConnectionError:
            self.force_close()
        except Exception:
            log.exception("an answer broke off", method=request.method, path=request.path)
            if self.transport is not None:  # half of it may be out: the client must not take it for the whole
                self.transport.abort()
        finally:
            self._answering = None
        self._next_keepalive_close_time = self._loop.time() + _KEEPALIVE_S
        if self._waiting and not self._force_close and not self._close:
            self._resume_transport_reading()
            self._take(self._waiting)

    async def send(self, head: bytes, body: bytes, *, last: bool) -> None:
        """An answer; a large one as fast as the client takes it. Raises ConnectionResetError when it has gone."""
        if self.gone() or self.transport is None:
            raise ConnectionResetError("the client has gone")
        if len(body) <= _PIECE:
            self.transport.write(head + body)
        else:
            self.transport.write(head)
            view = memoryview(body)
            for start in range(0, len(view), _PIECE):
                await self._drain_helper()
                self.transport.write(view[start : start + _PIECE])
        if self.writing_paused:
            await self._drain_helper()
        if last:
            self.force_close()

    async def shutdown(self, timeout: float | None = 15.0) -> None:
        if self._answering is not None:
            await asyncio.wait({self._answering}, timeout=timeout)
        if self._answering is not None:
            self._answering.cancel()
        await super().shutdown(timeout)

    # ---- aiohttp's way

    def renew(self) -> None:
        """What comes next begins a request. The arguments are those of aiohttp's constructor."""
        self._parser = http_parser.HttpRequestParser(
            self,
            self._loop,
            self._read_bufsize,
            max_line_size=self.max_line_size,
            max_field_size=self.max_field_size,
            max_headers=self.max_headers,
            payload_exception=web_protocol.RequestPayloadError,
            auto_decompress=False,
            max_msg_queue_size=self._max_msg_queue_size,
        )

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Reached for requests that are no HTTP; our handler turns its own faults into answers."""
        text = " ".join((message or "the request could not be read").split())
        fault = answer.Fault(status, f"malformed HTTP request: {text}")
        response = answer.respond(fault, answer.enveloped_fault).response()
        response.force_close()
        return response


class Connections(web.Server):
    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        owner: Owner,
        read_ahead_bytes: int,
    ) -> None:
        super().__init__(handler)
        self._owner = owner
        self._read_ahead_bytes = read_ahead_bytes

    def __call__(self) -> web_protocol.RequestHandler:
        return Connection(
            self,
            self._owner,
            keepalive_timeout=_KEEPALIVE_S,
            lingering_time=_LINGER_S,
            access_log=None,
            auto_decompress=False,
            read_bufsize=self._read_ahead_bytes,
        )
