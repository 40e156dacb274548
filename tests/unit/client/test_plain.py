"""HTTP over plain connections: every way in which an answer may come, or not come."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from covey import errors
from covey.client import http, plain

Answers = Callable[[bytes], list[bytes]]  # a request's head → what is written, piece by piece; b"" closes


class Server:
    """Answers each request as told, and notes the heads of those that came."""

    def __init__(self, answers: Answers) -> None:
        self.heads: list[bytes] = []
        self.connections = 0
        self._answers = answers

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]
                self.heads.append(head + await reader.readexactly(int(length or 0)))
                for piece in self._answers(head):
                    if not piece:
                        raise ConnectionError  # enough
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
        writer.close()


@contextlib.asynccontextmanager
async def serving(answers: Answers) -> AsyncIterator[tuple[Server, str, http.Sockets]]:
    server, sockets = Server(answers), http.Sockets()
    listener = await asyncio.start_server(server, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server, url, sockets
    finally:
        await sockets.close()
        listener.close()
        await listener.wait_closed()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-A: 1\r\n\r\nhi"


async def send(sockets: http.Sockets, url: str, method: str = "POST", data: bytes | None = b"{}") -> http.Reply:
    return await sockets.send(url, method, "/a?b=c", data, {"Authorization": "x y"}, 20)


async def test_a_request_as_it_is_written_and_a_connection_used_again() -> None:
    async with serving(lambda head: [OK]) as (server, url, sockets):
        for _ in range(3):
            reply = await send(sockets, url)
            assert (reply.status, reply.body, reply.headers["x-a"]) == (200, b"hi", "1")
        assert server.connections == 1
        first, *fields = server.heads[0].decode().split("\r\n")
        assert first == "POST /a?b=c HTTP/1.1" and fields[-1] == "{}"
        assert {f"Host: {url[7:]}", "Authorization: x y", "Content-Length: 2"} <= set(fields)


@pytest.mark.parametrize(
    ("pieces", "body"),
    [
        ([bytes([byte]) for byte in OK], b"hi"),
        ([b"HTTP/1.1 100 Continue\r\n\r\n", OK], b"hi"),
        ([b"HTTP/1.1 200 OK\r\n\r\nall", b" of it", b""], b"all of it"),
        ([b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi"], b"hi"),
        ([b"HTTP/1.1 204 No Content\r\n\r\n"], b""),
        ([b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\n"], b""),
        ([OK], b"hi"),
        ([b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\nContent-Length: 2\r\n\r\nhi"], b"hi"),
        ([b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi"], b"hi"),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n", b"3;x=y\r\n th\r\n0\r\n\r\n"], b"hi th"),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nA: b\r\n", b"\r\n"], b"hi"),
    ],
)
async def test_answers_in_every_shape(pieces: list[bytes], body: bytes) -> None:
    async with serving(lambda head: pieces) as (_, url, sockets):
        assert [(await send(sockets, url)).body for _ in range(2)] == [body, body]


async def test_an_answer_to_head_has_no_body() -> None:
    async with serving(lambda head: [OK[:-2]]) as (server, url, sockets):
        replies = [await send(sockets, url, "HEAD", None) for _ in range(2)]
        assert [(reply.status, reply.body) for reply in replies] == [(200, b"")] * 2
        assert server.connections == 1


@pytest.mark.parametrize(
    "pieces",
    [
        [b""],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi", b""],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n", b""],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"],
        [b"SSH-2.0-OpenSSH\r\n\r\n"],
        [b"HTTP/1.1 fine\r\n\r\n"],
        [b"x" * (1 << 17)],
    ],
)
async def test_what_is_no_whole_answer_is_lost(pieces: list[bytes]) -> None:
    async with serving(lambda head: pieces) as (_, url, sockets):
        with pytest.raises(http.Lost):
            await send(sockets, url)


async def test_a_connection_with_something_left_in_it_is_not_used_again() -> None:
    async with serving(lambda head: [OK + b"HTTP/1.1 200 OK\r\n"]) as (server, url, sockets):
        assert [(await send(sockets, url)).body for _ in range(2)] == [b"hi", b"hi"]
        assert server.connections == 2


async def test_a_head_that_came_before_says_nothing_of_the_body_that_follows() -> None:
    """Heads that were read are remembered."""
    head = OK[:-2]
    turns = iter(([head + b"hi"], [head + b"yo"], [head, b"h", b"o"], [head + b"haHTTP"], [head + b"h", b""], [OK]))
    async with serving(lambda _: next(turns)) as (server, url, sockets):
        assert [(await send(sockets, url)).body for _ in range(4)] == [b"hi", b"yo", b"ho", b"ha"]
        assert server.connections == 1
        with pytest.raises(http.Lost):
            await send(sockets, url)
        assert (await send(sockets, url)).headers["X-A"] == "1"
        assert server.connections == 3


async def test_the_only_server_is_asked_again_where_that_is_harmless() -> None:
    """Over a connection that was open already, which the server may just have closed."""
    good = b'HTTP/1.1 200 OK\r\nContent-Length: 35\r\n\r\n{"status":"OK","body":{"seq":true}}'
    turns = iter(([good], [b""], [good], [good], [b""]))
    async with serving(lambda _: next(turns)) as (server, url, sockets), http.Endpoints([url], exchange=sockets) as one:
        for _ in range(2):
            assert await one.ask("POST", "/a", dict[str, bool], {}, repeatable=True) == {"seq": True}
        assert server.connections == 2
        assert await one.ask("POST", "/a", dict[str, bool], {}) == {"seq": True}
        with pytest.raises(errors.RemoteError, match="may have been carried out"):
            await one.ask("POST", "/a", dict[str, bool], {})


async def test_an_answer_that_is_given_up_is_nobody_elses() -> None:
    def answers(head: bytes) -> list[bytes]:
        return [] if b"POST" in head else [OK]

    async with serving(answers) as (server, url, sockets):
        with pytest.raises(http.Lost, match="no answer within"):
            await sockets.send(url, "POST", "/", b"{}", {}, 0.05)
        assert (await send(sockets, url, "GET", None)).body == b"hi"
        assert server.connections == 2


async def test_nobody_there() -> None:
    async with serving(lambda head: [OK]) as (_, url, _sockets):
        pass
    sockets = http.Sockets()
    with pytest.raises(http.NotSent, match="Connection refused"):
        await send(sockets, url)
    with pytest.raises(http.NotSent, match="cannot connect"):
        await send(sockets, "http://no-such-name.invalid:1")
    await sockets.close()


@pytest.mark.parametrize(
    ("url", "path", "headers"),
    [
        ("https://a", "/", {}),
        ("http://user:password@a", "/", {}),
        ("http://a:port", "/", {}),
        ("http://a", "/with space", {}),
        ("http://a", "/ü", {}),
        ("http://a", "/", {"X": "a\r\nY: b"}),
    ],
)
def test_what_is_left_to_the_general_client(url: str, path: str, headers: dict[str, str]) -> None:
    assert not plain.Lines(1).takes(url, path, headers)
    assert plain.Lines(1).takes("http://a:80/prefix", "/b", {"X": "y"})
