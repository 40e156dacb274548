"""Whom a pulling node is told of, out of what the cloud knows already, and that nobody else can make its tickets."""

import msgspec

from covey import model, ticket, wire
from covey.controller import neighbours, wanted
from covey.store import commit_nodes
from tests.support import cloud, nouns

DIGEST = nouns.spec().digest


async def join(c: cloud.Cloud, number: int, port: int = 8091) -> model.NodeId:
    return await c.join(secret=f"secret of {number}", facts=nouns.facts(ip=f"10.0.0.{number}", share_port=port))


async def holds(c: cloud.Cloud, node: model.NodeId, *digests: model.Digest) -> None:
    word = model.Word(node=node, session=1, messages=1, at_ns=0, images=digests)
    await commit_nodes.say(c.writer, await c.look(), node, 1, word)


async def urls(c: cloud.Cloud, node: model.NodeId) -> list[str]:
    return [one.url for one in neighbours.of(await c.look(), node, DIGEST)]


async def test_those_that_pull_before_are_named_the_nearest_first() -> None:
    async with cloud.running() as c:
        nodes = [await join(c, number) for number in range(1, 4)]
        for node in nodes:
            await c.create(homes=[node])
        assert await urls(c, nodes[0]) == []
        assert await urls(c, nodes[1]) == ["http://10.0.0.1:8091"]
        assert await urls(c, nodes[2]) == ["http://10.0.0.2:8091", "http://10.0.0.1:8091"]


async def test_those_that_hold_it_are_named_and_one_that_holds_it_itself_is_told_of_nobody() -> None:
    async with cloud.running() as c:
        first, second = await join(c, 1), await join(c, 2)
        await holds(c, first, DIGEST)
        assert await urls(c, second) == ["http://10.0.0.1:8091"]
        await holds(c, second, DIGEST)
        assert await urls(c, second) == []
        assert neighbours.of(await c.look(), second, model.Digest("sha256:" + "f" * 64)) == ()


async def test_a_node_that_shares_nothing_is_not_named_and_told_of_nobody() -> None:
    async with cloud.running() as c:
        first, second, third = await join(c, 1, port=0), await join(c, 2), await join(c, 3)
        for node in (first, second, third):
            await c.create(homes=[node])
        await holds(c, first, DIGEST)
        assert await urls(c, first) == await urls(c, second) == []
        assert await urls(c, third) == ["http://10.0.0.2:8091"]


async def test_a_ticket_is_for_the_one_who_was_told_and_opens_the_named_node_alone() -> None:
    async with cloud.running() as c:
        first, second = await join(c, 1), await join(c, 2)
        await holds(c, first, DIGEST)
        snapshot = await c.look()
        (one,) = neighbours.of(snapshot, second, DIGEST)
        good = ticket.check(ticket.key_of("secret of 1"), one.ticket, DIGEST)
        assert good == ticket.Ticket(second, snapshot.history)
        assert ticket.check(ticket.key_of("secret of 2"), one.ticket, DIGEST) is None


async def test_an_address_of_version_6_is_a_url() -> None:
    async with cloud.running() as c:
        first = await c.join(facts=nouns.facts(ip="fd00::1", share_port=8091))
        second = await join(c, 2)
        await holds(c, first, DIGEST)
        assert await urls(c, second) == ["http://[fd00::1]:8091"]


async def test_that_somebody_may_help_is_no_news() -> None:
    """The tag that polls wait with is the same, whoever else pulls."""
    async with cloud.running() as c:
        first, second = await join(c, 1), await join(c, 2)
        await c.create(homes=[second])
        before = wanted.for_node(await c.look(), second).tag
        await holds(c, first, DIGEST)
        assert wanted.for_node(await c.look(), second).tag == before


class OldWanted(model.Noun, frozen=True, kw_only=True):
    """What an agent before 0.4 knows of `wire.Wanted`, in part."""

    instance: model.InstanceId
    epoch: int
    verb: wire.Verb


def test_an_older_agent_passes_over_what_it_does_not_know() -> None:
    """Safety S27."""
    told = wire.Neighbour(url="http://10.0.0.1:8091", ticket="t")
    want = wire.Wanted(instance=nouns.instance_id(), epoch=1, verb=wire.Verb.RUN, neighbours=(told,))
    assert msgspec.json.decode(msgspec.json.encode(want), type=OldWanted).epoch == 1
