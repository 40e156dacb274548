"""Nothing sticks in Scheduling or Pulling (promise I1): each way in which a start could stand still, and what moves it
on. What follows when a span is over is in `test_loop`."""

import asyncio
from typing import Any

import pytest

from covey import model, wire
from covey.controller import hosts, loop
from covey.decide import deadlines
from covey.store import base, commit, commit_cloud, commit_instances, commit_nodes, mirror, schema
from tests.support import cloud, flaky, nouns
from tests.unit.controller import test_loop as looped

Said = wire.ReportEvent
State = model.State
MS = 1_000_000
NEVER = looped.NEVER
looping, until = looped.looping, looped.until


async def _on(c: cloud.Cloud, id: str, node: str) -> bool:
    return (await c.instance(id)).node == node


async def _waits(c: cloud.Cloud, id: str) -> bool:
    return (await c.instance(id)).waiting


async def test_a_node_whose_ledger_cannot_be_read_is_passed_by() -> None:
    """No placement there could be written down: the same plan would be made, and lost, for ever."""
    async with cloud.running() as c:
        bad = await c.join()
        await c.store.commit(base.Txn((), (base.Put(schema.ledger(bad), b"?"),)))
        async with looping(c) as (one,):
            (id,) = await c.create()
            await until(lambda: looped._true("cannot be read from the store" in looped.why(one, id)))
            good = await c.join()
            await until(lambda: _on(c, id, good))


async def test_a_silent_node_that_speaks_again_gets_what_waits() -> None:
    """That it is silent no longer is noticed after its word was seen, and no change of the store announces it."""
    async with cloud.running() as c:
        node = await c.join()
        async with looping(c, spans=NEVER._replace(silent_ns=1500 * MS)) as (one,):
            await until(lambda: looped._true(node in one.silent))
            (id,) = await c.create()
            await until(lambda: looped._true("no node that could take it is alive" in looped.why(one, id)))
            await c.say(node, 2)
            await until(lambda: _on(c, id, node), limit_s=5)


async def test_what_came_while_another_replica_had_its_turn_is_placed() -> None:
    """The replica with the first turn is dead, and what the second looked at was placed meanwhile by a third."""
    async with cloud.running() as c:
        lease = await c.store.grant(60)
        dead = schema.Controller(id="dead", version="", format=1, url="", started_ns=0)
        await commit_cloud.announce(c.writer, dead, lease)
        node = await c.join(facts=nouns.facts(slots=5))
        async with looping(c) as (one,):
            await until(lambda: looped._true(one._mirror.listed))
            (first,) = await c.create()
            await c.place(node, first)
            (second,) = await c.create()
            await until(lambda: _on(c, second, node), limit_s=5)


async def test_waiting_makes_older_and_two_replicas_count_no_span_twice() -> None:
    """Safety S9: observed, and kept with the instance; in the end it counts no more."""
    spans = NEVER._replace(waiting_ns=400 * MS)
    async with cloud.running() as c:
        (id,) = await c.create(priority=10_000)
        began_ns = c.world.boot_ns()
        async with looping(c, spans=spans, replicas=2):
            await until(lambda: _aged(c, id, 3))
            assert (await c.instance(id)).aged <= (c.world.boot_ns() - began_ns) / (400 * MS)
        aged = await c.instance(id)
        assert (aged.state, aged.waiting) == (State.SCHEDULING, True)


async def test_one_that_waits_long_stands_before_a_better_priority_that_came_later() -> None:
    async with cloud.running() as c:
        (old,) = await c.create(priority=1000)
        async with looping(c, spans=NEVER._replace(waiting_ns=20 * MS)):
            await until(lambda: _aged(c, old, 3))
        (new,) = await c.create(priority=1)
        node = await c.join(facts=nouns.facts(slots=1))
        async with looping(c):
            await until(lambda: _on(c, old, node))
        assert (await c.instance(new)).waiting


async def _aged(c: cloud.Cloud, id: str, times: int) -> bool:
    return (await c.instance(id)).aged >= times


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"arch": model.Arch.ARM64}, "Waiting: no node has the architecture arm64"),
        ({"group": "mac"}, "Waiting: no node of architecture amd64 is in the group mac"),
        ({"node": "n-0"}, "Waiting: node n-0 is not there"),
    ],
)
async def test_what_no_node_can_ever_take_says_so(changes: dict[str, Any], text: str) -> None:
    async with cloud.running() as c, looping(c) as (one,):
        await c.join()
        (id,) = await c.create(**changes)
        await until(lambda: looped._true(looped.why(one, id) == text))


async def test_a_group_leads_to_its_nodes_only() -> None:
    async with cloud.running() as c, looping(c):
        await c.join()
        member = await c.join()
        await commit_nodes.configure(c.writer, await c.look(), member, {"groups": ("mac",)}, "operator")
        (id,) = await c.create(group="mac")
        await until(lambda: _on(c, id, member))


async def test_a_newcomer_takes_no_node_that_is_kept_for_another() -> None:
    """The direct path, create and place in one transaction, keeps to the queue as the loop does."""
    facts = nouns.facts(cpu_count=4)
    async with cloud.running() as c:
        node = await c.join(facts=facts)
        mode = {"capacity_mode": model.CapacityMode.RESOURCE}
        await commit_nodes.configure(c.writer, await c.look(), node, mode, "operator")
        (big,) = await c.create(vcpu=4, vram_mb=1)
        (younger,) = await c.create(vcpu=1, vram_mb=1)
        await c.place(node, younger)
        homes = hosts.Homes(c.world, "me")
        async with looping(c) as (one,):
            await until(lambda: looped._true("host is kept free for it" in looped.why(one, big)))
            with homes.reserve(await c.look(), nouns.spec(vcpu=1, vram_mb=1), 1) as home:
                assert home.nodes == ()
            with homes.reserve(await c.look(), nouns.spec(vcpu=1, vram_mb=1, priority=1), 1) as home:
                assert home.nodes == (node,), "it stands before the one that the node is kept for"
            (small,) = await c.create(vcpu=1, vram_mb=1)
            await until(lambda: looped._true("kept for instances that wait longer" in looped.why(one, small)))
            await c.terminate(big)
            await until(lambda: _on(c, small, node))


async def test_a_mass_of_waiting_grows_older_without_holding_up_other_work() -> None:
    """Each turn of the watch lifts some of them only, so that it ends before the next is due."""
    spans = NEVER._replace(waiting_ns=2500 * MS, terminated_ns=50 * MS)
    async with cloud.running() as c:
        for _ in range(4):
            await c.create(50)
        (over,) = await c.create()
        await c.terminate(over)
        async with looping(c, spans=spans):
            await until(lambda: _gone(c, over))
            await until(lambda: _all_aged(c))


async def _gone(c: cloud.Cloud, id: str) -> bool:
    return (await c.look()).instance(id) is None


async def _all_aged(c: cloud.Cloud) -> bool:
    await asyncio.sleep(0.2)
    return all(kept.noun.aged for kept in (await c.look()).waiting())


def test_spans_are_those_that_are_documented() -> None:
    spans = deadlines.Spans()
    assert (spans.waiting_ns, spans.stalled_ns) == (600_000 * MS, 900_000 * MS)


async def test_nodes_that_all_lose_the_registry_at_once_use_up_no_attempts() -> None:
    """Each refuses in turn; from the third refusal on all are left alone for a while that grows."""
    async with cloud.running() as c, looping(c) as (one,):
        nodes = {await c.join() for _ in range(12)}
        (id,) = await c.create()
        me = model.InstanceId(id)
        ends_ns = c.world.boot_ns() + 5_000 * MS
        while c.world.boot_ns() < ends_ns:
            now = await c.instance(id)
            if now.node:
                await c.report(now.node, nouns.item(Said.REFUSED, me, epoch=now.epoch, message="no registry"))
                await c.report(now.node, nouns.item(Said.GONE, me, epoch=now.epoch))
            await asyncio.sleep(0.02)
        await until(lambda: _on_one_of(c, id, nodes))
        now = await c.instance(id)
        assert now.state == State.PULLING
        assert 3 <= len(now.refused) <= 6
        assert now.refused[0] != now.refused[1], "another node is asked at once"
        await c.report(now.node, nouns.item(Said.REFUSED, me, epoch=now.epoch, message="no registry"))
        await until(lambda: looped._true("refused by host, host, host and" in looped.why(one, id)))


async def _on_one_of(c: cloud.Cloud, id: str, nodes: set[model.NodeId]) -> bool:
    return (await c.instance(id)).node in nodes


async def test_spans_go_on_while_very_much_is_to_be_done_at_once() -> None:
    """A night's builds end together, on a slow store: what others have waited so far still counts (promise I1). A turn
    that takes longer than a freeze would begin all spans anew."""
    async with cloud.running() as c:
        weather, me = flaky.Flaky(c.store), "c0"
        lease = await c.store.grant(60)
        announced = schema.Controller(id=me, version="", format=1, url="", started_ns=0)
        await commit_cloud.announce(c.writer, announced, lease)
        (waits,) = await c.create()
        ended = [id for _ in range(8) for id in await c.create(100)]
        snapshot = await c.look()
        ends = (commit_instances.terminate(c.writer, snapshot, model.InstanceId(id), cloud.WHO) for id in ended)
        await asyncio.gather(*ends)
        copy = mirror.Mirror(c.store, c.world)
        spans = NEVER._replace(terminated_ns=500 * MS)
        one = loop.Loop(copy, commit.Writer(weather, c.world, who=me), c.world, me=me, spans=spans)
        weather.delay = lambda: 0.12  # each way: 64 at once are 270 in a second
        thing = deadlines.Thing(deadlines.Kind.WAITING, waits)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(copy.run()), group.create_task(one.run())]
            await until(lambda: looped._true(thing in one._observed))
            first = one._observed.since(thing)
            await until(lambda: looped._true(copy.snapshot().instance_count() == 1))
            await asyncio.sleep(1.2)  # two turns more
            assert first is not None and one._observed.since(thing) == first
            for task in tasks:
                task.cancel()
