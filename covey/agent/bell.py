"""What one task waits for, with a limit: as asyncio.Event and asyncio.timeout together, for a fraction of their price.

A node's tasks wait and are woken several times for each VM, and a process may play hundreds of nodes.
"""

import asyncio
from typing import Any


async def end_of(task: asyncio.Future[Any]) -> None:
    """As `asyncio.wait` for one: it may end however it likes, and goes on when whoever waits is cancelled."""
    if task.done():
        return
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def ring(_: object) -> None:
        if not ended.done():
            ended.set_result(None)

    task.add_done_callback(ring)
    await ended


class Bell:
    """Rung by anybody, waited for by one task at a time."""

    __slots__ = ("_rung", "_waiting")

    def __init__(self) -> None:
        self._rung = False
        self._waiting: asyncio.Future[None] | None = None

    @property
    def rung(self) -> bool:
        """Since it was last cleared."""
        return self._rung

    def ring(self) -> None:
        self._rung = True
        self._end()

    def clear(self) -> None:
        self._rung = False

    async def wait(self, limit_s: float | None = None) -> None:
        """Until it is rung, which it may be already, or `limit_s` have passed."""
        if self._rung:
            return
        loop = asyncio.get_running_loop()
        self._waiting = mine = loop.create_future()
        timer = None if limit_s is None else loop.call_later(max(limit_s, 0.0), self._end)
        try:
            await mine
        finally:
            self._waiting = None
            if timer is not None:
                timer.cancel()

    def _end(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
