"""The network between programs: delay, lost requests, lost replies, cuts in one direction or both, refused connections.

What travels belongs to the world, not to the sender: a request that has left arrives although its sender was killed,
and a server works on although nobody waits for it. A dead server refuses connections and breaks those that are open; a
frozen one is silent, and closes what came meanwhile unread when it wakes (that is `dispatch`'s doing, not ours).
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from covey import dispatch, server
from covey.client import http
from tests.sim import clockwork

_CONNECT_S = 2.0
_FOR_EVER_S = 3600.0
_LATE_S = 15.0


@dataclass
class Door:
    """What answers at one URL now."""

    process: clockwork.Process
    host: str
    hand: Callable[[str, str, Mapping[str, str], bytes, str], Awaitable[dispatch.Reply]]


class Net:
    """All hosts and who can reach whom. Hosts are named; URLs are ``http://<host>``."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self.doors: dict[str, Door] = {}  # url -> who listens
        self.cuts: set[tuple[str, str]] = set()  # (from, to): nothing passes that way
        self.loss = 0.0  # of messages, each way
        self.lateness = 0.0  # of agents' messages: they come when nobody waits for an answer any more
        self.slowness_s = 0.004

    def exchange(self, host: str) -> "Wire":
        """The `http.Exchange` of a program on `host`."""
        return Wire(self, host)

    def listen(self, host: str, process: clockwork.Process, program: server.Server) -> None:
        url = f"http://{host}"
        self.doors[url] = Door(process, host, program.hand)

    def cut(self, one: str, other: str) -> None:
        """Nothing passes from `one` to `other` any more."""
        self.cuts.add((one, other))

    def heal(self) -> None:
        self.cuts.clear()
        self.loss = self.lateness = 0.0

    async def carry(self, parcel: "Parcel") -> http.Reply:
        """A request to its server and the answer back."""
        door = self.doors.get(parcel.url)
        await self._travel()
        if door is not None and (parcel.host, door.host) in self.cuts:
            await self._vanish(new_connection=self._chance.random() < 0.5)
        if door is None or door.process.dead:
            raise http.NotSent(f"{parcel.url}: cannot connect (connection refused)")
        if self._chance.random() < self.loss:
            await self._vanish(new_connection=False)
        if parcel.path.startswith("/agent/") and self._chance.random() < self.lateness:
            clockwork.depart(self._come_late(parcel))
            await self._vanish(new_connection=False)
        answering = door.process.spawn(_answered(door, parcel))
        ended = clockwork.depart(_ended(door.process))
        await asyncio.wait((answering, ended), return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if not answering.done():
            raise http.Lost(f"{parcel.url}: the connection was reset")
        try:
            reply = answering.result()
        except ConnectionError as error:
            raise http.Lost(f"{parcel.url}: {error}") from error
        await self._travel()
        if (door.host, parcel.host) in self.cuts or self._chance.random() < self.loss:
            await self._vanish(new_connection=False)
        return reply

    async def _come_late(self, parcel: "Parcel") -> None:
        await asyncio.sleep(self._chance.uniform(0.1, _LATE_S))
        door = self.doors.get(parcel.url)
        if door is not None and not door.process.dead:
            door.process.spawn(_answered(door, parcel)).add_done_callback(_forget)

    async def _vanish(self, *, new_connection: bool) -> None:
        """Nothing comes back. A connection that is just being opened gives up by itself."""
        if new_connection:
            await asyncio.sleep(_CONNECT_S)
            raise http.NotSent("cannot connect (time ran out)")
        await asyncio.sleep(self._chance.choice((0.1, _FOR_EVER_S)))  # reset by somebody on the way, or silence
        raise http.Lost("the connection broke")

    async def _travel(self) -> None:
        await asyncio.sleep(self._chance.uniform(0.0002, self.slowness_s))


async def _answered(door: Door, parcel: "Parcel") -> http.Reply:
    reply = await door.hand(parcel.method, parcel.path, parcel.headers, parcel.data or b"", parcel.host)
    return http.Reply(reply.status, reply.headers, reply.body)


def _forget(task: "asyncio.Task[http.Reply]") -> None:
    """Nobody waits for the answer."""
    if not task.cancelled():
        task.exception()


async def _ended(process: clockwork.Process) -> None:
    await process.ended.wait()


@dataclass
class Parcel:
    """A request on its way."""

    host: str
    url: str
    method: str
    path: str
    data: bytes | None
    headers: Mapping[str, str]


class Wire:
    """A program's way to the network; an `http.Exchange`."""

    def __init__(self, net: Net, host: str) -> None:
        self._net = net
        self._host = host

    async def send(
        self, url: str, method: str, path: str, data: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> http.Reply:
        parcel = Parcel(self._host, url, method, path, data, headers)
        try:
            async with asyncio.timeout(timeout_s):
                return await clockwork.outside(self._net.carry(parcel))
        except TimeoutError as error:
            raise http.Lost(f"{url}: no answer within {timeout_s:g} s") from error

    async def close(self) -> None:
        """There are no connections."""
