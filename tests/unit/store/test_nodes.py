"""Nodes come, go, and are told to clean up (safety S2, S7, S11, S12)."""

import pytest

from covey import errors, model, wire
from covey.store import base, commit, commit_instances, commit_nodes, schema
from tests.support import cloud, flaky, nouns

State = model.State
Said = wire.ReportEvent
Why = commit_nodes.Why


async def join(c: cloud.Cloud, what: wire.Join) -> commit_nodes.JoinAnswer:
    return await commit_nodes.join(c.writer, await c.look(), what)


def then(first: wire.Join, node: object, **changes: object) -> wire.Join:
    """The join of the same agent's next life."""
    return nouns.join(**({"node": node, "host_key": first.host_key, "last_secret": first.secret} | changes))


async def test_a_first_join_makes_node_session_ledger_and_sign_of_life() -> None:
    async with cloud.running() as c:
        answer = await join(c, nouns.join())
        assert isinstance(answer, commit_nodes.Joined)
        id = answer.node.noun.id
        snapshot = await c.look()
        assert snapshot.session(id) == answer.session
        assert snapshot.ledger(id) is not None
        assert snapshot.alive(id) is not None
        assert "secret" not in repr(answer.session.noun.secret_sha256)


@pytest.mark.parametrize("fate", [flaky.Fate.LOST_REPLY, flaky.Fate.LOST_REQUEST])
async def test_a_join_survives_what_gets_lost(fate: flaky.Fate) -> None:
    async with cloud.running() as c:
        await c.create()
        c.flaky.plan(fate)
        answer = await join(c, nouns.join())
        assert isinstance(answer, commit_nodes.Joined)
        assert len(list((await c.look()).nodes())) == 1


async def test_the_same_join_again_is_the_same_life() -> None:
    """The agent never got the answer: its next session's secret was on its disk before it asked."""
    async with cloud.running() as c:
        what = nouns.join()
        first = await join(c, what)
        again = await join(c, what)
        assert isinstance(first, commit_nodes.Joined)
        assert isinstance(again, commit_nodes.Joined)
        assert again.repeated
        assert again.session == first.session
        assert len(list((await c.look()).nodes())) == 1


async def test_a_first_join_whose_answer_was_lost_comes_from_the_next_life_as_the_same_node() -> None:
    """Safety S7: else a node stays that nobody is, and what was placed there is held by nobody for ever."""
    async with cloud.running() as c:
        first = await join(c, nouns.join(host_key="host", secret="one"))
        assert isinstance(first, commit_nodes.Joined)
        second = await join(c, nouns.join(host_key="host", secret="two", last_secret="one"))
        assert isinstance(second, commit_nodes.Joined)
        assert second.session.noun.counter == 2, "a life of its own: the first one's may still be frozen somewhere"
        assert [node.noun.id for node in (await c.look()).nodes()] == [first.node.noun.id]
        late = await join(c, nouns.join(host_key="host", secret="one"))
        assert late == commit_nodes.JoinRefused(Why.SECRET)


async def test_a_restart_takes_over_at_once() -> None:
    """Safety S7: with the last secret, on the same host."""
    async with cloud.running() as c:
        what = nouns.join()
        first = await join(c, what)
        assert isinstance(first, commit_nodes.Joined)
        second = await join(c, then(what, first.node.noun.id))
        assert isinstance(second, commit_nodes.Joined)
        assert second.session.noun.counter == 2
        assert second.session.noun.lease != first.session.noun.lease
        c.store._data.revoke(first.session.noun.lease)  # type: ignore[attr-defined]
        assert (await c.look()).alive(first.node.noun.id) is not None, "the new life hangs on the new lease"


async def test_who_is_refused() -> None:
    """Safety S7."""
    async with cloud.running() as c:
        what = nouns.join()
        first = await join(c, what)
        assert isinstance(first, commit_nodes.Joined)
        id = first.node.noun.id

        async def why(**changes: object) -> commit_nodes.Why | None:
            answer = await join(c, then(what, changes.pop("node", id), **changes))
            return answer.why if isinstance(answer, commit_nodes.JoinRefused) else None

        assert await why(last_secret="wrong") == Why.SECRET
        assert await why(last_secret="") == Why.SECRET
        assert await why(host_key="another") == Why.HOST
        assert await why(last_secret="", explicit=True) == Why.ALIVE
        assert await why(cloud="another") == Why.CLOUD
        assert await why(node=model.NodeId("unknown")) == Why.UNKNOWN
        c.store._data.revoke(first.session.noun.lease)  # type: ignore[attr-defined]
        assert await why(last_secret="") == Why.SECRET
        assert await why(last_secret="", explicit=True) is None


async def test_of_two_newcomers_one_wins() -> None:
    """Safety S7: a guarded commit replaces the session."""
    async with cloud.running() as c:
        what = nouns.join()
        first = await join(c, what)
        assert isinstance(first, commit_nodes.Joined)
        snapshot = await c.look()
        lives = [then(what, first.node.noun.id) for _ in range(2)]
        answers = [await commit_nodes.join(c.writer, snapshot, life) for life in lives]
        assert isinstance(answers[0], commit_nodes.Joined)
        assert answers[1] == commit_nodes.JoinRefused(Why.SECRET)


async def test_leaving_is_refused_while_claims_are_held() -> None:
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        left = await commit_nodes.leave(c.writer, await c.look(), node, 1, force=False, who="op")
        assert left == commit_nodes.StillClaimed((model.InstanceId(id),))
        left = await commit_nodes.leave(c.writer, await c.look(), node, 1, force=True, who="op")
        assert left == commit_nodes.Left(node)
        assert (await c.look()).removed(node) is not None


async def test_leaving_leaves_nothing() -> None:
    async with cloud.running() as c:
        node = await c.join()
        assert await commit_nodes.leave(c.writer, await c.look(), node, 1, force=False, who="op") == commit_nodes.Left(
            node
        )
        left = [kv.key for kv in await c.values(schema.PREFIX) if node in kv.key]
        assert left == []


async def test_removing_a_node_ends_its_instances_and_orders_its_vms_destroyed() -> None:
    """Safety S12: claims become orders, in as many transactions as it takes."""
    async with cloud.running() as c:
        node = await c.join(facts=nouns.facts(slots=100))
        ids = await c.create(60)
        await c.place(node, *ids[:30])
        await c.place(node, *ids[30:])
        await c.started(node, ids[0])
        await c.terminate(ids[1])
        assert await commit_nodes.remove(c.writer, await c.look(), node, "op") == commit_nodes.Left(node)
        snapshot = await c.look()
        assert snapshot.removed(node) is not None
        assert snapshot.session(node) is None
        assert snapshot.ledger(node) is None
        assert {order.noun.instance for order in snapshot.orders_on(node)} == set(ids)
        states = {id: (await c.instance(id)).state for id in ids}
        assert states.pop(ids[1]) == State.TERMINATED
        assert set(states.values()) == {State.ERROR}
        await c.terminate(ids[0])
        assert (await c.instance(ids[0])).state == State.TERMINATED, "no claim is left (safety S13)"


async def test_a_removed_node_is_told_so() -> None:
    """Safety S12."""
    async with cloud.running() as c:
        what = nouns.join()
        first = await join(c, what)
        assert isinstance(first, commit_nodes.Joined)
        await commit_nodes.remove(c.writer, await c.look(), first.node.noun.id, "op")
        assert await join(c, then(what, first.node.noun.id)) == commit_nodes.JoinRefused(Why.REMOVED)


async def test_nothing_is_placed_on_a_node_that_is_being_removed() -> None:
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create()
        stale = await c.look()
        await commit_nodes.remove(c.writer, stale, node, "op")
        placed = await commit_instances.place(c.writer, stale, node, [model.InstanceId(id)])
        assert isinstance(placed, commit.Lost)


async def test_configure_changes_only_what_is_named() -> None:
    async with cloud.running() as c:
        node = await c.join()
        await commit_nodes.configure(c.writer, await c.look(), node, {"name": "mac-1"}, "op")
        done = await commit_nodes.configure(c.writer, await c.look(), node, {"drain": True}, "op")
        assert isinstance(done, commit.Done)
        assert (done.noun.noun.name, done.noun.noun.drain) == ("mac-1", True)


async def test_a_vm_that_the_ledger_lacks_becomes_a_claim() -> None:
    """Safety S11: capacity follows what nodes really run."""
    async with cloud.running() as c:
        node = await c.join()
        await c.say(node, 1, ("stray", 3))
        assert await c.claims(node) == [("stray", 3)]


async def test_a_word_that_came_late_brings_no_claim_back() -> None:
    """Safety S3, S11: it was sent before `gone`, and arrives after a newer word."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        await c.terminate(id)
        await c.report(node, nouns.item(wire.ReportEvent.GONE, model.InstanceId(id)))
        await c.say(node, 7)
        await c.say(node, 5, (id, 1))
        assert await c.claims(node) == []


async def test_vms_of_another_cloud_are_not_adopted() -> None:
    """Safety S12."""
    async with cloud.running() as c:
        node = await c.join()
        vm = model.VmSeen(instance=model.InstanceId("theirs"), epoch=1, running=True, cloud="another")
        word = model.Word(node=node, session=1, messages=1, at_ns=0, vms=(vm,))
        await commit_nodes.say(c.writer, await c.look(), node, 1, word)
        assert await c.claims(node) == []


async def test_an_order_needs_the_instance_to_be_as_it_was_seen() -> None:
    """Safety S2: decided on its absence, or on its revision."""
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        order = commit_nodes.order
        owned = await order(c.writer, await c.look(), node, model.InstanceId(id), 1, cloud.WHO)
        assert isinstance(owned, commit.Lost), "the instance wants it"
        newer = await order(c.writer, await c.look(), node, model.InstanceId(id), 2, cloud.WHO)
        assert isinstance(newer, commit.Lost), "newer than what we know is never destroyed"
        absent = await c.look()
        stray = model.InstanceId("stray")
        await c.store.commit(base.Txn((), (base.Put(schema.instance(stray), schema.encode(nouns.instance(id=stray))),)))
        assert isinstance(await order(c.writer, absent, node, stray, 1, cloud.WHO), commit.Lost)
        done = await order(c.writer, await c.look(), node, model.InstanceId("other"), 1, cloud.WHO)
        assert isinstance(done, commit.Done)
        assert done.noun.noun.decision.who == "tester"


async def test_a_removed_node_comes_back_by_its_operators_word_and_is_told_to_clean_up() -> None:
    """Safety S7, S12: its agent alone is refused for good; its operator's join brings the orders to it. Sessions count
    on, so that nothing that the old life said can be taken for the new one's."""
    async with cloud.running() as c:
        what = nouns.join()
        first = await join(c, what)
        assert isinstance(first, commit_nodes.Joined)
        node = first.node.noun.id
        (id,) = await c.create(homes=[node])
        await c.started(node, id)
        await commit_nodes.remove(c.writer, await c.look(), node, "op")
        assert await join(c, then(what, node)) == commit_nodes.JoinRefused(Why.REMOVED)
        again = await join(c, then(what, node, explicit=True))
        assert isinstance(again, commit_nodes.Joined)
        assert again.session.noun.counter == 2
        await c.say(node, 1, (id, 1), session=2)
        assert await c.claims(node) == [(id, 1)], "its slot is held as long as the VM is there"
        snapshot = await c.look()
        assert snapshot.order(node, id) is not None
        assert snapshot.removed(node) is None
        await c.report(node, nouns.item(Said.GONE, model.InstanceId(id)), session=2)
        assert await c.claims(node) == []
        assert list((await c.look()).orders_on(node)) == []


async def test_a_removed_node_comes_back_only_when_its_claims_are_cleared() -> None:
    """Safety S12: a crash cut the removal short, and the operator is quicker than the loop."""
    async with cloud.running() as c:
        what = nouns.join()
        first = await join(c, what)
        assert isinstance(first, commit_nodes.Joined)
        node = first.node.noun.id
        (id,) = await c.create(homes=[node])
        c.flaky.plan(flaky.Fate.FINE, flaky.Fate.UNAVAILABLE)
        with pytest.raises(errors.Unavailable):
            await commit_nodes.remove(c.writer, await c.look(), node, "op")
        assert await join(c, then(what, node, explicit=True)) == commit_nodes.JoinRefused(Why.REMOVED)
        assert await commit_nodes.clear_removed(c.writer, await c.look(), node, "loop") is False
        assert (await c.instance(id)).state == State.ERROR
        assert isinstance(await join(c, then(what, node, explicit=True)), commit_nodes.Joined)


async def test_orders_of_a_removed_node_end_by_themselves() -> None:
    async with cloud.running() as c:
        node = await c.join()
        await c.create(homes=[node])
        await commit_nodes.remove(c.writer, await c.look(), node, "op")
        orders = await c.values(schema.ORDERS)
        assert [kv.lease != 0 for kv in orders] == [True]


async def test_a_node_with_an_instance_that_cannot_be_read_can_be_removed() -> None:
    async with cloud.running() as c:
        node = await c.join()
        broken, fine = await c.create(2)
        await c.place(node, broken, fine)
        await c.store.commit(base.Txn((), (base.Put(schema.instance(broken), b"?"),)))
        assert await commit_nodes.remove(c.writer, await c.look(), node, "op") == commit_nodes.Left(node)
        assert (await c.look()).ledger(node) is None
        assert (await c.instance(fine)).state == State.ERROR
        assert len(await c.values(schema.ORDERS)) == 2


async def test_leaving_takes_orders_along() -> None:
    async with cloud.running() as c:
        node = await c.join()
        done = await commit_nodes.order(c.writer, await c.look(), node, model.InstanceId("stray"), 1, cloud.WHO)
        assert isinstance(done, commit.Done)
        await commit_nodes.leave(c.writer, await c.look(), node, 1, force=False, who="op")
        assert await c.values(schema.ORDERS) == []
