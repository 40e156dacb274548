"""The loop over a store in memory: what is left standing is seen to, by any number of replicas at once."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from covey import model, wire, world
from covey.controller import hosts, loop
from covey.decide import deadlines
from covey.store import base, commit, commit_cloud, commit_instances, commit_nodes, mirror, schema, view
from tests.support import cloud, nouns

State = model.State
Said = wire.ReportEvent
MS = 1_000_000
QUICK = deadlines.Spans(
    unacknowledged_ns=50 * MS,
    stalled_ns=50 * MS,
    silent_ns=50 * MS,
    lost_ns=50 * MS,
    terminated_ns=50 * MS,
    error_ns=50 * MS,
    unwanted_ns=50 * MS,
)
NEVER = deadlines.Spans(*[10**18] * len(deadlines.Spans._fields))


@contextlib.asynccontextmanager
async def looping(c: cloud.Cloud, spans: deadlines.Spans = NEVER, replicas: int = 1) -> AsyncIterator[list[loop.Loop]]:
    """`replicas` controllers, the first of which has the first turn."""
    async with asyncio.TaskGroup() as group:
        tasks, loops = [], []
        for number in range(replicas):
            me = f"c{number}"
            lease = await c.store.grant(60)
            controller = schema.Controller(id=me, version="", format=1, url="", started_ns=0)
            await commit_cloud.announce(c.writer, controller, lease)
            copy = mirror.Mirror(c.store, c.world)
            loops.append(loop.Loop(copy, commit.Writer(c.store, c.world, who=me), c.world, me=me, spans=spans))
            tasks += [group.create_task(copy.run()), group.create_task(loops[-1].run())]
        yield loops
        for task in tasks:
            task.cancel()


async def until(condition: Callable[[], Awaitable[bool]], limit_s: float = 60.0) -> None:
    async with asyncio.timeout(limit_s):
        while not await condition():
            await asyncio.sleep(0.02)


def why(one: loop.Loop, id: str) -> str:
    """What this replica tells of a waiting instance."""
    return one._waiting.why(one._mirror.snapshot(), model.InstanceId(id))


async def states(c: cloud.Cloud) -> dict[str, State]:
    return {kept.noun.id: kept.noun.state for kept in (await c.look()).instances()}


async def test_what_waits_is_placed_when_a_node_comes() -> None:
    async with cloud.running() as c, looping(c) as (one,):
        ids = await c.create(3)
        await until(lambda: _true(why(one, ids[0]) == "Waiting: no node has joined"))
        node = await c.join()
        await until(lambda: _count(c, State.PULLING, 2))
        assert len(await c.claims(node)) == 2
        await until(lambda: _true("full" in "".join(why(one, id) for id in ids)))


async def test_three_replicas_place_each_instance_once() -> None:
    """Promise I2: conflicts are harmless."""
    async with cloud.running() as c, looping(c, replicas=3):
        nodes = [await c.join(facts=nouns.facts(slots=10)) for _ in range(4)]
        await asyncio.gather(*(c.create(10) for _ in range(4)))
        await until(lambda: _count(c, State.PULLING, 40))
        claims = [claim for node in nodes for claim in await c.claims(node)]
        assert sorted(claims) == sorted((id, 1) for id in await states(c))


async def test_the_others_act_when_the_first_does_not() -> None:
    """The replica with the first turn is announced but dead."""
    async with cloud.running() as c:
        lease = await c.store.grant(60)
        dead = schema.Controller(id="dead", version="", format=1, url="", started_ns=0)
        await commit_cloud.announce(c.writer, dead, lease)
        async with looping(c, spans=QUICK):
            await c.join()
            (id,) = await c.create()
            await until(lambda: _count(c, State.PULLING, 1))
            await c.terminate(id)


async def test_a_placement_without_acknowledgement_is_made_elsewhere() -> None:
    """Safety S10."""
    async with cloud.running() as c:
        deaf = await c.join()
        (id,) = await c.create(homes=[deaf])
        other = await c.join()
        async with looping(c, spans=NEVER._replace(unacknowledged_ns=1500 * MS)):
            await until(lambda: _on(c, id, other))
            await c.report(other, nouns.item(Said.ACKNOWLEDGED, model.InstanceId(id), epoch=2))
        instance = await c.instance(id)
        assert (instance.epoch, instance.state) == (2, State.PULLING)
        assert await c.claims(deaf) == [(id, 1)], "the slot is not free before the node says so"


async def test_an_unlaunched_instance_leaves_a_lost_node_and_a_launched_one_stays() -> None:
    """Safety S1."""
    async with cloud.running() as c:
        lost = await c.join()
        unlaunched, launched = await c.create(2)
        await c.place(lost, unlaunched, launched)
        await c.launch(lost, launched)
        other = await c.join()
        session = (await c.look()).session(lost)
        assert session is not None
        c.store._data.revoke(session.noun.lease)  # type: ignore[attr-defined]
        async with looping(c):
            await until(lambda: _on(c, unlaunched, other))
        instance = await c.instance(launched)
        assert (instance.node, instance.state, instance.epoch) == (lost, State.PULLING, 1)


async def test_a_silent_node_counts_as_lost_although_its_lease_lives() -> None:
    """Safety S8: an election may keep a lease alive for ever."""
    async with cloud.running() as c:
        silent = await c.join()
        (id,) = await c.create(homes=[silent])
        async with looping(c, spans=NEVER._replace(silent_ns=200 * MS)) as (one,):
            await until(lambda: _true(silent in one.silent))
            await until(lambda: _waits(c, id))
            assert "no node" in (await _text(one, id))


async def test_what_is_over_is_forgotten_and_error_is_reaped() -> None:
    async with cloud.running() as c:
        node = await c.join()
        ended, failed = await c.create(2)
        await c.place(node, failed)
        await c.terminate(ended)
        await c.report(node, nouns.item(Said.FAILED, model.InstanceId(failed), message="no"))
        async with looping(c, spans=QUICK._replace(unacknowledged_ns=10**18, silent_ns=10**18)):
            await until(lambda: _states_are(c, {failed: State.TERMINATING}))
            await c.report(node, nouns.item(Said.GONE, model.InstanceId(failed)))
            await until(lambda: _states_are(c, {}))
        assert await c.claims(node) == []
        assert await c.values(schema.OUTPUTS) == []


async def test_a_vm_that_nobody_wants_is_ordered_destroyed() -> None:
    """Promise I3, safety S2: by an order with who and why, after its time."""
    async with cloud.running() as c:
        node = await c.join()
        await c.say(node, 1, ("stray", 3))
        async with looping(c, spans=NEVER._replace(unwanted_ns=50 * MS)):
            await until(lambda: _ordered(c, node, "stray"))
        order = (await c.look()).order(node, "stray")
        assert order is not None
        assert (order.noun.epoch, order.noun.decision.who, order.noun.decision.why) == (
            3,
            "c0",
            "no instance wants this VM",
        )
        await c.report(node, nouns.item(Said.GONE, model.InstanceId("stray"), epoch=3))
        assert await c.claims(node) == []


async def test_a_vm_that_is_wanted_is_never_ordered_destroyed() -> None:
    """Promise I4."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        await c.started(node, id)
        await c.say(node, 1, (id, 1), (id, 2))
        async with looping(c, spans=QUICK._replace(silent_ns=10**18)):
            await asyncio.sleep(1.5)
        assert list((await c.look()).orders_on(node)) == []
        assert (await c.instance(id)).state == State.STARTED


async def test_a_launched_instance_on_a_node_long_away_ends_in_error() -> None:
    """Safety S1: after a documented time."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        await c.started(node, id)
        session = (await c.look()).session(node)
        assert session is not None
        c.store._data.revoke(session.noun.lease)  # type: ignore[attr-defined]
        async with looping(c, spans=NEVER._replace(lost_ns=50 * MS)):
            await until(lambda: _states_are(c, {id: State.ERROR}))


class Sleeper(world.System):
    """A host whose clock a test may push forward, as if the process had been stopped."""

    ahead_ns = 0

    def boot_ns(self) -> int:
        return super().boot_ns() + self.ahead_ns


class Stopping(world.System):
    """A clock that a test may stop."""

    stopped_ns = 0

    def boot_ns(self) -> int:
        return self.stopped_ns or super().boot_ns()


async def test_a_loop_that_was_stopped_begins_every_span_anew() -> None:
    """Safety S9: what it did not see stand still all the while has not stood still."""
    clock = Sleeper()
    async with cloud.running(clock) as c:
        (id,) = await c.create()
        await c.terminate(id)
        async with looping(c, spans=NEVER._replace(terminated_ns=4_000 * MS)) as (one,):
            await until(lambda: _observed(one, id))
            clock.ahead_ns += 60_000 * MS
            began_ns = time.monotonic_ns()
            await until(lambda: _is_forgotten(c, id))
            assert time.monotonic_ns() - began_ns > 3_500 * MS


async def _observed(one: loop.Loop, id: str) -> bool:
    return any(thing.id == id for thing in one._observed)


async def _is_forgotten(c: cloud.Cloud, id: str) -> bool:
    return id not in await states(c)


async def test_a_node_owes_what_was_withdrawn_until_it_says_gone() -> None:
    """Safety S10: it has not answered for that one, and gets nothing new."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        await commit_instances.withdraw(c.writer, await c.look(), await c.kept(id), cloud.WHO)
        assert _owes(await c.look(), node)
        await c.report(node, nouns.item(Said.GONE, model.InstanceId(id), epoch=1))
        assert not _owes(await c.look(), node)


def _owes(snapshot: view.Snapshot, node: str) -> bool:
    found = hosts.host(snapshot, node)
    assert found is not None
    return found.owed


async def test_a_removal_that_a_crash_cut_short_is_finished() -> None:
    """Safety S12."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        mark = base.Put(schema.removed(node), schema.encode(schema.Removed(at_ns=1)))
        gone = [base.Delete(key) for key in (schema.node(node), schema.session(node), schema.alive(node))]
        await c.store.commit(base.Txn((), (mark, *gone)))
        async with looping(c):
            await until(lambda: _states_are(c, {id: State.ERROR}))
        assert (await c.look()).ledger(node) is None


async def test_sweeping_takes_what_nothing_refers_to() -> None:
    async with cloud.running() as c:
        (id,) = await c.create(script=model.Script(key="used"))
        useless = [schema.script("lost"), schema.output("nobody", "stdout")]
        await c.store.commit(base.Txn((), (*(base.Put(key, b"x") for key in useless),)))
        await c.store.commit(base.Txn((), (base.Put(schema.output(id, "stdout"), b"x"),)))
        assert await loop.sweep(c.writer, await c.look()) == 2
        left = [kv.key for kv in [*await c.values(schema.SCRIPTS), *await c.values(schema.OUTPUTS)]]
        assert left == [schema.script("used"), schema.output(id, "stdout")]


async def test_nothing_is_written_when_there_is_nothing_to_decide() -> None:
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        await c.started(node, id)
        await c.create(2, node=node, priority=1)
        await commit_nodes.configure(c.writer, await c.look(), node, {"drain": True}, "op")
        async with looping(c, replicas=2) as loops:
            await until(lambda: _true(all(one._mirror.listed for one in loops)))
            revision = (await c.look()).revision
            await asyncio.sleep(1.2)
            assert (await c.look()).revision == revision


async def test_the_loop_survives_a_store_that_is_away() -> None:
    async with cloud.running() as c:
        await c.join()
        c.flaky.partition(True)
        copy = mirror.Mirror(c.flaky, c.world)
        one = loop.Loop(copy, c.writer, c.world, me="x", spans=NEVER)
        tasks = [asyncio.create_task(copy.run()), asyncio.create_task(one.run())]
        try:
            await asyncio.sleep(0.5)
            c.flaky.partition(False)
            await c.create()
            await until(lambda: _count(c, State.PULLING, 1))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _true(value: bool) -> bool:
    return value


async def _text(one: loop.Loop, id: str) -> str:
    await until(lambda: _true(why(one, id) != ""))
    return why(one, id)


async def _count(c: cloud.Cloud, state: State, count: int) -> bool:
    return (await c.look()).instance_count(state) == count


async def _on(c: cloud.Cloud, id: str, node: str) -> bool:
    return (await c.instance(id)).node == node


async def _waits(c: cloud.Cloud, id: str) -> bool:
    return (await c.instance(id)).waiting


async def _states_are(c: cloud.Cloud, wanted: dict[str, State]) -> bool:
    return await states(c) == wanted


async def _ordered(c: cloud.Cloud, node: str, id: str) -> bool:
    return (await c.look()).order(node, id) is not None


async def test_waiting_for_a_removed_node_ends_in_error() -> None:
    """Promise I1: it would wait for ever."""
    async with cloud.running() as c, looping(c):
        node = await c.join()
        (id,) = await c.create(arch=model.Arch.ARM64, node=node)
        await commit_nodes.remove(c.writer, await c.look(), node, "operator")
        await until(lambda: _states_are(c, {id: State.ERROR}))
        assert (await c.instance(id)).message == "The node asked for was removed"


async def test_one_thing_that_cannot_be_done_keeps_no_other_from_its_time() -> None:
    """A key that no program of this version can read, in the way of one decision at every turn."""
    async with cloud.running() as c:
        node = await c.join()
        (over,) = await c.create()
        await c.terminate(over)
        await commit_nodes.remove(c.writer, await c.look(), node, "operator")
        claims = (model.Claim(instance=model.InstanceId("x"), epoch=1),)
        ledger = base.Put(schema.ledger(node), schema.encode(model.Ledger(node=node, claims=claims)))
        broken = base.Put(schema.order(node, "x"), b"?")
        await c.store.commit(base.Txn((), (ledger, broken)))
        async with looping(c, spans=NEVER._replace(terminated_ns=1200 * MS)):
            await until(lambda: _states_are(c, {}))
        assert (await c.values(schema.order(node, "x")))[0].value == b"?"


async def test_a_node_that_refused_gets_it_again_after_a_pause_and_meanwhile_it_says_why() -> None:
    """A short trouble of the only node must not use up all attempts. Nothing changes in the store when a pause ends."""
    clock = Stopping()
    async with cloud.running(clock) as c, looping(c, replicas=2) as (one, _):
        node = await c.join()
        (id,) = await c.create()
        me = model.InstanceId(id)
        for epoch, least_s in ((1, 0.9), (2, 1.9)):
            await until(lambda: _on(c, id, node))
            refused_ns = clock.stopped_ns = clock.boot_ns()  # the pause does not end before it was seen
            await c.report(node, nouns.item(Said.REFUSED, me, epoch=epoch, message="disk full"))
            await c.report(node, nouns.item(Said.GONE, me, epoch=epoch))
            await until(lambda: _true("refused by host: disk full" in why(one, id)))
            clock.stopped_ns = 0
            await until(lambda: _on(c, id, node))
            assert least_s < (c.world.boot_ns() - refused_ns) / 1e9 < least_s + 15
        assert (await c.instance(id)).epoch == 3


async def test_another_node_gets_at_once_what_one_refused() -> None:
    clock = Stopping()
    async with cloud.running(clock) as c, looping(c):
        node = await c.join()
        (id,) = await c.create()
        await until(lambda: _on(c, id, node))
        other = await c.join()
        clock.stopped_ns = clock.boot_ns()  # no pause ends
        await c.report(node, nouns.item(Said.REFUSED, model.InstanceId(id), message="disk full"))
        await until(lambda: _on(c, id, other))


async def test_a_placement_without_progress_is_made_elsewhere() -> None:
    """Safety S10: its node named it and then got stuck."""
    async with cloud.running() as c:
        stuck = await c.join()
        (id,) = await c.create(homes=[stuck])
        me = model.InstanceId(id)
        await c.report(stuck, nouns.item(Said.ACKNOWLEDGED, me))
        other = await c.join()
        before = await c.kept(id)
        await c.report(stuck, nouns.item(Said.PROGRESS, me, progress=0.1))
        assert (await c.kept(id)).revision > before.revision, "progress begins the span anew"
        async with looping(c, spans=NEVER._replace(stalled_ns=500 * MS)):
            await until(lambda: _on(c, id, other))
        order = (await c.look()).order(stuck, id)
        assert order is not None
        assert (order.noun.withdrawn, order.noun.decision.why) == (True, "Its node shows no progress with it")
