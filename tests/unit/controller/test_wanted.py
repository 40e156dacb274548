"""What a node is told: never more than what was decided (safety S2)."""

from covey import model, wire
from covey.controller import hosts, wanted
from covey.store import commit_instances, commit_nodes
from tests.support import cloud, nouns

Verb = wire.Verb
Said = wire.ReportEvent


async def wants(c: cloud.Cloud, node: str) -> list[tuple[str, int, Verb]]:
    found = wanted.for_node(await c.look(), node).wanted
    return [(want.instance, want.epoch, want.verb) for want in found]


async def test_from_placement_to_the_end() -> None:
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        assert await wants(c, node) == [(id, 1, Verb.RUN)]
        await c.started(node, id)
        (want,) = wanted.for_node(await c.look(), node).wanted
        assert (want.verb, want.launched, want.spec) == (Verb.RUN, True, nouns.spec())
        await c.terminate(id)
        (want,) = wanted.for_node(await c.look(), node).wanted
        assert want.verb == Verb.DESTROY
        assert want.decision is not None
        assert (want.decision.who, want.decision.why) == ("tester", "the test says so")
        await c.report(node, nouns.item(Said.GONE, model.InstanceId(id)))
        assert await wants(c, node) == []


async def test_a_failed_vm_is_kept_until_someone_decides() -> None:
    """Promise I4."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        await c.report(node, nouns.item(Said.FAILED, model.InstanceId(id)))
        assert await wants(c, node) == [(id, 1, Verb.KEEP)]
        await c.report(node, nouns.item(Said.GONE, model.InstanceId(id)))
        assert await wants(c, node) == []


async def test_a_withdrawn_placement_is_ordered_away_and_the_next_is_told_beside_it() -> None:
    """Safety S10: this epoch and every older one."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        await commit_instances.withdraw(c.writer, await c.look(), await c.kept(id), cloud.WHO)
        assert await wants(c, node) == [(id, 1, Verb.DESTROY)]
        await c.place(node, id)
        assert await wants(c, node) == [(id, 1, Verb.DESTROY), (id, 2, Verb.RUN)]


async def test_nothing_is_said_of_a_vm_that_nobody_wants() -> None:
    """Safety S2: its absence from the answer is no order; the order comes in its time."""
    async with cloud.running() as c:
        node = await c.join()
        await c.say(node, 1, ("stray", 1))
        assert await wants(c, node) == []
        await commit_nodes.order(c.writer, await c.look(), node, model.InstanceId("stray"), 1, cloud.WHO)
        assert await wants(c, node) == [("stray", 1, Verb.DESTROY)]


async def test_the_tag_changes_with_what_there_is_to_do_and_with_nothing_else() -> None:
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        first = wanted.for_node(await c.look(), node).tag
        await c.report(node, nouns.item(Said.ACKNOWLEDGED, model.InstanceId(id)))
        await c.started(node, id)
        assert wanted.for_node(await c.look(), node).tag == first
        await c.terminate(id)
        assert wanted.for_node(await c.look(), node).tag != first


async def test_homes_are_used_by_one_start_at_a_time() -> None:
    async with cloud.running() as c:
        nodes = {await c.join(), await c.join()}
        homes = hosts.Homes(c.world)
        snapshot = await c.look()
        with homes.reserve(snapshot, nouns.spec(), 1) as one, homes.reserve(snapshot, nouns.spec(), 1) as two:
            assert {*one.nodes, *two.nodes} == nodes
            assert homes.reserve(snapshot, nouns.spec(), 1).nodes == ()
            one.revision = snapshot.revision + 1
        assert homes.reserve(snapshot, nouns.spec(), 1).nodes == two.nodes, "the other shows its write first"


async def test_no_home_for_what_would_overtake_or_does_not_fit() -> None:
    async with cloud.running() as c:
        node = await c.join(facts=nouns.facts(slots=2))
        homes = hosts.Homes(c.world)
        assert homes.reserve(await c.look(), nouns.spec(), 2).nodes == (), "one home per node and start"
        await c.create(2, homes=[node, node])
        assert homes.reserve(await c.look(), nouns.spec(), 1).nodes == ()
