"""What /readyz tells of etcd's members, on real ones (safety S25)."""

import asyncio
import json
import time

import aiohttp
import pytest

from covey import errors, settings, world
from covey.controller import members, replica
from covey.store import base, etcd
from tests.support import etcd as etcd_server


async def test_members_that_do_not_answer_are_named() -> None:
    with etcd_server.running(members=3) as cluster:
        store = etcd.Etcd(cluster.endpoints, world=world.System())
        try:
            assert await members.look(store.admin) == []
            cluster.members[1].kill()
            assert await members.look(store.admin) == [
                f"etcd member m1 at {cluster.members[1].endpoint} does not answer"
            ]
            cluster.members[2].kill()
            assert await members.look(store.admin) == [], "without a quorum the controller is red and says why"
        finally:
            await store.close()


async def test_a_full_store_is_told() -> None:
    with etcd_server.running(extra=["--quota-backend-bytes", str(16 << 20)]) as cluster:
        store = etcd.Etcd(cluster.endpoints, world=world.System())
        try:
            with pytest.raises(errors.NoSpace):
                for _ in range(40):
                    await store.commit(base.Txn((), (base.Put("/filler", b"x" * 1_000_000),)))
            [trouble] = await members.look(store.admin)
            assert trouble.startswith("etcd is full: nothing can be started")
        finally:
            await store.close()


async def test_the_body_of_readyz_names_what_is_wrong() -> None:
    with etcd_server.running(members=3) as cluster:
        environ = {
            "COVEY_LISTEN_ADDR": "127.0.0.1:0",
            "COVEY_ALLOW_EMPTY_REGISTRY": "true",
            "COVEY_SHUTDOWN_DELAY": "0s",
            "COVEY_ETCD_ENDPOINTS": ",".join(cluster.endpoints),
        }
        cluster.members[0].kill()
        one = replica.Replica(settings.controller(environ), world.System())
        await one.start()
        try:
            async with aiohttp.ClientSession(f"http://127.0.0.1:{one.server.port}") as http:
                deadline = time.monotonic() + 90
                while time.monotonic() < deadline:
                    async with http.get("/readyz") as answer:
                        said = json.loads(await answer.read())
                    if answer.status == 200 and said["body"]["troubles"]:
                        break
                    await asyncio.sleep(0.05)
                assert said["body"]["troubles"] == [f"etcd member m0 at {cluster.members[0].endpoint} does not answer"]
        finally:
            await one.stop()
