"""On hold, an agent waits for its own history, and then tells a restored store what it has (safety S19)."""

import shutil
from pathlib import Path

import msgspec

from covey import wire
from covey.agent import adoption
from covey.client import balance
from tests.unit.agent import fake
from tests.unit.agent.conftest import MakeNode, Node

Said = wire.ReportEvent
RUN, DESTROY = wire.Verb.RUN, wire.Verb.DESTROY


async def started(cloud: fake.Controller, vm: str) -> None:
    cloud.want(RUN, vm)
    await fake.until(lambda: Said.BOOTED in cloud.said(vm), "booted")


async def held_for_long(cloud: fake.Controller, node: Node) -> None:
    """On hold, and the patience is over."""
    await fake.until(lambda: node.agent.session.hold, "on hold")
    polls = len(cloud.messages)
    await fake.until(lambda: len(cloud.messages) >= polls + adoption.LEAST_ANSWERS, "every answer says hold")
    node.clock.ahead_ns += adoption.PATIENCE_NS


async def test_a_node_tells_what_it_has_and_goes_on(cloud: fake.Controller, make_node: MakeNode) -> None:
    node = make_node()
    await node.start()
    await started(cloud, "kept")
    await started(cloud, "ended")
    await started(cloud, "replaced")
    cloud.want(DESTROY, "ended")
    cloud.wants["ended", 1] = msgspec.structs.replace(cloud.wants["ended", 1], final=True)
    cloud.want(DESTROY, "replaced")
    await fake.until(lambda: Said.GONE in cloud.said("ended") and Said.GONE in cloud.said("replaced"), "gone")
    before, joins = node.agent.session.seen, len(cloud.joins)
    cloud.restore()
    await held_for_long(cloud, node)
    await fake.until(lambda: cloud.adopts and cloud.adopts[-1].last, "told")
    (vm,) = [one for told in cloud.adopts for one in told.vms]
    assert (vm.instance, vm.epoch, vm.launched, vm.running, vm.stopped, vm.buried) == (
        "kept",
        1,
        True,
        True,
        False,
        False,
    )
    assert vm.vm is not None
    (grave,) = [one for told in cloud.adopts for one in told.buried]
    assert (grave.instance, grave.final, grave.seen.history) == ("ended", True, fake.HISTORY)
    assert all(told.seen.history == before.history for told in cloud.adopts)
    await fake.until(lambda: len(cloud.joins) == joins + 1, "a new session")
    await fake.until(lambda: cloud.said("kept").count(Said.BOOTED) == 2, "everything is said again")
    seen = node.agent.session.seen
    assert (seen.history, seen.revision < before.revision) == ("restored", True)
    assert await node.phases() == {("kept", 1): "running"}
    await started(cloud, "new")


async def test_an_answer_of_the_own_history_ends_the_hold(cloud: fake.Controller, make_node: MakeNode) -> None:
    node = make_node()
    await node.start()
    await started(cloud, "vm")
    cloud.hold = True
    cloud.changed()
    await fake.until(lambda: node.agent.session.hold, "on hold")
    cloud.hold = False
    await fake.until(lambda: not node.agent.session.hold, "released")
    node.clock.ahead_ns += adoption.PATIENCE_NS
    cloud.hold = True
    cloud.changed()
    await fake.until(lambda: node.agent.session.hold, "on hold again: the patience begins anew")
    polls = len(cloud.messages)
    await fake.until(lambda: len(cloud.messages) > polls + adoption.LEAST_ANSWERS, "some answers more")
    assert not cloud.adopts


async def test_what_was_told_and_not_answered_is_told_again(cloud: fake.Controller, make_node: MakeNode) -> None:
    node = make_node()
    await node.start()
    await started(cloud, "vm")
    cloud.restore()
    cloud.lose.append("adopt")
    await held_for_long(cloud, node)
    await fake.until(lambda: len(cloud.adopts) > 1 or not node.agent.session.hold, "told again, or known to be taken")
    await fake.until(lambda: node.agent.session.seen.history == "restored", "goes on")
    assert {one.instance for told in cloud.adopts for one in told.vms} == {"vm"}
    assert await node.phases() == {("vm", 1): "running"}


async def test_everything_is_told_anew_when_the_store_is_restored_between_two_parts(
    cloud: fake.Controller, make_node: MakeNode
) -> None:
    """Safety S19: what the first part told is forgotten then."""
    node = make_node()
    await node.start()
    for vm in ("one", "two", "three"):
        await started(cloud, vm)

    def restore_once(told: wire.Adopt) -> None:
        if told.begun.revision:
            cloud.before_adopt = lambda _told: None
            cloud.restore(history="restored again")

    cloud.before_adopt = restore_once
    cloud.restore()
    await held_for_long(cloud, node)
    await fake.until(lambda: node.agent.session.seen.history == "restored again", "goes on")
    told = [(len(part.vms), part.begun.history, part.last) for part in cloud.adopts]
    assert told[:2] == [(2, "", False), (1, "restored", True)]
    assert told[-2:] == [(2, "", False), (1, "restored again", True)]
    assert {vm.instance for part in cloud.adopts[-2:] for vm in part.vms} == {"one", "two", "three"}


async def test_a_controller_that_cannot_take_what_is_told_is_left_for_another_one(
    cloud: fake.Controller, make_node: MakeNode
) -> None:
    """It may be older than this call."""
    node, other = make_node(), fake.Controller()
    await other.start()
    try:
        node.endpoints._balance = balance.Balance([cloud.url, other.url])
        await node.start()
        await started(cloud, "vm")
        other.counter, other.secret = cloud.counter, cloud.secret
        for one in (cloud, other):
            one.break_["adopt"] = 500
            one.restore()
        await held_for_long(cloud, node)
        for _ in range(3):
            for one in (cloud, other):
                one.called.clear()
            await fake.until(lambda: "adopt" in cloud.called and "adopt" in other.called, "both are asked, by turns")
        assert node.agent.session.hold
    finally:
        await other.stop()


async def test_a_hold_outlasts_the_session(cloud: fake.Controller, make_node: MakeNode) -> None:
    """(safety S18) Nothing is done in the moment between a new session and its first answer."""
    node = make_node()
    await node.start()
    await started(cloud, "vm")
    cloud.hold = True
    cloud.changed()
    await fake.until(lambda: node.agent.session.hold, "on hold")
    cloud.break_["wanted"] = 503
    cloud.counter += 1  # its reports get 409: it joins again
    joins = len(cloud.joins)
    await fake.until(lambda: len(cloud.joins) > joins and node.agent.session.good.is_set(), "a new session")
    assert node.agent.session.hold
    del cloud.break_["wanted"]
    cloud.hold = False
    await fake.until(lambda: not node.agent.session.hold, "an answer of its own history ends it")


async def test_an_agent_that_died_on_hold_tells_after_its_restart(
    cloud: fake.Controller, make_node: MakeNode, tmp_path: Path
) -> None:
    first = make_node()
    await first.start()
    await started(cloud, "vm")
    cloud.restore()
    await fake.until(lambda: first.agent.session.hold, "on hold")
    await first.stop()
    second = make_node()
    await second.start()
    await held_for_long(cloud, second)
    await fake.until(lambda: second.agent.session.seen.history == "restored", "goes on")
    assert [one.instance for told in cloud.adopts for one in told.vms] == ["vm"]
    assert (tmp_path / "node" / "node.json").read_text().count('"restored"') == 1, "durable"


async def test_a_vm_that_is_on_record_alone_is_told_after_a_restart(
    cloud: fake.Controller, make_node: MakeNode, tmp_path: Path
) -> None:
    """Safety S19: the host lost power, and the VM's disk with it. The record is not forgotten in the moment between the
    new session and its first answer, which says hold: the store has forgotten an instance that was launched."""
    first = make_node()
    await first.start()
    await started(cloud, "vm")
    await first.stop()
    shutil.rmtree(tmp_path / "node" / "vms")
    cloud.wants.clear()
    cloud.restore()
    second = make_node()
    await second.start()
    await held_for_long(cloud, second)
    await fake.until(lambda: second.agent.session.seen.history == "restored", "goes on")
    assert [(one.instance, one.launched, one.running) for told in cloud.adopts for one in told.vms] == [
        ("vm", True, False)
    ]
    await fake.until(lambda: not list((tmp_path / "node" / "records").iterdir()), "forgotten: nobody wants it any more")


async def test_the_record_has_the_view_of_its_launch_before_the_guest_runs(
    cloud: fake.Controller, make_node: MakeNode, tmp_path: Path
) -> None:
    """Else a store that was restored to just before the launch would look like the one that the agent knows."""
    node = make_node()
    await node.start()
    revision = cloud.revision
    cloud.before_launch_answer = lambda: setattr(cloud, "revision", cloud.revision + 1000)
    await started(cloud, "vm")
    (record,) = (tmp_path / "node" / "records").glob("vm.1.json")
    seen = msgspec.json.decode(record.read_bytes())["seen"]
    assert seen["revision"] > revision + 1000
