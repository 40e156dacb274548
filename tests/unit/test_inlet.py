"""Bodies straight from the socket into the reader's memory: every byte, and the connection afterwards."""

import asyncio
import contextlib
import hashlib
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from covey import inlet, room, serve, server, world

CONTENT = random.Random(7).randbytes((3 << 20) + 17)
WAIT_S = 60.0


class House:
    """A server that takes bodies; `taken` is what came of the last one."""

    def __init__(self) -> None:
        self.taken = bytearray()
        self.direct = False
        self.failed = asyncio.Event()
        limits: dict[str, Any] = {"body_limit_bytes": 1 << 30, "time_limit_s": None}
        routes = [serve.Route("POST", "/all", self._all, **limits), serve.Route("POST", "/some", self._some, **limits)]
        self.server = server.Server(routes, world=world.System(), read_ahead_bytes=serve.MIB)

    async def _all(self, call: serve.Call) -> str:
        self.taken.clear()
        self.direct = call.request.direct
        if call.request.size_bytes is None:
            async for chunk in call.chunks():
                self.taken += chunk
            return hashlib.sha256(self.taken).hexdigest()
        into = room.Room(300_001)
        full = True
        try:
            while full:
                into.clear()
                try:
                    await call.fill(into)
                finally:
                    self.taken += into.filled
                full = into.full
        except ConnectionError:
            self.failed.set()
            raise
        return hashlib.sha256(self.taken).hexdigest()

    async def _some(self, call: serve.Call) -> str:
        await call.fill(room.Room(1000))
        return "enough"

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.server.port)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    made = House()
    await made.server.start("127.0.0.1", 0)
    yield made
    await made.server.drain(0.2)


def head(path: str, size_bytes: int) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {size_bytes}\r\n\r\n".encode()


async def answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """The next one on a connection: its head and its body."""
    async with asyncio.timeout(WAIT_S):
        found = await reader.readuntil(b"\r\n\r\n")
        (length,) = (int(line[15:]) for line in found.split(b"\r\n") if line.lower().startswith(b"content-length:"))
        return found.lower(), await reader.readexactly(length)


async def closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@pytest.mark.parametrize("first", [0, 1, 70_000, len(CONTENT) - 1, len(CONTENT)], ids="{}_bytes_with_the_head".format)
async def test_every_byte_arrives_and_the_next_requests_follow(house: House, first: int) -> None:
    reader, writer = await house.connect()
    for _ in range(2):  # the second one meets what the first one has left of the connection
        writer.write(head("/all", len(CONTENT)) + CONTENT[:first])
        await writer.drain()
        await asyncio.sleep(0)
        writer.write(CONTENT[first:] + head("/all", 5) + b"small")  # the small one waits right behind
        found, body = await answer(reader)
        assert found.startswith(b"http/1.1 200")
        assert b"connection: close" not in found
        assert hashlib.sha256(CONTENT).hexdigest().encode() in body
        found, body = await answer(reader)
        assert hashlib.sha256(b"small").hexdigest().encode() in body
    await closed(writer)


async def test_only_long_bodies_come_this_way(house: House) -> None:
    reader, writer = await house.connect()
    for size, direct in ((inlet.LEAST_BYTES - 1, False), (inlet.LEAST_BYTES, True)):
        writer.write(head("/all", size) + bytes(size))
        await answer(reader)
        assert (house.direct, len(house.taken)) == (direct, size)
    await closed(writer)


async def test_what_came_before_the_client_went_is_kept(house: House) -> None:
    _, writer = await house.connect()
    writer.write(head("/all", len(CONTENT)) + CONTENT[:2_000_000])
    await writer.drain()
    await closed(writer)
    async with asyncio.timeout(WAIT_S):
        await house.failed.wait()
    assert bytes(house.taken) == CONTENT[:2_000_000]


async def test_a_body_left_unread_ends_its_connection(house: House) -> None:
    reader, writer = await house.connect()
    writer.write(head("/some", len(CONTENT)) + CONTENT[:100_000])
    found, _ = await answer(reader)
    assert b"connection: close" in found
    writer.write(head("/all", 5) + b"small")  # it would be read as a part of that body
    async with asyncio.timeout(WAIT_S):
        assert await reader.read() == b""
    await closed(writer)
