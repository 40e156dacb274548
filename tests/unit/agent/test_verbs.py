"""The last look before the fork, and steps that must not be cut in half."""

import asyncio
import dataclasses

import msgspec
import pytest

from covey import errors, model, wire
from covey.agent import hypervisor, images, records, synthetic, verbs
from covey.client import packing
from covey.decide import convergence
from tests.support import nouns
from tests.unit.agent import fake
from tests.unit.agent.conftest import MakeNode, Node


async def _prepared(node: Node, cloud: fake.Controller) -> tuple[records.Record, verbs.Grant]:
    """A VM that only waits for its fork, and the launch for it."""
    await node.start()
    await fake.until(lambda: cloud.words, "joined")
    shared = node.agent._parts
    record = records.Record(
        instance=nouns.instance_id(), epoch=1, cloud=fake.CLOUD, seen=shared.session.seen, spec=nouns.spec()
    )
    await verbs.Verbs(shared).prepare(record, acknowledged=True)
    grant = verbs.Grant(
        nonce="n", session=shared.session.counter, asked_ns=node.clock.boot_ns(), script="", seen=record.seen
    )
    return record, grant


async def test_a_launch_in_hand_is_used(cloud: fake.Controller, make_node: MakeNode) -> None:
    node = make_node()
    record, grant = await _prepared(node, cloud)
    started = await verbs.Verbs(node.agent._parts).start(record, grant)
    assert started is not None and started.stage is convergence.Stage.LAUNCHED
    assert await node.phases() == {record.key: hypervisor.Phase.RUNNING}


@pytest.mark.parametrize("why", ["a tombstone", "another session", "a hold", "an old grant", "a lease that ended"])
async def test_the_last_look_before_the_fork(cloud: fake.Controller, make_node: MakeNode, why: str) -> None:
    """Safety S6, S7, S8, S9, S18: each of these alone keeps the guest from running."""
    node = make_node()
    record, grant = await _prepared(node, cloud)
    shared = node.agent._parts
    if why == "a tombstone":
        order = model.Decision(who="tester", why="the test says so")
        shared.records.bury(
            records.Tombstone(instance=record.instance, epoch=1, decision=order, seen=record.seen, at_ns=1)
        )
    elif why == "another session":
        grant = msgspec.structs.replace(grant, session=grant.session - 1)
    elif why == "a hold":
        shared.session.hold = True
    elif why == "an old grant":
        grant = msgspec.structs.replace(grant, asked_ns=grant.asked_ns - 6 * 10**9)
    else:
        shared.session.lease_until_ns = node.clock.boot_ns()
    assert await verbs.Verbs(shared).start(record, grant) is None
    assert (await node.phases()).get(record.key) in (None, hypervisor.Phase.PREPARED)


async def test_an_order_cuts_a_long_pull_short(cloud: fake.Controller, make_node: MakeNode) -> None:
    """Safety S6: nobody waits for the end of a pull whose VM was ordered away."""
    node, vm = make_node(pull_s=60.0), str(nouns.instance_id())
    await node.start()
    cloud.want(wire.Verb.RUN, vm)
    await fake.until(lambda: wire.ReportEvent.ACKNOWLEDGED in cloud.said(vm), "it pulls")
    cloud.want(wire.Verb.DESTROY, vm)
    await fake.until(lambda: wire.ReportEvent.GONE in cloud.said(vm), "gone", 40.0)


class NoImages(synthetic.Images):
    """A cache that cannot have it."""

    def __init__(self, fault: Exception) -> None:
        super().__init__(0.0)
        self._fault = fault

    async def get(
        self, holder: str, template: model.TemplateId, digest: model.Digest, progress: images.Progress
    ) -> hypervisor.Image:
        raise self._fault


@pytest.mark.parametrize(
    ("fault", "becomes"),
    [
        (packing.Damaged("not what it says"), convergence.Stage.FAILED),
        (errors.RemoteError("the registry is away"), convergence.Stage.REFUSED),
        (images.NoRoom("the disk is full"), convergence.Stage.REFUSED),
        (OSError(28, "no space"), convergence.Stage.REFUSED),
    ],
    ids=repr,
)
async def test_only_what_another_node_may_have_is_tried_elsewhere(
    cloud: fake.Controller, make_node: MakeNode, fault: Exception, becomes: convergence.Stage
) -> None:
    """A template that can never be used ends its instance in Error, with the reason."""
    node = make_node()
    record, _ = await _prepared(node, cloud)
    shared = dataclasses.replace(node.agent._parts, images=NoImages(fault))
    found = await verbs.Verbs(shared).prepare(record, acknowledged=True)
    assert found.stage is becomes
    assert str(fault.args[-1]) in found.message


async def test_a_verb_is_not_cut_in_half() -> None:
    """Safety S6: who cancels it goes on only when the verb has ended, so that nothing is removed under its hands."""
    done: list[str] = []

    async def fork() -> None:
        await asyncio.sleep(0.05)
        done.append("forked")

    task = asyncio.create_task(verbs.to_its_end(fork()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == ["forked"]
