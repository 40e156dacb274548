"""What agents report (safety S3): facts, once, in their order, from whom they concern."""

import base64

import pytest

from covey import model, wire
from covey.decide import pauses
from covey.store import base, commit_reports, schema
from tests.support import cloud, flaky, nouns

State = model.State
Said = wire.ReportEvent


def settled(answer: object) -> tuple[int, ...]:
    assert isinstance(answer, commit_reports.Applied)
    return answer.settled


async def test_a_start_from_placement_to_started() -> None:
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        me = model.InstanceId(id)
        await c.report(node, nouns.item(Said.ACKNOWLEDGED, me), nouns.item(Said.PROGRESS, me, progress=0.5))
        instance = await c.instance(id)
        assert (instance.acknowledged, instance.progress, instance.state) == (True, 0.5, State.PULLING)
        await c.launch(node, id)
        await c.report(node, nouns.item(Said.BOOTED, me, vm=nouns.vm()))
        instance = await c.instance(id)
        assert (instance.state, instance.vm, instance.progress) == (State.STARTED, nouns.vm(), 1.0)


async def test_booted_without_launch_changes_nothing() -> None:
    """Safety S1: nobody boots without leave."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        await c.report(node, nouns.item(Said.BOOTED, model.InstanceId(id), vm=nouns.vm()))
        assert (await c.instance(id)).state == State.PULLING


async def test_started_never_without_vminfo() -> None:
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        await c.launch(node, id)
        await c.report(node, nouns.item(Said.BOOTED, model.InstanceId(id)))
        assert (await c.instance(id)).state == State.PULLING


async def test_a_repeated_report_is_settled_without_a_write() -> None:
    """Safety S3, promise I7."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        item = nouns.item(Said.PROGRESS, model.InstanceId(id), progress=0.5)
        assert settled(await c.report(node, item)) == (0,)
        await c.create()
        now, before = (await c.look()).revision, len(c.flaky.commits)
        assert await c.report(node, item) == commit_reports.Applied((0,), now), "it was so at that revision"
        assert not any(txn.then for txn in c.flaky.commits[before:]), "it is proved, and nothing is written"


async def test_an_older_item_never_overwrites_a_newer_one() -> None:
    """Safety S3."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        me = model.InstanceId(id)
        await c.report(node, nouns.item(Said.PROGRESS, me, seq=5, progress=0.9))
        await c.report(node, nouns.item(Said.PROGRESS, me, seq=4, progress=0.1))
        assert (await c.instance(id)).progress == 0.9


async def test_a_report_survives_a_lost_reply() -> None:
    """Safety S15: applied once, answered as applied."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        c.flaky.plan(flaky.Fate.LOST_REPLY)
        answer = await c.report(node, nouns.item(Said.FAILED, model.InstanceId(id), message="no"))
        assert settled(answer) == (0,)
        events = [kv for kv in await c.values(schema.EVENTS) if b'"failed"' in kv.value]
        assert len(events) == 1


async def test_a_stale_session_reports_nothing() -> None:
    """Safety S7."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        answer = await c.report(node, nouns.item(Said.FAILED, model.InstanceId(id)), session=9)
        assert answer == commit_reports.StaleSession()
        assert (await c.instance(id)).state == State.PULLING


async def test_another_node_has_no_say() -> None:
    async with cloud.running() as c:
        node, other = await c.join(), await c.join()
        (id,) = await c.create(homes=[node])
        await c.report(other, nouns.item(Said.FAILED, model.InstanceId(id)))
        await c.report(other, nouns.item(Said.GONE, model.InstanceId(id)))
        assert (await c.instance(id)).state == State.PULLING
        assert await c.claims(node) == [(id, 1)]


async def test_an_old_epoch_has_no_say() -> None:
    """Safety S3: the VM of a former placement fails long after."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        me = model.InstanceId(id)
        await c.report(node, nouns.item(Said.REFUSED, me, message="busy"), nouns.item(Said.GONE, me))
        await c.place(node, id)
        assert (await c.instance(id)).epoch == 2
        await c.report(node, nouns.item(Said.FAILED, me, epoch=1), nouns.item(Said.GONE, me, epoch=1))
        instance = await c.instance(id)
        assert (instance.state, instance.epoch) == (State.PULLING, 2)
        assert await c.claims(node) == [(id, 2)]


async def test_refused_waits_again_and_remembers_who() -> None:
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        await c.report(node, nouns.item(Said.REFUSED, model.InstanceId(id), message="disk full"))
        instance = await c.instance(id)
        assert instance.waiting
        assert (instance.state, instance.refused, instance.message) == (State.PULLING, (node,), "disk full")
        assert await c.claims(node) == [(id, 1)], "until the node says gone"
        order = (await c.look()).order(node, id)
        assert order is not None
        assert not order.noun.withdrawn


async def test_refusals_end_in_error_and_not_in_a_circle() -> None:
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create()
        me = model.InstanceId(id)
        for epoch in range(1, pauses.LIMIT + 2):
            await c.place(node, id)
            await c.report(node, nouns.item(Said.REFUSED, me, epoch=epoch, message="disk full"))
            await c.report(node, nouns.item(Said.GONE, me, epoch=epoch))
        instance = await c.instance(id)
        assert (instance.state, instance.message) == (State.ERROR, "It was refused 51 times, now: disk full")
        assert await c.claims(node) == []


async def test_gone_ends_a_terminating_instance_and_frees_its_slot() -> None:
    """Promise I3, one transaction."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        await c.started(node, id)
        await c.terminate(id)
        assert await c.claims(node) == [(id, 1)]
        await c.report(node, nouns.item(Said.GONE, model.InstanceId(id)))
        instance = await c.instance(id)
        assert (instance.state, instance.released) == (State.TERMINATED, True)
        assert instance.vm is not None
        assert instance.vm.status == "deleted"
        assert await c.claims(node) == []


async def test_gone_in_error_frees_the_slot_and_terminate_needs_nobody() -> None:
    """Safety S13: after `gone` nobody would say it again."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        me = model.InstanceId(id)
        await c.report(node, nouns.item(Said.FAILED, me, message="no"), nouns.item(Said.GONE, me))
        assert (await c.instance(id)).state == State.ERROR
        assert await c.claims(node) == []
        await c.terminate(id)
        assert (await c.instance(id)).state == State.TERMINATED


async def test_a_started_vm_that_is_gone_has_failed() -> None:
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        await c.started(node, id)
        await c.report(node, nouns.item(Said.GONE, model.InstanceId(id)))
        assert (await c.instance(id)).state == State.ERROR
        assert await c.claims(node) == []


async def test_gone_before_launch_waits_for_another_node() -> None:
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        await c.report(node, nouns.item(Said.GONE, model.InstanceId(id)))
        assert (await c.instance(id)).waiting
        assert await c.claims(node) == []


@pytest.mark.parametrize("size", [10, 200_000])
async def test_output_lives_in_keys_of_its_own_and_is_cut(size: int) -> None:
    """Safety S26."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        await c.launch(node, id)
        output = bytes(index % 251 for index in range(size))
        await c.report(
            node,
            nouns.item(
                Said.FAILED,
                model.InstanceId(id),
                message="exit code 3",
                script=model.ScriptResult(return_code=3),
                stderr=base64.b64encode(output).decode(),
            ),
        )
        instance = await c.instance(id)
        assert instance.script_result == model.ScriptResult(return_code=3)
        (kv,) = await c.values(schema.OUTPUTS)
        assert kv.key == schema.output(id, "stderr")
        assert kv.value == output[-schema.OUTPUT_LIMIT_BYTES :]


async def test_many_items_in_one_report() -> None:
    async with cloud.running() as c:
        node = await c.join(facts=nouns.facts(slots=100))
        ids = await c.create(60)
        await c.place(node, *ids[:30])
        await c.place(node, *ids[30:])
        items = [nouns.item(Said.ACKNOWLEDGED, model.InstanceId(id)) for id in ids]
        assert settled(await c.report(node, *items)) == tuple(range(60))
        for id in ids:
            await c.terminate(id)
        items = [nouns.item(Said.GONE, model.InstanceId(id)) for id in ids]
        await c.report(node, *items)
        assert await c.claims(node) == []
        assert (await c.look()).instance_count(State.TERMINATED) == 60


async def test_refused_and_gone_at_once_leave_no_order() -> None:
    """Both in one report: an order given for what is gone already would never be answered."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        me = model.InstanceId(id)
        await c.report(node, nouns.item(Said.REFUSED, me, message="busy"), nouns.item(Said.GONE, me))
        assert list((await c.look()).orders_on(node)) == []
        assert await c.claims(node) == []
        assert (await c.instance(id)).waiting


async def test_an_instance_that_cannot_be_read_holds_up_nobody_else() -> None:
    """It is left as it is; the slot that its VM held is free again, and other facts of the report count."""
    async with cloud.running() as c:
        node = await c.join()
        broken, fine = await c.create(2)
        await c.place(node, broken, fine)
        await c.store.commit(base.Txn((), (base.Put(schema.instance(broken), b"?"),)))
        await c.report(
            node,
            nouns.item(Said.PROGRESS, model.InstanceId(broken), progress=0.5),
            nouns.item(Said.GONE, model.InstanceId(broken)),
            nouns.item(Said.PROGRESS, model.InstanceId(fine), progress=0.5),
        )
        assert (await c.instance(fine)).progress == 0.5
        assert await c.claims(node) == [(fine, 1)]
        assert (await c.values(schema.instance(broken)))[0].value == b"?"


async def test_a_long_message_is_cut() -> None:
    """What a hypervisor prints must not make an instance too large to be written."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        script = model.ScriptResult(return_code=1, errors="e" * 3_000_000)
        item = nouns.item(Said.FAILED, model.InstanceId(id), message="m" * 3_000_000, script=script)
        assert settled(await c.report(node, item)) == (0,)
        assert len((await c.values(schema.instance(id)))[0].value) < 20_000


async def test_a_node_that_only_says_gone_is_not_tried_for_ever() -> None:
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        for epoch in range(1, pauses.LIMIT + 2):
            await c.report(node, nouns.item(Said.GONE, model.InstanceId(id), epoch=epoch))
            await c.place(node, id)
        assert (await c.instance(id)).state == State.ERROR
        assert await c.claims(node) == []
