"""Registries with disks of their own: what is pushed to one is soon on all, byte for byte (safety S35 to S37)."""

import json
from pathlib import Path

from covey.client import oci
from covey.registry import roll_call
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


async def test_a_tag_that_was_pushed_can_be_started_at_once(tmp_path: Path) -> None:
    """Through a follower that has heard of nothing yet: what it lacks it asks for while it answers."""
    layer = bytes(range(256)) * 2000
    async with (
        replicas.places(tmp_path, 2) as places,
        replicas.one(places, 0) as holder,
        replicas.one(places, 1, follows=False) as follower,
    ):
        digest = await push(holder, "v1", layer)
        resolved = await body(follower, "/registry/vm/info?id=one&tag=v1")
        assert resolved["digest"] == digest
        status, _, manifest = await follower.call("GET", f"/v2/{TEMPLATE}/manifests/{digest}")
        assert (status, oci.digest_of(manifest)) == (200, digest)
        path = f"/v2/{TEMPLATE}/blobs/{oci.digest_of(layer)}"
        status, headers, part = await follower.call("GET", path, Range="bytes=1000-1999")
        assert (status, headers["Content-Range"], part) == (206, "bytes 1000-1999/512000", layer[1000:2000])
        status, headers, _ = await follower.call("HEAD", path)
        assert (status, headers["Content-Length"]) == (200, "512000")
        status, _, content = await follower.call("GET", path)
        assert (status, content) == (200, layer)
        assert oci.digest_of(layer).partition(":")[2] in follower.blobs()

        later = await push(holder, "v2", layer)
        assert (await body(follower, "/registry/vm/info?id=one"))["digest"] == later  # the newest one
        status, _, content = await follower.call("GET", f"/v2/{TEMPLATE}/manifests/v3")
        assert status == 404, content  # the holder was asked: it can know


async def test_only_a_registry_that_can_know_says_no(tmp_path: Path) -> None:
    async with replicas.places(tmp_path, 2) as places, replicas.one(places, 1) as follower:
        async with replicas.one(places, 0) as holder:
            digest = await push(holder, "v1", b"a layer")
            await follower.until_current(holder)
        assert await tags(follower) == {"v1": digest}
        for path in ("/registry/vm/info?id=one&tag=v2", f"/v2/{TEMPLATE}/manifests/v2", "/registry/v2/vm?id=two"):
            status, _, content = await follower.call("GET", path)
            assert status == 503, (path, content)
            assert places[0].url in content.decode(), content
        status, _, content = await follower.call("GET", f"/v2/{TEMPLATE}/manifests/v1")
        assert (status, oci.digest_of(content)) == (200, digest)

        async def told() -> bool:
            return "does not answer" in str(await follower.trouble())

        await replicas.until(told)


async def test_peers_alone_may_follow(tmp_path: Path) -> None:
    async with replicas.serving(tmp_path, 2) as (holder, _):
        for path in ("word", "feed", "inventory", f"log/{TEMPLATE}", f"blobs/{oci.digest_of(b'')}"):
            for headers in ({}, {"Covey_Peer_Secret": "a secret for tests onlx"}):
                status, _, content = await holder.call("GET", f"/replica/v1/{path}", **headers)
                assert status == 401, (path, content)
                assert replicas.SECRET not in content.decode()
        status, _, _ = await holder.call("GET", "/replica/v1/log/../../x", Covey_Peer_Secret=replicas.SECRET)
        assert status in (400, 404)


async def body(server: registry.Server, path: str) -> dict[str, str]:
    status, _, content = await server.call("GET", path)
    assert status == 200, content
    answer = json.loads(content)
    assert answer["status"] == "OK", answer
    found: dict[str, str] = answer["body"]
    return found


async def test_how_all_servers_stand_is_told(tmp_path: Path) -> None:
    async with replicas.places(tmp_path, 3) as places, replicas.one(places, 0) as holder:
        async with replicas.one(places, 1) as follower:
            await push(holder, "v1", b"a layer")
            await follower.until_current(holder)

            async def told() -> bool:
                answers = await roll_call.ask([place.url for place in places])
                seen = [one.seen for one in answers]
                assert answers[2].trouble
                return all(one and one.holder == places[0].url and one.lag_s == 0 for one in seen[:2])

            await replicas.until(told)
            answers = await roll_call.ask([place.url for place in places])
            assert [one.seen.mine for one in answers if one.seen] == [True, False]
            assert roll_call.disputes(answers) == []
        answers = await roll_call.ask([places[1].url])
        assert answers[0].seen is None
