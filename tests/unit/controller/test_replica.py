"""The composition root: a store that is away and comes back, a frozen process, stopping, odd requests end to end."""

import asyncio
import functools
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
import pytest

from covey import errors, wire, world
from covey.controller import replica
from covey.decide import permission
from covey.store import base, memory
from tests.unit.controller import cloud


class Away:
    """A store behind a switch: while `away`, no call succeeds, and watches deliver nothing."""

    def __init__(self, store: base.Store) -> None:
        self._store = store
        self.away = False
        self.why = "connection refused"
        self.back = asyncio.Event()
        self.back.set()

    def leave(self) -> None:
        self.away = True
        self.back.clear()

    def come(self) -> None:
        self.away = False
        self.back.set()

    def _check(self) -> None:
        if self.away:
            raise errors.Unavailable(self.why)

    async def range(self, key: str, end: str = "", **options: Any) -> base.Page:
        self._check()
        return await self._store.range(key, end, **options)

    async def commit(self, txn: base.Txn, *, within_s: float | None = None) -> base.Outcome:
        self._check()
        return await self._store.commit(txn, within_s=within_s)

    async def watch(self, key: str, end: str, start_revision: int) -> AsyncIterator[base.Batch]:
        async for batch in self._store.watch(key, end, start_revision):
            await self.back.wait()
            yield batch

    async def grant(self, ttl_s: int) -> base.Lease:
        self._check()
        return await self._store.grant(ttl_s)

    async def renew(self, leases: Sequence[int]) -> dict[int, float]:
        self._check()
        return await self._store.renew(leases)

    async def compact(self, revision: int) -> None:
        self._check()
        await self._store.compact(revision)

    async def origin(self, revision: int) -> permission.Origin:
        self._check()
        return await self._store.origin(revision)

    async def close(self) -> None:
        await self._store.close()


class StoppableWorld(world.System):
    ahead_ns = 0

    def boot_ns(self) -> int:
        return super().boot_ns() + self.ahead_ns


async def test_a_store_that_is_away_at_the_start_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    clock = world.System()
    store = Away(memory.Memory(clock))
    store.leave()
    one = replica.Replica(cloud.chosen(COVEY_ALLOW_EMPTY_REGISTRY="true"), clock, store)
    await one.start()
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{one.server.port}") as http:
            api = cloud.Api(http)
            await api.ok("GET", "/livez")
            await cloud.until(lambda: _says(api, "etcd at 127.0.0.1:2379 cannot be used: "))
            for path in ("/api/v1/vm", "/api/v1/node", "/api/v1/status", "/api/v1/registry/vm"):
                assert (await api.ask("GET", path))[0] == 503
            assert (await api.ask("POST", "/agent/v1/join", {}))[0] in (400, 503)
            store.come()
            await cloud.until(lambda: cloud.is_ready(api))
            assert await api.ok("GET", "/api/v1/vm") == []
    finally:
        await one.stop()
    assert capsys.readouterr().err.count("etcd cannot be used; trying on until it can") <= 1


async def test_each_reason_why_the_store_cannot_be_used_is_logged_once(capsys: pytest.CaptureFixture[str]) -> None:
    """A busy etcd first gives no answer, and then refuses the login: who reads the log must hear of the latter."""
    clock = world.System()
    store = Away(memory.Memory(clock))
    store.leave()
    refused = "etcd refuses the login"
    one = replica.Replica(cloud.chosen(COVEY_ALLOW_EMPTY_REGISTRY="true"), clock, store)
    await one.start()
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{one.server.port}") as http:
            api = cloud.Api(http)
            for store.why, told in (("no answer", "cannot be used: "), ("invalid user ID or password", refused)):
                await cloud.until(functools.partial(_says, api, told))
    finally:
        await one.stop()
    reasons = [line for line in capsys.readouterr().err.splitlines() if "etcd cannot be used" in line]
    assert [refused in why for why in reasons] == [False, True]


async def _says(api: cloud.Api, text: str) -> bool:
    status, envelope = await api.ask("GET", "/readyz")
    return status == 503 and text in envelope["message"]


@pytest.mark.parametrize("watched", [True, False])
async def test_a_controller_that_is_watched_is_red_for_a_while_before_it_takes_no_more(watched: bool) -> None:
    delay_s = 1 if watched else 60
    clock = world.System()
    store = memory.Memory(clock)
    chosen = cloud.chosen(COVEY_ALLOW_EMPTY_REGISTRY="true", COVEY_SHUTDOWN_DELAY=f"{delay_s}s")
    one = replica.Replica(chosen, clock, store.client())
    await one.start()
    async with aiohttp.ClientSession(f"http://127.0.0.1:{one.server.port}") as http:
        api = cloud.Api(http)
        await cloud.until(lambda: _lists_nothing(api))
        if watched:
            assert await cloud.is_ready(api)
        began = time.monotonic()
        stopping = asyncio.create_task(one.stop())
        await asyncio.sleep(0)
        if watched:
            status, envelope = await api.ask("GET", "/readyz")
            assert (status, envelope["message"]) == (503, "this controller is going down")
            assert await api.ok("GET", "/api/v1/vm") == []
        await stopping
        assert (time.monotonic() - began >= delay_s) == watched
    await store.close()


async def _lists_nothing(api: cloud.Api) -> bool:
    return (await api.ask("GET", "/api/v1/vm"))[0] == 200


async def test_data_of_another_format_is_left_alone() -> None:
    clock = world.System()
    store = memory.Memory(clock)
    await store.commit(base.Txn((), (base.Put("/covey/format", b'{"format":99}'),)))
    one = replica.Replica(cloud.chosen(COVEY_ALLOW_EMPTY_REGISTRY="true"), clock, store.client())
    await one.start()
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{one.server.port}") as http:
            await cloud.until(lambda: _says(cloud.Api(http), 'format {"format":99}; this program writes 1'))
    finally:
        await one.stop()
    assert (await store.range(base.EVERYTHING, base.EVERYTHING)).total == 1
    await store.close()


async def test_cut_off_from_the_store_it_turns_red_within_two_seconds_and_answers_nothing_old() -> None:
    switches = cloud.Wraps(Away)
    async with cloud.running(2, wrap=switches) as pair:
        cut, other = pair.apis
        agent = cloud.Agent(cut)
        await agent.join()
        await agent.wanted()
        parked = asyncio.create_task(_park(agent))
        [id] = await cut.start()
        switches[0].leave()
        left = time.monotonic()
        await other.ok("DELETE", "/api/v1/vm", {"id": id})
        assert (await cut.ask("GET", f"/api/v1/vm?id={id}"))[0] == 503
        await cloud.until(lambda: _is_red(cut))
        assert time.monotonic() - left < 20  # two, and those of a busy machine
        assert await asyncio.wait_for(parked, 60) in (200, 503)
        started = time.monotonic()
        assert (await cut.ask("GET", "/api/v1/vm"))[0] == 503
        assert time.monotonic() - started < 20
        await cut.ok("GET", "/livez")
        agent.api = other
        assert await _park(agent, wait_s=0) == 200
        switches[0].come()
        await cloud.until(lambda: cloud.is_ready(cut))
        assert await cut.state(id) in ("Terminating", "Terminated")


async def test_turning_red_answers_parked_polls() -> None:
    """Safety S25: an agent is not kept by a controller that can tell it nothing."""
    switches = cloud.Wraps(Away)
    async with cloud.running(1, wrap=switches) as house:
        agent = cloud.Agent(house.apis[0])
        await agent.join()
        await agent.wanted()
        parked = asyncio.create_task(_park(agent))
        await asyncio.sleep(0.2)  # it is parked now; were it not, it would be answered the same
        switches[0].leave()
        assert await asyncio.wait_for(parked, 8) == 503
        switches[0].come()


async def _park(agent: cloud.Agent, wait_s: float = 10) -> int:
    ask = wire.Ask(seen=agent.seen, messages=1, tag=agent.tag, wait_s=wait_s)
    return (await agent.call("wanted", ask))[0]


async def _is_red(api: cloud.Api) -> bool:
    return (await api.ask("GET", "/readyz"))[0] == 503


async def test_a_frozen_controller_proves_its_store_before_it_serves() -> None:
    """After a gap nothing counts that was proved before it, however short the store took last time (safety S24)."""
    clock = StoppableWorld()
    switches = cloud.Wraps(Away)
    async with cloud.running(1, wrap=switches, clock=clock) as house:
        [id] = await house.api.start()
        switches[0].leave()  # while it was frozen, its store went away
        clock.ahead_ns = 3_000_000_000
        with pytest.raises(aiohttp.ClientError):
            await house.api.ask("GET", "/api/v1/vm")
        await cloud.until(lambda: not house.replicas[0].server.shaken())
        assert (await house.api.ask("GET", "/api/v1/vm"))[0] == 503
        switches[0].come()
        await cloud.until(lambda: cloud.is_ready(house.api))
        assert await house.api.state(id) == "Scheduling"


async def test_stopping_finishes_requests_and_ends_the_announcement() -> None:
    async with cloud.running(2) as pair:
        first, second = pair.replicas
        await cloud.until(lambda: len(list(second._mirror.snapshot().controllers())) == 2)
        pair.registry.delay_s = 0.5
        starting = asyncio.create_task(pair.apis[0].start())
        await cloud.until(lambda: len(pair.registry.asked) == 1)
        await first.stop()
        [id] = await starting
        assert await pair.apis[1].state(id) == "Scheduling"
        await cloud.until(lambda: len(list(second._mirror.snapshot().controllers())) == 1)


async def test_unreadable_values_are_told_and_harm_nothing_else() -> None:
    async with cloud.running() as house:
        [id] = await house.api.start()
        await house.store.commit(base.Txn((), (base.Put("/covey/instance/broken", b"{"),)))
        assert [one["instance_id"] for one in await house.api.ok("GET", "/api/v1/vm")] == [id]
        troubles = (await house.api.ok("GET", "/readyz"))["troubles"]
        assert troubles == ["1 keys hold values that cannot be read, for example /covey/instance/broken"]


# ---- requests as odd clients write them, end to end


async def raw(port: int, *lines: str, body: bytes = b"") -> tuple[int, dict[str, Any]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "\r\n".join([*lines, "Host: x", f"Content-Length: {len(body)}", "Connection: close"])
    writer.write(head.encode() + b"\r\n\r\n" + body)
    try:
        content = await asyncio.wait_for(reader.read(), 60)
    finally:
        writer.close()
        await writer.wait_closed()
    first, _, rest = content.partition(b"\r\n")
    return int(first.split()[1]), json.loads(rest.partition(b"\r\n\r\n")[2])


async def test_requests_as_clients_really_send_them() -> None:
    async with cloud.running() as house:
        port = house.replicas[0].server.port
        start = json.dumps({"vmid": cloud.TEMPLATE}).encode() + b"\n"
        ids = []
        for path, *headers in (
            ("/api/v1/vm",),
            ("/api/v1/vm", "Content-Type: application/x-www-form-urlencoded"),
            ("//api/v1/vm", "content-type: application/json"),
        ):
            status, envelope = await raw(port, f"POST {path} HTTP/1.1", *headers, body=start)
            assert (status, envelope["status"]) == (200, "OK")
            ids += envelope["body"]
        latin1 = '{"metadata":{"jenkins-job-id":"caf\xe9"}}'.encode("latin-1")
        status, envelope = await raw(port, f"PUT /api/v1/vm?id={ids[0]} HTTP/1.1", body=latin1)
        assert (status, envelope) == (200, {"status": "OK", "message": ""})
        assert (await house.api.ok("GET", f"/api/v1/vm?id={ids[0]}"))["metadata"] == {"jenkins-job-id": "café"}
        for id in ids:
            status, envelope = await raw(port, "DELETE /api/v1/vm HTTP/1.1", body=json.dumps({"id": id}).encode())
            assert (status, envelope) == (200, {"status": "OK", "message": ""})
        for request, status in (("GET /nowhere", 404), ("PATCH /api/v1/vm", 405), ("GET /api/v1/vm/", 404)):
            assert (await raw(port, f"{request} HTTP/1.1"))[0] == status


async def test_an_agent_s_words_are_taken_to_the_end_and_only_its_polls_are_sent_elsewhere() -> None:
    async with cloud.running(COVEY_SHUTDOWN_DELAY="3s") as house:
        agent = cloud.Agent(house.api)
        await agent.join()
        await agent.wanted()
        parked = asyncio.create_task(_park(agent))
        await asyncio.sleep(0.1)
        stopping = asyncio.create_task(house.replicas[0].stop())
        assert await parked == 503
        await agent.report()
        assert await _park(agent) == 503
        await agent.wanted(tag="what is new to it is told")
        await stopping
