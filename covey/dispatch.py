"""From a request to its answer, however the request came: find the route, keep the limits, make the envelope.

    request ──► route (404, 405) ──► gate (503) ──► body limits (413, 415) ──► handler within its time ──► answer

`server` feeds it from sockets. `hand` feeds it within the process: the same way for requests without a network, as a
simulated cluster sends them. Time comes from the event loop and from `world`, so both may be virtual.

Frozen (safety S24): when the event loop stood still for over 2 s, what waits is of unknown age. `gaps` is raised, so
that no call from before commits anything, and everybody in `on_gap` is told: the server closes its connections unread,
the program proves its store again. A request that was handed over meets with a broken connection then, as over a
socket.

Drain: parked polls see `draining` and answer; uploads that still run near the end of the grace see `cutting`
(`Call.chunks` raises `answer.Cut`) and answer at a durable offset.
"""

import asyncio
import contextlib
import urllib.parse
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import multidict
from aiohttp import web

from covey import answer, errors, gate, observe, origin, paths, room, serve, world

T = TypeVar("T")

GAP_LIMIT_S = 2.0  # safety S24
LIMITS = {gate.Lane.PEOPLE: gate.Limits(), gate.Lane.AGENTS: gate.Limits()}
_BEAT_S = 0.25

log = observe.log("http")


class Reply(NamedTuple):
    """The answer to a request that was handed over."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Dispatch:
    """Routes and what all their requests share. `begin` → requests → `end`."""

    def __init__(
        self,
        routes: Sequence[serve.Route],
        *,
        world: world.World,
        error_bodies: Mapping[str, answer.ErrorBody] = {},
        limits: Mapping[gate.Lane, gate.Limits] = LIMITS,
        trusted: Sequence[origin.Network] = (),
    ) -> None:
        self.world = world
        self.draining = asyncio.Event()
        self.cutting = asyncio.Event()
        self.gaps = 0
        self.on_gap: list[Callable[[float], None]] = []
        self._table = paths.Table(routes)
        self._error_bodies = dict(error_bodies)
        self._gate = gate.Gate(limits)
        self._trusted = tuple(trusted)
        self.in_flight = 0
        self._idle = asyncio.Event()
        self._reads: set[asyncio.Timeout] = set()  # of uploads, waiting for bytes
        self._beaten_ns = world.boot_ns()
        self._beating: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Watch for gaps from now on."""
        self._beaten_ns = self.world.boot_ns()
        self._beat()

    def end(self) -> None:
        if self._beating is not None:
            self._beating.cancel()

    # ---- one request -----------------------------------------------------------------------------------------------

    async def hand(
        self, method: str, target: str, headers: Mapping[str, str] = {}, body: bytes = b"", peer: str = ""
    ) -> Reply:
        """Answer a request without a socket; `target` is path and query as on the wire. Raises ConnectionResetError
        where a socket's client would have seen its connection break."""
        gaps = self.gaps
        with self.passing():
            request = _Handed(self, method, target, headers, body, peer)
            if self.gaps != gaps:
                raise ConnectionResetError("the connection was closed unread")
            response = await self.answer(request)
            if request.gone():
                raise ConnectionResetError("the connection was closed unread")
            reply = whole(response)
            return Reply(reply.status, reply.headers, b"" if method == "HEAD" else reply.body)

    async def answer(self, request: serve.Request) -> answer.Plain | web.StreamResponse:
        """The answer, faults included. Raises ConnectionResetError when nobody waits for it any more."""
        path = paths.plain(request.path)
        try:
            route, params = self._table.find(request.method, path)
            result = await self._handle(route, request, params)
        except errors.CoveyError as error:
            fault = answer.as_fault(error)
        except Exception:
            if request.gone():
                raise ConnectionResetError("the client has gone") from None
            log.exception("a request failed unexpectedly", method=request.method, path=path)
            fault = answer.Fault(500, "internal error; this server's log says more", code="UNKNOWN")
        else:
            if isinstance(result, web.StreamResponse):
                return result
            return answer.Plain(200, answer.HEADERS, answer.envelope("OK", body=result))
        body = next(
            (make for prefix, make in self._error_bodies.items() if path.startswith(prefix)), answer.enveloped_fault
        )
        return answer.respond(fault, body)

    async def _handle(self, route: serve.Route, request: serve.Request, params: Mapping[str, str]) -> object:
        address = origin.address(request.peer, request.headers, self._trusted)
        call = serve.Call(self, route, request, params, address)
        ticket = await self._gate.enter(route.lane, origin.client(address, request.headers))
        try:
            call.admit(ticket)
            return await self._run(call)
        finally:
            if ticket is not None:
                ticket.end()

    async def _run(self, call: serve.Call) -> object:
        route, request = call.route, call.request
        if (request.size_bytes or 0) > route.body_limit_bytes:
            raise answer.too_large(route.body_limit_bytes)
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise answer.Fault(415, "Content-Encoding: send the body without compression")
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.go_ahead()
        scope = asyncio.timeout(None if route.time_limit_s is None else max(route.time_limit_s - call.age_s, 0.0))
        try:
            async with scope:
                return await route.handler(call)
        except TimeoutError as error:
            if not scope.expired():
                raise
            text = "no answer in time; whether the request was carried out is not known: look, or repeat it"
            raise errors.Unsure(text) from error

    # ---- drain -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """A request counts as in flight from its first line until its last byte is out."""
        self.in_flight += 1
        self._look_for_gap()
        try:
            yield
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()

    async def wait_until_idle(self, limit_s: float) -> None:
        """Until no request is in flight, or time is up."""
        if self.in_flight and limit_s > 0:
            self._idle.clear()
            try:
                await asyncio.wait_for(self._idle.wait(), limit_s)
            except TimeoutError:
                return

    def cut(self) -> None:
        """Uploads end now, at a durable offset."""
        self.cutting.set()
        now = asyncio.get_running_loop().time()
        for scope in self._reads:
            scope.reschedule(now)

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

    # ---- frozen (safety S24) ---------------------------------------------------------------------------------------

    def _beat(self) -> None:
        self._look_for_gap()
        self._beating = asyncio.get_running_loop().call_later(_BEAT_S, self._beat)

    def _look_for_gap(self) -> None:
        """Each request looks too: a loop that is busy with requests for seconds does not stand still."""
        now = self.world.boot_ns()
        gap_s = (now - self._beaten_ns) / 1e9
        self._beaten_ns = now
        if gap_s <= GAP_LIMIT_S:
            return
        self.gaps += 1
        log.warning("this process stood still; every client connection is closed unread", gap_s=round(gap_s, 1))
        for tell in self.on_gap:
            tell(gap_s)


def whole(response: answer.Plain | web.StreamResponse) -> answer.Plain:
    """The answer as one piece. Raises TypeError for one that streams."""
    if isinstance(response, answer.Plain):
        return response
    if not isinstance(response, web.Response):
        raise TypeError("an answer that streams needs a socket")
    raw = response.body if isinstance(response.body, bytes | bytearray) else b""
    return answer.Plain(response.status, response.headers, bytes(raw))


class _Handed:
    """A request that came without a socket. Its connection breaks when a gap is found."""

    has_body: bool

    def __init__(
        self, dispatch: Dispatch, method: str, target: str, headers: Mapping[str, str], body: bytes, peer: str
    ) -> None:
        path, _, query = target.partition("?")
        self.method = method
        self.path = urllib.parse.unquote(path)
        self.query = multidict.MultiDict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        self.headers = multidict.CIMultiDict(headers)
        self.peer = peer
        self.size_bytes = len(body)
        self.has_body = bool(body)
        self.whole = body
        self._left = body
        self._dispatch = dispatch
        self._epoch = dispatch.gaps

    def gone(self) -> bool:
        return self._epoch != self._dispatch.gaps

    async def piece(self) -> bytes:
        body, self._left = self._left, b""
        return body

    direct = False

    async def fill(self, into: room.Room) -> None:
        self._left = bytes(into.take(memoryview(self._left)))

    async def go_ahead(self) -> None:
        return
