"""Sets of registries with disks of their own, in this process: the first one takes pushes, the others follow.

    async with replicas.serving(tmp_path, 3) as (holder, second, third):
        await holder.push_image("a", "v1", b"layer")
        await second.until_current(holder)

Each reaches each other through a `proxy.Proxy`, so that a test can cut or silence one of them for its peers alone.
"""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from covey import settings, world
from covey.registry import role, service
from tests.support import etcd, proxy, registry

DEADLINE_S = 60.0
SECRET = "a secret for tests only"


async def until(true: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await true():
            await asyncio.sleep(0.05)


def settings_of(own: str, urls: list[str], holder: str) -> settings.Replicas:
    return settings.Replicas(
        write_only=False,
        own_url=own,
        peers=tuple(url for url in urls if url != own),
        registry_peer_secret=SECRET,
        push_url=holder,
        push_copies=1,
        etcd=None,
    )


@dataclasses.dataclass
class Place:
    """Where one server of a set lives, whether it runs or not."""

    base: Path
    port: int
    line: proxy.Proxy  # by which its peers reach it

    @property
    def url(self) -> str:
        return f"http://{self.line.address}"


class Replica(registry.Server):
    """One server that runs."""

    def __init__(self, place: Place, session: aiohttp.ClientSession, program: service.Registry) -> None:
        super().__init__(place.port, session)
        self.place = place
        self.program = program

    async def call(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, Mapping[str, str], bytes]:
        """As a patient client would: again when a connection broke, as all do when this process stood still (safety
        S24)."""
        for _ in range(20):
            with contextlib.suppress(aiohttp.ClientConnectionError):
                return await super().call(method, path, body, **headers)
            await asyncio.sleep(0.1)
        return await super().call(method, path, body, **headers)

    @property
    def base(self) -> Path:
        return self.place.base

    async def log(self, name: str) -> list[bytes]:
        """A log's entries as they lie on the disk."""
        return (await self.program.catalog.logs.read({name: 0}))[name]

    async def heads(self) -> object:
        assert self.program.replica is not None
        await self.program.replica.heads.look()
        return self.program.replica.heads.all()

    async def readyz(self) -> dict[str, Any]:
        status, _, content = await self.call("GET", "/readyz")
        assert status == 200
        found: dict[str, Any] = json.loads(content)["body"]
        return found

    async def standing(self) -> dict[str, Any]:
        return (await self.readyz()).get("replica") or {}

    async def trouble(self) -> str:
        return str((await self.readyz())["trouble"])

    def blobs(self) -> dict[str, bytes]:
        """Everything on the shelf."""
        return {path.name: path.read_bytes() for path in (self.base / "blobs").glob("*/*/*")}

    async def until_current(self, holder: "Replica") -> None:
        """Wait until it has every log and every blob of the holder's."""

        async def current() -> bool:
            return await self.heads() == await holder.heads() and self.blobs().keys() >= holder.blobs().keys()

        await until(current)


@contextlib.asynccontextmanager
async def places(folder: Path, count: int) -> AsyncIterator[list[Place]]:
    async with contextlib.AsyncExitStack() as stack:
        found = []
        for number in range(count):
            port = etcd.free_port()
            line = await stack.enter_async_context(proxy.before(port))
            found.append(Place(folder / f"r{number}", port, line))
        yield found


@contextlib.asynccontextmanager
async def one(all_places: list[Place], number: int, *, fresh: bool = False, **more: object) -> AsyncIterator[Replica]:
    """One of a set, in this process; `more` are fields of its `Config`. It knows of the first term already, unless it
    is to be `fresh`."""
    place, urls = all_places[number], [place.url for place in all_places]
    place.base.mkdir(exist_ok=True)
    terms = role.Terms(place.base, world.System(), fsync=False)
    if not fresh and not terms.last()[0]:
        terms.enter(1, urls[0])
    chosen = {"grace_s": 2.0, "fsync": False, "reserved_bytes": 0, **more}
    config = service.Config(
        base_path=place.base,
        port=place.port,
        replicas=settings_of(place.url, urls, urls[0]),
        **chosen,  # type: ignore[arg-type]
    )
    program = service.Registry(config, world.System())
    await program.start()
    try:
        async with aiohttp.ClientSession() as session:
            yield Replica(place, session, program)
    finally:
        await program.stop()


@contextlib.asynccontextmanager
async def serving(folder: Path, count: int) -> AsyncIterator[list[Replica]]:
    """A whole set; the first one takes pushes."""
    async with contextlib.AsyncExitStack() as stack:
        found = await stack.enter_async_context(places(folder, count))
        yield [await stack.enter_async_context(one(found, number)) for number in range(count)]
