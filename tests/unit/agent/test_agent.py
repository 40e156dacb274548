"""The agent against a controller that misbehaves: one rule per test."""

import asyncio
import base64
import functools
import itertools
import time
from pathlib import Path

import pytest

from covey import errors, model, wire
from covey.agent import hypervisor, session
from covey.client import balance
from tests.support import nouns
from tests.unit.agent import fake
from tests.unit.agent.conftest import MakeNode

Said = wire.ReportEvent
RUN, STOP, KEEP, DESTROY = wire.Verb.RUN, wire.Verb.STOP, wire.Verb.KEEP, wire.Verb.DESTROY
_names = itertools.count(1)


def name() -> str:
    return f"vm-{next(_names)}"


def scripted(cloud: fake.Controller, vm: str, text: str, **changes: object) -> model.Spec:
    cloud.scripts[vm] = base64.b64encode(text.encode()).decode()
    values: dict[str, object] = {"key": "k", "monitored": True, "timeout_s": 1}
    return nouns.spec(script=model.Script(**(values | changes)))  # type: ignore[arg-type]


async def started(cloud: fake.Controller, vm: str, epoch: int = 1) -> None:
    cloud.want(RUN, vm, epoch)
    await fake.until(lambda: Said.BOOTED in cloud.said(vm), f"{vm} booted")


# ---- the whole way -------------------------------------------------------------------------------------------------


async def test_a_vm_starts_and_ends(cloud: fake.Controller, make_node: MakeNode) -> None:
    node, vm = make_node(), name()
    await node.start()
    await started(cloud, vm)
    info = cloud.item(vm, Said.BOOTED).vm
    assert info is not None and info.uuid == vm and info.host_ip and info.status == "running"
    cloud.want(DESTROY, vm)
    await fake.until(lambda: Said.GONE in cloud.said(vm), "gone")
    assert await node.phases() == {}
    assert [ask.instance for ask in cloud.launches] == [vm]


async def test_what_quick_steps_come_to_rides_along_with_the_next_poll(
    cloud: fake.Controller, make_node: MakeNode
) -> None:
    """Two polls and a launch are all that a VM without a boot time costs."""
    cloud.heartbeat_s = 60
    node, vm = make_node(), name()
    await node.start()
    await fake.until(lambda: cloud.words, "the node has said how it is")
    await started(cloud, vm)
    cloud.want(DESTROY, vm)
    await fake.until(lambda: Said.GONE in cloud.said(vm), "gone")
    riders = [item.event for poll in cloud.polls for item in poll.items]
    reported = [item.event for report in cloud.reports for item in report.items]
    assert (riders, reported) == ([Said.BOOTED, Said.GONE], [])
    assert cloud.polls[-1].tag == wire.tag((), ()), "its end is no news to who tells of it"


async def test_a_rider_without_an_answer_is_reported_after_a_second(
    cloud: fake.Controller, make_node: MakeNode
) -> None:
    """A poll may wait for long, and nobody knows whether its controller still lives."""
    cloud.heartbeat_s = 60
    node, vm = make_node(), name()
    await node.start()
    await fake.until(lambda: cloud.words, "the node has said how it is")
    await started(cloud, vm)
    await fake.until(lambda: any(report.items for report in cloud.reports), "reported")
    sent = [(item.event, item.seq) for poll in cloud.polls for item in poll.items]
    sent += [(item.event, item.seq) for report in cloud.reports for item in report.items]
    assert sent == 2 * [(Said.BOOTED, cloud.item(vm, Said.BOOTED).seq)], "the same fact, which counts once"


async def test_a_controller_that_takes_no_riders_gets_reports(cloud: fake.Controller, make_node: MakeNode) -> None:
    """Version 0.2.0; also one that answers between newer ones."""
    node, vms = make_node(), [name() for _ in range(3)]
    await node.start()
    for takes, vm in zip((True, False, True), vms, strict=True):
        cloud.takes_reports = takes
        await started(cloud, vm)
        cloud.want(DESTROY, vm)
        await fake.until(lambda vm=vm: Said.GONE in cloud.said(vm), "gone")  # type: ignore[misc]
    assert not await node.phases()


async def test_of_what_stands_nothing_is_told_again(cloud: fake.Controller, make_node: MakeNode) -> None:
    node, stands, comes = make_node(), name(), name()
    await node.start()
    await started(cloud, stands)
    await started(cloud, comes)
    cloud.want(DESTROY, comes)
    await fake.until(lambda: Said.GONE in cloud.said(comes), "gone")
    last = cloud.answered[-1]
    assert last.since and [want.instance for want in last.wanted] == [comes]
    assert list(await node.phases()) == [(stands, 1)]
    cloud.want(STOP, stands)
    await fake.until(lambda: Said.STOPPED in cloud.said(stands), "stopped")
    cloud.want(DESTROY, stands)
    await fake.until(lambda: Said.GONE in cloud.said(stands), "gone")


async def test_an_answer_that_cannot_be_made_whole_counts_for_nothing_and_all_is_asked_for(
    cloud: fake.Controller, make_node: MakeNode
) -> None:
    """Safety S2: also an order in it has to come again."""
    node, stands, other = make_node(), name(), name()
    await node.start()
    await started(cloud, stands)
    cloud.forged_tag = wire.tag((), ())
    cloud.want(DESTROY, other)
    await fake.until(lambda: Said.GONE in cloud.said(other), "gone")
    after = next(
        index for index, answer in enumerate(cloud.answered) if answer.tag == wire.tag((), ()) and answer.since
    )
    assert (cloud.polls[after + 1].tag, cloud.polls[after + 1].known) == ("", wire.Seen())
    assert not cloud.answered[after + 1].since
    assert {want.instance for want in cloud.answered[after + 1].wanted} == {stands, other}
    assert list(await node.phases()) == [(stands, 1)]


async def test_a_new_session_asks_for_all(cloud: fake.Controller, make_node: MakeNode) -> None:
    node, vm = make_node(), name()
    await node.start()
    await started(cloud, vm)
    await fake.until(lambda: cloud.polls[-1].known.revision > 0, "it knows what is wanted")
    polls = len(cloud.polls)
    cloud.counter += 1  # somebody took the node over; the agent joins again
    cloud.changed()
    await fake.until(lambda: len(cloud.polls) > polls + 1, "polls in the new session")
    first = next(ask for ask in cloud.polls[polls:] if not ask.tag)
    assert first.known == wire.Seen()


async def test_a_controller_that_names_everything_will_do(cloud: fake.Controller, make_node: MakeNode) -> None:
    """Version 0.3.0; also one that answers between newer ones."""
    node, vms = make_node(), [name() for _ in range(4)]
    await node.start()
    for abridges, vm in zip((True, False, False, True), vms, strict=True):
        cloud.abridges = abridges
        await started(cloud, vm)
    for vm in vms:
        cloud.want(DESTROY, vm)
    await fake.until(lambda: all(Said.GONE in cloud.said(vm) for vm in vms), "gone")
    assert not await node.phases()


async def test_an_order_given_again_after_its_end_was_told_is_told_again(
    cloud: fake.Controller, make_node: MakeNode
) -> None:
    """Promise I3: the cloud believes in a claim again, by a word that was older than the end."""
    node, vm = make_node(), name()
    await node.start()
    await started(cloud, vm)
    for times in range(1, 4):
        cloud.want(DESTROY, vm)
        await fake.until(lambda times=times: cloud.said(vm).count(Said.GONE) >= times, "gone")  # type: ignore[misc]


async def test_a_host_that_cannot_prepare_says_so_at_once(
    cloud: fake.Controller, make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is offered nothing more, long before its facts would be looked at in their turn."""

    async def broken(*_: object) -> None:
        raise errors.HypervisorError("qemu-system-x86_64 is not there")

    node, vm = make_node(), name()
    await node.start()
    await fake.until(lambda: bool(cloud.words), "a word")
    with monkeypatch.context() as patch:
        patch.setattr(node.driver, "prepare", broken)
        patch.setattr(node.driver, "facts", broken)
        cloud.want(RUN, vm)
        await fake.until(lambda: Said.REFUSED in cloud.said(vm), "refused")
        await fake.until(lambda: cloud.words[-1].trouble == "qemu-system-x86_64 is not there", "its trouble")
    await fake.until(lambda: cloud.words[-1].trouble == "", "it is well again")


async def test_a_stopped_vm_keeps_its_disk_and_starts_again_under_a_new_epoch(
    cloud: fake.Controller, make_node: MakeNode
) -> None:
    node, vm = make_node(), name()
    await node.start()
    await started(cloud, vm)
    cloud.want(STOP, vm)
    await fake.until(lambda: Said.STOPPED in cloud.said(vm), "stopped")
    assert await node.phases() == {(vm, 1): "stopped"}
    cloud.unwant(vm)
    cloud.want(RUN, vm, 2)
    await fake.until(lambda: cloud.said(vm).count(Said.BOOTED) == 2, "booted again")
    assert await node.phases() == {(vm, 2): "running"}


async def test_a_guest_that_ends_by_itself_is_failed_and_never_started_again(
    cloud: fake.Controller, make_node: MakeNode
) -> None:
    node, vm = make_node(vanish_share=1.0, vanish_s=0.3), name()
    await node.start()
    await started(cloud, vm)
    await fake.until(lambda: Said.FAILED in cloud.said(vm), "failed")
    assert "vanished" in cloud.item(vm, Said.FAILED).message
    cloud.want(KEEP, vm)
    assert await node.phases() == {(vm, 1): "ended"}
    assert len(cloud.launches) == 1


async def test_a_guest_that_never_answers_is_failed(cloud: fake.Controller, make_node: MakeNode) -> None:
    node, vm = make_node(hang_share=1.0), name()
    await node.start()
    cloud.want(RUN, vm)
    await fake.until(lambda: Said.FAILED in cloud.said(vm), "failed")
    assert cloud.item(vm, Said.FAILED).message == "the guest did not answer within 2 s"


async def test_a_guest_that_never_answers_is_failed_also_when_its_record_is_lost(
    cloud: fake.Controller, make_node: MakeNode, tmp_path: Path
) -> None:
    before, vm = make_node(hang_share=1.0), name()
    await before.start()
    cloud.want(RUN, vm)
    await fake.until(lambda: [vm.phase for vm in before.driver._vms.values()] == ["running"], "running")
    await before.stop()
    (record,) = (tmp_path / "node/records").glob("*.json")
    record.write_bytes(b"{")
    after = make_node(hang_share=1.0)
    await after.start()
    await fake.until(lambda: Said.FAILED in cloud.said(vm), "failed")


async def test_what_cannot_be_prepared_leaves_nothing_behind(cloud: fake.Controller, make_node: MakeNode) -> None:
    node, vm = make_node(fail="prepare", fail_share=1.0), name()
    await node.start()
    cloud.want(RUN, vm)
    await fake.until(lambda: Said.FAILED in cloud.said(vm), "failed")
    assert "cannot prepare" in cloud.item(vm, Said.FAILED).message
    assert await node.phases() == {} and not cloud.launches


# ---- start scripts -------------------------------------------------------------------------------------------------


async def test_a_monitored_script_ends_before_booted_is_said(cloud: fake.Controller, make_node: MakeNode) -> None:
    node, vm = make_node(), name()
    await node.start()
    cloud.want(RUN, vm, spec=scripted(cloud, vm, "echo fine\nsleep 0.3"))
    await fake.until(lambda: Said.BOOTED in cloud.said(vm), "booted")
    item = cloud.item(vm, Said.BOOTED)
    assert item.script == model.ScriptResult(return_code=0)
    assert base64.b64decode(item.stdout) == b"fine\n"


@pytest.mark.parametrize(("handler", "left"), [(0, "stopped"), (1, "running"), (2, "")])
async def test_a_failed_script_is_told_with_its_output_and_then_handled(
    cloud: fake.Controller, make_node: MakeNode, handler: int, left: str
) -> None:
    node, vm = make_node(), name()
    await node.start()
    cloud.want(RUN, vm, spec=scripted(cloud, vm, "echo bad >&2\nexit 3", fail_handler=handler))
    await fake.until(lambda: Said.FAILED in cloud.said(vm), "failed")
    item = cloud.item(vm, Said.FAILED)
    assert item.script == model.ScriptResult(return_code=3)
    assert base64.b64decode(item.stderr) == b"bad\n" and "return code 3" in item.message
    cloud.want(KEEP, vm)
    if not left:
        await fake.until(lambda: Said.GONE in cloud.said(vm), "gone")
    expected = {(vm, 1): left} if left else {}
    seen: dict[tuple[str, int], str] = {}
    for _ in range(200):
        seen = await node.phases()
        if seen == expected:
            break
        await asyncio.sleep(0.01)
    assert seen == expected


async def test_a_script_that_hangs_ends_with_minus_one(cloud: fake.Controller, make_node: MakeNode) -> None:
    node, vm = make_node(), name()
    await node.start()
    cloud.want(RUN, vm, spec=scripted(cloud, vm, "echo first\nsleep 1000"))
    await fake.until(lambda: Said.FAILED in cloud.said(vm), "failed")
    assert cloud.item(vm, Said.FAILED).script == model.ScriptResult(return_code=-1, did_timeout=True)


async def test_an_unmonitored_script_holds_nothing_up(cloud: fake.Controller, make_node: MakeNode) -> None:
    node, vm = make_node(), name()
    await node.start()
    cloud.want(RUN, vm, spec=scripted(cloud, vm, "sleep 1000", monitored=False, timeout_s=300))
    await fake.until(lambda: Said.BOOTED in cloud.said(vm), "booted")
    assert cloud.item(vm, Said.BOOTED).script is None
    cloud.want(DESTROY, vm)
    await fake.until(lambda: Said.GONE in cloud.said(vm), "gone")


async def test_a_guest_that_powers_itself_off_is_failed(cloud: fake.Controller, make_node: MakeNode) -> None:
    node, vm = make_node(), name()
    await node.start()
    cloud.want(RUN, vm, spec=scripted(cloud, vm, "sleep 0.2\npoweroff", monitored=False, timeout_s=30))
    await fake.until(lambda: Said.FAILED in cloud.said(vm), "failed")
    assert "powered itself off" in cloud.item(vm, Said.FAILED).message


# ---- safety --------------------------------------------------------------------------------------------------------


async def test_absence_from_an_answer_destroys_nothing(cloud: fake.Controller, make_node: MakeNode) -> None:
    """Safety S2."""
    node, vm, other = make_node(), name(), name()
    await node.start()
    await started(cloud, vm)
    cloud.unwant(vm)
    await started(cloud, other)  # later answers have been worked on
    assert (await node.phases())[vm, 1] == "running"
    cloud.want(DESTROY, vm)
    await fake.until(lambda: Said.GONE in cloud.said(vm), "gone once it is ordered")


def _said_gone(cloud: fake.Controller, vm: str, times: int) -> bool:
    return cloud.said(vm).count(Said.GONE) == times


async def test_an_order_that_comes_after_gone_was_said_is_answered_again(
    cloud: fake.Controller, make_node: MakeNode
) -> None:
    """Promise I3: a claim that came back, by whatever way, must not stay until this agent is started again."""
    node, vm = make_node(), name()
    await node.start()
    await started(cloud, vm)
    for times in (1, 2, 3):
        cloud.want(DESTROY, vm)
        await fake.until(functools.partial(_said_gone, cloud, vm, times), f"gone, said {times} times")


async def test_gone_is_said_once_while_the_answer_is_awaited(cloud: fake.Controller, make_node: MakeNode) -> None:
    """The order stays in sight until the report was answered: it must not be answered over and over meanwhile."""
    node, vm = make_node(), name()
    await node.start()
    await started(cloud, vm)
    for _ in range(4):
        cloud.lose.append("report")
    cloud.want(DESTROY, vm)
    await fake.until(lambda: Said.GONE in cloud.said(vm) and not cloud.lose, "gone, and the answer arrived")
    assert cloud.said(vm).count(Said.GONE) == 1


async def test_what_was_said_to_be_gone_is_not_named_again(
    cloud: fake.Controller, make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise I3: a word from a look before the end would bring the claim back."""
    node, vm, may_look = make_node(), name(), asyncio.Event()
    look, end = node.driver.list, node.driver.destroy
    may_look.set()

    async def slow_look() -> list[hypervisor.Vm]:
        await may_look.wait()
        return await look()

    async def end_unseen(instance: model.InstanceId, epoch: int) -> None:
        await end(instance, epoch)
        may_look.clear()

    await node.start()
    await started(cloud, vm)
    await fake.until(lambda: any(seen.instance == vm for seen in cloud.words[-1].vms), "named in a word")
    with monkeypatch.context() as patch:
        patch.setattr(node.driver, "list", slow_look)
        patch.setattr(node.driver, "destroy", end_unseen)
        cloud.want(DESTROY, vm)
        await fake.until(lambda: Said.GONE in cloud.said(vm), "gone")
        assert node.agent._word().vms == ()
        node.agent._outbox.begin()
        assert node.agent._word().vms == (), "a new session has said nothing yet"
        may_look.set()


async def test_what_was_said_of_vms_that_are_no_more_is_forgotten(cloud: fake.Controller, make_node: MakeNode) -> None:
    """A session may last for months."""
    node, vms = make_node(), [name() for _ in range(3)]
    await node.start()
    for vm in vms:
        await started(cloud, vm)
        cloud.want(DESTROY, vm)
        await fake.until(functools.partial(lambda vm: Said.GONE in cloud.said(vm), vm), "gone")
    await fake.until(lambda: not node.agent._workers, "nothing is asked for any more")
    await fake.until(lambda: not node.agent._outbox._said, "forgotten")


async def test_a_lost_launch_answer_is_asked_again_with_the_same_nonce(
    cloud: fake.Controller, make_node: MakeNode
) -> None:
    node, vm = make_node(), name()
    await node.start()
    cloud.lose.append("launch")
    await started(cloud, vm)
    assert len(cloud.launches) == 2
    assert len({ask.nonce for ask in cloud.launches}) == 1


@pytest.mark.parametrize("rides", [False, True])
async def test_a_lost_report_answer_is_sent_again_with_the_same_number(
    cloud: fake.Controller, make_node: MakeNode, rides: bool
) -> None:
    """Safety S3."""
    node, vm = make_node(), name()
    cloud.takes_reports = rides
    await node.start()
    await fake.until(lambda: cloud.words, "the first word")
    cloud.before_launch_answer = lambda: cloud.lose.append("wanted" if rides else "report")
    await started(cloud, vm)
    cloud.want(DESTROY, vm)
    await fake.until(lambda: Said.GONE in cloud.said(vm), "gone")
    assert not cloud.lose
    assert [item.seq for item in cloud.items] == sorted({item.seq for item in cloud.items})


async def test_a_launch_that_is_denied_starts_nothing(cloud: fake.Controller, make_node: MakeNode) -> None:
    node, vm = make_node(), name()
    cloud.deny.add(vm)
    await node.start()
    cloud.want(RUN, vm)
    await fake.until(lambda: cloud.launches, "launch was asked for")
    cloud.want(DESTROY, vm)
    await fake.until(lambda: Said.GONE in cloud.said(vm), "gone")
    assert Said.BOOTED not in cloud.said(vm)


async def test_a_launch_denied_to_one_epoch_does_not_delay_the_next(
    cloud: fake.Controller, make_node: MakeNode
) -> None:
    """A placement that was withdrawn while its launch was asked for comes again: late once is not late always."""
    node, vm = make_node(), name()
    node.clock.ahead_ns = 3600 * 10**9
    cloud.deny.add(vm)
    await node.start()
    cloud.want(RUN, vm)
    await fake.until(lambda: Said.ACKNOWLEDGED in cloud.said(vm), "known here, though not granted (safety S10)")
    cloud.unwant(vm)
    cloud.want(DESTROY, vm)
    await fake.until(lambda: Said.GONE in cloud.said(vm), "gone")
    cloud.deny.clear()
    node.clock.ahead_ns = 0  # who waits until the first may be asked for again waits for an hour
    cloud.want(RUN, vm, 2)
    await fake.until(lambda: Said.BOOTED in cloud.said(vm), "started at once")


async def test_a_clock_that_jumped_between_grant_and_fork_asks_again(
    cloud: fake.Controller, make_node: MakeNode
) -> None:
    """Safety S9: a machine that slept with a launch in hand does not use it unasked."""
    node, vm = make_node(), name()
    await node.start()

    def jump() -> None:
        if len(cloud.launches) == 1:
            node.clock.ahead_ns += 6_000_000_000

    cloud.before_launch_answer = jump
    await started(cloud, vm)
    assert len(cloud.launches) == 2
    assert len({ask.nonce for ask in cloud.launches}) == 1


async def test_a_launch_over_the_end_of_the_lease_that_is_then_denied_starts_nothing(
    cloud: fake.Controller, make_node: MakeNode
) -> None:
    """Safety S8: the placement was given up meanwhile."""
    node, vm = make_node(), name()
    await node.start()

    def sleep_long() -> None:
        if len(cloud.launches) == 1:
            node.clock.ahead_ns += 40_000_000_000
            cloud.deny.add(vm)

    cloud.before_launch_answer = sleep_long
    cloud.want(RUN, vm)
    await fake.until(lambda: len(cloud.launches) >= 2, "asked again")
    cloud.want(DESTROY, vm)
    await fake.until(lambda: Said.GONE in cloud.said(vm), "gone")
    assert Said.BOOTED not in cloud.said(vm)


async def test_terminate_beats_a_start_under_way(cloud: fake.Controller, make_node: MakeNode) -> None:
    """Safety S6: whatever step the start is at, `gone` is the last word and nothing runs."""
    node = make_node(prepare_s=0.02, boot_s=0.05, pull_s=0.02)
    await node.start()
    vms = [name() for _ in range(25)]
    for count, vm in enumerate(vms):
        cloud.want(RUN, vm)
        await asyncio.sleep(0.006 * count)
        cloud.want(DESTROY, vm)
    for vm in vms:
        await fake.until(lambda vm=vm: Said.GONE in cloud.said(vm), f"{vm} gone")  # type: ignore[misc]
    assert await node.phases() == {}
    assert all(cloud.said(vm)[-1] is Said.GONE for vm in vms)


async def test_a_slow_preparation_is_acknowledged_and_shows_progress(
    cloud: fake.Controller, make_node: MakeNode
) -> None:
    """Safety S10."""
    node, vm = make_node(pull_s=2.5), name()
    await node.start()
    cloud.want(RUN, vm)
    began = time.monotonic()
    await fake.until(lambda: Said.BOOTED in cloud.said(vm), "booted")
    took_s = time.monotonic() - began
    assert cloud.said(vm)[0] is Said.ACKNOWLEDGED
    progress = [item.progress for item in cloud.items if item.event is Said.PROGRESS]
    assert progress == sorted(progress) and 1 <= len(progress) <= took_s + 1, "at most one a second"


async def test_a_quick_start_says_nothing_but_booted(cloud: fake.Controller, make_node: MakeNode) -> None:
    node, vm = make_node(), name()
    await node.start()
    await started(cloud, vm)
    assert cloud.said(vm) == [Said.BOOTED]


async def test_on_hold_nothing_is_launched_or_destroyed(cloud: fake.Controller, make_node: MakeNode) -> None:
    """Safety S18."""
    node, vm, new = make_node(), name(), name()
    await node.start()
    await started(cloud, vm)
    cloud.hold = True
    cloud.want(DESTROY, vm)
    cloud.want(RUN, new)
    await fake.until(lambda: node.agent.session.hold, "on hold")
    polls = len(cloud.messages)
    await fake.until(lambda: len(cloud.messages) > polls + 3, "some answers more")
    assert await node.phases() == {(vm, 1): "running"}
    assert [ask.instance for ask in cloud.launches] == [vm]
    cloud.hold = False
    cloud.changed()
    await fake.until(lambda: Said.GONE in cloud.said(vm) and Said.BOOTED in cloud.said(new), "work goes on")


async def test_a_stale_session_starts_and_destroys_nothing(cloud: fake.Controller, make_node: MakeNode) -> None:
    """Safety S7: another life of this node has taken over, and our secret is not the last one any more."""
    node, vm = make_node(), name()
    await node.start()
    await started(cloud, vm)
    cloud.secret, cloud.counter = "another's", cloud.counter + 1
    cloud.want(DESTROY, vm)
    await fake.until(lambda: len(cloud.joins) >= 2, "it tried to join again, and was refused")
    assert node.agent.session.standing is session.Standing.STALE
    assert (await node.phases())[vm, 1] == "running"


async def test_a_session_that_is_lost_is_joined_anew_and_everything_is_said_again(
    cloud: fake.Controller, make_node: MakeNode
) -> None:
    node, vm = make_node(), name()
    await node.start()
    await started(cloud, vm)
    cloud.counter += 1
    cloud.changed()
    await fake.until(lambda: cloud.said(vm).count(Said.BOOTED) == 2 or len(cloud.joins) > 1, "joined again")
    cloud.want(DESTROY, vm)
    await fake.until(lambda: Said.GONE in cloud.said(vm), "works again")


async def test_a_removed_node_holds_and_its_vms_stay(cloud: fake.Controller, make_node: MakeNode) -> None:
    """Safety S12."""
    node, vm = make_node(), name()
    await node.start()
    await started(cloud, vm)
    cloud.break_ = dict.fromkeys(("wanted", "report", "launch", "join"), 410)
    cloud.want(DESTROY, vm)
    await fake.until(lambda: node.agent.session.standing is session.Standing.REMOVED, "removed")
    assert await node.phases() == {(vm, 1): "running"}


async def test_a_controller_that_refuses_the_node_is_left_for_another_one(
    cloud: fake.Controller, make_node: MakeNode
) -> None:
    """Where one of its controllers was, there is one of another cloud now."""
    foreign, node, vm = fake.Controller(), make_node(), name()
    foreign.refuse, foreign.counter = "the agent belongs to another cloud", 1
    await foreign.start()
    try:
        node.endpoints._balance = balance.Balance([foreign.url, cloud.url])
        await node.start()
        await fake.until(lambda: bool(foreign.joins), "the foreign one is asked, and refuses")
        await started(cloud, vm)
    finally:
        await foreign.stop()


async def test_heartbeats_go_on_while_nothing_happens_and_carry_no_word(
    cloud: fake.Controller, make_node: MakeNode
) -> None:
    """Safety S8, S26."""
    node = make_node()
    await node.start()
    await fake.until(lambda: len(cloud.reports) >= 5, "five reports")
    assert len(cloud.words) == 1
    assert len(cloud.messages) == len(set(cloud.messages)), "each message has a number of its own"


async def test_an_end_in_good_order_waits_for_a_launch_in_hand_and_asks_for_no_other(
    cloud: fake.Controller, make_node: MakeNode
) -> None:
    """Safety S4: a launch that was granted to a process which ends is lost, and its instance fails."""
    node, vm, late = make_node(), name(), name()
    await node.start()
    ending: list[asyncio.Task[None]] = []

    def end_now() -> None:
        if not ending:
            ending.append(asyncio.create_task(node.agent.settle(20.0)))
            cloud.want(RUN, late)

    cloud.before_launch_answer = end_now
    cloud.want(RUN, vm)
    await fake.until(lambda: ending and ending[0].done(), "it is settled")
    await node.stop()
    assert (vm, 1) in await node.phases()
    assert [ask.instance for ask in cloud.launches] == [vm]
    cloud.before_launch_answer = lambda: None
    again = make_node()
    await again.start()
    await fake.until(lambda: {Said.BOOTED} <= {*cloud.said(vm)} & {*cloud.said(late)}, "both run")
    assert Said.FAILED not in (*cloud.said(vm), *cloud.said(late))


async def test_the_word_follows_the_vms(cloud: fake.Controller, make_node: MakeNode) -> None:
    node, vm = make_node(), name()
    await node.start()
    await started(cloud, vm)
    await fake.until(lambda: [seen.instance for seen in cloud.words[-1].vms] == [vm], "the word names it")
    assert cloud.words[-1].images == (nouns.spec().digest,)


async def test_an_answer_from_an_older_view_is_dropped(cloud: fake.Controller, make_node: MakeNode) -> None:
    """Safety S2."""
    node, vm, other = make_node(), name(), name()
    await node.start()
    await started(cloud, vm)
    newest = cloud.revision
    cloud.want(DESTROY, vm)
    cloud.revision = newest - 5  # a controller that lags says this
    polls = len(cloud.messages)
    await fake.until(lambda: len(cloud.messages) > polls + 2, "it asked again")
    assert await node.phases() == {(vm, 1): "running"}
    cloud.revision = newest + 5
    await started(cloud, other)
    await fake.until(lambda: Said.GONE in cloud.said(vm), "gone by a new answer")


# ---- another life --------------------------------------------------------------------------------------------------


async def test_vms_survive_the_agent_and_are_adopted(
    cloud: fake.Controller, make_node: MakeNode, tmp_path: Path
) -> None:
    first, vm = make_node(), name()
    await first.start()
    await started(cloud, vm)
    await first.stop()
    second = make_node()
    await second.start()
    await fake.until(lambda: cloud.said(vm).count(Said.BOOTED) == 2, "the new life says so too")
    assert [ask.node for ask in cloud.joins] == ["", "node-1"]
    assert cloud.joins[1].last_secret == cloud.joins[0].secret
    assert cloud.joins[1].host_key == cloud.joins[0].host_key
    assert len(cloud.launches) == 1, "adopted, not started again"
    cloud.want(DESTROY, vm)
    await fake.until(lambda: Said.GONE in cloud.said(vm), "gone")
    assert not list((tmp_path / "node" / "records").iterdir())


async def test_after_a_restart_no_answer_older_than_its_acts_is_believed(
    cloud: fake.Controller, make_node: MakeNode
) -> None:
    """Safety S2: the revision that an act rests on is on disk with it; the next life knows it."""
    first, vm, other = make_node(), name(), name()
    await first.start()
    await started(cloud, vm)
    await started(cloud, other)
    cloud.revision += 10
    cloud.want(DESTROY, vm)
    await fake.until(lambda: Said.GONE in cloud.said(vm), "gone")
    newest = cloud.revision
    await first.stop()
    cloud.want(DESTROY, other)
    cloud.revision = newest - 5  # a controller that lags says this
    second = make_node()
    polls = len(cloud.messages)
    await second.start()
    await fake.until(lambda: len(cloud.messages) > polls + 2, "it asked again")
    assert await second.phases() == {(other, 1): "running"}
    cloud.revision = newest + 5
    await fake.until(lambda: Said.GONE in cloud.said(other), "gone by a new answer")


async def test_a_join_whose_answer_was_lost_is_repeated(cloud: fake.Controller, make_node: MakeNode) -> None:
    """Safety S7: the secret is on disk before it is sent, so whichever the controller knows is known here too."""
    cloud.lose.append("join")
    node = make_node()
    await node.start()
    await fake.until(lambda: cloud.words, "joined")
    assert len({ask.secret for ask in cloud.joins}) == 1


async def test_a_vm_whose_record_is_lost_is_adopted(
    cloud: fake.Controller, make_node: MakeNode, tmp_path: Path
) -> None:
    first, vm = make_node(), name()
    await first.start()
    await started(cloud, vm)
    await first.stop()
    (record,) = (tmp_path / "node" / "records").glob("*.json")
    record.write_text('{"instance": "torn')
    second = make_node()
    await second.start()
    await fake.until(lambda: cloud.said(vm).count(Said.BOOTED) == 2, "adopted from what runs")
    assert (tmp_path / "node" / "records" / f"{record.name}.corrupt").exists()


async def test_launched_and_absent_is_failed(cloud: fake.Controller, make_node: MakeNode) -> None:
    """Safety S4: the host rebooted, or its disk came from a backup."""
    node, vm = make_node(), name()
    cloud.granted[vm, 1] = (99, "an earlier life's")
    cloud.want(RUN, vm)
    await node.start()
    await fake.until(lambda: Said.FAILED in cloud.said(vm), "failed")
    assert await node.phases() == {} and not cloud.launches


async def test_vms_of_another_cloud_are_counted_and_left_alone(
    cloud: fake.Controller, make_node: MakeNode, tmp_path: Path
) -> None:
    """Safety S12."""
    node, vm = make_node(), name()
    await node.start()
    await started(cloud, vm)
    await node.stop()
    path = tmp_path / "node" / "vms" / f"{vm}.1" / "vm.json"
    path.write_text(path.read_text().replace(fake.CLOUD, "another cloud"))
    second = make_node()
    cloud.want(DESTROY, vm)
    await second.start()
    await fake.until(lambda: cloud.words[-1].foreign_vms == 1, "counted")
    assert path.exists()
