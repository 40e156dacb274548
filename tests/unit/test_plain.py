"""Small requests past the general parser: what is taken, what is left to it, and that both ways answer the same."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator

import pytest

from covey import answer, plain, serve, server, world

HEAD = b"POST /api/v1/vm?id=a&force= HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n"
LARGE = "x" * 3_000_000


class Line:
    peer = "10.0.0.9"

    def gone(self) -> bool:
        return False


def test_a_whole_plain_request_is_taken() -> None:
    found = plain.parse(HEAD + b"Authorization:  Covey a.1.b \r\n\r\n{}", Line())
    assert isinstance(found, plain.Request)
    assert (found.method, found.path, dict(found.query)) == ("POST", "/api/v1/vm", {"id": "a", "force": ""})
    assert (found.headers["authorization"], found.whole, found.peer) == ("Covey a.1.b", b"{}", "10.0.0.9")
    assert isinstance(
        plain.parse(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Keep-Alive\r\n\r\n", Line()), plain.Request
    )


@pytest.mark.parametrize("there", [b"", b"{"])
def test_a_body_that_is_not_all_there_is_waited_for(there: bytes) -> None:
    assert plain.parse(HEAD + b"\r\n" + there, Line()) is plain.More.TO_COME


@pytest.mark.parametrize(
    "data",
    [
        HEAD,  # the head is not all there
        HEAD + b"\r\n{}G",  # something follows
        HEAD + b"Content-Length: 2\r\n\r\n{}",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n{}",
        HEAD + b"transfer-encoding : chunked\r\n\r\n{}",
        HEAD + b" folded\r\n\r\n{}",
        HEAD + b"Expect: 100-continue\r\n\r\n{}",
        HEAD + b"Upgrade: h2c\r\n\r\n{}",
        HEAD + b"Connection: close\r\n\r\n{}",
        HEAD + b"Connection: keep-alive, Upgrade\r\n\r\n{}",
        HEAD + b"X: caf\xc3\xa9\r\n\r\n{}",
        HEAD + b"X: a\nY: b\r\n\r\n{}",
        HEAD + b"X: a\0\r\n\r\n{}",
        HEAD + b"X: " + b"a" * 9000 + b"\r\n\r\n{}",
        b"POST /a HTTP/1.1\r\nContent-Length: +2\r\n\r\n{}",
        b"POST /a HTTP/1.1\r\nContent-Length: 2, 2\r\n\r\n{}",
        b"POST /a HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n{}",
        b"GET /a HTTP/1.0\r\n\r\n",
        b"GET /a%20b HTTP/1.1\r\n\r\n",
        b"GET /a/../b HTTP/1.1\r\n\r\n",
        b"GET /a?b=%20 HTTP/1.1\r\n\r\n",
        b"GET http://x/a HTTP/1.1\r\n\r\n",
        b"HEAD /a HTTP/1.1\r\n\r\n",
        b"GET /a HTTP/1.1\n\n",
        b" GET /a HTTP/1.1\r\n\r\n",
        b"garbage",
    ],
)
def test_everything_else_is_left_to_the_general_parser(data: bytes) -> None:
    assert plain.parse(data, Line()) is None


def test_a_header_of_an_answer_cannot_begin_another() -> None:
    with pytest.raises(ValueError, match="not printable"):
        plain.render(answer.Plain(200, {"X": "a\r\nY: b"}, b""), 0, last=False)


# ---- over a socket -----------------------------------------------------------------------------------------------


class Numbers:
    """Answers what it was given, in the order in which it was asked; `gate` holds it up."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.begun = 0

    async def echo(self, call: serve.Call) -> object:
        self.begun += 1
        body = await call.read()
        await self.gate.wait()
        return [call.query.get("n"), body.decode()]

    async def large(self, _call: serve.Call) -> object:
        return LARGE


@contextlib.asynccontextmanager
async def running(numbers: Numbers, *, streams: bool) -> AsyncIterator[server.Server]:
    routes = [serve.Route("POST", "/echo", numbers.echo), serve.Route("GET", "/large", numbers.large)]
    one = server.Server(routes, world=world.System(), streams=streams)
    await one.start("127.0.0.1", 0)
    try:
        yield one
    finally:
        numbers.gate.set()
        await one.drain(5)


def post(number: int, body: str, *headers: str) -> bytes:
    lines = (f"POST /echo?n={number} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers)
    return "\r\n".join((*lines, "", body)).encode()


async def read(reader: asyncio.StreamReader) -> tuple[bytes, object]:
    """Head and what the body holds."""
    async with asyncio.timeout(30):
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return head, json.loads(await reader.readexactly(size))["body"]


@pytest.mark.parametrize("streams", [True, False], ids=["streams", "plain"])
async def test_requests_are_answered_in_their_order_however_they_are_cut(streams: bool) -> None:
    """Pieces of any size, several at once, plain and not plain on one connection."""
    numbers = Numbers()
    async with running(numbers, streams=streams) as one:
        reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
        asked = [(number, "b" * (number * 37 % 90)) for number in range(40)]
        whole = b"".join(post(n, body, *(["X-Odd: é"] if n > 30 and n % 3 == 0 else [])) for n, body in asked)
        cut = [0, 10, 150, 151, 152, 400, 1000, 1001, len(whole) - 3, len(whole)]
        for start, end in itertools.pairwise(cut):
            writer.write(whole[start:end])
            await writer.drain()
            await asyncio.sleep(0.01)
        for number, body in asked:
            assert (await read(reader))[1] == [str(number), body]
        writer.close()
        await writer.wait_closed()


async def test_a_request_behind_another_waits_for_its_answer() -> None:
    numbers = Numbers()
    async with running(numbers, streams=False) as one:
        reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
        numbers.gate.clear()
        writer.write(post(1, "a"))
        while not numbers.begun:
            await asyncio.sleep(0.005)
        writer.write(post(2, "b")[:-1])
        await asyncio.sleep(0.02)
        assert numbers.begun == 1
        numbers.gate.set()
        assert (await read(reader))[1] == ["1", "a"]
        writer.write(b"b")
        assert (await read(reader))[1] == ["2", "b"]
        writer.close()
        await writer.wait_closed()


async def test_large_answers_and_answers_of_a_server_that_goes_down() -> None:
    numbers = Numbers()
    async with running(numbers, streams=False) as one:
        reader, writer = await asyncio.open_connection("127.0.0.1", one.port, limit=8 << 20)
        writer.write(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await read(reader))[1] == LARGE
        numbers.gate.clear()
        writer.write(post(1, "a"))
        while not numbers.begun:
            await asyncio.sleep(0.005)
        draining = asyncio.create_task(one.drain(30))
        await asyncio.sleep(0.01)
        numbers.gate.set()
        head, body = await read(reader)
        assert (b"Connection: close" in head, body) == (True, ["1", "a"])
        assert await reader.read() == b""
        assert await draining == 0
        writer.close()


async def test_who_goes_away_before_the_answer_breaks_nothing() -> None:
    numbers = Numbers()
    async with running(numbers, streams=False) as one:
        _, writer = await asyncio.open_connection("127.0.0.1", one.port)
        numbers.gate.clear()
        writer.write(post(1, "a"))
        while not numbers.begun:
            await asyncio.sleep(0.005)
        writer.transport.abort()
        while one.open:
            await asyncio.sleep(0.005)
        numbers.gate.set()
        assert await one.drain(30) == 0
