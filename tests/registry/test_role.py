"""Who takes pushes among registries with disks of their own, over real sockets (safety S33, S34, S37)."""

import json
from pathlib import Path

from covey.client import oci
from tests.support import registry, replicas

TEMPLATE = "templates/7a3f5f5e-6d0c-4b87-9c15-3f1f2a3b4c5d"
CONFIG = registry.template_config()


async def push(server: registry.Server, tag: str, layer: bytes, name: str = "one") -> tuple[int, str]:
    """A version of the template: the status, and what the answer says."""
    manifest = registry.template_manifest(CONFIG, layer, name=name, tag=tag)
    for content in (CONFIG, layer):
        digest = oci.digest_of(content)
        status, _, answer = await server.call("POST", f"/v2/{TEMPLATE}/blobs/uploads/?digest={digest}", content)
        if status != 201:
            return status, answer.decode()
    status, _, answer = await server.put_manifest(TEMPLATE, tag, manifest)
    return status, answer.decode()


async def pushed(server: registry.Server, tag: str, layer: bytes) -> None:
    """Until it is taken, as a person would."""

    async def taken() -> bool:
        status, text = await push(server, tag, layer)
        assert status in (201, 503), text
        return status == 201

    await replicas.until(taken)


async def versions(server: registry.Server) -> dict[str, int]:
    """Tags and their numbers."""
    status, _, content = await server.call("GET", "/registry/v2/vm?id=one")
    body = json.loads(content)
    assert status == 200, content
    return {version["tag"]: version["number"] for version in body.get("body", {}).get("versions", [])}


async def promote(server: registry.Server, *, force: bool = False) -> str:
    """ "" or why not."""
    secret = {"Covey_Peer_Secret": replicas.SECRET}
    body = json.dumps({"force": force}).encode()
    status, _, content = await server.call("POST", "/replica/v1/promote", body, **secret)
    assert status == 200, content
    return str(json.loads(content)["message"])


async def test_a_push_that_reaches_a_follower_is_passed_on(tmp_path: Path) -> None:
    async with replicas.serving(tmp_path, 3) as (holder, second, third):
        layer = b"a layer " * 100_000
        await pushed(second, "v1", layer)
        assert await versions(second) == await versions(third) == {"v1": 0}
        assert len(await holder.log(TEMPLATE)) == 1
        status, _headers, content = await third.call("GET", f"/v2/{TEMPLATE}/blobs/{oci.digest_of(layer)}")
        assert (status, content) == (200, layer)


async def test_the_role_is_handed_over(tmp_path: Path) -> None:
    async with replicas.serving(tmp_path, 3) as (first, second, third):
        await pushed(third, "v1", b"one")
        assert await promote(second) == ""
        await pushed(third, "v2", b"two")
        await pushed(first, "v3", b"three")
        for server in (first, second, third):
            await server.until_current(second)
            assert await versions(server) == {"v1": 0, "v2": 1, "v3": 2}
