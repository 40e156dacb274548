"""A registry dies or freezes under a pull: another one goes on with the same ranges, and the digest is right.

How soon is measured by `python -m bench.midpull`; here a pull that waited for the silent server would not end in time.
"""

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from covey import model
from covey.agent import images
from covey.client import http, oci, packing
from covey.client import registry as client
from tests.support import proxy, registry

MIB = 1 << 20
SIZE = 48 * MIB
TEMPLATE = "7a3f5f5e-6d0c-4b87-9c15-3f1f2a3b4c5d"
REPOSITORY = f"templates/{TEMPLATE}"
WITHIN_S = 60.0
FOREVER_S = 600.0  # the client's own limits of silence and patience, which must not be needed


async def pushed(server: registry.Server, layer: bytes) -> model.Digest:
    config = registry.template_config()
    manifest = registry.template_manifest(config, layer, name="one", tag="v1")
    for content in (config, layer):
        await server.push_blob(REPOSITORY, content)
    status, _, answer = await server.put_manifest(REPOSITORY, "v1", manifest)
    assert status == 201, answer
    return oci.digest_of(manifest)


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[registry.Process, registry.Process]]:
    """Two processes of one registry: what one has the other has too."""
    async with registry.process(tmp_path / "base") as one, registry.process(tmp_path / "base") as two:
        yield one, two


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_a_pull_goes_on_where_it_stood(
    pair: tuple[registry.Process, registry.Process], tmp_path: Path, fault: signal.Signals
) -> None:
    layer = os.urandom(SIZE)
    dying, living = pair
    await pushed(living, layer)
    stood = 0

    def hurt(done: int) -> None:
        nonlocal stood
        if not stood and done >= 4 * MIB:
            stood = done
            dying.send(fault)

    async with proxy.before(living.port) as counted, asyncio.timeout(WITHIN_S):
        urls = [dying.url, f"http://{counted.address}"]
        async with http.Endpoints(urls, timeout_s=FOREVER_S) as endpoints:
            remote = client.Registry(endpoints, patience_s=FOREVER_S, stall_s=FOREVER_S, range_bytes=8 * MIB)
            target = tmp_path / "layer"
            await remote.fetch(REPOSITORY, oci.digest_of(layer), SIZE, target, progress=hurt)
        assert packing.hash_file(target) == (oci.digest_of(layer), SIZE)
        assert stood
        assert 0 < counted.down_bytes < SIZE - stood + MIB  # nothing that was here is moved again


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_a_node_gets_its_template_although_its_registry_went_away(
    pair: tuple[registry.Process, registry.Process], tmp_path: Path, fault: signal.Signals
) -> None:
    layer = os.urandom(SIZE)
    dying, living = pair
    digest = await pushed(living, layer)
    opened: list[http.Endpoints] = []

    def connect(urls: tuple[str, ...]) -> images.Source:
        opened.append(http.Endpoints(urls, timeout_s=FOREVER_S))
        return client.Registry(opened[-1], patience_s=FOREVER_S, stall_s=FOREVER_S)

    cache = images.Cache(tmp_path / "images", connect, reserve_bytes=0)
    cache.from_registries((dying.url, living.url))
    dying.send(fault)
    async with asyncio.timeout(WITHIN_S):
        image = await cache.get("a VM", model.TemplateId(TEMPLATE), digest, lambda fraction: None)
    assert cache.held() == (digest,)
    assert packing.hash_file(Path(image.layers[0]))[0] == oci.digest_of(layer)
    for endpoints in opened:
        await endpoints.close()


async def test_servers_that_are_only_slow_are_waited_for(tmp_path: Path) -> None:
    """Both let a download wait for longer than one is left alone for: it must not go to and fro for ever."""
    content = b"slow, but right"
    asked = itertools.count()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"/blobs/" in head:
            next(asked)
            await asyncio.sleep(2.5)
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
        await writer.drain()
        writer.close()

    servers = [await asyncio.start_server(serve, "127.0.0.1", 0) for _ in range(2)]
    urls = [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers]
    async with asyncio.timeout(WITHIN_S), http.Endpoints(urls) as endpoints:
        remote = client.Registry(endpoints)
        await remote.fetch(REPOSITORY, oci.digest_of(content), len(content), tmp_path / "layer")
    assert next(asked) > 1  # it did look elsewhere
    for server in servers:
        server.close()
        await server.wait_closed()
