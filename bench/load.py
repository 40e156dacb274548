"""The load generator's two ends: a client that costs little, and an eye on etcd.

Everything shares the processors here, so what the load itself costs is taken from what is measured. A request is
written into a connection that stays open, and of its answer only status and body are looked at. How instances stand is
read from etcd's own watch, which costs the controllers nothing.
"""

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar, cast

import msgspec

from covey.store import base, etcd, schema

PATIENCE_S = 60.0
GONE = "gone"  # as a state: Terminated, and its node has said that nothing is left of it


T = TypeVar("T")


class Refused(Exception):
    """An answer that is no OK, or none."""


class Envelope(msgspec.Struct):
    status: str = ""
    message: str = ""
    body: object = None


_envelopes = msgspec.json.Decoder(Envelope)


class _Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[bytes] | None = None
        self._received = b""
        self._size = -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(Refused("the connection broke"))

    def ask(self, request: bytes) -> "asyncio.Future[bytes]":
        self._answer = asyncio.get_running_loop().create_future()
        self._received, self._size = b"", -1
        if self.transport is None:
            self._answer.set_exception(Refused("not connected"))
        else:
            self.transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._size < 0:
            head, mark, body = self._received.partition(b"\r\n\r\n")
            if not mark:
                return
            self._received = body
            length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
            self._size = int(length or 0)
        if len(self._received) >= self._size and self._answer is not None and not self._answer.done():
            self._answer.set_result(self._received)


class Api:
    """The two calls of a life-cycle, to the controllers in turn, straight and without retries."""

    def __init__(self, urls: list[str], template: str) -> None:
        self._places = [(host, int(port)) for host, port in (url.split("//")[1].split(":") for url in urls)]
        self._free: list[deque[_Connection]] = [deque() for _ in self._places]
        self._open: list[_Connection] = []
        self._turn = 0
        self._start = self._request("POST", msgspec.json.encode({"vmid": template, "tag": "v1"}))

    async def start(self) -> str:
        answer = await self._ask(self._start)
        assert isinstance(answer.body, list)
        return str(answer.body[0])

    async def terminate(self, id: str) -> None:
        await self._ask(self._request("DELETE", msgspec.json.encode({"id": id})))

    async def state(self, id: str) -> str:
        answer = await self._ask(b"GET /api/v1/vm?id=%s HTTP/1.1\r\nHost: bench\r\n\r\n" % id.encode())
        assert isinstance(answer.body, dict)
        return str(answer.body["instance_state"])

    def close(self) -> None:
        for one in self._open:
            if one.transport is not None:
                one.transport.close()

    def _request(self, method: str, body: bytes) -> bytes:
        head = f"{method} /api/v1/vm HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    async def _ask(self, request: bytes) -> Envelope:
        self._turn = turn = (self._turn + 1) % len(self._places)
        free = self._free[turn]
        if free:
            one = free.pop()
        else:
            _, one = await asyncio.get_running_loop().create_connection(_Connection, *self._places[turn])
            self._open.append(one)
        body: bytes = await _in_time(one.ask(request))
        answer = _envelopes.decode(body)
        free.append(one)
        if answer.status != "OK":
            raise Refused(answer.message)
        return answer


class Instance(msgspec.Struct):
    """What is read of a stored instance."""

    state: str = ""
    node: str = ""
    released: bool = False


_instances = msgspec.json.Decoder(Instance)


class Event(NamedTuple):
    """An instance reached a state, on this process's clock."""

    at: float
    state: str
    node: str


@dataclass(slots=True)
class Watcher:
    """States of instances as etcd's watch tells them."""

    lives: dict[str, dict[str, Event]] = field(default_factory=dict)  # until they are forgotten
    events: list[tuple[str, Event]] = field(default_factory=list)  # while somebody keeps them
    keeps: bool = False
    _waiting: dict[tuple[str, str], "asyncio.Future[Event]"] = field(default_factory=dict)

    async def follow(self, store: etcd.Etcd, since: int) -> None:
        prefix = schema.INSTANCES
        async for batch in store.watch(prefix, base.prefix_end(prefix), since):
            now = time.perf_counter()
            for change in batch.changes:
                id = change.key[len(prefix) :]
                if change.kv is None:
                    self.lives.pop(id, None)
                    continue
                found = _instances.decode(change.kv.value)
                ended = found.state == "Terminated" and (found.released or not found.node)
                self._tell(id, Event(now, GONE if ended else found.state, found.node))

    def _tell(self, id: str, event: Event) -> None:
        known = self.lives.setdefault(id, {})
        if event.state in known:
            return
        known[event.state] = event
        if self.keeps:
            self.events.append((id, event))
        future = self._waiting.pop((id, event.state), None)
        if future is not None and not future.done():
            future.set_result(event)

    async def until(self, id: str, state: str) -> Event:
        """When `id` reached `state`."""
        known = self.lives.get(id, {}).get(state)
        if known is not None:
            return known
        return await _in_time(self._waiting.setdefault((id, state), asyncio.get_running_loop().create_future()))


async def _in_time(future: "asyncio.Future[T]") -> T:
    """What it comes to; raises TimeoutError. Much cheaper than asyncio.timeout."""
    timer = asyncio.get_running_loop().call_later(PATIENCE_S, _give_up, future)
    try:
        return await future
    finally:
        timer.cancel()


def _give_up(future: "asyncio.Future[T]") -> None:
    if not future.done():
        future.set_exception(TimeoutError())
