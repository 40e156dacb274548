"""etcd is full: reads go on, it is told everywhere, and there is a way out (safety S25, S28)."""

import asyncio
import time
from pathlib import Path

import pytest

from covey import errors, world
from covey.store import base, etcd, etcd_care
from tests.cluster import conftest, fleet
from tests.operate import cloud as clouds

QUOTA_BYTES = 16 << 20
MINUTE_S = 0.02


class Hurried(world.System):
    """A world in which a minute takes 20 ms: nobody waits a quarter of an hour in a test."""

    def __init__(self) -> None:
        self._begun = time.monotonic()

    def boot_ns(self) -> int:
        return int((time.monotonic() - self._begun) / MINUTE_S * 60e9)


async def fill(endpoint: str) -> int:
    """Write one key again and again until etcd takes no more; how often."""
    store = etcd.Etcd([endpoint], world=world.System())
    try:
        for count in range(100):
            try:
                await store.commit(base.Txn((), (base.Put("/filler", b"x" * 1_000_000),)))
            except errors.NoSpace:
                return count
    finally:
        await store.close()
    raise AssertionError("it was never full")


async def compact(endpoint: str) -> list[str]:
    """As `covey etcd compact` does it; what it says."""
    store = etcd.Etcd([endpoint], world=world.System())
    said: list[str] = []
    clock = Hurried()
    begun_ns = clock.boot_ns()
    try:
        await etcd_care.compact(store, clock, said.append, pause_s=MINUTE_S)
    finally:
        await store.close()
    assert clock.boot_ns() - begun_ns >= 15 * 60e9, "what is younger than 15 minutes stays"
    return said


@pytest.mark.timeout(480)
def test_a_full_etcd_is_told_and_the_way_out_leads_on(tmp_path: Path) -> None:

    flags = ("--quota-backend-bytes", str(QUOTA_BYTES))
    with fleet.running(tmp_path, controllers=1, members=3, etcd_flags=flags) as cloud:
        alpha = cloud.node("alpha")
        (before,) = cloud.start()
        cloud.wait_until(before, "Started")
        endpoint = cloud.etcd.endpoints[0]

        def covey(*words: object) -> conftest.Ran:
            return conftest.covey("etcd", *words, COVEY_ETCD_ENDPOINTS=endpoint)

        assert asyncio.run(fill(endpoint)) > 5
        ran = covey("status")
        assert ran.code == 1 and "NOSPACE" in ran.out and "16.0 MiB" in ran.out, ran
        assert "! etcd is full: nothing can be started or changed" in ran.out
        ran = covey("alarms")
        assert ran.code == 1 and ran.out.strip().endswith("NOSPACE"), ran
        conftest.eventually(lambda: "etcd is full" in "; ".join(clouds.lesser_troubles(cloud.urls[0])))
        conftest.eventually(lambda: cloud.state(before) == "Started")  # reads go on
        status, body = conftest.ask(f"{cloud.urls[0]}/api/v1/vm", "POST", {"vmid": cloud.template})
        assert status == 503, body
        assert list(alpha.vms()) == [before]

        assert "is dropped in 15 minutes" in asyncio.run(compact(endpoint))[0]
        ran = covey("defrag")
        assert ran.code == 0 and ran.out.count("bytes before") == 3, ran
        ran = covey("alarms", "--disarm")
        assert ran.code == 0 and "No alarm is raised" in ran.out, ran
        (after,) = conftest.eventually(lambda: _start(cloud))
        cloud.wait_until_all([before, after], "Started")
        assert covey("status").code == 0


def _start(cloud: fleet.Fleet) -> list[str]:
    answer = cloud.ask("POST", "/api/v1/vm", {"vmid": cloud.template})
    return list(answer["body"]) if answer["status"] == "OK" else []
