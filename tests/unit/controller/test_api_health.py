"""GET /api/v1/health: right figures, at any time, never slower than what is ill allows."""

import asyncio
import time
from typing import Any

from covey import errors, settings, world
from covey.controller import api_events, api_health, etcd_health, replica
from covey.decide import troubles
from covey.store import base, etcd_admin, memory, schema
from tests.support import flaky
from tests.unit.controller import cloud


async def health(house: cloud.Cloud) -> dict[str, Any]:
    found: dict[str, Any] = await house.api.ok("GET", "/api/v1/health")
    return found


async def until_told(house: cloud.Cloud, kind: str) -> dict[str, Any]:
    told: dict[str, Any] = {}

    async def look() -> bool:
        told.update({one["kind"]: one for one in (await health(house))["troubles"]})
        return kind in told

    await cloud.until(look)
    return dict(told[kind])


async def test_a_small_cloud_that_is_well(pair: cloud.Cloud) -> None:
    agent = cloud.Agent(pair.api)
    await agent.join()
    (id,) = await pair.api.start()
    shown = await health(pair)
    assert shown["why"] == ""
    assert [one["me"] for one in shown["controllers"]].count(True) == 1
    assert len(shown["controllers"]) == 2
    assert shown["nodes"] == {"Active": 1}
    assert shown["agents"] == {"0.1.0": 1}
    assert shown["instances"] == {"Pulling": 1}
    assert (shown["queue"]["waiting"], shown["unsure"]["open"], shown["etcd"]) == (0, 0, [])
    assert (await pair.api.ok("GET", f"/api/v1/vm?id={id}"))["node_id"] == agent.me.node


async def test_an_instance_that_waits_and_a_registry_that_is_away(house: cloud.Cloud) -> None:
    (first,) = await house.api.start()
    await house.api.start()
    queue = (await health(house))["queue"]
    assert (queue["waiting"], queue["instance"], queue["template"]) == (2, first, "linux")
    assert "no node" in queue["why"].lower()
    assert house.registry.server is not None
    await house.registry.server.drain(0.1)
    told = await until_told(house, troubles.Kind.REGISTRY)
    assert told["about"] == house.registry.url


async def test_a_node_with_a_trouble_and_little_room(house: cloud.Cloud) -> None:
    agent = cloud.Agent(house.api)
    await agent.join()
    await agent.report(word=agent.word(free_disk_bytes=1 << 30, trouble="no /dev/kvm"))
    assert (await until_told(house, troubles.Kind.NODE_TROUBLE))["text"].endswith("no /dev/kvm")
    assert (await until_told(house, troubles.Kind.NODE_SPACE))["about"] == "host-1"
    (tightest,) = (await health(house))["tightest"]
    assert (tightest["name"], tightest["free_disk_bytes"], tightest["disk_bytes"]) == ("host-1", 1 << 30, 1 << 40)


async def test_a_red_controller_answers_at_once_and_says_what_it_knew() -> None:
    stores = cloud.Wraps(flaky.Flaky)
    async with cloud.running(wrap=stores) as house:
        await house.api.start()
        stores[0].partition(True)
        await cloud.until(lambda: red(house))
        shown = await health(house)
        assert shown["why"]
        assert shown["troubles"][0]["kind"] == troubles.Kind.CONTROLLER_RED
        assert shown["instances"] == {"Scheduling": 1}
        stores[0].partition(False)


async def red(house: cloud.Cloud) -> bool:
    return (await house.api.ask("GET", "/readyz"))[0] == 503


async def test_a_controller_that_has_never_reached_its_store_tells_that() -> None:
    clock = world.System()
    store = flaky.Flaky(memory.Memory(clock).client())
    store.partition(True)
    chosen = settings.controller({"COVEY_LISTEN_ADDR": "127.0.0.1:0", "COVEY_ALLOW_EMPTY_REGISTRY": "true"})
    one = replica.Replica(chosen, clock, store)
    await one.start()
    try:
        reply = await one.server.hand("GET", "/api/v1/health")
        assert reply.status == 200
        assert b"controller-red" in reply.body
        assert b"knows of no registry" in reply.body
    finally:
        store.partition(False)
        await one.stop()


async def test_a_write_whose_outcome_is_open_is_counted_until_it_is_known() -> None:
    stores = cloud.Wraps(flaky.Flaky)
    async with cloud.running(wrap=stores) as house:
        writer = house.replicas[0]._writer
        stores[0].weather = lambda: flaky.Fate.LOST_REPLY
        start = asyncio.create_task(house.api.start())
        await cloud.until(lambda: len(writer.unsure) > 0)
        await cloud.until(lambda: unsure(house))
        stores[0].weather = lambda: flaky.Fate.FINE
        await start
        await cloud.until(lambda: not writer.unsure)


async def unsure(house: cloud.Cloud) -> bool:
    return int((await health(house))["unsure"]["open"]) > 0


# ---- etcd's members ------------------------------------------------------------------------------------------------


def status(address: str, id: int, **changes: Any) -> etcd_admin.Status:
    values: dict[str, Any] = {
        "address": address,
        "cluster_id": 1,
        "member_id": id,
        "leader_id": 1,
        "version": "3.5.16",
        "revision": 100,
        "raft_term": 2,
        "raft_index": 500,
        "size_bytes": 10,
        "used_bytes": 5,
        "learner": False,
        "troubles": (),
    }
    return etcd_admin.Status(**(values | changes))


def listed(id: int, name: str, address: str) -> etcd_admin.Member:
    return etcd_admin.Member(id, name, (f"http://{address}0",), (f"https://{address}",), False)


def test_members_are_named_and_compared_with_the_furthest() -> None:
    words = {"b:2379": status("b:2379", 2, revision=90, raft_index=480), "a:2379": status("a:2379", 1), "c:2379": None}
    names = [listed(1, "m1", "a:2379"), listed(2, "m2", "b:2379"), listed(3, "m3", "c:2379")]
    one, two, three = etcd_health.members(words, names)
    assert (one.name, one.leads, one.revisions_behind, one.raft_behind) == ("m1", True, 0, 0)
    assert (two.name, two.leads, two.revisions_behind, two.raft_behind) == ("m2", False, 10, 20)
    assert (three.name, three.address, three.answers) == ("m3", "c:2379", False)
    assert [member.name for member in etcd_health.members(words, [])] == ["", "", ""]


def test_a_member_that_was_never_reached_is_listed_and_an_address_without_a_member_is_a_stranger() -> None:
    names = [listed(1, "m1", "a:2379"), listed(2, "m2", "b:2379")]
    one, two = etcd_health.members({"a:2379": status("a:2379", 1)}, names)
    assert (one.answers, two.name, two.address, two.answers) == (True, "m2", "b:2379", False)
    through_a_proxy = etcd_health.members({"a:2379": status("a:2379", 1), "proxy:1": None}, names)
    assert [(member.name, member.stranger) for member in through_a_proxy] == [("m1", False), ("m2", False)]
    everybody = {"a:2379": status("a:2379", 1), "b:2379": status("b:2379", 2), "old:2379": None}
    assert [member.address for member in etcd_health.members(everybody, names) if member.stranger] == ["old:2379"]
    again = {"a:2379": status("a:2379", 1), "alias:2379": status("alias:2379", 1), "b:2379": status("b:2379", 2)}
    assert [member.name for member in etcd_health.members(again, names)] == ["m1", "m2"]


async def test_the_last_backup_is_told_if_there_is_one_or_should_be() -> None:
    clock = world.System()
    store = memory.Memory(clock).client()
    assert await etcd_health.last_backup(store, clock, 0.0) is None
    assert await etcd_health.last_backup(store, clock, 60.0) == troubles.Backup(interval_s=60)
    at_ns = clock.wall_ns() - 5_000_000_000
    record = schema.Backup(at_ns=at_ns, file="/b/x.db", size_bytes=7)
    await store.commit(base.Txn((), (base.Put(schema.BACKUP, schema.encode(record)),)))
    told = await etcd_health.last_backup(store, clock, 0.0)
    assert told is not None
    assert (told.file, told.size_bytes, told.trouble, told.age_s >= 5) == ("/b/x.db", 7, "", True)
    await store.close()


class Admin:
    """etcd with a member that hangs, and no majority to list the members."""

    addresses = ("127.0.0.1:1", "127.0.0.1:2")

    async def status(self, address: str) -> etcd_admin.Status:
        if address == self.addresses[1]:
            await asyncio.sleep(60)
        return status(address, 1)

    async def members(self) -> list[etcd_admin.Member]:
        raise errors.Unavailable("no majority")

    async def alarms(self) -> list[etcd_admin.Alarm]:
        await asyncio.sleep(60)
        return []


class Refusing(Admin):
    """One that tells its status to administrators only, and we are none."""

    async def status(self, address: str) -> etcd_admin.Status:
        raise errors.Rejected("etcdserver: permission denied")

    async def alarms(self) -> list[etcd_admin.Alarm]:
        return []


async def test_members_that_may_not_be_asked_are_not_called_ill() -> None:
    found, _ = await etcd_health.Members(Refusing(), lambda: 0).look()  # type: ignore[arg-type]
    assert found == []


async def test_a_member_that_hangs_costs_a_bounded_time_and_nothing_fails() -> None:
    began = time.monotonic()
    found, alarms = await etcd_health.Members(Admin(), lambda: 0).look()  # type: ignore[arg-type]
    assert [one.answers for one in found] == [True, False]
    assert alarms == []
    assert time.monotonic() - began < 30


async def test_who_asks_at_the_same_time_or_soon_after_shares_one_look() -> None:
    asked, now_ns = 0, 0

    async def ask() -> int:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0)
        return asked

    recent = api_health.Recent(ask, lambda: now_ns)
    assert await asyncio.gather(recent.get(), recent.get()) == [1, 1]  # type: ignore[comparison-overlap]
    assert await recent.get() == 1
    now_ns += 2_000_000_000
    assert await recent.get() == 2
    await recent.close()


# ---- settings and events -------------------------------------------------------------------------------------------


async def test_settings_without_secrets() -> None:
    async with cloud.running(
        COVEY_HEARTBEAT="3s", COVEY_USE_ETCD_LOGIN="true", COVEY_ETCD_USERNAME="me", COVEY_ETCD_PASSWORD="pa55word"
    ) as house:
        shown = await house.api.ok("GET", "/api/v1/settings")
        assert (shown["heartbeat_s"], shown["etcd_username"], shown["etcd_password"]) == (3.0, "me", "(not shown)")
        assert "pa55word" not in str(shown) + str(await health(house))


async def test_the_newest_events_oldest_first(house: cloud.Cloud) -> None:
    born = [(await house.api.start())[0] for _ in range(5)]
    for id in born:
        await house.api.ok("DELETE", "/api/v1/vm", {"id": id})
    events = await house.api.ok("GET", "/api/v1/events")
    assert [one["about"] for one in events if one["what"] == "created"] == born
    ended = [one for one in events if one["what"] == "terminated"]
    assert [one["about"] for one in ended] == born
    assert (ended[0]["who"], ended[0]["why"]) == ("API client 127.0.0.1", "terminate request")
    assert await house.api.ok("GET", "/api/v1/events?limit=3") == events[-3:]
    assert (await house.api.fail("GET", "/api/v1/events?limit=0")).startswith("limit: ")


async def test_when_there_are_many_events_a_short_span_is_read_and_not_all_of_them() -> None:
    clock = world.System()
    store = memory.Memory(clock).client()
    now_ns = 10**18
    for number in range(300):
        at_ns = now_ns - (300 - number) * 1_000_000_000
        event = schema.encode(schema.Event(what="x", about=str(number), who="w", why="y", at_ns=at_ns))
        await store.commit(base.Txn((), (base.Put(schema.event(at_ns, "tx"), event),)))
    found = await api_events.newest(store, now_ns, 100)
    assert [one.about for one in found] == [str(number) for number in range(240, 300)]
    assert len(await api_events.newest(store, now_ns, 300)) == 300
    await store.close()
