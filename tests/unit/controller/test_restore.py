"""A store that is restored under two controllers which serve: what agents and people are answered (safety S18, S19)."""

import msgspec

from covey import model, wire
from covey.controller import watchlist
from covey.decide import deadlines
from covey.store import commit_adopt, commit_cloud, memory, schema, view
from tests.support import cloud as store_cloud
from tests.unit.controller import cloud

RUN = wire.Verb.RUN


async def restored(house: cloud.Cloud, backup: memory.Backup) -> None:
    """The backup takes the store's place; every controller has found out, and serves again."""
    store = house.store
    assert isinstance(store, memory.Memory)
    store.restore(backup)

    async def known() -> bool:
        ready = [await cloud.is_ready(api) for api in house.apis]
        return all(ready) and bool((await store.range(schema.BREAK)).kvs)

    await cloud.until(known)


def saved(house: cloud.Cloud) -> memory.Backup:
    assert isinstance(house.store, memory.Memory)
    return house.store.backup()


async def tell(agent: cloud.Agent, *vms: wire.Held, last: bool = True) -> wire.Adopted:
    told = wire.Adopt(seen=agent.seen, messages=agent.messages, vms=vms, last=last)
    status, envelope = await agent.call("adopt", told)
    assert (status, envelope["status"]) == (200, "OK"), envelope
    return msgspec.convert(envelope["body"], wire.Adopted)


async def started(agent: cloud.Agent) -> wire.Held:
    """Run the one thing that is wanted; how its node will tell of it."""
    want = await agent.work(RUN)
    launched = await agent.launch(want)
    assert launched.granted
    agent.seen = launched.seen
    vm = cloud.vm_info(want.instance)
    await agent.report(agent.item(want, wire.ReportEvent.BOOTED, vm=vm))
    assert want.spec is not None
    return wire.Held(instance=want.instance, epoch=want.epoch, spec=want.spec, launched=True, running=True, vm=vm)


async def test_a_launch_that_the_backup_lacks(pair: cloud.Cloud) -> None:
    one, two = pair.apis
    agent, other = cloud.Agent(one), cloud.Agent(two, host_key="host-key-2", secret="secret-2")
    await agent.join()
    await other.join(facts=msgspec.structs.replace(cloud.FACTS, name="host-2", ip="10.0.0.2"))
    (id,) = await one.start(node_id=agent.me.node)
    want = await agent.work(RUN)
    backup = saved(pair)
    held = await started(agent)
    await restored(pair, backup)

    for api in pair.apis:
        agent.api = api
        status, envelope = await agent.call("wanted", wire.Ask(seen=agent.seen, messages=agent.messages))
        assert status == 409 or envelope["body"]["hold"], "nothing is asked for on hold"
        status, envelope = await agent.call("report", wire.Report(seen=agent.seen, messages=agent.messages))
        assert (status, envelope["message"].startswith("hold: ")) == (409, True)
    shown = await two.ok("GET", f"/api/v1/vm?id={id}")
    assert shown["instance_state"] == "Pulling"
    assert "covey node release host-1" in shown["message"]

    await tell(other)
    other.seen = (await tell(other)).seen
    agent.seen = (await tell(agent, held)).seen
    for api in pair.apis:
        assert await api.state(id) == "Started"
    state = await agent.wanted()
    assert not state.hold
    assert [(one.instance, one.verb, one.launched) for one in state.wanted] == [(want.instance, RUN, True)]


async def test_a_view_that_this_store_cannot_have_had_begins_a_new_history_for_all(pair: cloud.Cloud) -> None:
    """No controller was there to see it, and the store was young: the agent brings the proof."""
    one, two = pair.apis
    agent, other = cloud.Agent(one), cloud.Agent(two, host_key="host-key-2", secret="secret-2")
    await agent.join()
    await other.join()
    assert not (await other.wanted()).hold
    before = agent.seen
    agent.seen = wire.Seen(history="of another life", revision=before.revision)
    assert (await agent.wanted()).hold
    await cloud.until(lambda: _held(other))
    assert (await pair.store.range(schema.BREAK)).total == 1
    first = (await pair.store.range(schema.BREAK)).kvs[0]
    agent.seen = wire.Seen(history="of another life", revision=before.revision)
    await tell(agent)
    await tell(other)
    assert not (await other.wanted()).hold
    assert (await agent.wanted()).hold, "it has not heard that it was taken, so it tells again"
    assert (await pair.store.range(schema.BREAK)).kvs[0] == first, "which is no proof of another restore"
    agent.seen = wire.Seen(history="of another life", revision=before.revision)
    agent.seen = (await tell(agent)).seen
    assert not (await agent.wanted()).hold


async def _held(agent: cloud.Agent) -> bool:
    seen = agent.seen
    state = await agent.wanted()
    agent.seen = seen
    return state.hold


async def test_who_was_away_for_longer_than_history_is_kept_tells_alone(house: cloud.Cloud) -> None:
    agent = cloud.Agent(house.api)
    await agent.join()
    agent.seen = wire.Seen(history="long forgotten", revision=1)
    assert (await agent.wanted()).hold
    assert not (await house.store.range(schema.BREAK)).kvs
    agent.seen = wire.Seen(history="long forgotten", revision=1)
    agent.seen = (await tell(agent)).seen
    assert not (await agent.wanted()).hold


async def test_a_node_that_tells_in_parts_begins_anew_when_the_store_is_restored_between_two(
    house: cloud.Cloud,
) -> None:
    """Safety S19."""
    agent = cloud.Agent(house.api)
    await agent.join()
    backup = saved(house)
    await house.api.start()
    await restored(house, backup)
    first = await tell(agent, last=False)
    await restored(house, backup)
    rest = wire.Adopt(seen=agent.seen, messages=agent.messages, last=True, begun=first.seen)
    status, envelope = await agent.call("adopt", rest)
    assert (status, "restored again" in envelope["message"]) == (503, True)
    assert (await agent.wanted()).hold
    begun = (await tell(agent, last=False)).seen
    status, envelope = await agent.call("adopt", msgspec.structs.replace(rest, begun=begun))
    assert status == 200
    agent.seen = msgspec.convert(envelope["body"], wire.Adopted).seen
    assert not (await agent.wanted()).hold


async def test_people_are_served_on_nodes_that_have_told_and_may_give_up_the_others(house: cloud.Cloud) -> None:
    told, lost = cloud.Agent(house.api), cloud.Agent(house.api, host_key="host-key-2", secret="secret-2")
    await told.join()
    await lost.join(facts=msgspec.structs.replace(cloud.FACTS, name="lost", arch=model.Arch.ARM64))
    backup = saved(house)
    (accepted,) = await house.api.start()
    await restored(house, backup)
    assert (await house.api.ask("GET", f"/api/v1/vm?id={accepted}"))[1]["message"] == "Not found"
    (id,) = await house.api.start()
    assert "since the store was restored" in (await house.api.ok("GET", f"/api/v1/vm?id={id}"))["message"]
    told.seen = (await tell(told)).seen
    held = await started(told)
    assert (held.instance, await house.api.state(id)) == (id, "Started")

    await house.api.ok("POST", "/api/v1/node/release", {"node_id": lost.me.node})
    await house.api.ok("POST", "/api/v1/node/release", {"node_id": lost.me.node})
    assert await house.api.fail("POST", "/api/v1/node/release", {"node_id": "nobody"}) == "Not found"
    assert (await lost.wanted()).hold, "should it come back, it tells first"
    snapshot = await house.replicas[0]._mirror.fresh()
    assert snapshot.awaited() == []
    assert await commit_adopt.settle(house.replicas[0]._writer, snapshot)


async def test_a_held_node_leaves_only_by_force(house: cloud.Cloud) -> None:
    agent = cloud.Agent(house.api)
    await agent.join()
    await house.api.start()
    backup = saved(house)
    await house.api.start()
    await restored(house, backup)
    _, envelope = await agent.call("leave", wire.Leave())
    assert envelope["status"] == "FAIL"
    assert "not yet told" in envelope["message"]
    _, envelope = await agent.call("leave", wire.Leave(force=True))
    assert envelope["status"] == "OK"


async def test_nothing_is_concluded_from_the_silence_of_a_node_that_has_not_told() -> None:
    """No withdrawal, no other placement, no order, no Error: until its operator gives it up."""
    kinds = deadlines.Kind
    async with store_cloud.running() as c:
        node = await c.join()
        (running,) = await c.create(homes=[node])
        await c.started(node, running)
        (placed,) = await c.create(homes=[node])
        await c.say(node, 1, ("stray", 1))
        life = (await c.look()).session(node)
        assert life is not None
        assert isinstance(c.store, memory.Memory)
        c.store.end_lease(life.noun.lease)

        def found(snapshot: view.Snapshot) -> set[tuple[str, str]]:
            watched = [*watchlist.things(snapshot), *watchlist.nodes(snapshot, ())]
            things = {(str(thing.kind), thing.id) for thing, _ in watched}
            stranded = {("stranded", str(kept.noun.id)) for kept in watchlist.stranded(snapshot, ())}
            return {one for one in things | stranded if one[0] != kinds.BREAK}

        all_of_it = {
            (kinds.LOST, running),
            (kinds.UNACKNOWLEDGED, placed),
            (kinds.UNWANTED, "stray"),
            ("stranded", placed),
        }
        assert found(await c.look()) == all_of_it
        c.store.restore(c.store.backup(), cluster="another")
        await commit_cloud.add_nonce(c.writer)
        held = await c.look()
        assert found(held) == set()
        assert [thing.kind for thing, _ in watchlist.things(held)] == [kinds.BREAK]
        await commit_adopt.excuse(c.writer, held, node, "operator")
        assert found(await c.look()) == all_of_it
