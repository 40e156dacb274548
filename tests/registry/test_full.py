"""A full disk: a push fails cleanly, pulls go on, the server stays ready and says so, and deleting makes room again."""

import asyncio
import json
from pathlib import Path

from covey.client import oci
from tests.support import disk, fleet, registry

LAYER = bytes(range(256)) * 16_000  # 4 MB
MIB = 1 << 20


async def test_a_full_disk_refuses_pushes_and_nothing_else(tmp_path: Path) -> None:
    small = disk.Small(tmp_path / "small", 48)
    base = small.folder / "base"
    async with registry.process(base, within=small.within(), reserved_bytes=8 * MIB) as server:
        await server.push_image("a", "v1", LAYER)
        digest = oci.digest_of(LAYER)
        large = bytes(60 * MIB)
        path = f"/v2/a/blobs/uploads/?digest={oci.digest_of(large)}"
        status, code, message = await server.error("POST", path, large)
        assert (status, code) == (507, "DISK_FULL")
        assert "the registry's disk is full" in message
        assert not [name for name in small.files(server.pid, "base/uploads") if "data" in name]

        filler = bytes(1 * MIB)
        number = 0
        while True:
            filler = number.to_bytes(4, "big") + filler[4:]
            where = f"/v2/a/blobs/uploads/?digest={oci.digest_of(filler)}"
            status, _, _ = await server.call("POST", where, filler)
            if status != 201:
                break
            number += 1
        assert status == 507
        assert number > 10
        status, _, body = await server.call("GET", "/readyz")
        assert status == 200
        assert b"the disk is full: pushes are refused, pulls go on" in body
        assert json.loads((await server.call("GET", "/registry/status"))[2])["body"]["storage"]["pushes"] is False
        assert (await server.call("GET", f"/v2/a/blobs/{digest}"))[2] == LAYER
        assert (await server.call("DELETE", "/v2/a/manifests/v1"))[0] == 202  # the reserve is for this
        small.resize(server.pid, 128)
        await server.push_image("a", "v2", LAYER)
        assert b"the disk is full" not in (await server.call("GET", "/readyz"))[2]


async def test_a_follower_whose_disk_is_full_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """It fetches what fits, passes the rest on, is ready, says so, and ends with everything."""
    small = disk.Small(tmp_path / "small", 24)
    async with fleet.running(tmp_path, 2, start=False, REGISTRY_RESERVED_SPACE="8") as (holder, follower):
        follower.base, follower.within = small.folder / "base", small.within()
        follower.environ["COVEY_BASE_PATH"] = str(follower.base)
        await asyncio.gather(holder.start(), follower.start())
        large = [bytes([number]) * (9 * MIB) for number in (1, 2)]
        async with asyncio.timeout(fleet.DEADLINE_S):
            while not await holder.holds() or (await holder.call("POST", "/v2/a/blobs/uploads/"))[0] != 202:
                await asyncio.sleep(0.1)  # a new set takes pushes once its servers have heard each other
        for number, layer in enumerate(large):
            await holder.push_image("a", f"v{number}", layer)

        async def until(true: str, *, said: bool) -> None:
            async with asyncio.timeout(fleet.DEADLINE_S):
                while (true in str(await follower.says())) != said:
                    await asyncio.sleep(0.1)

        await until("the registry's disk is full", said=True)
        await holder.push_image("a", "small", b"small")
        for tag, layer in (("v0", large[0]), ("v1", large[1]), ("small", b"small")):
            assert (await follower.call("GET", f"/v2/a/manifests/{tag}"))[0] == 200
            assert (await follower.call("GET", f"/v2/a/blobs/{oci.digest_of(layer)}"))[2] == layer
        assert (await follower.call("GET", "/readyz"))[0] == 200
        assert follower.child is not None
        small.resize(follower.child.pid, 96)
        await until("the registry's disk is full", said=False)
        async with asyncio.timeout(fleet.DEADLINE_S):
            while (await follower.says())["missing_blobs"]:
                await asyncio.sleep(0.1)
        for layer in large:
            assert small.files(follower.child.pid, "base/blobs/sha256")[_place(layer)] == len(layer)


def _place(content: bytes) -> str:
    name = oci.digest_of(content).partition(":")[2]
    return f"{name[:2]}/{name}"
