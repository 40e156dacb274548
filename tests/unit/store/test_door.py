"""What becomes of a start whose caller was told "unsure" (safety S15): nothing, or what a repeat was answered with."""

import asyncio
from typing import NamedTuple

import pytest

from covey import errors, model
from covey.store import commit, commit_births, commit_cloud, commit_door, memory, schema
from tests.support import cloud, flaky, nouns
from tests.support.births import create, start

Fate = flaky.Fate
State = model.State
TWIN = nouns.spec(external_id="e", name="n")


async def test_the_door_is_closed_on_a_create_that_was_given_up() -> None:
    """Safety S15, S16: the zombie arrives after the caller was told "unsure", and finds the door closed."""
    async with cloud.running() as c:
        await create(c, start())
        c.flaky.late_s = lambda: 0.4
        c.flaky.plan(Fate.LATE)
        what = start()
        with pytest.raises(errors.Unsure):
            await create(c, what, until_ns=c.until_trouble_ns())
        await c.writer.close()
        await c.flaky.settled()
        assert (await c.look()).instance(what.ids[0]) is None
        born = await c.values(schema.born(what.ids[0]))
        assert b'"closed":true' in born[0].value


async def test_no_more_starts_are_taken_while_very_many_are_unsettled() -> None:
    """What is kept of them in memory is bounded, however long the store gives no answers."""
    async with cloud.running() as c:
        await create(c, start())  # shared leases are there now
        snapshot = await c.look()
        c.flaky.partition(True)
        while c.writer.unfinished < 300:
            until_ns = c.world.boot_ns() + 200_000_000
            lost = (commit_births.create(c.writer, snapshot, start(), until_ns=until_ns) for _ in range(100))
            assert errors.Unsure in map(type, await asyncio.gather(*lost, return_exceptions=True))
        with pytest.raises(errors.Unavailable, match="unsettled"):
            await commit_births.create(c.writer, snapshot, start())
        c.flaky.partition(False)
        async with asyncio.timeout(60):
            while c.writer.unfinished:
                await asyncio.sleep(0.05)
        assert isinstance(await create(c, start()), commit_births.Created)
        assert (await c.look()).instance_count() == 2


async def test_what_turns_up_after_giving_up_is_terminated() -> None:
    """Safety S15: the create had been applied, its reply was lost, the caller was told 503."""
    async with cloud.running() as c:
        await create(c, start())
        c.flaky.plan(Fate.LOST_REPLY)
        what = start()
        with pytest.raises(errors.Unsure):
            await create(c, what, until_ns=c.until_trouble_ns())
        await c.writer.close()
        instance = await c.instance(what.ids[0])
        assert instance.state == State.TERMINATED
        assert instance.ended is not None
        assert "lost" in instance.ended.why


async def test_what_turns_up_stays_for_the_repeat_with_its_key() -> None:
    """Safety S17: the caller repeats with the key that it was told "unsure" about."""
    async with cloud.running() as c:
        await create(c, start())
        c.flaky.plan(Fate.LOST_REPLY)
        what = start(key="k")
        with pytest.raises(errors.Unsure):
            await create(c, what, until_ns=c.until_trouble_ns())
        await c.writer.close()
        assert await create(c, start(key="k")) == commit_births.Repeated(what.ids)
        assert (await c.instance(what.ids[0])).state == State.SCHEDULING


async def test_what_turns_up_stays_for_a_repeat_that_was_answered_with_it() -> None:
    """Safety S15, S17, promise I4: the reply was lost, the client repeats by external_id and name, and is answered OK
    before the door is closed. What was answered must not be terminated behind its back."""
    async with cloud.running() as c:
        await create(c, start())
        c.flaky.plan(Fate.LOST_REPLY, Fate.UNAVAILABLE)  # the second is the first attempt to close the door
        what = start(spec=TWIN)
        with pytest.raises(errors.Unsure):
            await create(c, what, until_ns=c.until_trouble_ns())
        while c.flaky.planned:
            await asyncio.sleep(0.001)
        assert await create(c, start(spec=TWIN)) == commit_births.Repeated(what.ids)
        await c.writer.close()
        assert (await c.instance(what.ids[0])).state == State.SCHEDULING


async def test_a_repeat_after_the_door_was_closed_is_a_new_start() -> None:
    """The other order of the same race."""
    async with cloud.running() as c:
        await create(c, start())
        c.flaky.plan(Fate.LOST_REPLY)
        what = start(spec=TWIN)
        with pytest.raises(errors.Unsure):
            await create(c, what, until_ns=c.until_trouble_ns())
        await c.writer.close()
        assert (await c.instance(what.ids[0])).state == State.TERMINATED
        assert isinstance(await create(c, start(spec=TWIN)), commit_births.Created)


# ---- the store is restored meanwhile


class Lost(NamedTuple):
    """A start that was done, and whose caller was told "unsure"; the controller that must settle it hears nothing."""

    given_up: commit_door.GivenUp
    before: memory.Backup
    after: memory.Backup


async def lost(c: cloud.Cloud, what: commit_births.Start) -> Lost:
    await create(c, start())  # shared leases are there now
    before = backup(c)
    c.flaky.plan(Fate.LOST_REPLY)
    breach, until_ns = (await c.look()).breach.nonce, c.until_trouble_ns()
    with pytest.raises(errors.Unsure):
        await create(c, what, until_ns=until_ns)
    c.flaky.partition(True)
    twin = schema.twin(what.spec.external_id, what.spec.name) if what.spec.name else ""
    return Lost(commit_door.GivenUp(what.ids, bool(what.key), twin, breach), before, backup(c))


def backup(c: cloud.Cloud) -> memory.Backup:
    assert isinstance(c.store, memory.Memory)
    return c.store.backup()


def restore(c: cloud.Cloud, saved: memory.Backup) -> None:
    assert isinstance(c.store, memory.Memory)
    c.store.restore(saved)


async def settled(c: cloud.Cloud) -> None:
    """The controller hears again, and has settled what it had to."""
    c.flaky.partition(False)
    async with asyncio.timeout(60):
        while c.writer.unfinished:
            await asyncio.sleep(0.05)


def another(c: cloud.Cloud) -> commit.Writer:
    return commit.Writer(c.store, c.world, who="controller-2")


async def repeated(c: cloud.Cloud, what: commit_births.Start) -> commit_births.Answer:
    """What another controller answers to a repeat."""
    again = start(spec=what.spec, key=what.key)
    return await commit_births.create(another(c), await c.look(), again)


async def test_the_door_is_closed_although_the_store_was_restored_meanwhile() -> None:
    """Safety S15, S18: a break shuts out what was decided before it, but not what puts an end to it."""
    async with cloud.running() as c:
        what = start()
        await lost(c, what)
        await commit_cloud.add_nonce(another(c), "the test says so")
        await settled(c)
        assert (await c.instance(what.ids[0])).state == State.TERMINATED


async def test_a_twin_stays_when_a_restore_took_away_the_mark_of_its_repeat() -> None:
    """Safety S15, S18, promise I4: a repeat was answered OK after the backup, and the restored store does not know."""
    async with cloud.running() as c:
        what = start(spec=TWIN)
        its = await lost(c, what)
        assert await repeated(c, what) == commit_births.Repeated(what.ids)
        restore(c, its.after)
        await commit_cloud.add_nonce(another(c))
        await settled(c)
        assert (await c.instance(what.ids[0])).state == State.SCHEDULING
        assert any(b'"kept"' in kv.value and b"restored" in kv.value for kv in await c.values(schema.EVENTS))
        assert await repeated(c, what) == commit_births.Repeated(what.ids)


async def test_nothing_is_settled_before_the_break_is_entered() -> None:
    """Safety S15, S18: the store was restored and nobody has noticed yet."""
    async with cloud.running() as c:
        what = start(spec=TWIN)
        its = await lost(c, what)
        assert await repeated(c, what) == commit_births.Repeated(what.ids)
        restore(c, its.after)
        for _ in range(2):
            with pytest.raises(errors.Unavailable, match="the store was restored"):
                await commit_door.settle(another(c), its.given_up)
        assert (await c.instance(what.ids[0])).state == State.SCHEDULING
        await commit_cloud.add_nonce(another(c))
        await settled(c)
        assert (await c.instance(what.ids[0])).state == State.SCHEDULING


@pytest.mark.parametrize("how", [{"spec": TWIN}, {"key": "k"}], ids=["by names", "by key"])
async def test_what_the_store_forgot_is_not_shut_out(how: dict[str, object]) -> None:
    """Safety S15, S19: a repeat was answered OK, the instance runs, and the backup is from before all that. A node
    will tell of it: a closed birth would make a leftover of it."""
    async with cloud.running() as c:
        what = start(**how)  # type: ignore[arg-type]
        its = await lost(c, what)
        assert await repeated(c, what) == commit_births.Repeated(what.ids)
        restore(c, its.before)
        await commit_cloud.add_nonce(another(c))
        await settled(c)
        assert not await c.values(schema.born(what.ids[0]))


async def test_a_start_that_nobody_can_repeat_is_shut_out_of_the_restored_store() -> None:
    """Safety S15: nobody was answered with it. A node that tells of its VM will be told to remove it."""
    async with cloud.running() as c:
        what = start()
        its = await lost(c, what)
        restore(c, its.before)
        await commit_cloud.add_nonce(another(c))
        await settled(c)
        assert b'"closed":true' in (await c.values(schema.born(what.ids[0])))[0].value


async def test_a_record_that_a_restore_brings_back_saves_the_instance() -> None:
    """Safety S15, S18: the record was removed, and the store restored before its instance was terminated: a repeat
    finds it again, and is answered OK."""
    async with cloud.running() as c:
        what = start(spec=TWIN)
        its = await lost(c, what)
        between = another(c)
        between.store = flaky.Flaky(c.store)
        between.store.plan(*(Fate.FINE,) * 5, Fate.UNAVAILABLE)  # two looks, the record goes; the terminate must wait
        with pytest.raises(errors.Unavailable):
            await commit_door.settle(between, its.given_up)
        assert not await c.values(its.given_up.twin)
        restore(c, its.after)
        await commit_cloud.add_nonce(another(c))
        assert await repeated(c, what) == commit_births.Repeated(what.ids)
        await settled(c)
        assert (await c.instance(what.ids[0])).state == State.SCHEDULING


async def test_a_terminate_under_way_does_not_outlast_the_record_s_return() -> None:
    """The same, and the terminate was sent already: it compares that the record is gone."""
    async with cloud.running() as c:
        what = start(spec=TWIN)
        its = await lost(c, what)
        mine = another(c)
        with pytest.raises(errors.Unavailable, match="restored meanwhile"):
            await commit_door.end(mine, its.given_up, what.ids[0])
        assert (await c.instance(what.ids[0])).state == State.SCHEDULING
