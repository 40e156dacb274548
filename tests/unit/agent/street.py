"""Nodes that share layers with each other, a registry that counts what leaves it, and neighbours of other kinds.

street.node("a") → its cache, what it knows of neighbours, and its server; all of it really listens on 127.0.0.1
a.knows(digest, b, stranger)      as if a controller had named them, with tickets
await a.get(template, digest)
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
from aiohttp import web

from covey import model, ticket, wire
from covey.agent import images, neighbours, sharing
from covey.client import http, oci
from covey.client import registry as client
from tests.support import proxy, registry
from tests.unit.agent import conftest

PATIENT = neighbours.Limits(
    paper_s=120, connect_s=30, answer_s=60, quiet_s=60, hope_s=120, still_s=120, turn_s=60, pace_s=600
)
HASTY = neighbours.Limits(answer_s=0.5, quiet_s=0.3, hope_s=1.0, still_s=1.0, turn_s=0.1, again_s=0.02)
NONCE = "nonce"


class Neighbour:
    """What a node can be told of: where it is, and the key to its tickets."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.url = ""
        self.key = ticket.key_of(f"secret of {name}")

    def ticket(self, asker: str, template: str, nonce: str = NONCE) -> str:
        return ticket.issue(self.key, asker, template, nonce)


class Node(Neighbour):
    def __init__(
        self,
        name: str,
        root: Path,
        session: aiohttp.ClientSession,
        source: client.Registry,
        limits: neighbours.Limits,
        limit_bytes_s: int,
        askers: int,
    ) -> None:
        super().__init__(name)
        self.clock = conftest.Clock()
        self.nonce = NONCE
        self.session = session
        self.near = neighbours.Neighbours(self.clock, lambda: session, limits)
        self.cache = images.Cache(root, lambda _: source, reserve_bytes=0, near=self.near)
        self.cache.from_registries(("http://registry",))
        self.server = sharing.Sharing(
            self.cache, self.near, lambda: self.key, lambda: self.nonce, limit_bytes_s=limit_bytes_s, askers=askers
        )

    async def start(self) -> None:
        await self.server.start([("127.0.0.1", 0)])
        self.url = f"http://127.0.0.1:{self.near.port}"

    async def stop(self) -> None:
        await self.server.stop()
        self.near.close()

    def knows(self, template: str, *others: Neighbour) -> None:
        told = [wire.Neighbour(url=other.url, ticket=other.ticket(self.name, template)) for other in others]
        self.near.told(template, tuple(told))

    async def get(self, template: model.TemplateId, digest: model.Digest) -> list[bytes]:
        """The layers' bytes."""
        image = await self.cache.get("vm.1", template, digest, lambda _: None)
        return [Path(path).read_bytes() for path in image.layers]

    async def ask(
        self, digest: str, blob: str, text: str, span: str = "bytes=0-9", method: str = "GET"
    ) -> tuple[int, bytes]:
        """One request to this node's server as it is given."""
        headers = {"Authorization": text, "Range": span}
        url = f"{self.url}/layers/v1/{digest}/{blob}"
        async with self.session.request(method, url, headers=headers) as answer:
            return answer.status, await answer.read()


class Stranger(Neighbour):
    """A neighbour that does as it likes with a request for a range of `content`."""

    def __init__(self, name: str, content: bytes) -> None:
        super().__init__(name)
        self.content = content
        self.asked = self.sent = 0
        self._runner: web.AppRunner | None = None

    @property
    def here(self) -> int:
        """How much it says that it has."""
        return len(self.content)

    async def start(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{rest:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.asked += 1
        headers = {neighbours.HERE_HEADER: str(self.here)}
        if request.method == "HEAD":
            return web.Response(headers=headers)
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        start, end = (int(found[1]), int(found[2]) + 1) if found is not None else (0, len(self.content))
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(self.content)}"
        answer = web.StreamResponse(status=206, headers=headers)
        answer.content_length = end - start
        await self.send(request, answer, start, end)
        return answer

    async def send(self, request: web.Request, answer: web.StreamResponse, start: int, end: int) -> None:
        await answer.prepare(request)
        await answer.write(self.content[start:end])


class Silent(Stranger):
    """Takes connections and never answers."""

    async def send(self, request: web.Request, answer: web.StreamResponse, start: int, end: int) -> None:
        await asyncio.sleep(600)


class Quiet(Stranger):
    """Answers each time, and sends nothing."""

    async def send(self, request: web.Request, answer: web.StreamResponse, start: int, end: int) -> None:
        await answer.prepare(request)
        await asyncio.sleep(600)


class Slow(Stranger):
    """A byte every now and then."""

    async def send(self, request: web.Request, answer: web.StreamResponse, start: int, end: int) -> None:
        await answer.prepare(request)
        for place in range(start, end):
            await answer.write(self.content[place : place + 1])
            self.sent += 1
            await asyncio.sleep(0.05)


class Waiting(Slow):
    """As slow, because it has no more itself."""

    @property
    def here(self) -> int:
        return self.sent


class Cut(Stranger):
    """Breaks off after a part of what is asked for, each time."""

    async def send(self, request: web.Request, answer: web.StreamResponse, start: int, end: int) -> None:
        await answer.prepare(request)
        await answer.write(self.content[start : start + max((end - start) // 2, 1)])
        await asyncio.sleep(0.02)
        assert request.transport is not None
        request.transport.abort()


class _Mute(client.Registry):
    """A registry that is asked, and never says anything."""

    def __init__(self, real: client.Registry) -> None:
        self.__dict__.update(real.__dict__)

    async def manifest(
        self, repository: str, reference: str, *, look: bool = False
    ) -> tuple[oci.Manifest, model.Digest, bytes]:
        await asyncio.Event().wait()
        raise AssertionError

    async def content(self, repository: str, digest: str, limit_bytes: int = 0) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError


class Street:
    def __init__(self, line: proxy.Proxy, source: client.Registry, hasty: client.Registry, root: Path) -> None:
        """`hasty`: the same registry, with little patience."""
        self._line = line
        self._hasty = hasty
        self._nodes: list[Node] = []
        self._source = source
        self._root = root
        self._stack = contextlib.AsyncExitStack()
        self._session = aiohttp.ClientSession()

    @property
    def registry_bytes(self) -> int:
        """What has left the registry."""
        return self._line.down_bytes

    async def cut_off_the_registry(self) -> None:
        """For good: nobody waits long for it any more."""
        await self._line.turn(proxy.Mood.CLOSED)
        for node in self._nodes:
            node.cache._source = self._hasty

    def silence_the_registry(self, node: Node) -> None:
        """For one node: it waits for manifests and configs for ever."""
        node.cache._source = _Mute(self._source)

    async def node(
        self, name: str, limits: neighbours.Limits = PATIENT, *, limit_bytes_s: int = 0, askers: int = sharing.ASKERS
    ) -> Node:
        made = Node(name, self._root / name, self._session, self._source, limits, limit_bytes_s, askers)
        self._nodes.append(made)
        await made.start()
        self._stack.push_async_callback(made.stop)
        return made

    async def let_in(self, stranger: Stranger) -> Stranger:
        await stranger.start()
        self._stack.push_async_callback(stranger.stop)
        return stranger

    async def close(self) -> None:
        await self._session.close()  # first: strangers that never answer are let go
        await self._stack.aclose()


@contextlib.asynccontextmanager
async def of(root: Path, server: registry.Server) -> AsyncIterator[Street]:
    """A street whose nodes reach the registry by one line."""
    line = proxy.Proxy(server.port)
    await line.turn(proxy.Mood.HONEST)
    try:
        async with http.Endpoints([f"http://{line.address}"]) as endpoints:
            street = Street(line, client.Registry(endpoints), client.Registry(endpoints, patience_s=0.5), root)
            try:
                yield street
            finally:
                await street.close()
    finally:
        await line.turn(proxy.Mood.CLOSED)
