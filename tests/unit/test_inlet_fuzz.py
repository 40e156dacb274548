"""Connections as a hostile client or a careless proxy uses them: bodies of every kind behind each other, cut anywhere.

What comes out must not depend on the way a body took: the same requests, in pieces of any size, are answered in their
order with the hash of what was sent, whether the parser had the body or `covey.inlet`. And no byte of a body is ever
taken for a request: each body holds one.
"""

import asyncio
import hashlib
import os
import random
from collections.abc import Sequence
from typing import NamedTuple

import pytest

from covey import inlet
from tests.unit import test_inlet

SEEDS = range(int(os.environ.get("COVEY_TEST_SEED", "1")), int(os.environ.get("COVEY_TEST_SEED", "1")) + 12)
MORE = int(os.environ.get("COVEY_TEST_HISTORIES", "0"))  # seeds beyond those
HIDDEN = b"\r\n\r\nPOST /all HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\n\r\nhidden"
POOL = random.Random(3).randbytes(1 << 16)

house = test_inlet.house


class Sent(NamedTuple):
    """One request: the bytes of it, and its body."""

    raw: bytes
    body: bytes
    waits: bool = False  # for 100 Continue, before its body


def made(chance: random.Random) -> Sent:
    size = chance.choice((0, 5, 70_000, inlet.LEAST_BYTES - 1, inlet.LEAST_BYTES, inlet.LEAST_BYTES + 1, 1_700_000))
    body = (HIDDEN + POOL * (size // len(POOL) + 1))[:size]
    kind = chance.choice(("length", "length", "length", "chunked", "waits"))
    if kind == "chunked":
        head = b"POST /all HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunks, start = bytearray(), 0
        while start < size:
            piece = body[start : start + chance.choice((1, 65_536, 1_048_577))]
            chunks += b"%x\r\n%s\r\n" % (len(piece), piece)
            start += len(piece)
        return Sent(head + bytes(chunks) + b"0\r\n\r\n", body)
    more = "Expect: 100-continue\r\n" if kind == "waits" and size else ""
    head = f"POST /all HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n{more}\r\n".encode()
    return Sent(head + body, body, bool(more))


async def trickle(writer: asyncio.StreamWriter, raw: bytes, chance: random.Random) -> None:
    """Send it in pieces whose edges nobody can foresee."""
    start = 0
    while start < len(raw):
        end = start + chance.choice((1, 17, 4096, 65_536, 262_144, 1 << 20, 1 << 22))
        writer.write(raw[start:end])
        await writer.drain()
        if chance.random() < 0.3:
            await asyncio.sleep(0)
        start = end


@pytest.mark.parametrize("seed", [*SEEDS, *range(1000, 1000 + MORE)])
async def test_every_body_is_itself_and_nothing_of_it_a_request(house: test_inlet.House, seed: int) -> None:
    chance = random.Random(seed)
    requests = [made(chance) for _ in range(6)]
    reader, writer = await house.connect()
    sending = asyncio.create_task(_send(writer, requests, chance))
    for number, request in enumerate(requests):
        found, body = await _answer(reader)
        assert found.startswith(b"http/1.1 200"), (seed, number, found)
        assert hashlib.sha256(request.body).hexdigest().encode() in body, (seed, number)
    await sending
    await test_inlet.closed(writer)


async def _send(writer: asyncio.StreamWriter, requests: Sequence[Sent], chance: random.Random) -> None:
    """All behind each other, as fast as the server takes them: it answers while more comes."""
    for request in requests:
        await trickle(writer, request.raw, chance)


async def _answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """The next final answer."""
    async with asyncio.timeout(test_inlet.WAIT_S):
        found = await reader.readuntil(b"\r\n\r\n")
        while found.startswith(b"HTTP/1.1 100"):
            found = await reader.readuntil(b"\r\n\r\n")
        (length,) = (int(line[15:]) for line in found.split(b"\r\n") if line.lower().startswith(b"content-length:"))
        return found.lower(), await reader.readexactly(length)


BIG = b"Content-Length: 2000000\r\n"


@pytest.mark.parametrize(
    "headers",
    [
        BIG + b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\n" + BIG,
        BIG + b"Transfer-Encoding: identity, chunked\r\n",
        BIG + b"Content-Length: 5\r\n",
        b"Content-Length: 2000000, 2000000\r\n",
        b"Content-Length: +2000000\r\n",
        b"Content-Length: 0x1e8480\r\n",
        b"Content-Length : 2000000\r\n",
        b"Content-Length: 2_000_000\r\n",
        b"Content-Length: -1\r\n",
        BIG + b"Transfer-Encoding : chunked\r\n",
        BIG + b" folded: chunked\r\n",
    ],
)
async def test_a_length_that_two_readers_may_read_differently_ends_the_connection(
    house: test_inlet.House, headers: bytes
) -> None:
    """Whatever follows is not looked at: one answer at most, and none of it a success."""
    reader, writer = await house.connect()
    writer.write(b"POST /all HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n0\r\n\r\n" + HIDDEN * 3)
    async with asyncio.timeout(test_inlet.WAIT_S):
        found = await reader.read()
    assert not found or b" 400 " in found.split(b"\r\n")[0], found
    assert found.count(b"HTTP/1.") <= 1
    await test_inlet.closed(writer)


@pytest.mark.parametrize("rest", [0, 1, 100_000])
async def test_a_body_left_unread_hides_no_request(house: test_inlet.House, rest: int) -> None:
    """The handler has had enough; what follows on the connection, in the body or behind it, is not carried out."""
    size = 2_000_000
    reader, writer = await house.connect()
    body = (HIDDEN * (size // len(HIDDEN) + 1))[:size]
    writer.write(test_inlet.head("/some", size) + body[: size - rest])
    if rest == 0:
        writer.write(HIDDEN)
    async with asyncio.timeout(test_inlet.WAIT_S):
        found = await reader.read()
    assert found.count(b"HTTP/1.") == 1 and b"onnection: close" in found
    assert house.taken == b""  # `/all` was never asked
    await test_inlet.closed(writer)
