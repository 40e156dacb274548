"""The small parts of a controller by themselves: renewals, shared questions, presence, names, views."""

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from covey import errors, model, wire, world
from covey.controller import naming, renewals, shared, views
from covey.decide import heartbeat
from covey.store import memory
from tests.unit.controller import cloud, strict


class Clock(world.System):
    ahead_s = 0.0

    def boot_ns(self) -> int:
        return super().boot_ns() + int(self.ahead_s * 1e9)


# ---- renewals (safety S8)


class Leases(memory.Memory):
    """Notes which leases were renewed together; refuses while `away`."""

    away = False

    def __init__(self, clock: world.World) -> None:
        super().__init__(clock)
        self.together: list[Sequence[int]] = []
        self.asked_s: list[float] = []  # when, on the clock
        self.gate = asyncio.Event()
        self.gate.set()

    async def renew(self, leases: Sequence[int]) -> dict[int, float]:
        self.together.append(leases)
        self.asked_s.append(self._data.world.boot_ns() / 1e9)
        await self.gate.wait()
        if self.away:
            raise errors.Unavailable("connection refused")
        return await super().renew(leases)


async def test_renewals_that_come_meanwhile_travel_together() -> None:
    clock = Clock()
    store = Leases(clock)
    renewing = renewals.Renewals(store, clock)
    leases = [(await store.grant(30)).id for _ in range(5)]
    store.gate.clear()
    first = asyncio.create_task(renewing.renewed(leases[0], clock.boot_ns()))
    await cloud.until(lambda: len(store.together) == 1)
    rest = [asyncio.create_task(renewing.renewed(lease, clock.boot_ns())) for lease in leases]
    await asyncio.sleep(0)
    store.gate.set()
    assert [terms.age_s for terms in await asyncio.gather(first, *rest)] == [0.0] * 6
    assert store.together == [[leases[0]], sorted(leases)]
    await renewing.close()
    await store.close()


async def test_a_message_right_after_a_renewal_rests_on_it_and_tells_its_age() -> None:
    """Safety S8: what the agent believes ends no later than the lease, whichever renewal it rests on."""
    clock = Clock()
    store = Leases(clock)
    renewing = renewals.Renewals(store, clock)
    lease = (await store.grant(30)).id
    asked_ns = clock.boot_ns()
    await renewing.renewed(lease, asked_ns)
    for after_s in (0.3, 0.9, 2.9):
        arrived_ns = asked_ns + int(after_s * 1e9)
        terms = await renewing.renewed(lease, arrived_ns)
        ends_ns = arrived_ns + int((terms.ttl_s - terms.age_s) * 1e9)
        assert ends_ns <= clock.boot_ns() + int(30e9)
        assert after_s - 0.2 <= terms.age_s <= after_s
    assert len(store.together) == 1
    clock.ahead_s = 4
    assert (await renewing.renewed(lease, clock.boot_ns())).age_s == 0
    assert len(store.together) == 2
    await renewing.close()
    await store.close()


async def test_who_talks_on_asks_for_the_next_renewal_in_time_and_does_not_wait_for_it() -> None:
    """Safety S8: the age is told, and no answer rests on a renewal that is older than `OLDEST_S`."""
    clock = Clock()
    store = Leases(clock)
    renewing = renewals.Renewals(store, clock)
    leases = [(await store.grant(30)).id for _ in range(3)]
    await asyncio.gather(*(renewing.renewed(lease, clock.boot_ns()) for lease in leases))
    assert len(store.together) == 1
    clock.ahead_s = heartbeat.SHARED_S
    for lease in leases:
        asked_ns = clock.boot_ns()
        terms = await renewing.renewed(lease, asked_ns)
        assert terms.age_s == 0 or heartbeat.SHARED_S <= terms.age_s < heartbeat.OLDEST_S
    await cloud.until(lambda: {lease for batch in store.together[1:] for lease in batch} == set(leases))
    clock.ahead_s += heartbeat.OLDEST_S + 1
    assert (await renewing.renewed(leases[0], clock.boot_ns())).age_s == 0, "too old: it was waited for"
    await renewing.close()
    await store.close()


async def test_where_signs_of_life_come_often_one_renewal_carries_many_of_them() -> None:
    """Safety S8: a node of a small fleet, which speaks every five seconds, has its lease renewed every ten, and what it
    is told is no more than etcd was asked for."""
    clock = Clock()
    store = Leases(clock)
    renewing = renewals.Renewals(store, clock)
    lease, told_s, lasted = (await store.grant(30)).id, wire.HEARTBEAT_S, 0
    for number in range(12):
        arrived_ns = clock.boot_ns()
        terms = await renewing.renewed(lease, arrived_ns, told_s)
        await cloud.until(lambda: renewing._sending is None or renewing._sending.done())
        assert terms.age_s <= heartbeat.oldest_s(told_s)
        assert arrived_ns / 1e9 + terms.ttl_s - terms.age_s <= store.asked_s[-1] + 30.001
        lasted += len(store.together) == number // 2 + 1
        clock.ahead_s += told_s
    assert lasted == 12, "every second message asked for one"
    await renewing.close()
    await store.close()


async def test_a_renewal_that_failed_lends_nothing_but_the_age_of_the_last_one() -> None:
    clock = Clock()
    store = Leases(clock)
    renewing = renewals.Renewals(store, clock)
    lease = (await store.grant(30)).id
    store.away = True
    assert (await renewing.renewed(lease, clock.boot_ns())).age_s == wire.LEASE_TTL_S
    store.away = False
    assert (await renewing.renewed(lease, clock.boot_ns())).age_s == 0
    store.away = True
    clock.ahead_s = 7
    assert 7 <= (await renewing.renewed(lease, clock.boot_ns())).age_s < 8
    store.away = False
    store.end_lease(lease)
    with pytest.raises(renewals.LeaseGone):
        await renewing.renewed(lease, clock.boot_ns())
    await renewing.close()
    await store.close()


# ---- shared questions


async def test_who_comes_after_the_question_was_sent_waits_for_the_next() -> None:
    gate = asyncio.Event()
    asked = 0

    async def ask(key: str) -> int:
        nonlocal asked
        asked += 1
        mine = asked
        await gate.wait()
        if key == "bad":
            raise errors.RemoteError("no")
        return mine

    questions = shared.Shared(ask)
    early = [asyncio.create_task(questions.get("a")) for _ in range(3)]
    await cloud.until(lambda: asked == 1)
    late = [asyncio.create_task(questions.get("a")) for _ in range(3)]
    await asyncio.sleep(0)
    gate.set()
    assert await asyncio.gather(*early) == [1, 1, 1]
    assert await asyncio.gather(*late) == [2, 2, 2]
    with pytest.raises(errors.RemoteError):
        await questions.get("bad")
    await questions.close()


# ---- presence, as users see it


async def test_a_silent_node_is_shown_so_after_the_time_outs_and_no_earlier() -> None:
    clock = Clock()
    async with cloud.running(
        clock=clock, COVEY_NODE_ACTIVE_TIMEOUT="32s", COVEY_INSTANCE_ACTIVE_TIMEOUT="31s"
    ) as house:
        agent = cloud.Agent(house.api)
        joined = await agent.join()
        [id] = await house.api.start()
        want = await agent.work(wire.Verb.RUN)
        await agent.launch(want)
        await agent.report(agent.item(want, wire.ReportEvent.BOOTED, vm=cloud.vm_info(id)))

        async def look() -> tuple[str, str, str]:
            [node] = await house.api.ok("GET", "/api/v1/node")
            vm = await house.api.ok("GET", f"/api/v1/vm?id={id}")
            strict.check_vm(vm)
            return node["state"], vm["instance_state"], vm.get("message", "")

        assert await look() == ("Active", "Started", "")
        kept = house.replicas[0]._mirror.snapshot().session(joined.node)
        assert kept is not None
        house.store.end_lease(kept.noun.lease)
        assert await look() == ("Active", "Started", "")
        silent = f"node {joined.node} is not communicating"
        await cloud.until(lambda: _same(look, ("Active", "Started", silent)))
        await cloud.until(lambda: _same(look, ("Offline", "Started", silent)))


async def _same(look: Any, wanted: tuple[str, str, str]) -> bool:
    return bool(await look() == wanted)


# ---- names and views


def _instance(**fields: Any) -> model.Instance:
    spec = model.Spec(
        template=cloud.TEMPLATE,
        template_name="linux",
        tag="v1",
        version=0,
        digest=model.Digest(cloud.DIGEST),
        arch=model.Arch.ARM64,
        name_template=fields.pop("name_template", ""),
    )
    defaults: dict[str, Any] = {"state": model.State.STARTED, "created_ns": 5, "changed_ns": 1_700_000_000_123_456_789}
    return model.Instance(id=model.InstanceId("i1"), spec=spec, **{**defaults, **fields})


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("", "covey-i1"),
        ("$ts", "covey-5"),
        ("$template_name-$node_name-$ts", "covey-linux-host-5"),
        ("$tag$tag-$nothing-$", "covey-v1v1-$nothing-$"),
        ("x" * 100, "covey-" + "x" * 74),
    ],
)
def test_names_of_vms(template: str, name: str) -> None:
    assert naming.vm_name(_instance(name_template=template), "host") == name


SHOWN = views.Shown(
    online=lambda _: True, talking=lambda _: True, why_waiting=lambda _: "", tags={}, registry="http://r"
)


@pytest.mark.parametrize("vm", [None, cloud.vm_info("i1", host_ip=""), cloud.vm_info("i1", uuid="")])
def test_started_is_never_shown_before_its_vminfo_is_complete(vm: model.VmInfo | None) -> None:
    shown = msgspec.to_builtins(views.inner(_instance(node="n", vm=vm), SHOWN))
    strict.check_vm(shown)
    assert shown["instance_state"] == "Pulling"
    assert "vminfo" not in shown


def test_what_is_empty_is_left_out_and_dates_have_a_zone() -> None:
    shown = msgspec.to_builtins(views.inner(_instance(node="n", vm=cloud.vm_info("i1", ram_mb=1500)), SHOWN))
    strict.check_vm(shown)
    assert not {"external_id", "name", "message", "metadata", "startup_script"} & shown.keys()
    assert (shown["ts"], shown["vminfo"]["ram"]) == ("2023-11-14T22:13:20.123456Z", "1500M")
