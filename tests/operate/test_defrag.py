"""Controllers defragment etcd by themselves: where it pays, while all members are well, and nobody notices."""

import asyncio
import contextlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from covey import world
from covey.store import base, etcd
from tests.cluster import clients, conftest, fleet
from tests.operate import cloud as clouds
from tests.support import etcd as members

FILL = 40  # MB that are of no use afterwards
SILENT = 1_000_000  # of so many requests one starts something


async def fill(endpoints: list[str]) -> None:
    """Write one key again and again, and drop what it was before."""
    store = etcd.Etcd(endpoints, world=world.System())
    try:
        for _ in range(FILL):
            done = await store.commit(base.Txn((), (base.Put("/filler", b"x" * 1_000_000),)))
        await store.commit(base.Txn((), (base.Put("/filler", b""),)))
        await store.compact(done.revision)
    finally:
        await store.close()


def record(cloud: fleet.Fleet) -> dict[str, Any]:
    """What the controllers wrote down; asked again where a busy etcd does not answer in time."""

    def read() -> dict[str, Any]:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            return cloud.value("defrag")
        return {}

    return conftest.eventually(read)


def size_mb(member: members.Member) -> float:
    return (member.directory / member.name / "member" / "snap" / "db").stat().st_size / 1e6


@pytest.mark.timeout(480)
def test_one_controller_gives_space_back_when_it_pays_and_all_members_are_well(tmp_path: Path) -> None:
    with fleet.running(tmp_path, controllers=2, members=3, COVEY_DEFRAG_DB_INTERVAL="2s") as cloud:
        conftest.eventually(lambda: record(cloud)["at_ns"])
        assert record(cloud).get("members", []) == [], "an empty store is not worth it"
        away = cloud.etcd.members[2]
        away.kill()
        for url in cloud.urls:
            conftest.eventually(lambda url=url: "does not answer" in str(clouds.lesser_troubles(url)))  # type: ignore[misc]
        conftest.eventually(lambda: not record(cloud).get("claim"))
        asyncio.run(fill(cloud.etcd.endpoints[:2]))
        before = record(cloud)
        for _ in fleet.until(5):
            assert record(cloud) == before, "a member is away"
        assert min(map(size_mb, cloud.etcd.members[:2])) > FILL

        with clients.asking(cloud.urls, cloud.template, start_each=SILENT) as load:
            away.start()
            conftest.eventually(lambda: record(cloud).get("members"), 120)
            conftest.eventually(lambda: not record(cloud).get("members"), 120)  # the next time: not worth it
        assert load.failures == []
        assert max(map(size_mb, cloud.etcd.members)) < FILL / 2
        ran = conftest.covey("etcd", "status", COVEY_ETCD_ENDPOINTS=cloud.etcd.endpoints[0])
        assert ran.code == 0 and "Last scheduled defragmentation: " in ran.out, ran
        done = []
        for one in cloud.controllers:
            one.running.end()
            done += [json.loads(line) for line in one.running.err if '"etcd was defragmented"' in line]
            one.program = None
        assert {name for one in done for name in one["members"]} == {"m0", "m1", "m2"}, done
        assert sum(one["freed_bytes"] for one in done) > FILL * 1e6, done
        assert len(done) <= 3, "each is done once: by one controller, or a second time for who came back late"
