"""The shared HTTP server over real sockets: the envelope of every answer, odd requests, limits, drain, frozen loops."""

import asyncio
import contextlib
import ipaddress
import json
import socket
import time
import types
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
import pytest
import uvloop
from aiohttp import web

from covey import answer, errors, serve, server, world
from covey import gate as gates
from tests.support import virtual


class Thing(msgspec.Struct):
    count: int = 1
    name: str = ""


class StoppableWorld(world.System):
    """A world whose boot clock can be moved ahead, as after a SIGSTOP."""

    ahead_ns = 0

    def boot_ns(self) -> int:
        return super().boot_ns() + self.ahead_ns


class _Half(web.StreamResponse):
    """An answer that goes wrong in its middle."""

    async def write_eof(self, data: bytes = b"") -> None:
        await self.write(b"x" * 10)
        raise RuntimeError("boom")


@dataclass
class House:
    """A server with one handler per trait under test, and what the handlers saw."""

    server: server.Server
    clock: StoppableWorld
    gaps: list[float]
    seen: list[object]
    gate: asyncio.Event

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"


ROOMY = gates.Limits()
PROXIES = (ipaddress.ip_network("127.0.0.0/8"),)


def _house(limits: gates.Limits = ROOMY, *, streams: bool = True) -> House:
    clock = StoppableWorld()
    gaps: list[float] = []
    seen: list[object] = []
    gate = asyncio.Event()

    async def echo(call: serve.Call) -> object:
        thing = await call.json(Thing)
        seen.append(thing)
        return thing

    async def refuse(call: serve.Call) -> object:
        raise errors.Refused("No such tag " + call.query["tag"])

    async def unsure(call: serve.Call) -> object:
        raise errors.Unsure("")

    async def burst(call: serve.Call) -> object:
        raise RuntimeError("boom")

    async def empty(call: serve.Call) -> object:
        return []

    async def bare(call: serve.Call) -> object:
        return None

    async def wait(call: serve.Call) -> object:
        seen.append("waiting")
        await gate.wait()
        try:
            call.still_fresh()
        except errors.Unavailable:
            seen.append("too old")
            raise
        return "done"

    async def park(call: serve.Call) -> object:
        seen.append("parked")
        with call.aside():
            await call.draining.wait()
        raise errors.Unavailable("this controller goes down")

    async def upload(call: serve.Call) -> object:
        size = 0
        try:
            async for chunk in call.chunks():
                size += len(chunk)
                seen.append(len(chunk))
        except answer.Cut:
            return web.Response(status=202, headers={"Range": f"0-{size - 1}"})
        return size

    async def slow(call: serve.Call) -> object:
        await asyncio.sleep(60)
        return None

    async def half(call: serve.Call) -> object:
        return _Half(headers={"Content-Length": "100"})

    async def repo(call: serve.Call) -> object:
        return dict(call.params)

    one = server.Server(
        [
            serve.Route("POST", "/api/v1/thing", echo, body_limit_bytes=10_000),
            serve.Route("DELETE", "/api/v1/thing", echo),
            serve.Route("GET", "/refuse", refuse),
            serve.Route("GET", "/unsure", unsure),
            serve.Route("GET", "/burst", burst),
            serve.Route("GET", "/empty", empty),
            serve.Route("PUT", "/bare", bare),
            serve.Route("GET", "/wait", wait),
            serve.Route("GET", "/park", park, time_limit_s=None),
            serve.Route("PUT", "/upload", upload, body_limit_bytes=1 << 30, time_limit_s=None),
            serve.Route("GET", "/slow", slow, time_limit_s=0.05),
            serve.Route("GET", "/half", half),
            serve.Route("GET", "/v2/{name:path}/blobs/{digest}", repo),
        ],
        world=clock,
        error_bodies={"/v2/": lambda fault: answer.ascii_json({"errors": [{"code": fault.code}]})},
        on_gap=gaps.append,
        limits={gates.Lane.PEOPLE: limits},
        streams=streams,
    )
    return House(one, clock, gaps, seen, gate)


@contextlib.asynccontextmanager
async def running(house: House) -> AsyncIterator[aiohttp.ClientSession]:
    await house.server.start("127.0.0.1", 0)
    try:
        async with aiohttp.ClientSession(house.url, connector=aiohttp.TCPConnector(limit=0)) as http:
            yield http
    finally:
        house.gate.set()
        await house.server.drain(0.2)


@pytest.fixture(params=[True, False], ids=["streams", "plain"])
async def house(request: pytest.FixtureRequest) -> House:
    """A server by either way: of handlers that stream, and of small requests."""
    return _house(streams=request.param)


@pytest.fixture
async def http(house: House) -> AsyncIterator[aiohttp.ClientSession]:
    async with running(house) as session:
        yield session


async def until(true: Callable[[], bool], limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, "the condition did not come true in time"
        await asyncio.sleep(0.005)


async def raw(house: House, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """One request as bytes on a socket; the answer's status, headers and body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", house.server.port)
    try:
        writer.write(request)
        return await read_answer(reader)
    finally:
        writer.close()
        await writer.wait_closed()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)).decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    return int(head[0].split()[1]), headers, await reader.readexactly(int(headers.get("content-length", "0")))


def post(body: bytes, *headers: str, path: str = "/api/v1/thing", method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@pytest.mark.parametrize(
    "request_bytes",
    [
        post(b'{"count":2,"name":"a"}\n'),
        post(b'{"count":2,"name":"a"}', "Content-Type: application/x-www-form-urlencoded"),
        post(b'{"count":2,"name":"a"}', "content-type: application/json"),
        post(b'{"count":2,"name":"a","what":[]}', method="DELETE"),
        post(b'{"count":2,"name":"a"}', path="//api/v1/thing"),
        post(b'{"count":2,"name":"a"}', path="//api//v1///thing?x=1"),
        post(b'{"count":2,"name":"a"}', path="http://elsewhere/api/v1/thing"),
    ],
    ids=["newline-no-type", "form-type", "lower-case", "delete-body", "slashes", "more-slashes", "absolute"],
)
async def test_every_spelling_of_a_request_is_understood(
    house: House, http: aiohttp.ClientSession, request_bytes: bytes
) -> None:
    status, headers, body = await raw(house, request_bytes)
    assert (status, headers["content-type"], headers["cache-control"]) == (200, "application/json", "no-store")
    assert json.loads(body) == {"status": "OK", "message": "", "body": {"count": 2, "name": "a"}}


@pytest.mark.parametrize("name", ["é", "日本 🙂"])
async def test_answers_are_ascii(house: House, http: aiohttp.ClientSession, name: str) -> None:
    _, _, body = await raw(house, post(json.dumps({"name": name}, ensure_ascii=False).encode()))
    assert body.isascii()
    assert json.loads(body)["body"]["name"] == name


async def test_latin1_bytes_are_read_as_latin1(house: House, http: aiohttp.ClientSession) -> None:
    status, _, body = await raw(house, post('{"name":"caf\xe9"}'.encode("latin-1")))
    assert (status, json.loads(body)["body"]["name"]) == (200, "café")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"count":"two"}', "count: expected `int`, got `str`; correct it"),
        (b"[1]", "the body: expected `object`, got `array`"),
        (b'{"count":1', "not valid JSON"),
        (b"name=x", "not valid JSON"),
        (b"", "no body"),
        (b" \n", "no body"),
        (b'{"name":"\\ud800"}', "not valid JSON"),
        (b'{"other":' + b"[" * 9000, "JSON"),
    ],
)
async def test_what_is_not_understood_is_400_and_names_the_field(
    house: House, http: aiohttp.ClientSession, body: bytes, says: str
) -> None:
    status, _, content = await raw(house, post(body))
    answered = json.loads(content)
    assert status == 400
    assert answered["status"] == "FAIL"
    assert says in answered["message"]
    assert house.seen == []


async def test_faults_carry_the_envelope(house: House, http: aiohttp.ClientSession) -> None:
    async def ask(method: str, path: str) -> tuple[int, str, dict[str, str]]:
        async with http.request(method, path) as got:
            envelope = json.loads(await got.read())
            assert envelope["status"] == "FAIL"
            assert "body" not in envelope
            return got.status, envelope["message"], dict(got.headers)

    assert (await ask("GET", "/nowhere"))[0] == 404
    status, _, headers = await ask("PATCH", "/api/v1/thing")
    assert (status, headers["Allow"]) == (405, "DELETE, POST")
    assert (await ask("GET", "/refuse?tag=a%20%23b"))[:2] == (200, "No such tag a #b")
    status, message, headers = await ask("GET", "/unsure")
    assert (status, headers["Retry-After"]) == (503, "1")
    assert message
    assert (await ask("GET", "/burst"))[0] == 500
    status, message, _ = await ask("GET", "/slow")
    assert status == 503
    assert "not known" in message


async def test_bodies_of_success(http: aiohttp.ClientSession) -> None:
    async with http.get("/empty") as got:
        assert await got.read() == b'{"status":"OK","message":"","body":[]}'
    async with http.put("/bare") as got:
        assert await got.read() == b'{"status":"OK","message":""}'
    async with http.head("/empty") as got:
        assert (got.status, await got.read()) == (200, b"")


async def test_a_program_brings_its_own_error_body(http: aiohttp.ClientSession) -> None:
    async with http.get("/v2/a/b/blobs/sha256:0") as got:
        assert (await got.json())["body"] == {"name": "a/b", "digest": "sha256:0"}
    async with http.get("/v2/nothing") as got:
        assert (got.status, await got.json()) == (404, {"errors": [{"code": "NOT_FOUND"}]})


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_that_is_too_large_is_413(house: House, http: aiohttp.ClientSession, announced: bool) -> None:
    async def stream() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 1000

    async with http.post("/api/v1/thing", data=b" " * 20_000 if announced else stream()) as got:
        assert got.status == 413
        assert (await got.json())["status"] == "FAIL"
    assert house.seen == []


async def test_a_compressed_body_is_refused(house: House, http: aiohttp.ClientSession) -> None:
    assert (await raw(house, post(b"\x1f\x8b", "Content-Encoding: gzip")))[0] == 415


async def test_a_client_that_waits_for_100_continue_gets_it(house: House, http: aiohttp.ClientSession) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", house.server.port)
    body = b'{"count":3}'
    writer.write(post(b"", "Expect: 100-continue").replace(b"Content-Length: 0", b"Content-Length: 11"))
    assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60) == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(body)
    assert (await read_answer(reader))[0] == 200
    writer.close()
    await writer.wait_closed()


async def test_what_is_no_http_gets_an_envelope_too(house: House, http: aiohttp.ClientSession) -> None:
    status, _, body = await raw(house, b"GARBAGE\r\n\r\n")
    assert (status, json.loads(body)["status"]) == (400, "FAIL")
    status, _, body = await raw(house, b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n")
    assert (status, json.loads(body)["status"]) == (400, "FAIL")


async def test_a_half_sent_answer_is_broken_off() -> None:
    async with running(_house()) as http:
        with pytest.raises(aiohttp.ClientPayloadError):
            async with http.get("/half") as got:
                await got.read()


async def test_too_much_load_is_503() -> None:
    house = _house(gates.Limits(at_once=1, waiting=0))
    async with running(house) as http:
        parked = asyncio.create_task(_status(http, "/park"))
        await until(lambda: house.seen == ["parked"])
        waiting = asyncio.create_task(_status(http, "/wait"))
        await until(lambda: house.seen == ["parked", "waiting"])
        assert await _status(http, "/empty") == 503
        house.gate.set()
        assert await waiting == 200
        assert await _status(http, "/empty") == 200
        house.server.draining.set()
        assert await parked == 503


async def _status(http: aiohttp.ClientSession, path: str) -> int:
    async with http.get(path) as got:
        await got.read()
        return got.status


async def test_a_taken_port_is_one_clear_line(house: House, http: aiohttp.ClientSession) -> None:
    other = _house()
    with pytest.raises(errors.SettingError, match=rf"127.0.0.1:{house.server.port} is taken by another program"):
        await other.server.start("127.0.0.1", house.server.port)


# ---- drain -------------------------------------------------------------------------------------------------------


def on(loop: Callable[[], asyncio.AbstractEventLoop], scenario: Callable[[], Coroutine[None, None, None]]) -> None:
    """Controllers run on uvloop, registries on asyncio's own loop: their transports differ."""
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(scenario())


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_drain_finishes_requests_answers_polls_and_cuts_uploads(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    on(loop, _drain)


async def _drain() -> None:
    house = _house()
    async with running(house) as http:
        reader, writer = await asyncio.open_connection("127.0.0.1", house.server.port)
        writer.write(post(b"x" * 2500, path="/upload", method="PUT").replace(b": 2500", b": 9000"))
        waiting = asyncio.create_task(_status(http, "/wait"))
        parked = asyncio.create_task(_status(http, "/park"))
        await until(
            lambda: (
                sum(n for n in house.seen if isinstance(n, int)) == 2500 and {"waiting", "parked"} <= set(house.seen)
            )
        )

        draining = asyncio.create_task(house.server.drain(2.0))
        assert await parked == 503
        with pytest.raises(aiohttp.ClientConnectorError):
            async with aiohttp.ClientSession() as newcomer, newcomer.get(house.url + "/empty"):
                pass
        house.gate.set()
        assert await waiting == 200
        status, headers, _ = await read_answer(reader)
        assert (status, headers["range"], headers["connection"]) == (202, "0-2499", "close")
        assert await draining == 0
        writer.close()
        await writer.wait_closed()


async def test_drain_ends_with_the_grace_and_counts_what_it_broke_off() -> None:
    house = _house()
    async with running(house) as http:
        waiting = asyncio.create_task(_status(http, "/wait"))
        await until(lambda: house.seen == ["waiting"])
        started = time.monotonic()
        assert await house.server.drain(0.3) == 1
        assert time.monotonic() - started < 30
        with pytest.raises(aiohttp.ClientError):
            await waiting


async def test_while_it_goes_down_requests_are_taken_and_each_answer_closes_its_connection(
    house: House, http: aiohttp.ClientSession
) -> None:
    """Between the first red /readyz and the end, nobody who looks away in time meets a closed connection."""
    kept = await asyncio.open_connection("127.0.0.1", house.server.port)
    kept[1].write(post(b"{}"))
    assert "connection" not in (await read_answer(kept[0]))[1]
    house.server.draining.set()
    kept[1].write(post(b"{}"))
    for reader, writer in (kept, await asyncio.open_connection("127.0.0.1", house.server.port)):
        if reader is not kept[0]:
            writer.write(post(b"{}"))
        status, headers, _ = await read_answer(reader)
        assert (status, headers["connection"]) == (200, "close")
        writer.close()
        await writer.wait_closed()


async def test_what_is_idle_is_served_until_the_very_end() -> None:
    """A request that crosses the drain on a kept connection is answered."""
    house = _house()
    async with running(house) as http:
        idle = await asyncio.open_connection("127.0.0.1", house.server.port)
        waiting = asyncio.create_task(_status(http, "/wait"))
        await until(lambda: house.seen == ["waiting"])
        draining = asyncio.create_task(house.server.drain(5.0))
        await asyncio.sleep(0.05)
        idle[1].write(post(b"{}"))
        assert (await read_answer(idle[0]))[0] == 200
        house.gate.set()
        assert await waiting == 200
        assert await draining == 0
        idle[1].close()
        await idle[1].wait_closed()


async def test_connections_are_bounded(house: House, http: aiohttp.ClientSession) -> None:
    house.server.connection_limit = 2
    kept = [await asyncio.open_connection("127.0.0.1", house.server.port) for _ in range(2)]
    await until(lambda: house.server.open == 2)
    reader, writer = await asyncio.open_connection("127.0.0.1", house.server.port)
    status, headers, _ = await read_answer(reader)
    assert (status, headers["retry-after"], await reader.read()) == (503, "1", b"")
    writer.close()
    kept[0][1].close()
    await until(lambda: house.server.open == 1)
    assert await _status(http, "/empty") == 200
    for _, one in [*kept, (reader, writer)]:
        one.close()
        await one.wait_closed()


async def test_an_idle_server_drains_at_once(house: House) -> None:
    async with running(house) as http:
        assert await _status(http, "/empty") == 200
        started = time.monotonic()
        assert await house.server.drain(30) == 0
        assert time.monotonic() - started < 10


# ---- frozen (safety S24) -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_after_a_gap_every_connection_is_closed_unread(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    on(loop, _gap)


async def _gap() -> None:
    house = _house()
    async with running(house) as http:
        address = ("127.0.0.1", house.server.port)
        idle = socket.create_connection(address)
        await until(lambda: len(house.server.connections) == 1)
        waiting = asyncio.create_task(_status(http, "/wait"))
        await until(lambda: house.seen == ["waiting"])

        # From here to the jump the loop does not run: both requests lie in the kernel, one of them in the backlog.
        idle.sendall(post(b'{"name":"sent while frozen"}'))
        late = socket.create_connection(address)
        late.sendall(post(b'{"name":"sent while frozen"}'))
        house.clock.ahead_ns = 3_000_000_000

        for sock in (idle, late):
            sock.setblocking(False)
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 1000), 60) == b""
            sock.close()
        with pytest.raises(aiohttp.ClientError):
            await waiting
        assert house.seen == ["waiting"]
        assert max(house.gaps) >= 3
        await until(lambda: not house.server.shaken())
        assert await _status(http, "/empty") == 200


async def test_a_request_that_slept_through_a_gap_commits_nothing(house: House, http: aiohttp.ClientSession) -> None:
    waiting = asyncio.create_task(_status(http, "/wait"))
    await until(lambda: house.seen == ["waiting"])
    house.clock.ahead_ns = 11_000_000_000
    house.gate.set()
    await until(lambda: house.seen == ["waiting", "too old"])
    await asyncio.gather(waiting, return_exceptions=True)  # 503, or the gap was found first and the connection cut


async def test_a_short_gap_is_enough(house: House) -> None:
    """Safety S24: nobody knows how old a request is that was here when the loop stood still."""
    stood: Any = types.SimpleNamespace(world=house.clock, gaps=0)
    nothing: Any = None
    call = serve.Call(stood, nothing, nothing, {})
    call.still_fresh()
    stood.gaps += 1
    with pytest.raises(errors.Unavailable):
        call.still_fresh()


async def test_addresses_are_the_same_however_the_server_listens() -> None:
    """A socket for all addresses is one of IPv6 and shows IPv4 peers in its own notation, in which no proxy and no
    node would be known."""
    asked: list[str] = []

    async def note(call: serve.Call) -> None:
        asked.append(call.address)

    one = server.Server([serve.Route("GET", "/who", note)], world=world.System(), trusted=PROXIES)
    await one.start("", 0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{one.port}") as http:
        await http.get("/who")
        await http.get("/who", headers={"X-Forwarded-For": "198.51.100.1"})
    await one.drain(0.2)
    assert asked == ["127.0.0.1", "198.51.100.1"]


async def test_a_body_that_does_not_come_is_not_waited_for_for_ever() -> None:
    """A host that dies in the middle of its request keeps no place in its lane, also where polls may park."""

    async def nothing_comes() -> None:
        await asyncio.Event().wait()

    def ask() -> None:
        house: Any = types.SimpleNamespace(world=world.System(), gaps=0)
        request: Any = types.SimpleNamespace(size_bytes=100, piece=nothing_comes, whole=None)
        route = serve.Route("POST", "/poll", _nothing, time_limit_s=None)
        virtual.run(serve.Call(house, route, request, {}).json(Thing))

    with pytest.raises(errors.Unavailable, match="did not come in time"):
        await asyncio.to_thread(ask)


async def _nothing(_call: serve.Call) -> None:
    return None


# ---- without sockets ---------------------------------------------------------------------------------------------


@dataclass
class Door:
    """The same house, where requests are handed over in this process."""

    house: House

    async def ask(self, method: str, target: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, object]]:
        reply = await self.house.server.hand(method, target, headers, body, peer="10.0.0.9")
        return reply.status, json.loads(reply.body)


@pytest.fixture
async def door(house: House) -> AsyncIterator[Door]:
    house.server.begin()
    yield Door(house)
    house.gate.set()
    await house.server.drain(0.2)


async def test_what_is_handed_over_gets_the_same_answers(door: Door) -> None:
    thing = {"count": 2, "name": "a"}
    assert await door.ask("POST", "//api/v1/thing?x=1", b'{"count":2,"name":"a"}') == (
        200,
        {"status": "OK", "message": "", "body": thing},
    )
    assert await door.ask("GET", "/refuse?tag=a%20%23b") == (200, {"status": "FAIL", "message": "No such tag a #b"})
    assert (await door.ask("GET", "/v2/a/b/blobs/sha256:0"))[1]["body"] == {"name": "a/b", "digest": "sha256:0"}
    assert (await door.ask("GET", "/nowhere"))[0] == 404
    assert (await door.ask("PATCH", "/api/v1/thing"))[0] == 405
    assert (await door.ask("POST", "/api/v1/thing", b" " * 20_000))[0] == 413
    assert (await door.ask("POST", "/api/v1/thing", b"{}", **{"content-encoding": "gzip"}))[0] == 415
    assert (await door.ask("GET", "/burst"))[0] == 500
    assert (await door.ask("GET", "/slow"))[0] == 503
    assert (await door.house.server.hand("HEAD", "/empty")).body == b""


async def test_what_is_handed_over_counts_as_load_and_drains() -> None:
    house = _house(gates.Limits(at_once=1, waiting=0))
    house.server.begin()
    waiting = asyncio.create_task(house.server.hand("GET", "/wait"))
    await until(lambda: house.seen == ["waiting"])
    refused = await house.server.hand("GET", "/empty")
    assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
    draining = asyncio.create_task(house.server.drain(5.0))
    house.gate.set()
    assert (await waiting).status == 200
    assert await draining == 0


async def test_a_gap_breaks_the_connection_of_what_was_handed_over(door: Door) -> None:
    waiting = asyncio.create_task(door.ask("GET", "/wait"))
    await until(lambda: door.house.seen == ["waiting"])
    door.house.clock.ahead_ns = 3_000_000_000
    with pytest.raises(ConnectionResetError):  # it lay there while the process stood still
        await door.ask("GET", "/empty")
    door.house.gate.set()
    with pytest.raises(ConnectionResetError):
        await waiting
    assert (await door.ask("GET", "/empty"))[0] == 200
