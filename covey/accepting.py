"""Accepting from one socket on which several processes listen: who takes which connection.

The one of rank 0 takes what comes at once, the next what has been waiting for some milliseconds, and so on: while a
process keeps up with its connections it has them all, and what it leaves waiting spills over to the next. Transfers
that the kernel does (sendfile) are cheaper so than with every process on every processor, where a sender and its
receiver hold each other's socket up. Where the work is the process's own (TLS), all have rank 0, and whoever looks
first takes; and a process that is `busy` with such work (uploads, which are hashed) leaves new ones to the others.

Each takes one connection in a turn of its loop, or a busy one would take what an idle one could. If the first one dies
or stands still, the second takes everything some milliseconds later: nothing is decided here that lasts.
"""

import asyncio
import errno
import socket
import ssl
from collections.abc import Callable

from covey import observe

_WAIT_S = 0.003  # for each rank
_BUSY_S = 0.01  # for each piece of its own work
_PAUSE_S = 1.0  # without descriptors or memory: as asyncio does
_POOR = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

log = observe.log("http")


class Accepting:
    """start → (accepts by itself) → close."""

    def __init__(
        self,
        listener: socket.socket,
        protocol: Callable[[], asyncio.BaseProtocol],
        *,
        tls: ssl.SSLContext | None = None,
        rank: int = 0,
        busy: Callable[[], int] = lambda: 0,
    ) -> None:
        self._listener = listener
        self._protocol = protocol
        self._tls = tls
        self._rank = rank
        self._busy = busy
        self._loop = asyncio.get_running_loop()
        self._later: asyncio.TimerHandle | None = None
        self._opening: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._loop.add_reader(self._listener, self._knock)

    def close(self) -> None:
        """Accept no more; what was accepted goes on. The socket is closed too."""
        if self._later is not None:
            self._later.cancel()
        self._loop.remove_reader(self._listener)
        self._listener.close()

    def _knock(self) -> None:
        """Somebody waits."""
        if wait_s := self._rank * _WAIT_S + self._busy() * _BUSY_S:
            self._resume_in(wait_s, self._take)
        else:
            self._take()

    def _resume_in(self, wait_s: float, then: Callable[[], None]) -> None:
        """Look away for a while."""
        self._loop.remove_reader(self._listener)

        def again() -> None:
            self._later = None
            self.start()
            then()

        self._later = self._loop.call_later(wait_s, again)

    def _take(self) -> None:
        try:
            wire, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):  # another process was first
            return
        except OSError as error:
            if error.errno not in _POOR:
                raise
            log.warning("a connection cannot be accepted", error=str(error))
            self._resume_in(_PAUSE_S, lambda: None)
            return
        wire.setblocking(False)
        task = self._loop.create_task(self._open(wire))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, wire: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._protocol, wire, ssl=self._tls)
        except (OSError, ssl.SSLError) as error:  # a client that does not speak TLS, or went away
            log.debug("a connection was not made", error=str(error))
            wire.close()
