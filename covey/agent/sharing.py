"""Layers for other nodes: those that are whole here, and those on their way (`passing`).

    GET, HEAD /layers/v1/<template's digest>/<layer's digest>     a range; Covey-Here tells how much of it is here
        Authorization: Covey-Ticket <ticket>                      403: not a good one for this template, or too old
        404: not here yet   503: enough others fetch already      403 also for a layer that is not of this template

Rules: a ticket is a controller's leave for one node and one template (`covey.ticket`). One made with a nonce that is
not the newest any more is good for `TICKET_S` since this node heard of the nonce, by its own clock (safety S9). A few
nodes at once are served, and all of them together get `limit_bytes_s`. Whoever fetches verifies what it gets; what is
served whole was verified here.
"""

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Protocol

from aiohttp import web

from covey import observe, ticket
from covey.agent import neighbours, passing
from covey.client import oci

TICKET_S = 2 * 3600.0  # nonces of history are hourly
ASKERS = 4
_STREAMS = 16  # of one asker
_CONNECTIONS = 96  # more than all askers need
_STUCK_S = 30.0  # for one piece: whoever reads so slowly is let go
_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{1,18})")
_log = observe.log("sharing")


class Shelf(Protocol):
    """The node's layers: `images.Cache`."""

    def layers_of(self, template: str) -> frozenset[str]:
        """Digests of all its layers, as they are here and as they travel; none: the template is not known here."""
        ...

    def whole(self, digest: str) -> Path | None:
        """Where a whole, verified layer is."""
        ...


class Sharing:
    """The server. `key`: to tickets for this node; b"": it has no session. `nonce`: the newest one known."""

    def __init__(
        self,
        shelf: Shelf,
        near: neighbours.Neighbours,
        key: Callable[[], bytes],
        nonce: Callable[[], str],
        *,
        limit_bytes_s: int = 0,
        askers: int = ASKERS,
    ) -> None:
        self._shelf = shelf
        self._near = near
        self._key = key
        self._nonce = nonce
        self._askers = askers
        self._pace = _Pace(limit_bytes_s)
        self._streams: dict[str, int] = {}
        self._runner: web.AppRunner | None = None
        self._listener: asyncio.Server | None = None
        self.sent_bytes = 0

    async def start(self, places: Sequence[tuple[str, int]]) -> None:
        """Listen at the first of these that is free. At none, this node shares nothing."""
        app = web.Application()
        app.router.add_route("GET", "/layers/v1/{template}/{digest}", self._answer, name="layer")
        app.router.add_route("HEAD", "/layers/v1/{template}/{digest}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        for host, port in places:
            try:
                self._listener = await asyncio.get_running_loop().create_server(self._connection, host, port)
            except OSError as error:
                _log.info("layers cannot be shared at this address", host=host, port=port, error=str(error))
                continue
            self._near.port = int(self._listener.sockets[0].getsockname()[1])
            return
        _log.warning("this node shares no layers with others: it can listen nowhere; see COVEY_SHARE_LISTEN")

    def _connection(self) -> asyncio.BaseProtocol:
        """For a new connection. Strangers that open many must not take the agent's file descriptors."""
        server = self._runner.server if self._runner is not None else None
        return _Full() if server is None or len(server.connections) >= _CONNECTIONS else server()

    async def stop(self) -> None:
        self._near.port = 0
        if self._listener is not None:
            self._listener.close()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        template, digest = request.match_info["template"], request.match_info["digest"]
        good = self._checked(request.headers.get("Authorization", ""), template)
        if good is None:
            return web.Response(status=403, text="a ticket for this template is needed")
        layers = self._shelf.layers_of(template)
        if layers and digest not in layers:
            return web.Response(status=403, text="the template has no such layer")
        source = self._source(digest) if layers and oci.valid_digest(digest) else None
        here = {neighbours.WRONG_HEADER: self._near.wrong.get(digest, "")}
        if source is None:
            return web.Response(status=404, text="it is not here", headers=here)
        here |= {neighbours.HERE_HEADER: str(source.here_bytes), neighbours.TRY_HEADER: source.token}
        if request.method == "HEAD":
            return web.Response(headers=here)
        span = _RANGE.fullmatch(request.headers.get("Range", ""))
        start, end = (int(span[1]), int(span[2]) + 1) if span is not None else (0, source.size_bytes)
        if not start < end <= source.size_bytes:
            return web.Response(status=416, headers={"Content-Range": f"bytes */{source.size_bytes}"})
        if not self._has_room(good.asker):
            return web.Response(status=503, headers={"Retry-After": "1"})
        self._streams[good.asker] = self._streams.get(good.asker, 0) + 1
        try:
            return await self._send(request, source, start, end, here)
        finally:
            self._streams[good.asker] -= 1
            if not self._streams[good.asker]:
                del self._streams[good.asker]

    async def _send(
        self, request: web.Request, source: "Source", start: int, end: int, here: dict[str, str]
    ) -> web.StreamResponse:
        answer = web.StreamResponse(status=206, headers=here)
        answer.headers["Content-Range"] = f"bytes {start}-{end - 1}/{source.size_bytes}"
        answer.content_length = end - start
        await answer.prepare(request)
        try:
            async with contextlib.aclosing(source.pieces(start, end)) as pieces:
                async for piece in pieces:
                    await self._pace.wait(len(piece))
                    async with asyncio.timeout(_STUCK_S):
                        await answer.write(piece)
                    self.sent_bytes += len(piece)
        except (ConnectionError, TimeoutError):  # it is gone or stuck, or what it reads turned out wrong
            if request.transport is not None:
                request.transport.abort()
        return answer

    def _source(self, digest: str) -> "Source | None":
        path = self._shelf.whole(digest)
        if path is not None:
            with contextlib.suppress(FileNotFoundError):  # evicted just now
                return _Whole(path)
        return self._near.passing.get(digest)

    # ---- who may ---------------------------------------------------------------------------------------------------

    def _checked(self, text: str, template: str) -> ticket.Ticket | None:
        scheme, _, shown = text.partition(" ")
        key = self._key()
        good = ticket.check(key, shown, template) if key and scheme == neighbours.SCHEME else None
        if good is None:
            return None
        heard_ns = self._near.heard(good.nonce)
        age_s = (self._near.clock.boot_ns() - heard_ns) / 1e9
        return good if good.nonce == self._nonce() or age_s <= TICKET_S else None

    def _has_room(self, asker: str) -> bool:
        if asker in self._streams:
            return self._streams[asker] < _STREAMS
        return len(self._streams) < self._askers


class _Full(asyncio.Protocol):
    """One connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


class Source(Protocol):
    """What is sent: a whole layer, or one on its way, whose try has a token."""

    @property
    def token(self) -> str: ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def here_bytes(self) -> int: ...

    def pieces(self, start: int, end: int) -> AsyncGenerator[bytes, None]: ...


class _Whole:
    """A verified layer. It may be evicted while it is read."""

    token = ""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.size_bytes = self.here_bytes = path.stat().st_size

    async def pieces(self, start: int, end: int) -> AsyncGenerator[bytes, None]:
        handle = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while start < end:
                piece = await asyncio.to_thread(os.pread, handle, min(passing.PIECE_BYTES, end - start), start)
                if not piece:
                    raise ConnectionResetError("the file became shorter")
                start += len(piece)
                yield piece
        finally:
            os.close(handle)


class _Pace:
    """So many bytes a second for all together; 0: as many as there are."""

    def __init__(self, bytes_s: int) -> None:
        self._bytes_s = bytes_s
        self._free_at = 0.0

    async def wait(self, size: int) -> None:
        if self._bytes_s:
            now = asyncio.get_running_loop().time()
            due, self._free_at = max(self._free_at, now), max(self._free_at, now) + size / self._bytes_s
            await asyncio.sleep(due - now)
