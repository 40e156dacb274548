"""Who takes pushes among registries with disks of their own, by an operator's word (safety S33, S34, S37).

Each test has real processes; with etcd: `test_takeover.py`."""

import asyncio
import contextlib
import json
import os
import sys
from pathlib import Path

import aiohttp

from covey.client import oci
from tests.support import certificates, fleet, registry

TEMPLATE = "templates/7a3f5f5e-6d0c-4b87-9c15-3f1f2a3b4c5d"
CONFIG = registry.template_config()


async def push(server: registry.Server, tag: str, layer: bytes, name: str = "one") -> tuple[int, str]:
    """A version of the template: the status, and the version's number or what is wrong."""
    manifest = registry.template_manifest(CONFIG, layer, name=name, tag=tag)
    for content in (CONFIG, layer):
        digest = oci.digest_of(content)
        status, _, answer = await server.call("POST", f"/v2/{TEMPLATE}/blobs/uploads/?digest={digest}", content)
        if status != 201:
            return status, answer.decode()
    status, headers, answer = await server.put_manifest(TEMPLATE, tag, manifest)
    return status, headers[oci.VERSION_HEADER] if status == 201 else answer.decode()


async def pushed(server: registry.Server, tag: str, layer: bytes) -> int:
    """Until it is taken, as a person would; the version's number."""
    async with asyncio.timeout(fleet.DEADLINE_S):
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                status, text = await push(server, tag, layer)
                if status == 201:
                    return int(text)
                assert status in (404, 503), text  # 404: the role moved between the blobs and the manifest
            await asyncio.sleep(0.1)


async def versions(server: registry.Server) -> dict[str, int]:
    """Tags and their numbers; nothing from a server that has just broken off all connections, as after a freeze, or
    that cannot know now."""
    try:
        status, _, content = await server.call("GET", "/registry/v2/vm?id=one")
    except aiohttp.ClientError:
        return {}
    body = json.loads(content)
    assert status in (200, 503), content
    return {version["tag"]: version["number"] for version in body.get("body", {}).get("versions", [])}


async def until_all_show(servers: list[fleet.Member], wanted: dict[str, int]) -> None:
    async with asyncio.timeout(fleet.DEADLINE_S):
        while [await versions(server) for server in servers] != [wanted] * len(servers):
            await asyncio.sleep(0.1)


async def until_has(server: registry.Server, layer: bytes) -> None:
    """Until it answers with a layer of the template."""
    async with asyncio.timeout(fleet.DEADLINE_S):
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                status, _, content = await server.call("GET", f"/v2/{TEMPLATE}/blobs/{oci.digest_of(layer)}")
                assert status in (200, 503), content
                if status == 200:
                    assert content == layer
                    return
            await asyncio.sleep(0.1)


async def until_refused(server: registry.Server, *words: str) -> None:
    """Until a push gets 503 with all these words."""
    async with asyncio.timeout(fleet.DEADLINE_S):
        while True:
            status, text = await push(server, "refused", b"refused")
            if status == 503 and all(word in text for word in words):
                return
            await asyncio.sleep(0.1)


async def test_a_push_that_reaches_a_follower_is_passed_on_once(tmp_path: Path) -> None:
    async with fleet.running(tmp_path, 2) as (holder, follower):
        layer = b"a layer " * 300_000
        assert await pushed(follower, "v1", layer) == 0
        await until_all_show([follower], {"v1": 0})
        await until_has(follower, layer)
        assert len(holder.entries(TEMPLATE)) == 1

        status, code, text = await follower.error(
            "POST", f"/v2/{TEMPLATE}/blobs/uploads/", Covey_Forwarded="1 http://127.0.0.1:1"
        )
        assert (status, code) == (503, "UNAVAILABLE")
        assert holder.known_as in text

        await holder.kill()
        status, code, text = await follower.error("POST", f"/v2/{TEMPLATE}/blobs/uploads/")
        assert (status, code) == (503, "UNAVAILABLE")
        assert holder.known_as in text
        status, _, content = await follower.call("DELETE", "/registry/vm?id=one")
        assert status == 503
        assert holder.known_as in content.decode()


async def test_an_upload_goes_on_through_any_server(tmp_path: Path) -> None:
    async with fleet.running(tmp_path, 3) as (holder, second, third):
        content = os.urandom(300_000)
        digest = oci.digest_of(content)
        await pushed(second, "v1", b"one")
        status, headers, _ = await second.call("POST", "/v2/a/blobs/uploads/")
        assert status == 202
        session = headers["Location"]
        assert session.startswith("/v2/a/blobs/uploads/")
        status, headers, _ = await third.call("PATCH", session, content[:100_000], Content_Range="0-99999")
        assert (status, headers["Range"]) == (202, "0-99999")
        status, headers, _ = await second.call("GET", session)
        assert (status, headers["Range"]) == (204, "0-99999")
        status, _, _ = await second.call("PATCH", session, content[100_000:200_000], Content_Range="1-100000")
        assert status == 416
        assert (await third.call("PUT", f"{session}?digest={digest}", content[100_000:]))[0] == 201
        status, headers, _ = await third.call("HEAD", f"/v2/a/blobs/{digest}")  # no entry names it yet
        assert (status, headers["Content-Length"]) == (200, "300000")
        assert (await third.call("HEAD", f"/v2/a/blobs/{oci.digest_of(b'no')}"))[0] == 404
        assert not [path for path in (third.base / "uploads").rglob("*") if path.is_file()]
        assert (await holder.call("GET", f"/v2/a/blobs/{digest}"))[0] == 200


async def test_the_role_is_handed_over(tmp_path: Path) -> None:
    async with fleet.running(tmp_path, 3) as (first, second, third):
        assert await pushed(third, "v1", b"one") == 0
        said = await _promote(second.known_as, third.environ)
        assert said == (0, f"{second.known_as} takes pushes now (term 2)")
        assert await pushed(third, "v2", b"two") == 1
        assert await pushed(first, "v3", b"three") == 2
        await until_all_show([first, second, third], {"v1": 0, "v2": 1, "v3": 2})
        await second.kill()
        await second.start()  # it still is the one, and knows it
        assert await pushed(first, "v4", b"four") == 3
        code, text = await _promote("http://127.0.0.1:1", third.environ)
        assert code == 1
        assert "is none of the set" in text


async def _promote(url: str, environ: dict[str, str]) -> tuple[int, str]:
    """`covey registry promote`: exit status, and what it says."""
    return await _registry("promote", url, environ=environ)


async def _registry(*words: str, environ: dict[str, str]) -> tuple[int, str]:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "covey", "registry", *words),
        env={**os.environ, **environ},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await child.communicate()
    assert child.returncode is not None
    return child.returncode, said.decode().strip()


async def test_what_no_manifest_names_ends_with_the_reign(tmp_path: Path) -> None:
    """A blob that was deleted at the holder does not come back through a server that held the role before (S35)."""
    async with fleet.running(tmp_path, 2) as (first, second):
        await pushed(first, "v1", b"one")
        await until_all_show([first, second], {"v1": 0})
        digest = oci.digest_of(b"a blob")
        path = f"/v2/{TEMPLATE}/blobs/{digest}"
        assert await first.push_blob(TEMPLATE, b"a blob") == digest
        assert (await second.call("HEAD", path))[0] == (await first.call("GET", path))[0] == 200
        assert await second.promote() == ""
        assert (await first.call("HEAD", path))[0] == (await first.call("GET", path))[0] == 404
        assert await second.push_blob(TEMPLATE, b"a blob") == digest
        assert (await first.call("DELETE", path))[0] == 202
        assert await first.promote() == ""
        for one in (first, second):
            assert (await one.call("HEAD", path))[0] == (await one.call("GET", path))[0] == 404
            await until_has(one, b"one")
        await first.push_blob(TEMPLATE, b"a blob")
        await first.kill()
        await first.start()  # it is the same one, and knows it
        assert (await first.call("HEAD", path))[0] == 200


async def test_a_promote_that_would_lose_something_is_refused(tmp_path: Path) -> None:
    async with fleet.running(tmp_path, 3) as servers:
        first, second, third = servers
        await pushed(first, "v1", b"one")
        await until_all_show(servers, {"v1": 0})
        await first.cut()
        for one in (second, third):
            await one.cut()
        assert await pushed(first, "v2", b"two") == 1  # nobody else has it yet
        await first.kill()
        for one in (second, third):
            await one.heal()
        refused = await second.promote()
        assert first.known_as in refused
        assert "--force" in refused
        assert (await push(third, "v3", b"three"))[0] == 503
        assert await second.promote(force=True) == ""
        assert await pushed(third, "v3", b"three") == 1
        await first.heal()
        await first.start()
        await until_all_show(servers, {"v1": 0, "v3": 1})
        assert [path for path in first.base.rglob("*") if path.is_file() and b'"tag":"v2"' in path.read_bytes()]
        assert await pushed(first, "v4", b"four") == 2  # passed on: it knows that it is not the one any more


async def test_two_holders_say_so_and_take_nothing(tmp_path: Path) -> None:
    async with fleet.running(tmp_path, 3) as servers:
        _, second, third = servers
        await pushed(second, "v1", b"one")
        await until_all_show(servers, {"v1": 0})
        for one in servers:
            await one.cut()
        assert await second.promote(force=True) == await third.promote(force=True) == ""
        assert await pushed(second, "v2", b"two") == await pushed(third, "v3", b"three") == 1
        async with asyncio.timeout(fleet.DEADLINE_S):
            while not (await second.says()).get("alone_s"):
                await asyncio.sleep(0.2)
        for one in servers:
            await one.heal()
        for one in (second, third):
            await until_refused(one, "covey registry promote", second.known_as, third.known_as)
        assert "two registries hold one term" in second.log() + third.log()
        assert await third.promote() == ""
        await pushed(second, "v4", b"four")
        async with asyncio.timeout(fleet.DEADLINE_S):
            while [{"v1", "v3", "v4"} <= (await versions(one)).keys() for one in servers] != [True] * 3:
                await asyncio.sleep(0.1)
        assert "v2" not in await versions(second)
        lying = [path for path in second.base.rglob("*") if path.is_file() and b'"tag":"v2"' in path.read_bytes()]
        assert lying  # set aside, not lost


async def test_a_new_set_begins_when_all_are_there(tmp_path: Path) -> None:
    async with fleet.running(tmp_path, 2, start=False) as (first, second):
        await first.start()
        await until_refused(first, f"{second.known_as} must be heard")
        await second.start()
        assert await pushed(first, "v1", b"one") == 0
        await until_all_show([first, second], {"v1": 0})

        await first.kill()  # and its disk is lost
        first.base.rename(tmp_path / "lost")
        await first.start()
        status, text = await push(first, "v2", b"two")
        assert status == 503, text
        await until_all_show([second], {"v1": 0})
        assert await second.promote(force=True) == ""
        assert await pushed(first, "v2", b"two") == 1
        await until_all_show([first, second], {"v1": 0, "v2": 1})


async def test_a_write_only_registry_feeds_its_peers_and_serves_no_pulls(tmp_path: Path) -> None:
    async with fleet.running(tmp_path, 2, start=False) as (pushes, pulls):
        pushes.environ["COVEY_REGISTRY_MODE"] = "write-only"
        await asyncio.gather(pushes.start(), pulls.start())
        layer = b"a layer"
        await pushed(pushes, "v1", layer)
        await until_all_show([pushes, pulls], {"v1": 0})
        for path in (f"/v2/{TEMPLATE}/blobs/{oci.digest_of(layer)}", f"/v2/{TEMPLATE}/manifests/v1"):
            status, code, text = await pushes.error("GET", path)
            assert (status, code) == (403, "DENIED")
            assert "write-only" in text
            assert (await pushes.call("HEAD", path))[0] == 200
            assert (await pushes.call("GET", path, Covey_Peer_Secret="a guess"))[0] == 403
            assert (await pushes.call("GET", path, Covey_Peer_Secret=fleet.SECRET))[0] == 200
            assert (await pulls.call("GET", path))[0] == 200


async def test_only_peers_speak_of_the_role(tmp_path: Path) -> None:
    async with fleet.running(tmp_path, 2) as (_, second):
        secrets: tuple[dict[str, str], ...] = ({}, {"Covey_Peer_Secret": "a guess"})
        for path in ("promote", "role"):
            for secret in secrets:
                assert (await second.call("POST", f"/replica/v1/{path}", b'{"force":true}', **secret))[0] == 401
        assert fleet.SECRET not in second.log()


async def test_a_push_is_answered_when_two_have_it(tmp_path: Path) -> None:
    async with fleet.running(tmp_path, 3, REGISTRY_PUSH_COPIES="2") as servers:
        first, second, third = servers
        layer = b"a layer " * 50_000
        assert await pushed(first, "v1", layer) == 0
        name = oci.digest_of(layer).partition(":")[2]
        assert any(list((one.base / "blobs").rglob(name)) for one in (second, third))
        for one in (second, third):
            await one.cut()
            one.freeze()
        await until_refused(first, "REGISTRY_PUSH_COPIES")
        for one in (second, third):
            one.thaw()
            await one.heal()
        assert await pushed(first, "refused", b"refused") == 1  # the same version, now that another one has it
        await until_all_show(servers, {"v1": 0, "refused": 1})


async def test_a_holder_that_stood_still_confirms_nothing_that_is_set_aside(tmp_path: Path) -> None:
    """Between the link of its entry and the answer; another one is promoted by force meanwhile, and cannot tell it."""
    async with fleet.running(tmp_path, 3) as servers:
        first, second, third = servers
        await pushed(first, "v1", b"one")
        await until_all_show(servers, {"v1": 0})
        await first.terminate()
        await first.start(failpoints="registry.entry.unsettled=stop")
        sleeping = asyncio.create_task(push(first, "v2", b"the old one's"))
        async with asyncio.timeout(fleet.DEADLINE_S):
            while len(first.entries(TEMPLATE)) < 2:
                await asyncio.sleep(0.05)
        while refused := await second.promote(force=True):
            assert "HTTP" in refused, refused
        assert await pushed(third, "v2", b"the new one's") == 1
        first.thaw()
        with contextlib.suppress(aiohttp.ClientError):
            assert (await sleeping)[0] == 503
        await until_all_show(servers, {"v1": 0, "v2": 1})
        assert await pushed(first, "v3", b"three") == 2


async def test_what_a_follower_has_is_not_given_up_by_force(tmp_path: Path) -> None:
    """Under REGISTRY_PUSH_COPIES=2 somebody beside the holder has what was answered: who is promoted asks for it."""
    async with fleet.running(tmp_path, 3, REGISTRY_PUSH_COPIES="2") as (first, second, third):
        await pushed(first, "v1", b"one")
        await until_all_show([first, second, third], {"v1": 0})
        await third.kill()
        await pushed(first, "v2", b"two")
        await first.kill()
        await second.cut()  # so that the third one does not follow it by itself
        await third.start()
        await second.heal()
        while refused := await third.promote(force=True):
            assert "HTTP" in refused, refused
        await until_all_show([second, third], {"v1": 0, "v2": 1})
        await until_has(third, b"two")
        assert not list(second.base.rglob("_aside.*"))


async def test_a_set_speaks_https(tmp_path: Path) -> None:
    made = certificates.make(tmp_path / "tls")
    async with fleet.running(tmp_path, 3, tls=made) as servers:
        first, second, third = servers
        layer = b"a layer " * 300_000
        assert await pushed(third, "v1", layer) == 0  # passed on
        await until_all_show(servers, {"v1": 0})
        for one in servers:
            await until_has(one, layer)
        assert (await _promote(second.known_as, third.environ))[0] == 0
        assert await pushed(first, "v2", b"two") == 1
        await until_all_show(servers, {"v1": 0, "v2": 1})
        async with asyncio.timeout(fleet.DEADLINE_S):
            while (told := await _registry("status", environ=third.environ))[0]:
                await asyncio.sleep(0.5)
        assert f"{second.known_as}  takes pushes" in told[1]
        for verb in (("status",), ("promote", first.known_as)):
            code, text = await _registry(*verb, environ={**third.environ, "COVEY_CA_CERT": ""})
            assert code == 1
            assert "certificate" in text.lower()
        await third.terminate()
        third.environ["COVEY_CA_CERT"] = ""
        await third.start()
        assert (await push(third, "v3", b"three"))[0] == 503
        async with asyncio.timeout(fleet.DEADLINE_S):
            while "certificate" not in str(await third.says()).lower():
                await asyncio.sleep(0.1)
