"""One of two registries dies or freezes: what is read comes from the other one, at once."""

import asyncio
import time
from pathlib import Path

import pytest

from covey.client import http, oci, registry
from tests.support import proxy
from tests.support import registry as server

TEMPLATE = "templates/9c8b3f0e-2f4f-4d57-9a3c-0d7b8f3c1a55"


async def _pushed(to: server.Server, layer: bytes) -> str:
    """A template of one layer, tagged v1: its digest."""
    config = server.template_config()
    async with server.talking(to) as writer:
        for blob in (config, layer):
            await writer.upload_bytes(TEMPLATE, blob)
        content = server.template_manifest(config, layer, name="t", tag="v1")
        return (await writer.push_manifest(TEMPLATE, "v1", content))[0]


@pytest.mark.parametrize("first", ["manifest", "blob"])
@pytest.mark.parametrize("mood", [proxy.Mood.CLOSED, proxy.Mood.DEAF], ids=["dead", "frozen"])
async def test_reading_goes_on_at_the_other_registry(tmp_path: Path, mood: proxy.Mood, first: str) -> None:
    layer = b"layer " * 1000
    async with server.serving(tmp_path / "data") as only, proxy.before(only.port) as nasty:
        digest = await _pushed(only, layer)
        await nasty.turn(mood)
        urls = [f"http://{nasty.address}", only.url]
        async with http.Endpoints(urls) as endpoints:
            reader = registry.Registry(endpoints)
            began_s = time.monotonic()
            if first == "manifest":
                assert (await reader.manifest(TEMPLATE, "v1"))[1] == digest
            target = tmp_path / "layer"
            await reader.fetch(TEMPLATE, oci.digest_of(layer), len(layer), target)
            assert target.read_bytes() == layer
            assert await reader.has_blob(TEMPLATE, oci.digest_of(layer))
            assert len(await reader.templates()) == 1
            assert time.monotonic() - began_s < (12 if first == "manifest" else 25)


async def test_a_manifest_does_not_wait_for_a_frozen_registry_when_no_second_copy_may_be_sent(tmp_path: Path) -> None:
    """Second copies of questions are few on the whole; a node that asks little may have none left."""
    layer = b"a layer"
    async with server.serving(tmp_path / "data") as only, proxy.before(only.port) as nasty:
        digest = await _pushed(only, layer)
        await nasty.turn(proxy.Mood.DEAF)
        async with http.Endpoints([f"http://{nasty.address}", only.url]) as endpoints, asyncio.timeout(60):
            while endpoints._balance.take_copy():
                pass
            reader = registry.Registry(endpoints, patience_s=600, stall_s=600)
            assert (await reader.manifest(TEMPLATE, "v1"))[1] == digest
