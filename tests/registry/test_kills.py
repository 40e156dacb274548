"""Several server processes on one directory, killed with -9 while clients push and pull and a collector runs."""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from covey import errors, model
from covey.client import http, oci, templates
from covey.client import registry as client
from covey.decide import garbage
from covey.registry import verify
from tests.support import balancers, etcd, registry, storage

KILLS = int(os.environ.get("COVEY_KILLS", "3"))  # each costs the start of a server
MIB = 1 << 20


class Fleet:
    """Servers that are started again, at the same port, whenever they were killed."""

    def __init__(self, base: Path, stack: contextlib.AsyncExitStack) -> None:
        self.base = base
        self.servers: list[registry.Process] = []
        self._stack = stack

    async def grow(self, count: int) -> None:
        for _ in range(count):
            self.servers.append(await self._stack.enter_async_context(registry.process(self.base)))

    async def kill(self, which: int) -> None:
        server = self.servers[which]
        server.send(signal.SIGKILL)
        assert await server.ended() == -signal.SIGKILL
        again = registry.process(self.base, port=server.port)
        self.servers[which] = await self._stack.enter_async_context(again)


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with contextlib.AsyncExitStack() as stack:
        made = Fleet(tmp_path / "base", stack)
        await made.grow(3)
        yield made


async def push(remote: client.Registry, path: Path, name: str, tag: str) -> str:
    """Until it is accepted, as a person would; the digest."""
    while True:
        with contextlib.suppress(errors.RemoteError, errors.NotFound):
            pushed = await templates.push_template(
                remote, name, tag, [path], arch=model.Arch.AMD64, force=True, pack=False
            )
            return pushed.digest
        await asyncio.sleep(0.05)


async def test_kills_lose_nothing_and_leave_nothing(fleet: Fleet, tmp_path: Path) -> None:
    chance = random.Random(30)
    accepted: dict[tuple[str, str], str] = {}
    done = asyncio.Event()
    pulls = 0

    async def client_(number: int) -> None:
        nonlocal pulls
        own = random.Random(number)
        async with registry.talking(*fleet.servers, patience_s=30.0) as remote:
            round_number = 0
            while not done.is_set():
                round_number += 1
                path = tmp_path / f"layer-{number}"
                content = own.randbytes(1000) * own.choice((1, 300, 3000))
                path.write_bytes(content)
                name, tag = f"mac-{number}", f"v{round_number % 3}"
                accepted[name, tag] = await push(remote, path, name, tag)
                out = tmp_path / f"out-{number}-{round_number}"
                pulled = await templates.pull_template(remote, name, out, tag=tag)
                assert pulled.files[0].read_bytes() == content
                pulls += 1

    async def collector() -> None:
        with storage.opened(fleet.base) as place:
            while not done.is_set():
                await place.collector(garbage.Periods(grace_s=20.0, trash_s=1.0)).run()
                await asyncio.sleep(0.2)

    working = [asyncio.create_task(client_(number)) for number in range(3)] + [asyncio.create_task(collector())]
    for _ in range(KILLS):
        await asyncio.sleep(chance.uniform(0.05, 0.4))
        await fleet.kill(chance.randrange(3))
    done.set()
    await asyncio.wait_for(asyncio.gather(*working), 240)
    assert pulls >= 3
    with storage.opened(fleet.base) as place:
        for (name, tag), digest in accepted.items():
            fold = await place.catalog.template(name)
            assert fold.tags[tag] == digest
        storage.age(fleet.base, hours=100)
        for _ in range(2):
            await place.collector(garbage.Periods(grace_s=-1.0, trash_s=-1.0)).run()
        report = await verify.Verification(place.catalog, place.care, place.care).run()
        assert report.problems == ()
        assert await place.lying() == set((await place.collector().needed()).reasons)
        for folder in ("trash", "quarantine", "uploads", "aside"):
            assert [path for path in (fleet.base / folder).rglob("*") if path.is_file()] == []


CONFIG = """
global
    maxconn 200
defaults
    mode http
    timeout connect 2s
    timeout client 60s
    timeout server 60s
    retries 2
    option redispatch
frontend registry
    bind 127.0.0.1:{port}
    default_backend registries
backend registries
    balance roundrobin
{servers}
"""


@contextlib.asynccontextmanager
async def haproxy(folder: Path, servers: list[registry.Process]) -> AsyncIterator[str]:
    """Before `servers`, round robin: no stickiness. Its URL."""

    port = etcd.free_port()
    lines = "\n".join(f"    server r{server.port} 127.0.0.1:{server.port} check inter 200ms" for server in servers)
    file = folder / "haproxy.cfg"
    file.write_text(CONFIG.format(port=port, servers=lines))
    child = await asyncio.create_subprocess_exec(
        *("setpriv", "--pdeathsig", "KILL", balancers.binary("haproxy"), "-db", "-q", "-f", str(file))
    )
    try:
        url = f"http://127.0.0.1:{port}"
        async with aiohttp.ClientSession() as session, asyncio.timeout(90):
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(url + "/readyz") as answer:
                        if answer.status == 200:
                            break
                await asyncio.sleep(0.05)
        yield url
    finally:
        child.kill()
        await child.wait()


async def test_a_server_is_killed_under_pulls_behind_haproxy(fleet: Fleet, tmp_path: Path) -> None:
    content = random.Random(1).randbytes(MIB) * 48
    layer = tmp_path / "layer"
    layer.write_bytes(content)
    async with haproxy(tmp_path, fleet.servers) as url, http.Endpoints([url]) as endpoints:
        remote = client.Registry(endpoints, patience_s=30.0)
        await push(remote, layer, "mac", "v1")
        killed = 0

        def kill_twice(_title: str, moved: int, _size: int) -> None:
            nonlocal killed
            if moved > (killed + 1) * 10 * MIB and killed < 2:
                fleet.servers[killed].send(signal.SIGKILL)
                killed += 1

        pulls = [
            templates.pull_template(remote, "mac", tmp_path / f"out-{number}", progress=kill_twice)
            for number in range(4)
        ]
        for pulled in await asyncio.gather(*pulls):
            assert oci.digest_of(pulled.files[0].read_bytes()) == oci.digest_of(content)
        assert killed == 2


async def test_deleting_and_collecting_at_all_servers_while_others_push(fleet: Fleet, tmp_path: Path) -> None:
    """The same two tags and the same layers, pushed and deleted everywhere at once; collected without any grace."""
    contents = [f"layer {number}".encode() * 1000 for number in range(3)]
    done = asyncio.Event()
    pushed = 0

    async def pusher(number: int) -> None:
        nonlocal pushed
        own = random.Random(number)
        while not done.is_set():
            server = fleet.servers[own.randrange(3)]
            layers = own.sample(contents, 2)
            manifest = registry.image_manifest(storage.CONFIG, *layers)
            for layer in (storage.CONFIG, *layers):
                await server.push_blob("a", layer)
            status, _, answer = await server.put_manifest("a", own.choice(("v1", "v2")), manifest)
            assert status in (201, 404), answer  # 404: collected in between, for lack of any grace
            pushed += status == 201

    async def deleter() -> None:
        own = random.Random(99)
        while not done.is_set():
            await fleet.servers[own.randrange(3)].call("DELETE", f"/v2/a/manifests/{own.choice(('v1', 'v2'))}")
            await asyncio.sleep(0.02)

    async def puller() -> None:
        own = random.Random(7)
        while not done.is_set():
            server = fleet.servers[own.randrange(3)]
            status, _, manifest = await server.call("GET", f"/v2/a/manifests/{own.choice(('v1', 'v2'))}")
            if status != 200:
                continue
            for layer in oci.parse_manifest(manifest).layers:
                status, _, content = await server.call("GET", f"/v2/a/blobs/{layer.digest}")
                if status == 200:
                    assert oci.digest_of(content) == layer.digest
                else:
                    assert (await server.call("HEAD", f"/v2/a/manifests/{oci.digest_of(manifest)}"))[0] == 404

    async def collector() -> None:
        with storage.opened(fleet.base) as place:
            while not done.is_set():
                await place.collector(garbage.Periods(grace_s=-1.0, trash_s=-1.0)).run()

    working = [
        *(asyncio.create_task(pusher(number)) for number in range(3)),
        asyncio.create_task(puller()),
        *(asyncio.create_task(one()) for one in (deleter, collector, collector)),
    ]
    finished, until_s = set[asyncio.Task[None]](), time.monotonic() + 60
    while not finished and time.monotonic() < until_s:
        finished, _ = await asyncio.wait(working, timeout=8, return_when=asyncio.FIRST_EXCEPTION)
        if pushed:
            break
    done.set()
    await asyncio.gather(*working)
    assert not finished
    assert pushed > 0
    with storage.opened(fleet.base) as place:
        report = await verify.Verification(place.catalog, place.care, place.care).run()
        assert report.problems == ()
