"""The push role with etcd: taken over by itself, and fenced before every entry (safety S33, S34). Real processes, real
etcd; more histories: `python -m tests.reigns.real --histories 20`."""

import asyncio
import base64
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from covey.client import oci
from tests.registry.test_role import TEMPLATE, push, pushed, until_all_show, until_has
from tests.reigns import real
from tests.support import etcd, fleet

SEEDS = range(1, int(os.environ["COVEY_REAL_REIGNS"]) + 1) if "COVEY_REAL_REIGNS" in os.environ else (1, 4)
STORM_S = 8.0


@pytest.fixture
def cluster() -> Iterator[etcd.Cluster]:
    with etcd.running() as made:
        yield made


async def test_a_frozen_holder_wakes_up_in_the_middle_of_a_push(tmp_path: Path, cluster: etcd.Cluster) -> None:
    """It stops right before the acceptance of its entry, and goes on when another one has held the role for a while."""
    async with fleet.running(tmp_path, 3, cluster.endpoints) as servers:
        old = await fleet.holder(servers)
        await pushed(old, "v1", b"one")
        await until_all_show(servers, {"v1": 0})
        await old.terminate()
        await old.start(failpoints="registry.entry.unaccepted=stop")
        assert await _promoted(old)
        sleeping = asyncio.create_task(push(old, "v2", b"the old one's"))
        new = await fleet.holder([one for one in servers if one is not old])
        assert await pushed(new, "v2", b"the new one's") == 1
        old.thaw()
        with contextlib.suppress(aiohttp.ClientError):
            assert (await sleeping)[0] in (
                404,
                503,
            )  # 404: repeated by its client, at the new one, which lacks its blobs
        await until_all_show(servers, {"v1": 0, "v2": 1})
        assert await pushed(old, "v3", b"three") == 2
        await until_all_show(servers, {"v1": 0, "v2": 1, "v3": 2})
        logs = [one.entries(TEMPLATE) for one in servers]
        assert logs[0] == logs[1] == logs[2]
        assert oci.digest_of(b"the old one's") not in str(logs)


async def _promoted(server: fleet.Member) -> bool:
    async with asyncio.timeout(fleet.DEADLINE_S):
        while why := await server.promote():
            assert "did not take" in why or "HTTP" in why or "etcd" in why, why
    return True


async def test_what_was_accepted_survives_the_holder(tmp_path: Path, cluster: etcd.Cluster) -> None:
    """It dies between the acceptance and the link: nobody has the entry but etcd, and nobody but it has the bytes."""
    async with fleet.running(tmp_path, 3, cluster.endpoints) as servers:
        old = await fleet.holder(servers)
        await pushed(old, "v1", b"one")
        await until_all_show(servers, {"v1": 0})
        await old.terminate()
        await old.start(failpoints="registry.entry.accepted=kill")
        assert await _promoted(old)
        with pytest.raises(aiohttp.ClientError):
            await push(old, "v2", b"two")
        await old.kill()
        assert len(old.entries(TEMPLATE)) == 1
        others = [one for one in servers if one is not old]
        new = await fleet.holder(others)
        await until_all_show([new], {"v1": 0, "v2": 1})
        status, _, content = await new.call("GET", f"/v2/{TEMPLATE}/blobs/{oci.digest_of(b'two')}")
        assert status == 503, content
        assert old.known_as in content.decode()
        assert await pushed(new, "v3", b"three") == 2  # the number is not given again
        await old.start()
        await until_all_show(servers, {"v1": 0, "v2": 1, "v3": 2})
        await until_has(new, b"two")


async def test_a_holder_without_etcd_takes_nothing_and_serves_on(tmp_path: Path, cluster: etcd.Cluster) -> None:
    async with fleet.running(tmp_path, 2, cluster.endpoints, REGISTRY_WORKERS="2") as servers:
        old = await fleet.holder(servers)
        await pushed(old, "v1", b"one")
        await until_all_show(servers, {"v1": 0})
        await old.cut()
        new = await fleet.holder([one for one in servers if one is not old])
        assert await pushed(new, "v2", b"two") == 1
        status, text = await push(old, "v2", b"not two")
        assert status == 503, text
        await until_has(old, b"one")
        await old.heal()
        assert await pushed(old, "v3", b"three") == 2
        await until_all_show(servers, {"v1": 0, "v2": 1, "v3": 2})
        keys = cluster.ctl("get", "--prefix", "/covey-registry/", "-w", "json")
        assert {"role", "term", "format"} <= {_key(kv) for kv in json.loads(keys)["kvs"]}


async def test_who_may_hold_the_role_no_more_does_not_say_no(tmp_path: Path, cluster: etcd.Cluster) -> None:
    """Two servers that etcd is cut off from believe in the old holder, one of them that it is this one itself; a third
    one holds the role and has taken a push. Neither says that the new tag is not there (safety S14)."""
    async with fleet.running(tmp_path, 3, cluster.endpoints, REGISTRY_WORKERS="2") as servers:
        old = await fleet.holder(servers)
        await pushed(old, "v1", b"one")
        await until_all_show(servers, {"v1": 0})
        await old.cut(peers=False)
        new = await fleet.holder(servers, but=old)
        other = next(one for one in servers if one not in (old, new))
        await other.cut(peers=False)
        assert await pushed(new, "v2", b"two") == 1
        await new.cut(etcd=False)
        for one in (old, other):
            for _ in range(10):  # either process may answer
                status, _, content = await one.call("GET", "/registry/vm/info?id=one&tag=v2", Connection="close")
                assert status == 503 or json.loads(content)["status"] == "OK", content
        for one in servers:
            await one.heal()
        await until_all_show(servers, {"v1": 0, "v2": 1})
        status, _, content = await old.call("GET", "/registry/vm/info?id=one&tag=v3")
        assert status == 200, content
        assert json.loads(content)["message"] == "No such tag v3"


async def test_etcd_is_restored_from_an_older_backup(tmp_path: Path, cluster: etcd.Cluster) -> None:
    """Another server has what etcd does not know of any more: who takes over asks for it first (safety S34)."""
    async with fleet.running(tmp_path, 3, cluster.endpoints) as servers:
        old = await fleet.holder(servers)
        await pushed(old, "v1", b"one")
        await until_all_show(servers, {"v1": 0})
        cluster.save(tmp_path / "backup")
        has, lacks = (one for one in servers if one is not old)
        await lacks.kill()
        await pushed(old, "v2", b"two")
        await until_all_show([has], {"v1": 0, "v2": 1})
        await old.kill()
        await has.cut(peers=False)  # so it is not the one that takes over
        cluster.restore(tmp_path / "backup")
        await lacks.start()
        assert await fleet.holder([lacks]) is lacks
        await has.heal()
        await until_all_show([has, lacks], {"v1": 0, "v2": 1})
        assert await pushed(has, "v3", b"three") == 2
        await old.start()
        await until_all_show(servers, {"v1": 0, "v2": 1, "v3": 2})
        assert not [path for one in servers for path in one.base.rglob("_aside.*")]


async def test_what_was_given_up_does_not_come_back_over_what_came_since(tmp_path: Path, cluster: etcd.Cluster) -> None:
    """By force, and then the one that has it is back alone, with more entries than anybody else (decision 30)."""
    async with fleet.running(tmp_path, 2, cluster.endpoints) as servers:
        old = await fleet.holder(servers)
        (new,) = (one for one in servers if one is not old)
        await pushed(old, "v1", b"one")
        await until_all_show(servers, {"v1": 0})
        await new.kill()
        for number in range(1, 4):
            assert await pushed(old, f"old{number}", b"old %d" % number) == number
        await old.kill()
        cluster.ctl("del", "--prefix", "/covey-registry/accepted/")  # as if they were too many to be kept
        await new.start()
        async with asyncio.timeout(fleet.DEADLINE_S):
            while why := await new.promote(force=True):
                assert "did not take" in why or "HTTP" in why or "etcd" in why, why
        assert await pushed(new, "new1", b"new 1") == 1
        await new.kill()
        await old.start()
        async with asyncio.timeout(fleet.DEADLINE_S):
            while "given up by force" not in old.log():
                assert not await old.holds()
                await asyncio.sleep(0.2)
        assert (await push(old, "old4", b"old 4"))[0] == 503
        await new.start()
        await fleet.holder([new])
        await until_all_show(servers, {"v1": 0, "new1": 1})
        assert await pushed(old, "new2", b"new 2") == 2
        assert list(old.base.rglob("_aside.*"))


def _key(kv: dict[str, str]) -> str:

    return base64.b64decode(kv["key"]).decode().removeprefix("/covey-registry/")


@pytest.mark.parametrize("seed", SEEDS)
async def test_random_histories(tmp_path: Path, seed: int) -> None:
    await real.play(seed, tmp_path, storm_s=STORM_S)
