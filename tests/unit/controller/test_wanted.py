"""What a node is told: never more than what was decided (safety S2)."""

import msgspec

from covey import model, wire
from covey.controller import hosts, wanted, watchlist
from covey.decide import deadlines
from covey.store import commit_cloud, commit_instances, commit_nodes, schema
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


async def test_what_turns_up_again_after_it_was_gone_is_ordered_away_and_frees_its_slot() -> None:
    """Promise I3: a word was slower than the end, so the claim came back; the failed instance wants nothing of it."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        await c.report(node, nouns.item(Said.FAILED, model.InstanceId(id)), nouns.item(Said.GONE, model.InstanceId(id)))
        await c.say(node, 1, (id, 1))
        assert await wants(c, node) == []
        odd, things = watchlist.on_node(await c.look(), node)
        assert odd
        assert [thing for thing, _ in things] == [deadlines.Thing(deadlines.Kind.UNWANTED, id, node, 1)]
        await commit_nodes.order(c.writer, await c.look(), node, model.InstanceId(id), 1, cloud.WHO)
        assert await wants(c, node) == [(id, 1, Verb.DESTROY)]
        await c.report(node, nouns.item(Said.GONE, model.InstanceId(id)))
        assert await wants(c, node) == []
        ledger = (await c.look()).ledger(node)
        assert ledger is not None
        assert ledger.noun.claims == ()


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
        homes = hosts.Homes(c.world, "me")
        snapshot = await c.look()
        with homes.reserve(snapshot, nouns.spec(), 1) as one, homes.reserve(snapshot, nouns.spec(), 1) as two:
            assert {*one.nodes, *two.nodes} == nodes
            assert homes.reserve(snapshot, nouns.spec(), 1).nodes == ()
            one.revision = snapshot.revision + 1
        assert homes.reserve(snapshot, nouns.spec(), 1).nodes == two.nodes, "the other shows its write first"


async def test_controllers_prefer_different_ones_of_equal_nodes() -> None:
    """As long as each has free nodes of its own share, nobody meets; and together they use all nodes."""
    async with cloud.running() as c:
        nodes = {await c.join() for _ in range(30)}
        for name in ("a", "b", "c"):
            noun = schema.Controller(id=name, version="1", format=schema.FORMAT, url="", started_ns=0)
            await commit_cloud.announce(c.writer, noun, await c.store.grant(60))
        snapshot = await c.look()
        first: dict[str, list[str]] = {}
        for name in ("a", "b", "c"):
            homes = hosts.Homes(c.world, name)
            held = [homes.reserve(snapshot, nouns.spec(), 1).nodes for _ in range(30)]
            first[name] = [node for (node,) in held]
            assert {*first[name]} == nodes
        shares = {name: {node for node in nodes if _is_first(first, name, node)} for name in first}
        assert sum(map(len, shares.values())) == 30
        for name, order in first.items():
            assert {*order[: len(shares[name])]} == shares[name]


def _is_first(orders: dict[str, list[str]], name: str, node: str) -> bool:
    """Whether nobody has a lower lot for the node."""
    lots = {other: hosts._lot(other, node) for other in orders}
    return min(lots, key=lambda other: lots[other]) == name


def test_controllers_have_equal_shares() -> None:
    names = ("a", "b", "c")
    firsts = [min(names, key=lambda name: hosts._lot(name, f"node {number}")) for number in range(300)]
    assert all(85 < firsts.count(name) < 115 for name in names)


async def test_a_home_may_have_room_beside_other_claims() -> None:
    async with cloud.running() as c:
        node = await c.join(facts=nouns.facts(slots=2))
        homes = hosts.Homes(c.world, "me")
        with homes.reserve(await c.look(), nouns.spec(), 1) as home:
            assert home.nodes == (node,)
            claim = model.Claim(instance=nouns.instance_id(), epoch=1)
            other = msgspec.structs.replace(claim, instance=nouns.instance_id())
            assert home.fits(node, model.Ledger(node=node, claims=(claim,)))
            assert not home.fits(node, model.Ledger(node=node, claims=(claim, other)))


async def test_no_home_for_what_would_overtake_or_does_not_fit() -> None:
    async with cloud.running() as c:
        node = await c.join(facts=nouns.facts(slots=2))
        homes = hosts.Homes(c.world, "me")
        assert homes.reserve(await c.look(), nouns.spec(), 2).nodes == (), "one home per node and start"
        await c.create(2, homes=[node, node])
        assert homes.reserve(await c.look(), nouns.spec(), 1).nodes == ()
