"""The body of a request straight from the socket into its reader's memory, past the HTTP parser.

    before   socket ──► bytes, made for each read ──► parser ──► bytes, copied ──► StreamReader ──► task
    within   socket ──recv_into──► the reader's room                                                (one copy)

A parser has nothing to find in a body whose length is known. What it had handed out already comes first; then the
transport gets another protocol (`set_protocol`), which takes exactly as many bytes as the body still has. With the last
one the connection is given back, with a parser that has seen nothing of it. A body that is left unread cannot be:
its connection must be closed.

The client is held up by the socket whenever nobody waits for bytes: memory is the reader's rooms, and nothing else.
"""

import asyncio
import collections
import socket
from typing import Protocol

import aiohttp
from aiohttp import web

from covey import room

LEAST_BYTES = 1 << 20  # for smaller bodies it is not worth the while
_LOW_BYTES = 1 << 18  # the kernel wakes us for this much: senders come with a sixteenth of it at a time


class Parsing(Protocol):
    """The connection as it is at other times."""

    def renew(self) -> None:
        """Look for a new request in what comes next."""
        ...

    def connection_lost(self, exc: BaseException | None) -> None: ...

    def eof_received(self) -> bool | None: ...

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...


def fits(raw: web.BaseRequest) -> bool:
    """Whether this body can come this way: a long one of known length, and in the clear."""
    plain = raw.transport is not None and raw.transport.get_extra_info("sslcontext") is None
    return plain and (raw.content_length or 0) >= LEAST_BYTES


class Inlet(asyncio.BufferedProtocol):
    """fill … fill, then `close`. Begun when the handler wants the first byte."""

    def __init__(self, raw: web.BaseRequest, connection: asyncio.Protocol, parsing: Parsing) -> None:
        if raw.transport is None:
            raise ConnectionResetError("the client has gone")
        if raw.content_length is None:
            raise ValueError("only a body of known length ends by counting")
        self._transport = raw.transport
        self._content = raw.content
        self._connection = connection
        self._parsing = parsing
        self._early: collections.deque[memoryview] = collections.deque()
        self._room: room.Room | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._lost = False
        self._low_bytes = 1
        self._take_early()
        self._left = 0 if self._content.is_eof() else raw.content_length - self._content.total_bytes
        self.open = self._left > 0  # whether the connection is ours
        if self.open:
            self._transport.pause_reading()
            self._transport.set_protocol(self)

    def _take_early(self) -> None:
        """All that the parser has: reading it makes the parser go on with what it had put off."""
        try:
            while piece := self._content.read_nowait():
                self._early.append(memoryview(piece))
        except aiohttp.ClientError as error:
            raise ConnectionResetError(str(error)) from error

    async def fill(self, into: room.Room) -> None:
        """Bytes until `into` is full or the body ends. Raises ConnectionResetError when the client has gone; also then,
        and when this is cancelled, what came before is in it."""
        while self._early and not into.full:
            if rest := into.take(self._early.popleft()):
                self._early.appendleft(rest)
        if into.full or not self._left:
            return
        if self._lost:
            raise ConnectionResetError("the client has gone")
        self._room, self._waiter = into, asyncio.get_running_loop().create_future()
        self._wake_for(self.get_buffer(-1))
        self._transport.resume_reading()
        try:
            await self._waiter
        finally:
            self._room = self._waiter = None
            if self.open:
                self._transport.pause_reading()

    def close(self) -> bool:
        """Give the connection back. False: there is more of the body, so no other request can follow on it."""
        if self.open:
            self._give_back()
            return False
        return not self._left

    def _give_back(self) -> None:
        self.open = False
        self._set_low(1)
        self._transport.set_protocol(self._connection)
        self._transport.resume_reading()

    def _wake_for(self, rest: memoryview) -> None:
        """No sooner than for a good piece of what is wanted, and no later than for all of it."""
        wanted = min(_LOW_BYTES, len(rest))
        if wanted != self._low_bytes:
            self._set_low(wanted)

    def _set_low(self, size_bytes: int) -> None:
        self._low_bytes = size_bytes
        wire: socket.socket | None = self._transport.get_extra_info("socket")
        if wire is not None and wire.fileno() >= 0:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size_bytes)

    def _wake(self, error: Exception | None = None) -> None:
        if self._waiter is None or self._waiter.done():
            return
        if error is None:
            self._waiter.set_result(None)
        else:
            self._waiter.set_exception(error)

    # ---- the transport's side --------------------------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        assert self._room is not None  # noqa: S101  reading is paused when nobody waits
        return self._room.free[: self._left]

    def buffer_updated(self, nbytes: int) -> None:
        assert self._room is not None  # noqa: S101
        self._room.size_bytes += nbytes
        self._left -= nbytes
        if not self._left:
            self._give_back()
            self._parsing.renew()
            self._content.feed_eof()
            self._wake()
        elif self._room.full:
            self._transport.pause_reading()
            self._wake()
        else:
            self._wake_for(self.get_buffer(-1))

    def eof_received(self) -> bool | None:
        return self._parsing.eof_received()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._lost, self.open = True, False
        self._parsing.connection_lost(exc)
        self._wake(ConnectionResetError("the client has gone"))

    def pause_writing(self) -> None:
        self._parsing.pause_writing()

    def resume_writing(self) -> None:
        self._parsing.resume_writing()
