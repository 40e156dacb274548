"""Placing, withdrawing, launching, ending (safety S1, S10, S11, S13)."""

import asyncio

from covey import model, wire
from covey.controller import wanted
from covey.store import commit, commit_instances, commit_nodes, commit_reports, schema
from tests.support import cloud, flaky, nouns

State = model.State
Said = wire.ReportEvent


async def test_placing_takes_a_slot_and_raises_the_epoch() -> None:
    async with cloud.running() as c:
        node = await c.join()
        ids = await c.create(2)
        assert isinstance(await c.place(node, *ids), int)
        assert await c.claims(node) == [(ids[0], 1), (ids[1], 1)]
        assert {(await c.instance(id)).epoch for id in ids} == {1}


async def test_two_placements_of_one_instance_cannot_both_win() -> None:
    """Safety S11, promise I2: two loops decided on the same snapshot."""
    async with cloud.running() as c:
        nodes = [await c.join(), await c.join()]
        (id,) = await c.create()
        snapshot = await c.look()
        results = await asyncio.gather(
            *(commit_instances.place(c.writer, snapshot, node, [model.InstanceId(id)]) for node in nodes)
        )
        assert sorted(isinstance(result, int) for result in results) == [False, True]
        assert sum([len(await c.claims(node)) for node in nodes]) == 1


async def test_two_placements_on_one_ledger_cannot_both_win() -> None:
    """Safety S11: both saw the last free slot."""
    async with cloud.running() as c:
        node = await c.join()
        ids = await c.create(2)
        snapshot = await c.look()
        results = await asyncio.gather(
            *(commit_instances.place(c.writer, snapshot, node, [model.InstanceId(id)]) for id in ids)
        )
        assert sorted(isinstance(result, int) for result in results) == [False, True]
        assert len(await c.claims(node)) == 1


async def test_a_node_whose_lease_ended_gets_nothing() -> None:
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create()
        snapshot = await c.look()
        session = snapshot.session(node)
        assert session is not None
        c.store._data.revoke(session.noun.lease)  # type: ignore[attr-defined]
        placed = await commit_instances.place(c.writer, snapshot, node, [model.InstanceId(id)])
        assert isinstance(placed, commit.Lost)
        assert await c.claims(node) == []


async def test_a_new_session_of_the_node_loses_an_old_placement() -> None:
    """Safety S7: the agent came back as another life between decision and commit."""
    async with cloud.running() as c:
        first = nouns.join()
        joined = await commit_nodes.join(c.writer, await c.look(), first)
        assert isinstance(joined, commit_nodes.Joined)
        node = joined.node.noun.id
        (id,) = await c.create()
        snapshot = await c.look()
        again = nouns.join(node=node, host_key=first.host_key, last_secret=first.secret)
        assert isinstance(await commit_nodes.join(c.writer, await c.look(), again), commit_nodes.Joined)
        placed = await commit_instances.place(c.writer, snapshot, node, [model.InstanceId(id)])
        assert isinstance(placed, commit.Lost)


async def test_launch_and_withdrawal_exclude_each_other() -> None:
    """Safety S1: one key, two commits, one winner."""
    for order in ((0, 1), (1, 0)):
        async with cloud.running() as c:
            node = await c.join()
            (id,) = await c.create(homes=[node])
            snapshot = await c.look()
            kept = await c.kept(id)
            works = [
                commit_instances.launch(c.writer, snapshot, node, 1, kept.noun.id, 1, "n"),
                commit_instances.withdraw(c.writer, snapshot, kept, cloud.WHO),
            ]
            results = await asyncio.gather(*(works[index] for index in order))
            launched = isinstance(results[order.index(0)], commit_instances.Granted)
            withdrawn = isinstance(results[order.index(1)], commit.Done)
            assert launched != withdrawn
            instance = await c.instance(id)
            assert instance.launched == launched
            assert instance.waiting == withdrawn


async def test_a_withdrawn_placement_keeps_its_claim_and_orders_a_clean_up() -> None:
    """Safety S10, S11: the slot is free when the node says so, not before; and users see no second Scheduling."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        await commit_instances.withdraw(c.writer, await c.look(), await c.kept(id), cloud.WHO)
        instance = await c.instance(id)
        assert (instance.state, instance.node) == (State.PULLING, model.NOWHERE)
        assert await c.claims(node) == [(id, 1)]
        order = (await c.look()).order(node, id)
        assert order is not None
        assert (order.noun.epoch, order.noun.withdrawn) == (1, True)
        await c.report(node, nouns.item(Said.GONE, instance.id))
        assert await c.claims(node) == []
        assert (await c.look()).order(node, id) is None
        assert (await c.instance(id)).waiting


async def test_a_launched_instance_is_never_withdrawn() -> None:
    """Safety S1."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        await c.launch(node, id)
        for lost in (False, True):
            withdrawn = await commit_instances.withdraw(
                c.writer, await c.look(), await c.kept(id), cloud.WHO, node_lost=lost
            )
            assert isinstance(withdrawn, commit.Lost)


async def test_launch_is_granted_once_and_repeats_are_known_by_their_nonce() -> None:
    """Safety S1, S4."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        assert isinstance(await c.launch(node, id, nonce="a"), commit_instances.Granted)
        assert isinstance(await c.launch(node, id, nonce="a"), commit_instances.Granted)
        assert isinstance(await c.launch(node, id, nonce="b"), commit_instances.Denied)


async def test_launch_survives_a_lost_reply() -> None:
    """Safety S15."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        c.flaky.plan(flaky.Fate.LOST_REPLY)
        assert isinstance(await c.launch(node, id, nonce="a"), commit_instances.Granted)


async def test_launch_is_denied_to_others() -> None:
    async with cloud.running() as c:
        node, other = await c.join(), await c.join()
        (id,) = await c.create(homes=[node])
        assert isinstance(await c.launch(other, id), commit_instances.Denied)
        assert isinstance(await c.launch(node, id, epoch=2), commit_instances.Denied)
        stale = await c.launch(node, id, session=7)
        assert isinstance(stale, commit_instances.Denied)
        assert stale.stale_session
        await c.terminate(id)
        assert isinstance(await c.launch(node, id), commit_instances.Denied)


async def test_terminate_wins_over_launch_whatever_the_order() -> None:
    """Promise I5."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        await asyncio.gather(c.launch(node, id), c.terminate(id))
        assert (await c.instance(id)).state == State.TERMINATING
        await c.report(node, nouns.item(Said.BOOTED, model.InstanceId(id), vm=nouns.vm()))
        assert (await c.instance(id)).state == State.TERMINATING


async def test_terminate_without_a_claim_is_terminated_at_once() -> None:
    """Safety S13: nobody would say `gone`."""
    async with cloud.running() as c:
        (id,) = await c.create()
        await c.terminate(id)
        instance = await c.instance(id)
        assert instance.state == State.TERMINATED
        assert instance.ended is not None
        assert instance.ended.who == "tester"


async def test_terminate_between_placements_is_terminated_at_once() -> None:
    """Safety S13: it waits again, and the order will clean up its former node."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        await commit_instances.withdraw(c.writer, await c.look(), await c.kept(id), cloud.WHO)
        await c.terminate(id)
        assert (await c.instance(id)).state == State.TERMINATED
        assert (await c.look()).order(node, id) is not None


async def test_terminate_twice_is_harmless_and_a_lost_reply_too() -> None:
    """Promise I7."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        c.flaky.plan(flaky.Fate.LOST_REPLY)
        first = await c.terminate(id)
        assert isinstance(first, commit.Done)
        assert first.changed
        again = await c.terminate(id)
        assert isinstance(again, commit.Done)
        assert not again.changed
        assert isinstance(await c.terminate("unknown"), commit.Missing)


async def test_a_lost_race_is_decided_again_on_what_was_found() -> None:
    """The terminate was decided while the instance waited; meanwhile it was placed."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create()
        stale = await c.look()
        await c.place(node, id)
        done = await commit_instances.terminate(c.writer, stale, model.InstanceId(id), cloud.WHO)
        assert isinstance(done, commit.Done)
        assert done.noun.noun.state == State.TERMINATING, "it has a claim now: its node must say gone"


async def test_update_merges_metadata() -> None:
    async with cloud.running() as c:
        (id,) = await c.create(external_id="e", name="n")
        snapshot = await c.look()
        await commit_instances.update(c.writer, snapshot, model.InstanceId(id), metadata={"a": 1, "b": "x"})
        done = await commit_instances.update(
            c.writer, await c.look(), model.InstanceId(id), metadata={"b": "y"}, name="m"
        )
        assert isinstance(done, commit.Done)
        instance = await c.instance(id)
        assert (instance.metadata, instance.external_id, instance.name) == ({"a": 1, "b": "y"}, "e", "m")


async def test_two_updates_at_once_lose_nothing() -> None:
    async with cloud.running() as c:
        (id,) = await c.create()
        snapshot = await c.look()
        await asyncio.gather(
            *(
                commit_instances.update(c.writer, snapshot, model.InstanceId(id), metadata={f"k{n}": n})
                for n in range(8)
            )
        )
        assert (await c.instance(id)).metadata == {f"k{n}": n for n in range(8)}


async def test_forgetting_leaves_no_key_of_the_instance() -> None:
    async with cloud.running() as c:
        script = model.Script(key="s")
        ids = await c.create(2, script=script)
        for id in ids:
            await c.terminate(id)
        assert await commit_instances.forget(c.writer, await c.look(), [await c.kept(ids[0])]) == 1
        assert len(await c.values(schema.SCRIPTS)) == 1, "the other instance still refers to it"
        await commit_instances.forget(c.writer, await c.look(), [await c.kept(ids[1])])
        for prefix in (schema.INSTANCES, schema.OUTPUTS, schema.SCRIPTS):
            assert await c.values(prefix) == [], prefix


async def test_only_what_is_over_is_forgotten() -> None:
    async with cloud.running() as c:
        (id,) = await c.create()
        assert await commit_instances.forget(c.writer, await c.look(), [await c.kept(id)]) == 0
        assert (await c.instance(id)).state == State.SCHEDULING


async def test_many_are_forgotten_at_once_but_for_those_that_changed() -> None:
    async with cloud.running() as c:
        script = model.Script(key="s")
        ids = await c.create(4, script=script)
        for id in ids[:3]:
            await c.terminate(id)
        spent = [await c.kept(id) for id in ids]
        await commit_instances.update(c.writer, await c.look(), model.InstanceId(ids[2]), metadata={"k": 1})
        before = len(c.flaky.commits)
        assert await commit_instances.forget(c.writer, await c.look(), spent) == 2
        assert len(c.flaky.commits) == before + 1
        assert {instance.noun.id for instance in (await c.look()).instances()} == set(ids[2:])
        assert len(await c.values(schema.SCRIPTS)) == 1
        stale = await c.look()
        await commit_instances.update(c.writer, stale, model.InstanceId(ids[2]), metadata={"k": 2})
        lost = await commit_instances.forget(c.writer, stale, [await c.kept(ids[2])])
        assert lost == 0 or isinstance(lost, commit.Lost)
        assert (await c.instance(ids[2])).metadata == {"k": 2}


async def test_reaping_an_error_frees_its_node_by_order() -> None:
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        await c.report(node, nouns.item(Said.FAILED, model.InstanceId(id), message="no"))
        assert (await c.instance(id)).state == State.ERROR
        await commit_instances.reap(c.writer, await c.look(), await c.kept(id), cloud.WHO)
        assert (await c.instance(id)).state == State.TERMINATING


async def test_a_node_that_is_back_saves_its_instances_from_error() -> None:
    """Safety S9, promise I4: a controller that was frozen between its decision and its commit fails nothing whose node
    has joined again, or spoken, meanwhile."""
    async with cloud.running() as c:
        what = nouns.join()
        joined = await commit_nodes.join(c.writer, await c.look(), what)
        assert isinstance(joined, commit_nodes.Joined)
        node = joined.node.noun.id
        (id,) = await c.create(homes=[node])
        await c.started(node, id)
        c.store._data.revoke(joined.session.noun.lease)  # type: ignore[attr-defined]
        away = await c.look()
        again = nouns.join(node=node, host_key=what.host_key, last_secret=what.secret)
        assert isinstance(await commit_nodes.join(c.writer, away, again), commit_nodes.Joined)
        silent = await c.look()
        await c.say(node, 1, (id, 1), session=2)
        for snapshot in (away, silent):
            kept = snapshot.instance(id)
            assert kept is not None
            assert isinstance(await commit_instances.fail(c.writer, snapshot, kept, "away"), commit.Lost)
        assert (await c.instance(id)).state == State.STARTED


async def test_late_words_about_a_withdrawn_placement_change_nothing() -> None:
    """Safety S1, S10: the node acknowledges, asks for launch and reports after its placement was withdrawn: while the
    instance waits, while another node has it, and after it was terminated there."""
    async with cloud.running() as c:
        slow, other = await c.join(), await c.join()
        (id,) = await c.create(homes=[slow])
        me = model.InstanceId(id)
        await commit_instances.withdraw(c.writer, await c.look(), await c.kept(id), cloud.WHO)

        async def late_words() -> None:
            before = await c.kept(id)
            assert isinstance(await c.launch(slow, id, 1), commit_instances.Denied)
            late = (Said.ACKNOWLEDGED, Said.PROGRESS, Said.BOOTED, Said.INFO, Said.FAILED, Said.REFUSED, Said.STOPPED)
            await c.report(slow, *(nouns.item(event, me, vm=nouns.vm()) for event in late))
            assert await c.kept(id) == before
            assert await c.claims(slow) == [(id, 1)]

        await late_words()
        await c.place(other, id)
        await late_words()
        await c.launch(other, id, 2)
        await late_words()
        await c.terminate(id)
        await late_words()
        await c.report(other, nouns.item(Said.GONE, me, 2))
        await late_words()
        await c.report(slow, nouns.item(Said.GONE, me, 1))
        assert await c.claims(slow) == []
        assert (await c.instance(id)).state == State.TERMINATED


async def test_a_node_that_joins_again_keeps_what_was_launched_and_no_more() -> None:
    """Safety S1, S7: its lease had ended. What had not been launched is another node's now and is ordered away here;
    what had been launched goes on as if nothing had happened."""
    async with cloud.running() as c:
        what = nouns.join()
        first = await commit_nodes.join(c.writer, await c.look(), what)
        assert isinstance(first, commit_nodes.Joined)
        node = first.node.noun.id
        unlaunched, launched = await c.create(2)
        await c.place(node, unlaunched, launched)
        await c.launch(node, launched)
        c.store._data.revoke(first.session.noun.lease)  # type: ignore[attr-defined]
        await commit_instances.withdraw(c.writer, await c.look(), await c.kept(unlaunched), cloud.WHO, node_lost=True)
        again = nouns.join(node=node, host_key=what.host_key, last_secret=what.secret)
        assert isinstance(await commit_nodes.join(c.writer, await c.look(), again), commit_nodes.Joined)
        wants = {want.instance: want for want in wanted.for_node(await c.look(), node).wanted}
        assert (wants[model.InstanceId(unlaunched)].verb, wants[model.InstanceId(launched)].verb) == ("destroy", "run")
        assert wants[model.InstanceId(launched)].launched
        booted = nouns.item(Said.BOOTED, model.InstanceId(launched), vm=nouns.vm())
        assert await c.report(node, booted, session=1) == commit_reports.StaleSession()
        await c.report(node, booted, session=2)
        assert (await c.instance(launched)).state == State.STARTED


async def test_waiting_is_counted_once_per_span_whoever_saw_it() -> None:
    """Safety S9: two controllers that saw the same span; and only of what still waits."""
    async with cloud.running() as c:
        (id,) = await c.create()
        snapshot, kept = await c.look(), await c.kept(id)
        assert await commit_instances.age(c.writer, snapshot, kept) is True
        assert isinstance(await commit_instances.age(c.writer, snapshot, kept), commit.Lost)
        aged = await c.instance(id)
        assert (aged.aged, aged.state) == (1, State.SCHEDULING)
        node = await c.join()
        waiting = await c.kept(id)
        await c.place(node, id)
        assert isinstance(await commit_instances.age(c.writer, await c.look(), waiting), commit.Lost)
        assert isinstance(await commit_instances.age(c.writer, await c.look(), await c.kept(id)), commit.Lost)
        assert (await c.instance(id)).aged == 1, "it keeps its turn, should it wait again"
