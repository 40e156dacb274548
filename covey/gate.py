"""How much work a server takes on at once, and who gets in next when there is more.

    request ──► its lane ──► room? ──► in
                              │ no     ▲ by turns: one of each client that waits
                              ▼        │
                          its client's queue ──► 503 with Retry-After: queue full, or waited too long

Everything a request costs is bounded here, before it is spent: requests at work, requests that wait, and the bytes of
their bodies. What is refused was not begun: nothing was done.

* *Lanes* share nothing. Agents have one of their own, so that a flood of API requests makes no node fall silent, and a
  fleet that comes back all at once locks out no person. Probes are in none: who asks for health must not queue.
* *Clients* within a lane get in by turns, and none fills more than its share of a lane: whoever sends a thousand
  requests at once waits behind itself. When all places to wait are taken, a client with fewer waiting takes the place
  of the youngest request of the one with most.
* A refusal is cheap but not free: a client that comes back at once would use up the processor with refusals. So it is
  told after a moment, a different one each time, lest they all come back together.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from covey import answer

_MIB = 1 << 20
_PAUSED_LIMIT = 4096  # beyond that many, refusals are told at once
_SPREAD = 17  # so many different moments, from half of the pause to one and a half


class Lane(StrEnum):
    """Who shares room with whom."""

    OPEN = "open"  # probes, and streams that a program bounds by itself: not counted
    PEOPLE = "people"
    AGENTS = "agents"


class Limits(NamedTuple):
    """Of one lane. A client may have half of `at_once` and of `body_bytes`, one at least."""

    at_once: int = 256
    waiting: int = 1024
    wait_s: float = 3.0
    pause_s: float = 1.0  # before a refusal is told, on average
    body_bytes: int = 64 * _MIB


@dataclass(slots=True)
class _Client:
    inside: int = 0
    body_bytes: int = 0
    queue: deque[asyncio.Future[bool]] = field(default_factory=deque)


class Ticket:
    """Leave to be at work. `hold` counts bytes of a body that are kept until the end of the request."""

    def __init__(self, lane: "_Lane", client: str) -> None:
        self._lane = lane
        self._client = client
        self._held_bytes = 0

    def hold(self, size_bytes: int) -> None:
        """Raises Fault 503 when bodies take too much memory already."""
        self._lane.hold(self._client, size_bytes)
        self._held_bytes += size_bytes

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """While it only waits for news it takes nobody's place; afterwards it goes on at once."""
        self._lane.leave(self._client)
        try:
            yield
        finally:
            self._lane.come_back(self._client)

    def end(self) -> None:
        self._lane.release(self._client, self._held_bytes)
        self._lane.leave(self._client)


class Gate:
    """One lane for each of `limits`. A lane without any is open."""

    def __init__(self, limits: Mapping[Lane, Limits]) -> None:
        self._lanes = {lane: _Lane(given) for lane, given in limits.items()}
        self._paused = 0
        self._refused = 0

    async def enter(self, lane: Lane, client: str) -> Ticket | None:
        """Leave, to be given back by `end`; None in an open lane. Raises Fault 503 when there is no room in time:
        nothing was done."""
        room = self._lanes.get(lane)
        if room is None:
            return None
        if not await room.enter(client):
            await self._pause(room.pause_s)
            raise _busy("this server has too much to do and nothing was done; try again")
        return Ticket(room, client)

    async def _pause(self, pause_s: float) -> None:
        if self._paused < _PAUSED_LIMIT:
            self._paused += 1
            self._refused += 1
            pause_s *= 0.5 + (self._refused % _SPREAD) / (_SPREAD - 1)
            try:
                await asyncio.sleep(pause_s)
            finally:
                self._paused -= 1


class _Lane:
    """`_turns` holds the clients that have somebody waiting, the next one first."""

    def __init__(self, limits: Limits) -> None:
        self.pause_s = limits.pause_s
        self._limits = limits
        self._share = max(limits.at_once // 2, 1)
        self._clients: dict[str, _Client] = {}
        self._turns: deque[str] = deque()
        self._inside = 0
        self._waiting = 0
        self._body_bytes = 0

    async def enter(self, name: str) -> bool:
        """Whether there was room in time. Who has room enters at once: nobody who may enter is kept waiting."""
        client = self._clients.setdefault(name, _Client())
        if self._inside < self._limits.at_once and client.inside < self._share:
            self._inside += 1
            client.inside += 1
            return True
        if not self._place_to_wait(client):
            self._forget_if_idle(name)
            return False
        mine: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        client.queue.append(mine)
        self._waiting += 1
        if len(client.queue) == 1:
            self._turns.append(name)
        try:
            async with asyncio.timeout(self._limits.wait_s):
                return await mine
        except TimeoutError:
            return self._stop_waiting(name, mine)
        except asyncio.CancelledError:
            if self._stop_waiting(name, mine):
                self.leave(name)
            raise

    def leave(self, name: str) -> None:
        self._inside -= 1
        self._clients[name].inside -= 1
        self._forget_if_idle(name)
        self._admit()

    def come_back(self, name: str) -> None:
        self._inside += 1
        self._clients.setdefault(name, _Client()).inside += 1

    def hold(self, name: str, size_bytes: int) -> None:
        client = self._clients[name]
        if (
            self._body_bytes + size_bytes > self._limits.body_bytes
            or client.body_bytes + size_bytes > self._limits.body_bytes // 2
        ):
            raise _busy("this server holds too many large requests and nothing was done; try again")
        self._body_bytes += size_bytes
        client.body_bytes += size_bytes

    def release(self, name: str, size_bytes: int) -> None:
        self._body_bytes -= size_bytes
        self._clients[name].body_bytes -= size_bytes

    def _admit(self) -> None:
        """Let in one of each client in turn while there is room."""
        skipped = 0
        while self._turns and skipped < len(self._turns) and self._inside < self._limits.at_once:
            name = self._turns.popleft()
            client = self._clients[name]
            if client.inside >= self._share:
                self._turns.append(name)
                skipped += 1
                continue
            skipped = 0
            first = client.queue.popleft()
            self._waiting -= 1
            if client.queue:
                self._turns.append(name)
            if first.done():  # it has just given up
                self._forget_if_idle(name)
                continue
            first.set_result(True)
            self._inside += 1
            client.inside += 1

    def _place_to_wait(self, client: _Client) -> bool:
        """Whether one more of `client` may wait, perhaps in the place of somebody else's youngest."""
        if self._waiting < self._limits.waiting:
            return True
        if not self._turns or (len(client.queue) + 1) * len(self._turns) > self._waiting:
            return False  # it has its fair part of the places already
        longest = max(self._turns, key=lambda name: len(self._clients[name].queue))
        if len(self._clients[longest].queue) <= len(client.queue) + 1:
            return False
        youngest = self._clients[longest].queue[-1]
        self._remove(longest, youngest)
        if not youngest.done():
            youngest.set_result(False)
        return True

    def _stop_waiting(self, name: str, mine: asyncio.Future[bool]) -> bool:
        """True when it had been let in at this very moment."""
        if mine.done() and not mine.cancelled():
            return mine.result()
        if name in self._clients and mine in self._clients[name].queue:
            self._remove(name, mine)
        return False

    def _remove(self, name: str, waiting: asyncio.Future[bool]) -> None:
        queue = self._clients[name].queue
        queue.remove(waiting)
        self._waiting -= 1
        if not queue:
            self._turns.remove(name)
            self._forget_if_idle(name)

    def _forget_if_idle(self, name: str) -> None:
        client = self._clients[name]
        if not client.inside and not client.queue and not client.body_bytes:
            del self._clients[name]


def _busy(text: str) -> answer.Fault:
    return answer.Fault(503, text, code="UNAVAILABLE", headers={"Retry-After": "1"})
