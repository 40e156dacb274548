"""Why an instance waits, over HTTP: the same from every replica, at once, and cheap for a long queue."""

import asyncio
import time
from typing import Any

import msgspec

from covey import model, wire, world
from covey.controller import hosts, presence, waiting
from covey.decide import placement
from covey.store import commit_nodes, mirror
from tests.support import cloud as clouds
from tests.support import nouns
from tests.unit.controller import cloud

Event = wire.ReportEvent
SMALL = msgspec.structs.replace(cloud.FACTS, slots=1)


class Clock(world.System):
    """Moves on by a step whenever it is asked."""

    def __init__(self, step_ns: int = 0) -> None:
        super().__init__()
        self.now_ns = 0
        self.step_ns = step_ns

    def boot_ns(self) -> int:
        self.now_ns += self.step_ns
        return self.now_ns


async def explained(api: cloud.Api, id: str) -> Any:
    return await api.ok("GET", f"/api/v1/vm/explain?id={id}")


async def message(api: cloud.Api, id: str) -> str:
    return str((await api.ok("GET", f"/api/v1/vm?id={id}")).get("message", ""))


async def test_every_replica_says_the_same_at_once() -> None:
    """Promise I6: also before the loop of that replica has looked."""
    async with cloud.running(3) as house:
        for number, api in enumerate(house.apis):
            [id] = await api.start()
            said = await asyncio.gather(*(message(other, id) for other in house.apis))
            assert set(said) == {"Waiting: no node has joined"}
            stories = await asyncio.gather(*(explained(other, id) for other in house.apis))
            assert all(story == stories[0] for story in stories)
            assert (stories[0]["position"], stories[0]["waiting"]) == (number + 1, number + 1)
        listed = await house.api.ok("GET", "/api/v1/vm")
        assert {wrapper["vm"]["message"] for wrapper in listed} == {"Waiting: no node has joined"}


async def test_a_queue_and_each_nodes_verdict() -> None:
    async with cloud.running() as house:
        agent = cloud.Agent(house.api, facts=SMALL)
        joined = await agent.join()
        first, second, third = [(await house.api.start())[0] for _ in range(3)]
        want = await agent.work(wire.Verb.RUN)
        assert want.instance == first
        story = await explained(house.api, third)
        assert (story["instance_state"], story["position"], story["waiting"]) == ("Scheduling", 2, 2)
        assert (story["competitors"], story["before"]) == (1, [second])
        assert story["text"] == "Waiting: all nodes that could take it are full (of 1 node: 1 full)"
        assert story["nodes"] == [
            {
                "node_id": joined.node,
                "node_name": "host-1",
                "verdict": "full",
                "text": "its only slot is taken",
            }
        ]
        placed = await explained(house.api, first)
        assert placed["text"].startswith("Placed on node host-1, which has not acknowledged it yet")
        await agent.report(agent.item(want, Event.PROGRESS, progress=0.43))
        assert (await explained(house.api, first))["text"] == "Node host-1 pulls the template: 43%"
        assert await house.api.fail("GET", "/api/v1/vm/explain?id=none") == "Not found"
        assert (await house.api.fail("GET", "/api/v1/vm/explain")).startswith("id: missing")


async def test_who_refused_is_told_with_the_time_left() -> None:
    async with cloud.running() as house:
        agent = cloud.Agent(house.api)
        await agent.join()
        [id] = await house.api.start()
        want = await agent.work(wire.Verb.RUN)
        await agent.report(agent.item(want, Event.REFUSED, message="disk full"), agent.item(want, Event.GONE))
        [node] = (await explained(house.api, id))["nodes"]
        assert node == {**node, "verdict": "refused", "text": "refused it once: disk full; asked again in 1 s"}


async def test_a_long_queue_costs_one_plan_and_not_one_each() -> None:
    """A list of all that wait: their reasons come from one plan of the snapshot."""
    async with clouds.running() as c:
        await c.join(facts=nouns.facts(slots=0))
        for _ in range(20):
            await c.create(50)
        told = waiting.Waiting(c.world, hosts.Fleet())
        snapshot = await c.look()
        began = time.process_time()
        texts = {told.why(snapshot, kept.noun.id) for kept in snapshot.waiting()}
        assert texts == {"Waiting: all nodes that could take it are full (of 1 node: 1 full)"}
        assert time.process_time() - began < 0.5


async def test_a_plan_that_was_quick_is_made_anew_for_each_change() -> None:
    async with clouds.running() as c:
        told = waiting.Waiting(Clock(), hosts.Fleet())
        (id,) = await c.create()
        me = model.InstanceId(id)
        assert told.why(await c.look(), me) == "Waiting: no node has joined"
        node = await c.join()
        snapshot = await c.look()
        assert told.why(snapshot, me) == "Waiting: it is being placed on host"
        await commit_nodes.configure(c.writer, snapshot, node, {"drain": True}, "operator")
        assert "draining" in told.why(await c.look(), me)
        assert told.why(await c.look(), model.InstanceId("another")) == ""


async def test_a_plan_stands_until_something_changes_that_it_rests_on() -> None:
    """What becomes of instances that have a node, and of those that end, costs no plan."""
    async with clouds.running() as c:
        told, copy = waiting.Waiting(Clock(), hosts.Fleet()), mirror.Mirror(c.store, c.world)
        following = asyncio.create_task(copy.run())

        async def planned() -> waiting.Plan:
            return told.plan(await copy.fresh())

        node = await c.join(facts=nouns.facts(slots=1))
        (placed,) = map(model.InstanceId, await c.create())
        await c.place(node, placed)
        (id,) = map(model.InstanceId, await c.create())
        before = await planned()
        assert [type(decision) for decision in before.decisions] == [placement.Wait]
        await c.launch(node, placed)
        await c.terminate(placed)
        later = await planned()
        assert later.decisions is before.decisions and later.snapshot.revision > before.snapshot.revision
        await c.report(node, nouns.item(Event.GONE, placed))
        assert (await planned()).decisions == [placement.Place(id, node)]
        (second,) = map(model.InstanceId, await c.create())
        assert (await planned()).by_instance.keys() == {id, second}
        await c.terminate(second)
        told.fleet.silent = frozenset({node})
        assert [type(decision) for decision in (await planned()).decisions] == [placement.Wait]
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_a_plan_that_was_slow_is_told_for_a_while_but_of_nobody_that_it_does_not_know() -> None:
    async with clouds.running() as c:
        clock = Clock(50_000_000)  # a plan takes one step
        told = waiting.Waiting(clock, hosts.Fleet())
        (old,) = map(model.InstanceId, await c.create())
        assert told.why(await c.look(), old) == "Waiting: no node has joined"
        await c.join()
        assert told.why(await c.look(), old) == "Waiting: no node has joined", "as it was a moment ago"
        (new,) = map(model.InstanceId, await c.create())
        assert told.why(await c.look(), new) == "Waiting: it is being placed on host"
        assert told.why(await c.look(), old) == "Waiting: it is being placed on host"
        await c.terminate(new)
        clock.now_ns += 1_000_000_000
        await commit_nodes.remove(c.writer, await c.look(), next((await c.look()).nodes()).noun.id, "operator")
        assert told.why(await c.look(), old) == "Waiting: no node has joined"


async def test_a_long_queue_whose_pauses_end_all_the_time_costs_one_plan_too() -> None:
    """A registry is away: while a list is told, the pause of one or another instance is over at every moment."""
    async with clouds.running() as c:
        clock = Clock(50_000_000)  # a plan takes one step
        told = waiting.Waiting(clock, hosts.Fleet())
        node = await c.join()
        ids = await c.create(20)
        for id in ids:  # each refused at another time
            await c.place(node, id)
            await c.report(node, nouns.item(Event.REFUSED, model.InstanceId(id)))
            told.plan(await c.look())
        snapshot, plans = await c.look(), set()
        for kept in snapshot.waiting():
            assert told.why(snapshot, kept.noun.id)
            plans.add(told._plan.made_ns if told._plan else 0)
        assert len(plans) <= 5, "a plan for nearly every line of a list"


async def test_how_long_a_node_was_not_heard_of_is_told_by_this_controllers_clock() -> None:
    """Safety S9; its last word came a lease before its sign of life went."""
    async with clouds.running() as c:
        clock, fleet = Clock(), hosts.Fleet()
        seen = presence.Presence(clock)
        told = waiting.Waiting(clock, fleet, seen.silent_s)
        node = await c.join()
        (id,) = await c.create()
        seen.look(await c.look())
        session = (await c.look()).session(node)
        assert session is not None
        c.store._data.revoke(session.noun.lease)  # type: ignore[attr-defined]
        clock.now_ns += 12_000_000_000
        snapshot = await c.look()
        kept = snapshot.instance(id)
        assert kept is not None
        [verdict] = told.story(snapshot, kept, talking=True).verdicts
        assert verdict.text == "no word for 42 s"
        fleet.silent = frozenset({node})
        [verdict] = told.story(snapshot, kept, talking=True).verdicts
        assert verdict.text == "no word for 2 min"
