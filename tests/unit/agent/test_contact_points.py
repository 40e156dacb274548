"""Where a node and its cloud find each other: learnt controllers, a host that moves, a join that is refused."""

import asyncio
from pathlib import Path

import pytest

from covey import errors, wire
from covey.agent import host, identity
from tests.unit.agent import fake
from tests.unit.agent.conftest import MakeNode, Node


async def begun_at(place: host.Place, cloud: fake.Controller, make_node: MakeNode) -> Node:
    node = make_node()
    node.place = place
    await node.start()
    await fake.until(lambda: bool(cloud.called & {"report"}), "the node has joined")
    return node


async def move(node: Node, place: host.Place) -> None:
    """The host is elsewhere, and the agent has seen it."""
    node.place = place
    node.clock.ahead_ns += 61_000_000_000
    node.agent.wake()
    await fake.until(lambda: node.agent._moved, "the node has looked at its host again")


async def test_a_node_whose_host_got_another_name_or_address_says_so(
    cloud: fake.Controller, make_node: MakeNode
) -> None:
    """Without a restart: it joins again, as the same node, and its VMs run on."""
    node = await begun_at(host.Place("before", "192.0.2.1"), cloud, make_node)
    assert (cloud.joins[-1].facts.name, cloud.joins[-1].facts.ip) == ("before", "192.0.2.1")
    await move(node, host.Place("after", "192.0.2.2"))
    cloud.changed()  # its poll is answered
    await fake.until(lambda: len(cloud.joins) == 2, "the node joins again")
    assert (cloud.joins[-1].facts.name, cloud.joins[-1].facts.ip) == ("after", "192.0.2.2")
    assert cloud.joins[-1].node == "node-1"


async def test_a_launch_under_way_is_not_lost_because_the_host_got_another_name(
    cloud: fake.Controller, make_node: MakeNode
) -> None:
    """The launch was granted, and its answer is still to come, when the node would begin a session for its new name."""
    node = await begun_at(host.Place("before", "192.0.2.1"), cloud, make_node)
    cloud.lose = ["launch"] * 1000
    cloud.want(wire.Verb.RUN, "vm")
    await fake.until(lambda: bool(cloud.granted), "granted, and the answer lost")
    await move(node, host.Place("after", "192.0.2.2"))
    for _ in range(3):
        polls = len(cloud.messages)
        cloud.changed()
        cloud.want(wire.Verb.KEEP, f"another-{polls}")  # news: the poll is answered
        await fake.until(lambda polls=polls: len(cloud.messages) > polls + 1, "it asked again")  # type: ignore[misc]
    cloud.lose = []
    await fake.until(lambda: wire.ReportEvent.BOOTED in cloud.said("vm"), "booted")
    cloud.want(wire.Verb.KEEP, "another")
    await fake.until(lambda: cloud.joins[-1].facts.name == "after", "then its new name is told")
    assert wire.ReportEvent.FAILED not in cloud.said("vm")


async def test_a_host_that_does_not_know_its_address_now_has_not_moved(
    cloud: fake.Controller, make_node: MakeNode
) -> None:
    """The network is away for a while."""
    node = await begun_at(host.Place("mine", "192.0.2.1"), cloud, make_node)
    node.place = host.Place("mine", "")
    reports = len(cloud.reports)
    node.clock.ahead_ns += 61_000_000_000
    node.agent.wake()
    await fake.until(lambda: len(cloud.reports) > reports + 1, "it goes on")
    cloud.changed()
    assert len(cloud.joins) == 1


async def test_learnt_controllers_are_asked_and_kept(
    cloud: fake.Controller, make_node: MakeNode, tmp_path: Path
) -> None:
    node = make_node()
    cloud.controllers = ("http://127.0.0.1:1", cloud.url)
    await node.start()
    await fake.until(lambda: set(node.endpoints.urls) == set(cloud.controllers), "the node has learnt")
    assert identity.learnt(tmp_path / "node") == cloud.controllers
    cloud.controllers = ()  # nothing to learn from that
    cloud.changed()
    await fake.until(lambda: cloud.called >= {"report"}, "it goes on")
    await fake.until(lambda: len(cloud.messages) > 3, "it has asked again")
    assert set(node.endpoints.urls) == {"http://127.0.0.1:1", cloud.url}


async def test_an_operators_join_that_is_refused_for_good_ends(cloud: fake.Controller, make_node: MakeNode) -> None:
    node = make_node()
    node.agent._explicit = True
    cloud.refuse = "the agent belongs to another cloud"
    with pytest.raises(BaseExceptionGroup) as caught:
        await asyncio.wait_for(node.agent.run(), 20)
    (error,) = caught.value.exceptions
    assert isinstance(error, errors.SettingError)
    assert "another cloud" in str(error)


@pytest.mark.parametrize("status", [409, 410], ids=["its old session lives", "its removal is not finished"])
async def test_an_operators_join_waits_for_what_passes(
    cloud: fake.Controller, make_node: MakeNode, status: int
) -> None:
    node = make_node()
    node.agent._explicit = True
    cloud.break_["join"] = status
    await node.start()
    await fake.until(lambda: "join" in cloud.called, "the node has asked")
    del cloud.break_["join"]
    await fake.until(lambda: "report" in cloud.called, "the node has joined")
    assert cloud.joins[-1].explicit
