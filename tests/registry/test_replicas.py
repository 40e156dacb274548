"""Registries with disks of their own: what is pushed to one is soon on all, byte for byte (safety S35 to S37)."""

import json
from pathlib import Path

from covey.client import oci
from tests.support import registry, replicas

TEMPLATE = "templates/7a3f5f5e-6d0c-4b87-9c15-3f1f2a3b4c5d"
CONFIG = registry.template_config()


async def push(server: registry.Server, tag: str, layer: bytes, name: str = "one", *, force: bool = False) -> str:
    """A version of the template: its manifest's digest."""
    manifest = registry.template_manifest(CONFIG, layer, name=name, tag=tag)
    for content in (CONFIG, layer):
        await server.push_blob(TEMPLATE, content)
    more = {"Covey_Force": "true"} if force else {}
    status, _, answer = await server.put_manifest(TEMPLATE, tag, manifest, **more)
    assert status == 201, answer
    return oci.digest_of(manifest)


async def tags(server: registry.Server, name: str = "one") -> dict[str, str]:
    """The template's tags as the server tells them, and their digests."""
    status, _, content = await server.call("GET", f"/registry/v2/vm?id={name}")
    body = json.loads(content)
    assert status == 200, content
    return {version["tag"]: version["digest"] for version in body.get("body", {}).get("versions", [])}


async def test_what_is_pushed_to_one_is_soon_on_all(tmp_path: Path) -> None:
    async with replicas.serving(tmp_path, 3) as (holder, *followers):
        digest = await push(holder, "v1", b"a layer " * 1000)
        await holder.push_image("other/image", "latest", b"another layer")
        for follower in followers:
            await follower.until_current(holder)
            assert await tags(follower) == {"v1": digest}
            assert await follower.log(TEMPLATE) == await holder.log(TEMPLATE)
            status, _, content = await follower.call("GET", f"/v2/{TEMPLATE}/blobs/{oci.digest_of(b'a layer ' * 1000)}")
            assert (status, content) == (200, b"a layer " * 1000)


async def test_deletes_and_reverts_are_entries_like_others(tmp_path: Path) -> None:
    async with replicas.serving(tmp_path, 2) as (holder, follower):
        await push(holder, "v1", b"first")
        await push(holder, "v2", b"second")
        await follower.until_current(holder)
        await holder.call("DELETE", "/registry/revert?id=one&tag=v2")
        await push(holder, "v3", b"third")
        await follower.until_current(holder)
        assert list(await tags(follower)) == ["v1", "v3"]
        await holder.call("DELETE", "/registry/vm?id=one")
        await follower.until_current(holder)
        _, _, content = await follower.call("GET", "/registry/v2/vm?id=one")
        assert json.loads(content)["message"] == "Not found"
