"""The HTTP server that controller and registry share: routes, the envelope, limits, drain, and waking up frozen.

Rules that hold for every answer, errors included:

* Success is exactly 200, in the envelope (`covey.answer`). A business refusal (`errors.Refused`) is 200 with status
  FAIL. Other codes are for requests that were not understood (400, 404, 405, 413), for a server that cannot answer now
  (503 with Retry-After) and for our own faults (500). Only below prefixes for which a program brings its own error
  body (the registry's OCI paths), and in raw responses, is the body something else.
* Bodies are read as JSON whatever the Content-Type says, on DELETE too, as UTF-8 or else Latin-1: clients differ.
* Answers are ASCII-escaped JSON: one client decodes them with its platform's charset.

A handler is ``async def handler(call: Call) -> object``: None (a command's bare OK), something msgspec can encode (the
envelope's body), or an aiohttp response (sent as it is). Handlers know nothing of HTTP faults but `answer.Fault`.

Frozen (safety S24): when the event loop stood still for over 2 s, what lies in the sockets is of unknown age. Every
client connection is closed unread, the backlog too, and `on_gap` lets the program prove its store before it serves.

Drain: the listener closes, parked polls see `draining` and answer, requests in flight finish; uploads that still run
near the end of the grace see `cutting` (`Call.chunks` raises `answer.Cut`) and answer at a durable offset.

This module knows no store and no noun.
"""

import asyncio
import errno
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
import msgspec
from aiohttp import web, web_protocol

from covey import answer, errors, observe, world

T = TypeVar("T")

MIB = 1 << 20
GAP_LIMIT_S = 2.0  # safety S24
AGE_LIMIT_S = 10.0  # safety S24: nothing is committed for an older request
_BEAT_S = 0.25
_AFTERSHOCK_S = 0.05  # connections accepted this soon after a gap had been waiting in the backlog
_KEEPALIVE_S = 150.0  # above 120 s: a client's pooled connection must not be closed under its POST
_LINGER_S = 3.0
_CUT_SHARE = 0.7  # uploads are cut after this share of the grace

log = observe.log("http")

Handler = Callable[["Call"], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Route:
    """One method on one path. In `path`, ``{name}`` matches one segment and ``{name:path}`` several.

    `time_limit_s` None is for streams and parked polls: they end by themselves and do not count as load.
    """

    method: str
    path: str
    handler: Handler
    body_limit_bytes: int = MIB
    time_limit_s: float | None = AGE_LIMIT_S


class Call:
    """One request on its way through a handler."""

    __slots__ = ("_arrived_ns", "_epoch", "_server", "params", "request", "route")

    def __init__(self, server: "Server", route: Route, request: web.BaseRequest, params: Mapping[str, str]) -> None:
        self.route = route
        self.request = request
        self.params = params
        self._server = server
        self._arrived_ns = server.world.boot_ns()
        self._epoch = server.gaps

    @property
    def query(self) -> Mapping[str, str]:
        return self.request.query

    @property
    def headers(self) -> Mapping[str, str]:
        return self.request.headers

    @property
    def draining(self) -> asyncio.Event:
        """Set when the server goes down: a parked poll answers at once."""
        return self._server.draining

    @property
    def age_s(self) -> float:
        return (self._server.world.boot_ns() - self._arrived_ns) / 1e9

    @property
    def until_ns(self) -> int:
        """On the boot clock: nothing is committed for this request after that (safety S24)."""
        return self._arrived_ns + int(AGE_LIMIT_S * 1e9)

    @property
    def client(self) -> str:
        """Who asks, for records of decisions."""
        return self.request.remote or "unknown"

    def still_fresh(self) -> None:
        """Called just before a commit: raises Unavailable for a request that is too old or slept through a gap."""
        if self._epoch != self._server.gaps or self.age_s > AGE_LIMIT_S:
            raise errors.Unavailable("the request waited too long in this server and nothing was done; send it again")

    def still_here(self) -> None:
        """Raises ConnectionError when the client has gone: a parked poll need not answer it."""
        if self.request.transport is None or self.request.transport.is_closing():
            raise ConnectionResetError("the client has gone")

    async def read(self) -> bytes:
        """The whole body, up to the route's limit."""
        parts = []
        size = 0
        async for part in self.request.content.iter_any():
            size += len(part)
            if size > self.route.body_limit_bytes:
                raise answer.too_large(self.route.body_limit_bytes)
            parts.append(part)
        return b"".join(parts)

    async def json(self, kind: type[T]) -> T:
        """The body as `kind`, whatever the Content-Type. Raises Fault 400 that names the field."""
        return parse(await self.read(), kind)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body piece by piece as it came from the socket, for streaming to disk. Raises Cut when the server goes
        down, ConnectionError when the client has gone."""
        content = self.request.content
        try:
            while True:
                chunk, _ = await self._server.until_cut(content.readchunk())  # what arrived, without a copy
                if chunk:
                    yield chunk
                elif content.at_eof():
                    return
        except (aiohttp.ClientError, asyncio.IncompleteReadError) as error:
            raise ConnectionResetError(str(error)) from error


def parse(raw: bytes, kind: type[T]) -> T:
    """A request's body as `kind`, read as UTF-8 or else as Latin-1. Raises Fault 400 that names the field."""
    if not raw.strip():
        raise answer.Fault(400, "the request has no body; send a JSON object")
    try:
        raw.decode()
    except UnicodeDecodeError:
        raw = raw.decode("latin-1").encode()
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise answer.Fault(400, _name_field(str(error))) from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise answer.Fault(400, f"the body is not valid JSON ({error}); send a JSON object") from error


def _name_field(text: str) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.count`" with the field first and what to do last."""
    what, _, where = text.partition(" - at `")
    name = where.rstrip("`").removeprefix("$").lstrip(".") or "the body"
    return f"{name}: {what[:1].lower()}{what[1:]}; correct it and send the request again"


def _pattern(path: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)(:path)?\}", path)
    out = re.escape(parts[0])
    for name, several, literal in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        out += f"(?P<{name}>{'.+' if several else '[^/]+'}){re.escape(literal)}"
    return re.compile(out)


@dataclass(slots=True)
class _Table:
    """Paths to routes by method: literal ones by look-up, the others in the order in which they were given."""

    literal: dict[str, dict[str, Route]] = field(default_factory=dict)
    patterns: dict[str, tuple[re.Pattern[str], dict[str, Route]]] = field(default_factory=dict)

    def add(self, route: Route) -> None:
        if "{" in route.path:
            methods = self.patterns.setdefault(route.path, (_pattern(route.path), {}))[1]
        else:
            methods = self.literal.setdefault(route.path, {})
        if route.method in methods:
            raise ValueError(f"two routes for {route.method} {route.path}")
        methods[route.method] = route

    def find(self, method: str, path: str) -> tuple[Route, Mapping[str, str]]:
        """The route, or Fault 404 or 405. HEAD is answered as GET without its body where no route takes it."""
        found: list[tuple[dict[str, Route], Mapping[str, str]]] = []
        if path in self.literal:
            found.append((self.literal[path], {}))
        found += [
            (methods, hit.groupdict()) for regex, methods in self.patterns.values() if (hit := regex.fullmatch(path))
        ]
        for wanted in (method, "GET") if method == "HEAD" else (method,):
            for methods, params in found:
                if wanted in methods:
                    return methods[wanted], params
        if not found:
            raise answer.Fault(404, f"there is nothing at {path}", code="NOT_FOUND")
        allow = ", ".join(sorted({name for methods, _ in found for name in methods}))
        raise answer.Fault(405, f"{path} takes {allow}, not {method}", code="UNSUPPORTED", headers={"Allow": allow})


class _Protocol(web_protocol.RequestHandler):
    """aiohttp's connection, with our error bodies and without connections that waited through a gap."""

    __slots__ = ("_owner",)

    def __init__(self, manager: web.Server, owner: "Server", **settings: Any) -> None:
        super().__init__(manager, loop=asyncio.get_running_loop(), **settings)
        self._owner = owner

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self._owner.shaken() and self.transport is not None:
            self.transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Reached for requests that are no HTTP; our handler turns its own faults into answers."""
        text = " ".join((message or "the request could not be read").split())
        response = answer.respond(answer.Fault(status, f"malformed HTTP request: {text}"), answer.enveloped_fault)
        response.force_close()
        return response


class _WebServer(web.Server):
    def __init__(self, handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]], owner: "Server") -> None:
        super().__init__(handler)
        self._owner = owner

    def __call__(self) -> web_protocol.RequestHandler:
        return _Protocol(
            self,
            self._owner,
            keepalive_timeout=_KEEPALIVE_S,
            lingering_time=_LINGER_S,
            access_log=None,
            auto_decompress=False,
            read_bufsize=MIB,
        )


class Server:
    """One listening program: start → (serve by itself) → drain."""

    def __init__(
        self,
        routes: Sequence[Route],
        *,
        world: world.World,
        error_bodies: Mapping[str, answer.ErrorBody] = {},
        on_gap: Callable[[float], None] | None = None,
        load_limit: int = 1000,
    ) -> None:
        self.world = world
        self.draining = asyncio.Event()
        self.cutting = asyncio.Event()
        self.gaps = 0  # how often the event loop stood still for too long
        self.host = ""
        self.port = 0
        self._table = _Table()
        for route in routes:
            self._table.add(route)
        self._error_bodies = dict(error_bodies)
        self._on_gap = on_gap
        self._load_limit = load_limit
        self._load = 0  # requests in flight that count as load
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._reads: set[asyncio.Timeout] = set()  # of uploads, waiting for bytes
        self._beaten_ns = world.boot_ns()
        self._shaken_until_ns = 0
        self._web: _WebServer | None = None
        self._listener: asyncio.Server | None = None
        self._sockets: list[socket.socket] = []
        self._beating: asyncio.TimerHandle | None = None

    # ---- start and drain -------------------------------------------------------------------------------------------

    async def start(self, host: str, port: int) -> None:
        """Listen on host:port ("" is every address, port 0 any free one). Raises SettingError in one clear line."""
        self._sockets = [_listen(host, port)]
        self._web = _WebServer(self._serve, self)
        self._listener = await asyncio.get_running_loop().create_server(self._web, sock=self._sockets[0], backlog=4096)
        self.host, self.port = host, self._sockets[0].getsockname()[1]
        self._beaten_ns = self.world.boot_ns()
        self._beat()

    async def drain(self, grace_s: float) -> int:
        """Take nothing new, finish what runs within `grace_s`, close everything. Returns how many requests had to be
        broken off."""
        loop = asyncio.get_running_loop()
        end = loop.time() + grace_s
        self.draining.set()
        if self._listener is not None:
            self._listener.close()
        await self._wait_idle(grace_s * _CUT_SHARE)
        self.cutting.set()
        for scope in self._reads:
            scope.reschedule(loop.time())
        await self._wait_idle(end - loop.time())
        while self._unsent_bytes() and loop.time() < end:
            await asyncio.sleep(0.01)
        broken = self._in_flight
        if self._web is not None:
            await self._web.shutdown(0.1)
        if self._beating is not None:
            self._beating.cancel()
        return broken

    async def until_cut(self, reading: Awaitable[T]) -> T:
        """What `reading` brings, or Cut when uploads are to end. No task for each read: uploads have thousands."""
        try:
            async with asyncio.timeout(0.0 if self.cutting.is_set() else None) as scope:
                self._reads.add(scope)
                try:
                    return await reading
                finally:
                    self._reads.discard(scope)
        except TimeoutError as error:
            raise answer.Cut("the server goes down") from error

    async def _wait_idle(self, limit_s: float) -> None:
        if self._in_flight and limit_s > 0:
            self._idle.clear()
            try:
                await asyncio.wait_for(self._idle.wait(), limit_s)
            except TimeoutError:
                return

    def _unsent_bytes(self) -> int:
        transports = (connection.transport for connection in self.connections)
        return sum(transport.get_write_buffer_size() for transport in transports if transport is not None)

    @property
    def connections(self) -> Sequence[web_protocol.RequestHandler]:
        return self._web.connections if self._web is not None else ()

    # ---- frozen (safety S24) ---------------------------------------------------------------------------------------

    def _beat(self) -> None:
        self._look_for_gap()
        self._beating = asyncio.get_running_loop().call_later(_BEAT_S, self._beat)

    def _look_for_gap(self) -> bool:
        now = self.world.boot_ns()
        gap_s = (now - self._beaten_ns) / 1e9
        self._beaten_ns = now
        if gap_s <= GAP_LIMIT_S:
            return False
        self.gaps += 1
        self._shaken_until_ns = now + int(_AFTERSHOCK_S * 1e9)
        log.warning("this process stood still; every client connection is closed unread", gap_s=round(gap_s, 1))
        if self._on_gap is not None:
            self._on_gap(gap_s)
        self._close_unread()
        return True

    def _close_unread(self) -> None:
        for sock in self._sockets:
            try:
                while True:
                    sock.accept()[0].close()
            except OSError:  # BlockingIOError: the backlog is empty
                continue
        for connection in self.connections:
            if connection.transport is not None:
                connection.transport.abort()

    def shaken(self) -> bool:
        """Whether a gap was found just now: what is accepted at this moment had been waiting through it."""
        return self.world.boot_ns() < self._shaken_until_ns

    # ---- one request -----------------------------------------------------------------------------------------------

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        """aiohttp's entry: the answer is sent in here, so that `drain` counts a request until its last byte."""
        self._in_flight += 1
        started_ns = self.world.boot_ns()
        if started_ns - self._beaten_ns > GAP_LIMIT_S * 1e9:
            self._look_for_gap()
        try:
            if request.transport is None or request.transport.is_closing():  # also: read just before a gap was found
                raise ConnectionResetError("the connection was closed unread")
            response = await self._answer(request)
            if self.draining.is_set():
                response.force_close()
            try:
                await response.prepare(request)
                await response.write_eof()
            except ConnectionError:
                response.force_close()
            took_ms = (self.world.boot_ns() - started_ns) / 1e6
            log.debug(
                "answered", method=request.method, path=request.path, status=response.status, ms=round(took_ms, 1)
            )
            return response
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        path = re.sub("/{2,}", "/", request.path)
        try:
            route, params = self._table.find(request.method, path)
            result = await self._handle(route, request, params)
        except errors.CoveyError as error:
            fault = answer.as_fault(error)
        except Exception:
            if request.transport is None or request.transport.is_closing():
                raise ConnectionResetError("the client has gone") from None
            log.exception("a request failed unexpectedly", method=request.method, path=path)
            fault = answer.Fault(500, "internal error; this server's log says more", code="UNKNOWN")
        else:
            if isinstance(result, web.StreamResponse):
                return result
            return web.Response(body=answer.envelope("OK", body=result), headers=answer.HEADERS)
        if request.writer.output_size:  # half an answer is out: the client must not take it for a whole one
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("the answer was broken off")
        body = next(
            (make for prefix, make in self._error_bodies.items() if path.startswith(prefix)), answer.enveloped_fault
        )
        return answer.respond(fault, body)

    async def _handle(self, route: Route, request: web.BaseRequest, params: Mapping[str, str]) -> object:
        counts = route.time_limit_s is not None
        if counts and self._load >= self._load_limit:
            raise answer.Fault(503, "this server has too much to do; try again", headers={"Retry-After": "1"})
        if (request.content_length or 0) > route.body_limit_bytes:
            raise answer.too_large(route.body_limit_bytes)
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise answer.Fault(415, "Content-Encoding: send the body without compression")
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0  # of the answer itself nothing is out yet
        self._load += counts
        scope = asyncio.timeout(route.time_limit_s)
        try:
            async with scope:
                return await route.handler(Call(self, route, request, params))
        except TimeoutError as error:
            if not scope.expired():
                raise
            text = "no answer in time; whether the request was carried out is not known: look, or repeat it"
            raise errors.Unsure(text) from error
        finally:
            self._load -= counts


def _listen(host: str, port: int) -> socket.socket:
    try:
        if not host and socket.has_dualstack_ipv6():
            sock = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
        else:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sock = socket.create_server((host, port), family=family, backlog=4096)
    except OSError as error:
        where = f"{host or '*'}:{port}"
        if error.errno == errno.EADDRINUSE:
            raise errors.SettingError(f"{where} is taken by another program; choose another listen address") from error
        raise errors.SettingError(f"cannot listen on {where}: {error.strerror or error}") from error
    sock.setblocking(False)
    return sock
