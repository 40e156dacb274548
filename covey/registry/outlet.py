"""A file from the page cache to a socket, by the kernel, in steps.

asyncio's own `sendfile` asks the kernel for all that is left. A client that reads as fast as the disk delivers never
fills its socket, so such a call may go on for 2 GiB: until then the event loop stands still, which looks like a frozen
server (safety S24), and one client has everything. Here a call takes at most `_STEP_BYTES`; between two of them the
loop serves others, and the socket stays watched, so that a step is one system call.

The socket is watched under a second descriptor, because a transport lets nobody else watch its own. A transport that
is closed meanwhile, by us or by the client, is noticed at the next step, or within `_LOOK_S` where none comes.
"""

import asyncio
import os
import socket

_STEP_BYTES = 2 << 20  # as nginx: its sendfile_max_chunk
_LOOK_S = 1.0


class NoSendfile(Exception):
    """The file's file system cannot do it; nothing was sent."""


async def send(transport: asyncio.Transport, wire: socket.socket, file: int, start: int, end: int) -> None:
    """The bytes of `file` from `start` to before `end`; nothing may wait in the transport. Raises ConnectionResetError
    when not all of them went out, NoSendfile before the first."""
    if transport.is_closing():
        raise ConnectionResetError("the connection is closed")
    loop = asyncio.get_running_loop()
    descriptor = os.dup(wire.fileno())
    leaving = _Leaving(transport, descriptor, file, start, end, loop.create_future())
    loop.add_writer(descriptor, leaving.step)
    try:
        while not leaving.done.done():
            leaving.look()
            await asyncio.wait((leaving.done,), timeout=_LOOK_S)
        leaving.done.result()
    finally:
        loop.remove_writer(descriptor)
        os.close(descriptor)


class _Leaving:
    """What is still to go of one file."""

    def __init__(
        self,
        transport: asyncio.Transport,
        descriptor: int,
        file: int,
        start: int,
        end: int,
        done: asyncio.Future[None],
    ) -> None:
        self.done = done
        self._transport = transport
        self._descriptor = descriptor
        self._file = file
        self._first, self._start, self._end = start, start, end

    def look(self) -> None:
        if self._transport.is_closing():
            self._end_with(ConnectionResetError("the connection was closed"))

    def step(self) -> None:
        """The socket takes something."""
        self.look()
        if self.done.done():
            return
        try:
            sent = os.sendfile(self._descriptor, self._file, self._start, min(self._end - self._start, _STEP_BYTES))
        except BlockingIOError:
            return
        except ConnectionError as error:
            self._end_with(error)
        except OSError as error:
            started = self._start > self._first
            self._end_with(ConnectionResetError(str(error)) if started else NoSendfile(str(error)))
        else:
            self._start += sent
            if self._start == self._end:
                self._end_with(None)
            elif not sent:
                self._end_with(ConnectionResetError("the file is shorter than it was"))

    def _end_with(self, error: Exception | None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)
