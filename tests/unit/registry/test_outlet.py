"""Files leave in steps: the loop goes on beside, and a connection that ends, ends the sending."""

import asyncio
import contextlib
import hashlib
import os
import random
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from covey.registry import outlet
from tests.support import registry

WAIT_S = 60.0
_LARGE = 128 << 20
CONTENT = random.Random(5).randbytes((9 << 20) + 1)


@contextlib.asynccontextmanager
async def pair() -> AsyncIterator[tuple[asyncio.Transport, socket.socket]]:
    """A transport, and the socket at its other end, which nobody reads by itself."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    transport, _ = await asyncio.get_running_loop().connect_accepted_socket(asyncio.Protocol, ours)
    try:
        yield transport, theirs
    finally:
        transport.abort()
        theirs.close()
        await asyncio.sleep(0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "file"
    made.write_bytes(CONTENT)
    return made


def sending(transport: asyncio.Transport, file: int, start: int, end: int) -> "asyncio.Task[None]":
    return asyncio.create_task(outlet.send(transport, transport.get_extra_info("socket"), file, start, end))


@pytest.mark.parametrize(("start", "end"), [(0, len(CONTENT)), (0, 1), (3_000_001, len(CONTENT) - 7)])
async def test_every_byte_goes_out(path: Path, start: int, end: int) -> None:
    async with pair() as (transport, theirs), asyncio.timeout(WAIT_S):
        with path.open("rb") as file:
            task = sending(transport, file.fileno(), start, end)
            found = bytearray()
            while len(found) < end - start:
                found += await asyncio.get_running_loop().sock_recv(theirs, 1 << 20)
            await task
    assert found == CONTENT[start:end]


async def test_a_reader_as_fast_as_the_disk_does_not_hold_the_loop(tmp_path: Path) -> None:
    """A socket that blocks stands for one that is never full: a call sends all that it was asked to."""
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(_LARGE)
    async with pair() as (transport, theirs), asyncio.timeout(WAIT_S):
        theirs.setblocking(True)
        os.set_blocking(transport.get_extra_info("socket").fileno(), True)
        reading = asyncio.create_task(asyncio.to_thread(_read_all, theirs))
        with large.open("rb") as file:
            task = sending(transport, file.fileno(), 0, _LARGE)
            turns = 0
            while not task.done():
                await asyncio.sleep(0)
                turns += 1
        assert await reading == _LARGE
    assert turns >= 64  # one for each step


def _read_all(wire: socket.socket) -> int:
    room, size = bytearray(1 << 20), 0
    while size < _LARGE and (more := wire.recv_into(room)):
        size += more
    return size


@pytest.mark.parametrize("who", ["we", "they"])
async def test_a_connection_that_ends_while_nobody_reads_ends_the_sending(path: Path, who: str) -> None:
    async with pair() as (transport, theirs), asyncio.timeout(WAIT_S):
        with path.open("rb") as file:
            task = sending(transport, file.fileno(), 0, len(CONTENT))
            await asyncio.get_running_loop().sock_recv(theirs, 1)  # it has begun
            if who == "we":
                transport.abort()
            else:
                theirs.close()
            with pytest.raises(ConnectionError):
                await task


async def test_a_cancelled_one_leaves_nothing(path: Path) -> None:
    async with pair() as (transport, theirs), asyncio.timeout(WAIT_S):
        with path.open("rb") as file:
            task = sending(transport, file.fileno(), 0, len(CONTENT))
            await asyncio.get_running_loop().sock_recv(theirs, 1)
            before = len(os.listdir("/proc/self/fd"))
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            assert len(os.listdir("/proc/self/fd")) == before - 1


async def test_a_blob_that_became_shorter_breaks_the_answer(tmp_path: Path) -> None:
    """Its length was told already: what is missing must not be taken from an answer that follows."""
    async with registry.serving(tmp_path) as server:
        digest = await server.push_blob("a", CONTENT)
        async with aiohttp.ClientSession() as session:
            answer = await session.get(f"{server.url}/v2/a/blobs/{digest}")
            await answer.content.readexactly(1)  # the head is out, and the socket is full
            (stored,) = (tmp_path / "blobs" / "sha256").glob(f"*/{digest.removeprefix('sha256:')}")
            stored.chmod(0o600)
            os.truncate(stored, 1 << 20)
            with pytest.raises(aiohttp.ClientError):
                await asyncio.wait_for(answer.content.read(), WAIT_S)
            answer.close()


async def test_a_blob_comes_whole_on_a_connection_used_again(tmp_path: Path) -> None:
    async with registry.serving(tmp_path) as server:
        digest = await server.push_blob("a", CONTENT)
        for _ in range(3):
            status, _, content = await server.call("GET", f"/v2/a/blobs/{digest}")
            assert (status, hashlib.sha256(content).hexdigest()) == (200, digest.removeprefix("sha256:"))
            assert (await server.call("GET", "/v2/"))[0] == 200
