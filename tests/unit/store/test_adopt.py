"""A store that was restored is found out, holds what it may have forgotten, and learns it from the nodes (S18, S19)."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from covey import errors, model, wire
from covey.decide import permission
from covey.store import (
    base,
    commit,
    commit_adopt,
    commit_cloud,
    commit_instances,
    commit_nodes,
    memory,
    mirror,
    schema,
    view,
)
from covey.store import commit_reports as reports
from tests.support import cloud, nouns

State = model.State
ENDED = model.Decision(who="user", why="terminate request")


async def restore(c: cloud.Cloud, backup: memory.Backup, **how: Any) -> str:
    """The backup takes the store's place, and a controller finds out; why."""
    c.store.restore(backup, **how)  # type: ignore[attr-defined]
    await commit_cloud.add_nonce(c.writer)
    return (await c.look()).breach_why


def backup(c: cloud.Cloud) -> memory.Backup:
    saved: memory.Backup = c.store.backup()  # type: ignore[attr-defined]
    return saved


def held(id: str, epoch: int = 1, **changes: Any) -> wire.Held:
    values: dict[str, Any] = {"launched": True, "running": True, "vm": nouns.vm(), "spec": nouns.spec()}
    return wire.Held(instance=model.InstanceId(id), epoch=epoch, **{**values, **changes})


def buried(id: str, epoch: int = 1, **changes: Any) -> wire.Buried:
    return wire.Buried(instance=model.InstanceId(id), epoch=epoch, decision=ENDED, **{"final": True, **changes})


async def tell(
    c: cloud.Cloud,
    node: str,
    *what: wire.Held | wire.Buried,
    last: bool = True,
    session: int = 1,
    begun: wire.Seen | None = None,
) -> object:
    told = wire.Adopt(
        seen=wire.Seen(history="lost", revision=99),
        messages=1,
        vms=tuple(one for one in what if isinstance(one, wire.Held)),
        buried=tuple(one for one in what if isinstance(one, wire.Buried)),
        last=last,
        begun=begun or wire.Seen(),
    )
    return await commit_adopt.adopt(c.writer, await c.look(), model.NodeId(node), session, told)


async def settled(c: cloud.Cloud) -> bool:
    return await commit_adopt.settle(c.writer, await c.look())


# ---- finding out -----------------------------------------------------------------------------------------------------


async def test_a_nonce_after_a_restore_begins_a_new_history() -> None:
    async with cloud.running() as c:
        saved = backup(c)
        for _ in range(10):
            await c.create()
        assert "raft index went back" in await restore(c, saved)
        snapshot = await c.look()
        assert snapshot.breach.nonce == snapshot.history
        assert snapshot.fence == snapshot.breach.revision
        (event,) = [kv for kv in await c.values(schema.EVENTS) if b'"restored"' in kv.value]
        assert b"controller-1" in event.value
        await commit_cloud.add_nonce(c.writer)
        assert (await c.look()).breach == snapshot.breach, "entered once"


async def test_another_cluster_id_is_a_restore_too() -> None:
    async with cloud.running() as c:
        assert "cluster id" in await restore(c, backup(c), cluster="another")


async def test_two_controllers_that_find_out_at_once_enter_one_break() -> None:
    async with cloud.running() as c:
        chain, saved = (await c.look()).chain, backup(c)
        await c.create()
        c.store.restore(saved)  # type: ignore[attr-defined]
        proofs = ("its revision went back", "its revision went back")
        both = (commit_cloud.add_nonce(c.writer, proof, chain) for proof in proofs)
        outcomes = await asyncio.gather(*both, return_exceptions=True)
        assert all(isinstance(one, str | errors.Unavailable) for one in outcomes)
        first = (await c.look()).breach
        for _ in outcomes:  # whoever came too late does it again
            await commit_cloud.add_nonce(c.writer, proofs[0], chain)
        assert (await c.look()).breach == first
        assert len([kv for kv in await c.values(schema.EVENTS) if b'"restored"' in kv.value]) == 1


async def test_what_was_decided_before_the_break_is_never_written() -> None:
    """Whatever revisions its guards name: the restored store may have reached them again."""
    async with cloud.running() as c:
        (id,) = await c.create()
        node, saved = await c.join(), backup(c)
        before = await c.look()
        await restore(c, saved)
        with pytest.raises(errors.Unavailable, match="restored"):
            await commit_instances.place(c.writer, before, node, [model.InstanceId(id)])
        with pytest.raises(errors.Unavailable, match="restored"):
            await commit_instances.terminate(c.writer, before, model.InstanceId(id), ENDED)
        assert (await c.instance(id)).state == State.SCHEDULING


async def test_a_launch_that_was_withdrawn_is_not_granted_between_the_restore_and_its_break() -> None:
    """The node was frozen when its placement was withdrawn; the instance runs elsewhere. It asks for the launch just
    when the store has forgotten all that, and nobody has noticed yet. A decision that lost is not made once more on
    what the restored store holds (safety S1, S18)."""
    async with cloud.running() as c:
        frozen, other = await c.join(), await c.join(host_key="other", secret="s")
        (id,) = await c.create()
        await c.place(frozen, id)
        saved = backup(c)
        await commit_instances.withdraw(c.writer, await c.look(), await c.kept(id), ENDED)
        await c.place(other, id)
        await c.launch(other, id, epoch=2)
        copy = await c.look()
        c.store.restore(saved)  # type: ignore[attr-defined]
        with pytest.raises(errors.Unavailable, match="the store was restored: its revision went back"):
            await commit_instances.launch(c.writer, copy, frozen, 1, model.InstanceId(id), 1, "nonce")
        assert not (await c.instance(id)).launched
        gone = wire.Item(instance=model.InstanceId(id), epoch=1, seq=1, event=wire.ReportEvent.GONE)
        with pytest.raises(errors.Unavailable, match="the store was restored: its revision went back"):
            await reports.report(c.writer, copy, frozen, 1, [gone])
        assert (await c.instance(id)).state == State.PULLING


async def test_what_was_written_between_the_restore_and_its_break_is_not_sure() -> None:
    async with cloud.running() as c:
        (id,) = await c.create()
        saved = backup(c)
        await c.create()
        await c.create()
        copy = await c.look()
        c.store.restore(saved)  # type: ignore[attr-defined]
        with pytest.raises(errors.Unsure, match="the store was restored: its revision went back"):
            await commit_instances.terminate(c.writer, copy, model.InstanceId(id), ENDED)


async def test_two_breaks_at_one_revision_are_two() -> None:
    """Safety S18: one backup that is restored twice. What was decided between the two is not written after the second,
    although every revision that it rests on is there again, the break's too."""
    async with cloud.running() as c:
        (node, other), (id,) = [await c.join(), await c.join(host_key="other", secret="s")], await c.create()
        saved = backup(c)
        await restore(c, saved)
        await c.store.commit(base.Txn((), (base.Put(schema.script("unused"), b""),)))
        between = await c.look()
        (unused,) = await c.values(schema.SCRIPTS)
        await restore(c, saved)
        await c.store.commit(base.Txn((), (base.Put(schema.script("unused"), b""),)))
        after = await c.look()
        assert between.breach.revision == after.breach.revision == between.fence == after.fence, "else it shows nothing"
        assert between.breach.nonce != after.breach.nonce
        assert between.is_shut_out_from(after)
        with pytest.raises(errors.Unavailable, match="the store was restored"):
            await commit_adopt.excuse(c.writer, between, node, "operator")
        with pytest.raises(errors.Unavailable, match="the store was restored"):
            await commit_instances.terminate(c.writer, between, model.InstanceId(id), ENDED)
        assert await commit_cloud.sweep(c.writer, between, [unused]) == 0
        assert await commit_cloud.sweep(c.writer, after, [unused]) == 1
        await commit_adopt.excuse(c.writer, after, node, "operator")
        await commit_instances.terminate(c.writer, after, model.InstanceId(id), ENDED)
        assert [one.node for one in (await c.look()).awaited()] == [other]


async def test_a_break_shuts_out_what_was_decided_after_the_format_was_raised() -> None:
    """The raise, which is lost, had the revision at which the break stands now."""
    async with cloud.running() as c:
        node, saved = await c.join(), backup(c)
        await c.store.commit(base.Txn((), (base.Put(schema.FORMAT_KEY, schema.encode(schema.Format(format=2))),)))
        writer = commit.Writer(c.store, c.world, newest_format=2)
        raised = await c.look()
        await restore(c, saved)
        assert raised.fence == (await c.look()).fence, "else it shows nothing"
        with pytest.raises(errors.Unavailable, match="nothing was done"):
            await commit_nodes.configure(writer, raised, node, {"drain": True}, "operator")


async def test_old_nonces_go_from_the_oldest_on() -> None:
    async with cloud.running() as c:
        for _ in range(3):
            await commit_cloud.add_nonce(c.writer)
        assert await commit_cloud.old_nonces(c.writer) == []
        chain = [kv.key for kv in sorted(await c.values(schema.HISTORY), key=lambda kv: kv.create_revision)]
        for key in (chain[0], chain[1], chain[3]):
            await c.store.commit(base.Txn((), (base.Put(key, schema.encode(schema.Nonce(at_ns=1))),)))
        old = await commit_cloud.old_nonces(c.writer)
        assert [kv.key for kv in old] == chain[:2], "never one from the middle, and never the newest"
        await commit_cloud.sweep(c.writer, await c.look(), old)
        assert [link.nonce for link in (await c.look()).chain] == [schema.tail(key) for key in chain[2:]]


async def test_two_sweeps_at_once_tear_no_hole_into_the_chain() -> None:
    """Safety S18: who saw the store as it was at a hole would seem to come from another history, and hold all nodes."""
    async with cloud.running() as c:
        old = schema.encode(schema.Nonce(at_ns=1))
        (first,) = await c.values(schema.HISTORY)
        for key in (first.key, *(schema.nonce(f"{number:03}") for number in range(250))):
            await c.store.commit(base.Txn((), (base.Put(key, old),)))
        await commit_cloud.add_nonce(c.writer)
        before = (await c.look()).chain
        late = await commit_cloud.old_nonces(c.writer)
        await commit_cloud.sweep(c.writer, await c.look(), late[:30])
        await commit_cloud.sweep(c.writer, await c.look(), late)  # by another controller, which had looked before that
        after = (await c.look()).chain
        assert after == before[-len(after) :]
        await commit_cloud.sweep(c.writer, await c.look(), await commit_cloud.old_nonces(c.writer))
        assert len((await c.look()).chain) < 3


async def test_a_nonce_that_cannot_be_read_ends_the_sweep_and_no_more() -> None:
    async with cloud.running() as c:
        for number in range(3):
            value = b"?" if number == 1 else schema.encode(schema.Nonce(at_ns=1))
            await c.store.commit(base.Txn((), (base.Put(schema.nonce(f"a{number}"), value),)))
        await commit_cloud.add_nonce(c.writer)
        first = min(await c.values(schema.HISTORY), key=lambda kv: kv.create_revision).key
        await c.store.commit(base.Txn((), (base.Put(first, schema.encode(schema.Nonce(at_ns=1))),)))
        assert [kv.key for kv in await commit_cloud.old_nonces(c.writer)] == [first, schema.nonce("a0")]


async def test_a_long_chain_is_listed_quickly() -> None:
    """An etcd that fails again and again makes it long; a controller that lists for seconds counts as frozen (S24)."""
    draft = view.Draft()
    value = schema.encode(schema.Nonce(at_ns=1))
    kvs = [base.Kv(schema.nonce(f"{n * 7919 % 5000:04}"), value, n + 1, n + 1) for n in range(5000)]
    began = time.process_time()
    for kv in sorted(kvs):
        draft.apply(base.Change(kv.key, kv))
    assert time.process_time() - began < 0.4
    assert [link.revision for link in draft.chain] == list(range(1, 5001))
    draft.apply(base.Change(kvs[7].key, kvs[7]))
    draft.apply(base.Change(kvs[9].key, None))
    assert len(draft.chain) == 4999


# ---- the mirror ------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def mirrored(c: cloud.Cloud) -> AsyncIterator[mirror.Mirror]:
    async def prove(why: str, before: Any) -> None:
        await commit_cloud.add_nonce(c.writer, why, before)

    copy = mirror.Mirror(c.flaky, c.world, prove)
    task = asyncio.create_task(copy.run())
    try:
        await until_ready(copy)
        yield copy
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until_ready(copy: mirror.Mirror) -> None:
    async with asyncio.timeout(60):
        while not copy.ready:
            await asyncio.sleep(0.01)


async def test_a_revision_that_went_back_throws_the_copy_away() -> None:
    async with cloud.running() as c, mirrored(c) as copy:
        saved = backup(c)
        (lost,) = await c.create()
        before = await copy.fresh()
        assert before.instance(lost) is not None
        c.store.restore(saved)  # type: ignore[attr-defined]
        with pytest.raises(errors.Unavailable, match="revision went back"):
            await copy.fresh()
        assert not copy.ready
        await until_ready(copy)
        after = await copy.fresh()
        assert after.instance(lost) is None
        assert after.breach.nonce
        assert after.breach.revision > saved.revision
        assert after.kinship(before.seen) is permission.Kinship.FOREIGN


async def test_who_waits_for_a_change_hears_of_the_new_copy() -> None:
    async with cloud.running() as c, mirrored(c) as copy:
        node, saved = await c.join(), backup(c)
        for _ in range(5):
            await c.create()
        after = (await copy.fresh()).revision
        waits = [asyncio.create_task(copy.changed(after)), asyncio.create_task(copy.node_changed(node, after))]
        await asyncio.sleep(0)
        c.store.restore(saved)  # type: ignore[attr-defined]
        async with asyncio.timeout(60):
            await asyncio.gather(*waits)
        assert copy.revision <= after


async def test_a_store_that_has_overtaken_the_copy_is_found_out() -> None:
    """Another controller entered the break and wrote on, while this one could not read: no revision goes back."""
    async with cloud.running() as c, mirrored(c) as copy:
        saved = backup(c)
        (lost,) = await c.create()
        before = await copy.fresh()
        c.flaky.partition(True)
        c.store.restore(saved)  # type: ignore[attr-defined]
        await commit_cloud.add_nonce(commit.Writer(c.store, c.world, who="another controller"))
        while (await c.look()).revision <= before.revision + 3:
            await c.store.commit(base.Txn((), (base.Put("/covey/x", b"x"),)))
        c.flaky.partition(False)
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(errors.Unavailable):
                    snapshot = await copy.fresh()
                    if snapshot.breach.nonce:
                        break
                await asyncio.sleep(0.01)
        assert snapshot.instance(lost) is None, "the copy is of the restored store alone"
        await until_ready(copy)
        assert (await copy.fresh()).breach == (await c.look()).breach


async def test_before_it_is_ready_again_the_mirror_compares_the_store_with_its_past() -> None:
    async with cloud.running() as c, mirrored(c) as copy:
        links = len((await copy.fresh()).chain)
        copy.doubt()
        assert not copy.ready
        await until_ready(copy)
        snapshot = await copy.fresh()
        assert len(snapshot.chain) == links + 1
        assert snapshot.breach.nonce == ""


# ---- hold ------------------------------------------------------------------------------------------------------------


async def test_a_held_node_is_given_nothing_and_what_waits_stays() -> None:
    async with cloud.running() as c:
        node = await c.join()
        (waiting,) = await c.create()
        (placed,) = await c.create(homes=[node])
        await restore(c, backup(c), cluster="another")
        assert isinstance(await c.place(node, waiting), commit.Lost)
        denied = await c.launch(node, placed)
        assert isinstance(denied, commit_instances.Denied)
        assert f"covey node release {'host'}" in denied.why
        await tell(c, node, held(placed, launched=False, running=False, vm=None))
        assert not (await c.look()).held(node)
        assert isinstance(await c.place(node, waiting), commit.Lost), "not before all is settled"
        assert await settled(c)
        assert isinstance(await c.launch(node, placed), commit_instances.Granted)
        assert isinstance(await c.place(node, waiting), int)


async def test_what_is_born_after_the_break_runs_on_nodes_that_have_told() -> None:
    async with cloud.running() as c:
        told, silent = await c.join(), await c.join()
        await restore(c, backup(c), cluster="another")
        (id,) = await c.create()
        assert isinstance(await c.place(silent, id), commit.Lost)
        await tell(c, told)
        assert isinstance(await c.place(told, id), int)
        assert isinstance(await c.launch(told, id), commit_instances.Granted)
        assert not await settled(c), "one node has not told yet"


async def test_a_node_that_joins_for_the_first_time_has_nothing_to_tell() -> None:
    async with cloud.running() as c:
        await restore(c, backup(c), cluster="another")
        node = await c.join()
        assert not (await c.look()).held(node)


async def test_nodes_that_were_removed_or_given_up_are_not_waited_for() -> None:
    async with cloud.running() as c:
        removed, lost = await c.join(), await c.join()
        await restore(c, backup(c), cluster="another")
        assert [one.node for one in (await c.look()).awaited()] == sorted([removed, lost])
        await commit_nodes.remove(c.writer, await c.look(), removed, "operator")
        assert not await settled(c)
        done = await commit_adopt.excuse(c.writer, await c.look(), lost, "operator")
        assert isinstance(done, commit.Done)
        again = await commit_adopt.excuse(c.writer, await c.look(), lost, "operator")
        assert isinstance(again, commit.Done)
        assert not again.changed
        assert await settled(c)
        assert (await c.look()).held(lost), "should it come back, it tells first"
        assert isinstance(
            await commit_adopt.excuse(c.writer, await c.look(), model.NodeId("nobody"), "operator"), commit.Missing
        )


@pytest.mark.parametrize("known", [True, False], ids=["secret forgotten", "node forgotten"])
async def test_a_node_whose_session_the_store_has_forgotten_comes_forward(known: bool) -> None:
    async with cloud.running() as c:
        if not known:
            saved = backup(c)
        node = await c.join(host_key="host", secret="one")
        if known:
            saved = backup(c)
        rejoin = {"node": node, "host_key": "host", "cloud": (await c.look()).cloud}
        await c.join(**rejoin, secret="two", last_secret="one")
        await restore(c, saved)
        back = nouns.join(**rejoin, secret="three", last_secret="two", last_session=2)
        joined = await commit_nodes.join(c.writer, await c.look(), back)
        assert isinstance(joined, commit_nodes.Joined)
        assert joined.session.noun.counter == 3, "higher than any that the agent had"
        snapshot = await c.look()
        assert snapshot.held(node)
        assert [one.node for one in snapshot.awaited()] == [node]
        thief = nouns.join(**{**rejoin, "host_key": "another"}, secret="x", last_secret="two")
        refused = await commit_nodes.join(c.writer, snapshot, thief)
        assert refused == commit_nodes.JoinRefused(commit_nodes.Why.HOST)


async def test_without_a_break_a_forgotten_node_stays_outside() -> None:
    async with cloud.running() as c:
        node = await c.join(host_key="host", secret="one")
        ask = nouns.join(node=node, host_key="host", secret="three", last_secret="two", cloud=(await c.look()).cloud)
        refused = await commit_nodes.join(c.writer, await c.look(), ask)
        assert refused == commit_nodes.JoinRefused(commit_nodes.Why.SECRET)


async def test_a_node_that_left_after_a_restore_does_not_come_back_by_itself() -> None:
    """Its agent still runs for a moment: it must not take the node's absence for the restore's work."""
    async with cloud.running() as c:
        node = await c.join(host_key="host", secret="one")
        await restore(c, backup(c))
        await tell(c, node)
        left = await commit_nodes.leave(c.writer, await c.look(), node, 1, force=False, who="its operator")
        assert left == commit_nodes.Left(node)
        again = nouns.join(node=node, host_key="host", secret="two", last_secret="one", cloud=(await c.look()).cloud)
        refused = await commit_nodes.join(c.writer, await c.look(), again)
        assert refused == commit_nodes.JoinRefused(commit_nodes.Why.UNKNOWN)
        assert not (await c.look()).awaited()


# ---- adoption --------------------------------------------------------------------------------------------------------


async def test_what_was_launched_after_the_backup_is_so_again() -> None:
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        saved = backup(c)
        await c.started(node, id)
        await restore(c, saved)
        assert not (await c.instance(id)).launched
        await tell(c, node, held(id))
        found = await c.instance(id)
        assert (found.state, found.launched, found.node, found.vm) == (State.STARTED, True, node, nouns.vm())
        assert await c.claims(node) == [(id, 1)]


@pytest.mark.parametrize("sizes", [True, False], ids=["processors and memory", "slots"])
async def test_a_placement_whose_room_others_have_taken_since_the_backup_waits_again(sizes: bool) -> None:
    """Safety S19, promise I3: it ended after the backup, and left its room to a VM that the store has forgotten."""
    async with cloud.running() as c:
        node = await c.join(facts=nouns.facts(slots=2, cpu_count=4))
        if sizes:
            kept = (await c.look()).node(node)
            assert kept is not None
            noun = msgspec.structs.replace(kept.noun, capacity_mode=model.CapacityMode.RESOURCE, max_vms=99)
            await c.store.commit(base.Txn((), (base.Put(schema.node(node), schema.encode(noun)),)))
        (runs,) = await c.create(homes=[node], vcpu=2, vram_mb=1024)
        (began,) = await c.create(homes=[node], vcpu=2, vram_mb=1024)
        await restore(c, backup(c), cluster="another")
        spec = nouns.spec(vcpu=2, vram_mb=1024)
        await tell(c, node, held(runs, spec=spec))
        assert (await c.instance(began)).node == node, "there is room for both"
        await restore(c, backup(c), cluster="a third")
        forgotten = nouns.instance_id()
        await tell(c, node, held(runs, spec=spec), held(forgotten, spec=spec))
        found = await c.instance(began)
        assert (found.waiting, "room" in found.message) == (True, True)
        assert {(await c.instance(id)).state for id in (runs, forgotten)} == {State.STARTED}
        (order,) = [kv for kv in await c.values(schema.ORDERS) if began in kv.key]
        assert b'"withdrawn":true' in order.value
        await c.report(node, nouns.item(wire.ReportEvent.GONE, model.InstanceId(began)))
        assert await c.claims(node) == [(runs, 1), (forgotten, 1)]


async def test_what_was_placed_elsewhere_after_the_backup_is_there() -> None:
    """The highest epoch wins, and what the older one left is ordered away."""
    async with cloud.running() as c:
        old, new = await c.join(), await c.join()
        (id,) = await c.create(homes=[old])
        await restore(c, backup(c), cluster="another")
        await tell(c, new, held(id, epoch=2))
        found = await c.instance(id)
        assert (found.node, found.epoch, found.state) == (new, 2, State.STARTED)
        order = (await c.look()).order(old, id)
        assert order is not None
        assert order.noun.epoch == 1
        assert new in order.noun.decision.why
        await tell(c, old, held(id, epoch=1, launched=False, running=False, vm=None))
        assert (await c.instance(id)).node == new


async def test_the_older_epoch_may_tell_last_or_first() -> None:
    for first in (True, False):
        async with cloud.running() as c:
            old, new = await c.join(), await c.join()
            (id,) = await c.create()
            await restore(c, backup(c), cluster="another")
            leftover = (old, held(id, epoch=1, launched=False, running=False, vm=None))
            real = (new, held(id, epoch=2))
            for node, vm in (leftover, real) if first else (real, leftover):
                await tell(c, node, vm)
            found = await c.instance(id)
            assert (found.node, found.epoch, found.state) == (new, 2, State.STARTED)
            assert await c.claims(old) == [(id, 1)]


async def test_a_part_does_not_release_a_node_whose_first_part_a_second_restore_has_forgotten() -> None:
    """Safety S19, promise I2: what that part told would begin again elsewhere."""
    async with cloud.running() as c:
        node, saved = await c.join(), backup(c)
        first, second = nouns.instance_id(), nouns.instance_id()
        await restore(c, saved, cluster="another")
        view = (await c.look()).seen
        assert await tell(c, node, held(first), last=False) == commit_adopt.Told()
        await restore(c, saved, cluster="a third")
        for last in (False, True):
            assert await tell(c, node, held(second), last=last, begun=view) == commit_adopt.Torn()
        assert (await c.look()).held(node)
        view = (await c.look()).seen
        assert await tell(c, node, held(first), last=False) == commit_adopt.Told()
        await commit_cloud.add_nonce(c.writer)  # a controller that begins is no break
        assert await tell(c, node, held(second), begun=view) == commit_adopt.Told()
        assert not (await c.look()).held(node)
        assert {(await c.instance(id)).state for id in (first, second)} == {State.STARTED}


@pytest.mark.parametrize("well", [True, False], ids=["it ended well", "it failed"])
async def test_what_a_script_came_to_is_told_again(well: bool) -> None:
    """Safety S19: the adoption says that the guest runs, or failed; what its start script said comes by the report."""
    async with cloud.running() as c:
        node, (id,) = await c.join(), await c.create()
        await restore(c, backup(c), cluster="another")
        await tell(c, node, held(id, running=well, vm=nouns.vm() if well else None))
        result = model.ScriptResult(return_code=0 if well else 3)
        event = wire.ReportEvent.BOOTED if well else wire.ReportEvent.FAILED
        said = nouns.item(event, model.InstanceId(id), vm=nouns.vm(), script=result, stdout="d2VsbA==")
        await c.report(node, said)
        found = await c.instance(id)
        assert (found.state, found.script_result) == (State.STARTED if well else State.ERROR, result)
        assert (await c.values(schema.output(id, "stdout")))[0].value == b"well"
        other = msgspec.structs.replace(said, seq=said.seq + 1, script=model.ScriptResult(return_code=9))
        await c.report(node, other)
        assert (await c.instance(id)).script_result == result, "once it is known it stays"


async def test_an_instance_that_the_store_never_knew_is_made_again() -> None:
    async with cloud.running() as c:
        node, id = await c.join(), nouns.instance_id()
        await restore(c, backup(c), cluster="another")
        spec = nouns.spec(external_id="job-7", name="build")
        await tell(c, node, held(id, epoch=3, spec=spec))
        found = await c.instance(id)
        assert (found.state, found.epoch, found.node) == (State.STARTED, 3, node)
        assert (found.spec, found.external_id, found.name) == (spec, "job-7", "build")
        assert await c.values(schema.born(id))
        events = [kv.value for kv in await c.values(schema.EVENTS) if b'"adopted"' in kv.value]
        assert len(events) == 1
        assert b"the store was restored" in events[0]


async def test_one_made_again_without_a_launch_waits_for_all_nodes() -> None:
    async with cloud.running() as c:
        node, other, id = await c.join(), await c.join(), nouns.instance_id()
        await restore(c, backup(c), cluster="another")
        await tell(c, node, held(id, launched=False, running=False, vm=None))
        assert (await c.instance(id)).state == State.PULLING
        assert isinstance(await c.launch(node, id), commit_instances.Denied)
        await tell(c, other, buried(id, epoch=2))
        assert (await c.instance(id)).state == State.TERMINATING


async def test_what_was_forgotten_after_its_end_is_not_made_again() -> None:
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create()
        await c.terminate(id)
        await commit_instances.forget(c.writer, await c.look(), [await c.kept(id)])
        await restore(c, backup(c), cluster="another")
        await tell(c, node, held(id))
        assert (await c.look()).instance(id) is None
        assert await c.claims(node) == [(id, 1)], "a claim that nobody wants: ordered away in its time"


async def test_a_final_tombstone_ends_the_instance() -> None:
    async with cloud.running() as c:
        node = await c.join()
        waiting, placed = await c.create(2)
        await c.place(node, placed)
        await restore(c, backup(c), cluster="another")
        await tell(c, node, buried(waiting), buried(placed))
        assert (await c.instance(waiting)).state == State.TERMINATED
        found = await c.instance(placed)
        assert (found.state, found.ended) == (State.TERMINATING, ENDED)


async def test_a_tombstone_of_a_placement_ends_nothing() -> None:
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create()
        await restore(c, backup(c), cluster="another")
        await tell(c, node, buried(id, final=False))
        assert (await c.instance(id)).state == State.SCHEDULING


async def test_an_end_that_the_store_remembers_is_not_told_again() -> None:
    """Thirty days of tombstones cost no writes: only those from after the backup do."""
    async with cloud.running() as c:
        node, id = await c.join(), nouns.instance_id()
        seen = (await c.look()).seen
        await restore(c, backup(c), cluster="another")
        await tell(c, node, buried(id, seen=seen), last=False)
        assert not await c.values(schema.born(id))
        await tell(c, node, buried(id), last=False)
        assert await c.values(schema.born(id))


async def test_an_instance_that_ended_is_not_made_again_by_what_is_left_of_it() -> None:
    async with cloud.running() as c:
        ended, leftover, id = await c.join(), await c.join(), nouns.instance_id()
        await restore(c, backup(c), cluster="another")
        await tell(c, ended, buried(id, epoch=2))
        await tell(c, leftover, held(id, epoch=1, launched=False, running=False, vm=None))
        assert (await c.look()).instance(id) is None
        assert await c.claims(leftover) == [(id, 1)]


async def test_a_terminate_after_the_restore_wins() -> None:
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create()
        await restore(c, backup(c), cluster="another")
        await c.terminate(id)
        await tell(c, node, held(id, epoch=1))
        assert (await c.instance(id)).state == State.TERMINATED
        order = (await c.look()).order(node, id)
        assert order is not None
        assert order.noun.decision.who == "tester"
        assert await c.claims(node) == [(id, 1)]


async def test_a_terminate_of_what_its_node_has_in_a_newer_epoch() -> None:
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        await restore(c, backup(c), cluster="another")
        await c.terminate(id)
        await tell(c, node, held(id, epoch=2))
        found = await c.instance(id)
        assert (found.state, found.epoch) == (State.TERMINATING, 2)
        await c.report(node, nouns.item(wire.ReportEvent.GONE, model.InstanceId(id), epoch=2))
        assert (await c.instance(id)).state == State.TERMINATED
        assert await c.claims(node) == []


async def test_of_two_in_one_epoch_the_launched_one_wins() -> None:
    """The operator gave the node up, the instance was placed again with the same number, and the node came back."""
    async with cloud.running() as c:
        lost, other = await c.join(), await c.join()
        (id,) = await c.create()
        await restore(c, backup(c), cluster="another")
        await commit_adopt.excuse(c.writer, await c.look(), lost, "operator")
        await tell(c, other)
        assert await settled(c)
        await c.place(other, id)
        await tell(c, lost, held(id, epoch=1))
        found = await c.instance(id)
        assert (found.node, found.launched) == (lost, True)
        order = (await c.look()).order(other, id)
        assert order is not None
        assert isinstance(await c.launch(other, id), commit_instances.Denied)


async def test_what_was_placed_again_and_launched_stays() -> None:
    async with cloud.running() as c:
        lost, other = await c.join(), await c.join()
        (id,) = await c.create()
        await restore(c, backup(c), cluster="another")
        await commit_adopt.excuse(c.writer, await c.look(), lost, "operator")
        await tell(c, other)
        assert await settled(c)
        await c.place(other, id)
        await c.started(other, id)
        await tell(c, lost, held(id, epoch=1))
        assert (await c.instance(id)).node == other
        assert not commit_instances.owns(await c.instance(id), lost, 1), "so its VM is ordered away"


async def test_a_stopped_vm_is_stopped() -> None:
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        await restore(c, backup(c), cluster="another")
        await tell(c, node, held(id, running=False, stopped=True))
        assert (await c.instance(id)).state == State.STOPPED


async def test_launched_and_absent_ends_in_error_by_the_nodes_word() -> None:
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        await restore(c, backup(c), cluster="another")
        await tell(c, node, held(id, running=False, vm=None))
        found = await c.instance(id)
        assert (found.state, found.launched) == (State.PULLING, True)
        await c.report(node, nouns.item(wire.ReportEvent.FAILED, model.InstanceId(id)))
        assert (await c.instance(id)).state == State.ERROR


async def test_a_vm_that_is_being_destroyed_is_a_claim_and_no_more() -> None:
    async with cloud.running() as c:
        node, id = await c.join(), nouns.instance_id()
        await restore(c, backup(c), cluster="another")
        await tell(c, node, held(id, buried=True))
        assert (await c.look()).instance(id) is None
        assert await c.claims(node) == [(id, 1)]


async def test_telling_again_changes_nothing() -> None:
    async with cloud.running() as c:
        node = await c.join(facts=nouns.facts(slots=40))
        ids = [nouns.instance_id() for _ in range(30)]
        (ended,) = await c.create()
        await restore(c, backup(c), cluster="another")
        what: list[wire.Held | wire.Buried] = [*map(held, ids), buried(ended)]
        await tell(c, node, *what, last=False)
        assert (await c.look()).held(node), "not before the part marked last"
        await tell(c, node, *what)
        before = [kv for kv in await c.values(schema.PREFIX) if kv.key.startswith((schema.INSTANCES, schema.LEDGERS))]
        await tell(c, node, *what)
        after = [kv for kv in await c.values(schema.PREFIX) if kv.key.startswith((schema.INSTANCES, schema.LEDGERS))]
        assert before == after
        assert len(await c.claims(node)) == 30
        assert (await c.look()).instance_count(State.STARTED) == 30


async def test_only_the_newest_session_tells() -> None:
    async with cloud.running() as c:
        node = await c.join()
        await restore(c, backup(c), cluster="another")
        assert isinstance(await tell(c, node, held(nouns.instance_id()), session=7), reports.StaleSession)
        assert isinstance(await tell(c, node, session=7), reports.StaleSession)
        assert (await c.look()).held(node)
