"""The HTTP server that controller and registry share: sockets, drain, and waking up frozen.

    connection ──┬──► aiohttp's parser ──┬──► dispatch (routes, limits, envelope) ──► the answer's last byte
                 └──► plain ─────────────┘    small requests that arrive whole, where nothing streams

Frozen (safety S24): after a gap of the event loop what lies in the sockets is of unknown age. Every client connection
is closed unread, the backlog too.

Drain: once `draining` is set, parked polls are told (`dispatch`) and each answer closes its connection, but requests
are taken until `drain` closes the listener: a balancer that asks /readyz has time to look away. Connections that are
idle then stay open until the end, so that what was sent on one at that moment is still answered.
"""

import asyncio
import errno
import resource
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import aiohttp
import multidict
from aiohttp import web, web_protocol

from covey import (
    accepting,
    answer,
    connection,
    dispatch,
    errors,
    gate,
    inlet,
    observe,
    origin,
    plain,
    room,
    serve,
    world,
)

_AFTERSHOCK_S = 0.05  # connections accepted this soon after a gap had been waiting in the backlog …
_AFTERSHOCK_TURNS = 3  # … and so many turns of the loop later
_BACKLOG = 4096
_CUT_SHARE = 0.7  # uploads are cut after this share of the grace
_CONNECTION_LIMIT = 10_000
_SPARE_FILES = 256  # descriptors left for everything else
_PIECE = 1 << 18  # larger answers are sent in pieces of this size

log = observe.log("http")


class Served(NamedTuple):
    """One request that was answered, as far as anybody counts it."""

    method: str
    path: str
    status: int
    received_bytes: int  # of the body
    sent_bytes: int  # of the body; of one that broke off, none
    took_s: float


class Server:
    """One listening program: start → (serve by itself) → drain. Or without sockets: begin → hand → drain."""

    def __init__(
        self,
        routes: Sequence[serve.Route],
        *,
        world: world.World,
        error_bodies: Mapping[str, answer.ErrorBody] = {},
        on_gap: Callable[[float], None] | None = None,
        limits: Mapping[gate.Lane, gate.Limits] = dispatch.LIMITS,
        trusted: Sequence[origin.Network] = (),
        read_ahead_bytes: int = 1 << 16,
        on_served: Callable[[Served], None] | None = None,
        streams: bool = True,
    ) -> None:
        """`streams`: some handlers take a body, or give an answer, piece by piece. Without any, small requests take the
        short way (`plain`)."""
        self.host = ""
        self.port = 0
        self.open = 0  # connections
        self.connection_limit = _CONNECTION_LIMIT
        self._world = world
        self._dispatch = dispatch.Dispatch(
            routes, world=world, error_bodies=error_bodies, limits=limits, trusted=trusted
        )
        self._read_ahead_bytes = read_ahead_bytes
        self._on_served = on_served
        self.streams = streams
        self._dispatch.on_gap += [on_gap, self._close_unread] if on_gap is not None else [self._close_unread]
        self.draining = self._dispatch.draining
        self.hand = self._dispatch.hand
        self._shaken = False
        self._calming: asyncio.Handle | None = None
        self._web: connection.Connections | None = None
        self._listener: asyncio.Server | accepting.Accepting | None = None
        self._sockets: list[socket.socket] = []

    # ---- start and drain -------------------------------------------------------------------------------------------

    async def start(
        self,
        host: str,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        shared: socket.socket | None = None,
        rank: int = 0,
        busy: Callable[[], int] = lambda: 0,
    ) -> None:
        """Listen on host:port ("" is every address, port 0 any free one). Raises SettingError in one clear line.
        `shared`: a socket that listens there already, for several processes; `rank`, `busy`: see `accepting`."""
        self._sockets = [listen(host, port) if shared is None else shared]
        self.connection_limit = max(
            min(_CONNECTION_LIMIT, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _SPARE_FILES), 64
        )
        self._web = connection.Connections(self._serve, self, self._read_ahead_bytes)
        if shared is None:
            loop = asyncio.get_running_loop()
            self._listener = await loop.create_server(self._web, sock=self._sockets[0], backlog=_BACKLOG, ssl=tls)
        else:
            self._listener = accepting.Accepting(shared, self._web, tls=tls, rank=rank, busy=busy)
            self._listener.start()
        self.host, self.port = host, self._sockets[0].getsockname()[1]
        self.begin()

    def begin(self) -> None:
        """Serve what is handed over, without a listener."""
        self._dispatch.begin()

    async def drain(self, grace_s: float) -> int:
        """Take nothing new, finish what runs within `grace_s`, close everything. Returns how many requests had to be
        broken off."""
        loop = asyncio.get_running_loop()
        end = loop.time() + grace_s
        self.draining.set()
        if self._listener is not None:
            self._listener.close()
        await self._dispatch.wait_until_idle(grace_s * _CUT_SHARE)
        self._dispatch.cut()
        await self._dispatch.wait_until_idle(end - loop.time())
        while self._unsent_bytes() and loop.time() < end:
            await asyncio.sleep(0.01)
        broken = self._dispatch.in_flight
        if self._web is not None:
            await self._web.shutdown(0.1)
        self._dispatch.end()
        if self._calming is not None:
            self._calming.cancel()
        return broken

    def _unsent_bytes(self) -> int:
        transports = (one.transport for one in self.connections)
        return sum(transport.get_write_buffer_size() for transport in transports if transport is not None)

    @property
    def connections(self) -> Sequence[web_protocol.RequestHandler]:
        return self._web.connections if self._web is not None else ()

    # ---- frozen (safety S24) ---------------------------------------------------------------------------------------

    def _close_unread(self, _gap_s: float) -> None:
        self._shaken = True
        if self._calming is not None:
            self._calming.cancel()
        self._calming = asyncio.get_running_loop().call_later(_AFTERSHOCK_S, self._calm_down, _AFTERSHOCK_TURNS)
        for sock in self._sockets:
            try:
                while True:
                    sock.accept()[0].close()
            except OSError:  # BlockingIOError: the backlog is empty
                continue
        for one in self.connections:
            if one.transport is not None:
                one.transport.abort()

    def _calm_down(self, turns: int) -> None:
        """Turns of the loop count too: on a busy host time may be up before what was accepted has been looked at."""
        self._shaken = turns > 0
        self._calming = asyncio.get_running_loop().call_soon(self._calm_down, turns - 1) if turns else None

    def shaken(self) -> bool:
        """Whether a gap was found just now: what is accepted at this moment had been waiting through it."""
        return self._shaken

    # ---- one request -----------------------------------------------------------------------------------------------

    async def _serve(self, raw: web.BaseRequest) -> web.StreamResponse:
        """aiohttp's entry: the answer is sent in here, so that `drain` counts a request until its last byte."""
        started_ns = self._world.boot_ns()
        with self._dispatch.passing():
            request = _Wired(raw)
            if request.gone():  # also: read just before a gap was found
                raise ConnectionResetError("the connection was closed unread")
            reply = await self._dispatch.answer(request)
            response = reply.response() if isinstance(reply, answer.Plain) else reply
            if not request.end() or self.draining.is_set():
                response.force_close()
            whole = await _send(response, raw)
        sent = (response.content_length or 0) if whole and raw.method != "HEAD" else 0
        self._note(raw.method, raw.path, response.status, request.received_bytes, sent, started_ns)
        return response

    async def serve_plain(self, request: plain.Request, over: connection.Connection) -> None:
        """The short way of a small request. Raises ConnectionResetError when its client has gone."""
        started_ns = self._world.boot_ns()
        with self._dispatch.passing():
            if request.gone():
                raise ConnectionResetError("the connection was closed unread")
            reply = dispatch.whole(await self._dispatch.answer(request))
            last = self.draining.is_set()
            head = plain.render(reply, self._world.wall_ns() // 1_000_000_000, last=last)
            await over.send(head, reply.body, last=last)
        self._note(request.method, request.path, reply.status, request.size_bytes, len(reply.body), started_ns)

    def _note(self, method: str, path: str, status: int, received: int, sent: int, started_ns: int) -> None:
        took_s = (self._world.boot_ns() - started_ns) / 1e9
        log.debug("answered", method=method, path=path, status=status, ms=round(took_s * 1e3, 1))
        if self._on_served is not None:
            self._on_served(Served(method, path, status, received, sent, took_s))


async def _send(response: web.StreamResponse, raw: web.BaseRequest) -> bool:
    """Whether all of it went out."""
    try:
        if isinstance(response, web.Response) and isinstance(response.body, bytes) and len(response.body) > _PIECE:
            await _send_in_pieces(response, raw, response.body)
            return True
        await response.prepare(raw)
        await response.write_eof()
    except ConnectionError:
        response.force_close()
        return False
    except Exception:
        log.exception("an answer broke off", method=raw.method, path=raw.path)
        if raw.transport is not None:  # half of it may be out: the client must not take it for the whole
            raw.transport.abort()
        raise ConnectionResetError("the answer was broken off") from None
    return True


async def _send_in_pieces(response: web.Response, raw: web.BaseRequest, body: bytes) -> None:
    """As fast as the client takes it: who reads slowly, or asks for much at once, does not fill our memory with copies
    of what is large and shared."""
    length = {"Content-Length": str(len(body))}
    streamed = web.StreamResponse(status=response.status, headers={**response.headers, **length})
    if response.keep_alive is False:
        streamed.force_close()
    await streamed.prepare(raw)
    if raw.method != "HEAD":
        view = memoryview(body)
        for start in range(0, len(view), _PIECE):
            await streamed.write(view[start : start + _PIECE])
    await streamed.write_eof()


class _Wired:
    """A request from a socket."""

    __slots__ = ("_inlet", "_raw", "received_bytes")

    def __init__(self, raw: web.BaseRequest) -> None:
        self._raw = raw
        self._inlet: inlet.Inlet | None = None
        self.received_bytes = 0

    @property
    def method(self) -> str:
        return self._raw.method

    @property
    def path(self) -> str:
        return self._raw.path

    @property
    def query(self) -> multidict.MultiMapping[str]:
        return self._raw.query

    @property
    def headers(self) -> multidict.MultiMapping[str]:
        return self._raw.headers

    @property
    def peer(self) -> str:
        return self._raw.remote or ""

    @property
    def has_body(self) -> bool:
        return self._raw.body_exists

    @property
    def size_bytes(self) -> int | None:
        return self._raw.content_length

    @property
    def whole(self) -> bytes | None:
        return None  # it comes in its own time

    def gone(self) -> bool:
        return self._raw.transport is None or self._raw.transport.is_closing()

    async def piece(self) -> bytes:
        content = self._raw.content
        try:
            while True:
                chunk, _ = await content.readchunk()  # what arrived, without a copy
                if chunk or content.at_eof():
                    self.received_bytes += len(chunk)
                    return chunk
        except (aiohttp.ClientError, asyncio.IncompleteReadError) as error:
            raise ConnectionResetError(str(error)) from error

    @property
    def direct(self) -> bool:
        return inlet.fits(self._raw)

    async def fill(self, into: room.Room) -> None:
        before = into.size_bytes
        try:
            if self._inlet is None:
                over = self._raw.protocol
                assert isinstance(over, connection.Connection)  # noqa: S101  made by Connections
                self._inlet = inlet.Inlet(self._raw, over, over)
            await self._inlet.fill(into)
        finally:
            self.received_bytes += into.size_bytes - before

    def end(self) -> bool:
        """The handler is done with it. Whether another request can follow on its connection."""
        return self._inlet is None or self._inlet.close()

    async def go_ahead(self) -> None:
        await self._raw.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._raw.writer.output_size = 0  # of the answer itself nothing is out yet


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises SettingError in one clear line."""
    try:
        if not host and socket.has_dualstack_ipv6():
            sock = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)
        else:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sock = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        where = f"{host or '*'}:{port}"
        if error.errno == errno.EADDRINUSE:
            raise errors.SettingError(f"{where} is taken by another program; choose another listen address") from error
        raise errors.SettingError(f"cannot listen on {where}: {error.strerror or error}") from error
    sock.setblocking(False)
    return sock
