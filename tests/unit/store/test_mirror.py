"""The mirror shows every write answered before, or says that it cannot (safety S20, S21, S22, S25)."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import pytest

from covey import errors, model, wire
from covey.decide import permission
from covey.store import base, commit, commit_cloud, commit_instances, memory, mirror, schema, view
from tests.support import cloud, flaky, nouns


@contextlib.asynccontextmanager
async def mirrored(
    c: cloud.Cloud, prove: mirror.Prove | None = None
) -> AsyncIterator[tuple[mirror.Mirror, flaky.Flaky]]:
    """A mirror behind weather of its own; the writer has fine weather."""
    weather = flaky.Flaky(c.store)
    copy = mirror.Mirror(weather, c.world, prove)
    task = asyncio.create_task(copy.run())
    try:
        yield copy, weather
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: object, limit_s: float = 60.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.01)


async def test_a_read_shows_every_write_answered_before_it() -> None:
    """Promise I6, with a watch that is slower than the writer."""
    async with cloud.running() as c, mirrored(c) as (copy, weather):
        weather.watch_delay_s = 0.02
        for _ in range(10):
            (id,) = await c.create()
            assert (await copy.fresh()).instance(id) is not None


async def test_requests_share_a_read_but_never_one_sent_before_they_came() -> None:
    """Safety S21."""
    async with cloud.running() as c, mirrored(c) as (copy, weather):
        await copy.fresh()
        weather.delay = lambda: 0.05  # the first read is on its way for 0.1 s
        early = asyncio.create_task(copy.fresh())
        await asyncio.sleep(0.07)
        (id,) = await c.create()
        late = [asyncio.create_task(copy.fresh()) for _ in range(20)]
        await early
        assert all(snapshot.instance(id) is not None for snapshot in await asyncio.gather(*late))


async def test_what_a_guarded_write_proves_asks_the_store_only_when_the_mirror_is_not_ready() -> None:
    """Safety S21: a decision of an old view that a transaction carries is refused, and made again on what is there."""
    async with cloud.running() as c, mirrored(c) as (copy, weather):
        reads = 0
        read = copy._proof.read

        async def counted() -> int:
            nonlocal reads
            reads += 1
            return await read()

        copy._proof.read = counted  # type: ignore[method-assign]
        await until(lambda: copy.ready)
        copy._proof.proved_ns = c.world.boot_ns() - 2 * mirror.PROVED_NS
        before = reads
        await copy.current()
        assert reads > before, "the last proof is too old"
        weather.watch_delay_s = 3600
        (id,) = await c.create()
        copy._proof.proved_ns = c.world.boot_ns() + mirror.PROVED_NS  # however slow this machine is
        behind = await copy.current()
        assert behind.instance(id) is None
        decision = model.Decision(who="test", why="it is over")
        done = await commit_instances.terminate(c.writer, behind, model.InstanceId(id), decision)
        assert isinstance(done, commit.Done) and done.noun.noun.state == model.State.TERMINATED


async def test_a_late_watch_is_not_waited_for_long() -> None:
    """Safety S21: after 300 ms the answer comes from the store directly."""
    async with cloud.running() as c, mirrored(c) as (copy, weather):
        await copy.fresh()
        weather.watch_delay_s = 30
        (id,) = await c.create()
        began = c.world.boot_ns()
        assert (await copy.fresh()).instance(id) is not None
        assert 0.25e9 < c.world.boot_ns() - began < 15e9
        assert copy.snapshot().instance(id) is None, "the copy itself is still late"


async def test_who_comes_while_the_store_is_read_directly_waits_for_the_next_read() -> None:
    """Promise I6: a read that began too early for a request is no reason to refuse it."""
    async with cloud.running() as c, mirrored(c) as (copy, weather):
        await copy.fresh()
        weather.watch_delay_s = 30
        await c.create()
        early = asyncio.create_task(copy.fresh())
        await until(lambda: copy._direct is not None)
        begun, copy._direct = copy._direct, asyncio.create_task(asyncio.sleep(2.0, copy.snapshot()))
        (id,) = await c.create()
        assert (await copy.fresh()).instance(id) is not None
        assert begun is not None
        await asyncio.gather(early, begun)


async def test_a_store_that_says_nothing_is_not_waited_for_long() -> None:
    """Promise I10: who asks gets a 503 soon enough to ask another controller, however patient the store's client is."""
    async with cloud.running() as c, mirrored(c) as (copy, weather):
        await copy.fresh()
        weather.delay = lambda: 2.0  # each way
        began = c.world.boot_ns()
        with pytest.raises(errors.Unavailable, match="does not answer"):
            await copy.fresh()
        assert c.world.boot_ns() - began < 30e9


async def test_cut_off_from_the_store_there_is_no_answer() -> None:
    """Promise I10: never an answer from an older view; red within 2 s (safety S25)."""
    async with cloud.running() as c, mirrored(c) as (copy, weather):
        await copy.fresh()
        assert copy.ready
        weather.partition(True)
        with pytest.raises(errors.Unavailable):
            await copy.fresh()
        began = c.world.boot_ns()
        await until(lambda: not copy.ready)
        assert c.world.boot_ns() - began < 8e9
        weather.partition(False)
        await until(lambda: copy.ready)


async def test_a_watch_that_stands_still_turns_red_and_is_opened_again() -> None:
    """Safety S21: the reads go on, the watch does not."""
    async with cloud.running() as c, mirrored(c) as (copy, weather):
        await copy.fresh()
        weather.watch_delay_s = 3600
        (id,) = await c.create()
        await until(lambda: "behind the store" in copy.trouble)
        await asyncio.sleep(1.0)  # several looks: a new watch alone is no reason to be green
        assert "behind the store" in copy.trouble
        weather.watch_delay_s = 0
        await until(lambda: copy.snapshot().instance(id) is not None)
        await until(lambda: copy.ready)


async def test_doubt_after_a_freeze() -> None:
    """Safety S24: nothing that was proved before the process was frozen counts after it."""
    async with cloud.running() as c, mirrored(c) as (copy, _):
        await copy.fresh()
        copy.doubt()
        assert not copy.ready
        await copy.fresh()
        assert copy.ready


async def test_after_a_freeze_the_past_is_proved_although_nobody_asked_meanwhile() -> None:
    """Safety S18, S24: the first who asks may come after the next read, and that read alone proves too little."""
    async with cloud.running() as c:
        proofs = 0

        async def prove(_why: str, _before: object) -> None:
            nonlocal proofs
            proofs += 1

        copy = mirror.Mirror(c.store, c.world, prove)
        task = asyncio.create_task(copy.run())
        try:
            await until(lambda: copy.ready)
            copy.doubt()
            await copy.fresh()
            assert not copy.ready
            await until(lambda: copy.ready)
            assert proofs == 2
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_a_compaction_under_the_watch_is_survived() -> None:
    """Safety S20: list again at one revision, and nothing deleted meanwhile stays."""
    async with cloud.running() as c, mirrored(c) as (copy, weather):
        gone, stays = await c.create(2)
        await copy.fresh()
        weather.partition(True)
        await c.store.commit(base.Txn((), (base.Delete(schema.instance(gone)),)))
        (new,) = await c.create()
        revision = (await c.look()).revision
        await c.store.compact(revision)
        weather.partition(False)
        await until(lambda: copy.revision >= revision)
        snapshot = copy.snapshot()
        assert {kept.noun.id for kept in snapshot.instances()} == {stays, new}


async def test_a_snapshot_never_changes() -> None:
    async with cloud.running() as c, mirrored(c) as (copy, _):
        (id,) = await c.create()
        before = await copy.fresh()
        revision = before.revision
        await c.terminate(id)
        for _ in range(50):
            await c.create()
        after = await copy.fresh()
        kept, now = before.instance(id), after.instance(id)
        assert kept is not None
        assert now is not None
        assert (kept.noun.state, now.noun.state) == (model.State.SCHEDULING, model.State.TERMINATED)
        assert (before.instance_count(), before.revision, before.waiting_count()) == (1, revision, 1)
        assert (after.instance_count(), after.waiting_count()) == (51, 50)


async def test_how_a_view_relates_to_this_store() -> None:
    """Safety S18, S22."""
    async with cloud.running() as c, mirrored(c) as (copy, _):
        now = await copy.fresh()
        assert now.kinship(now.seen) is permission.Kinship.OWN
        assert now.kinship(wire.Seen(history=now.history, revision=now.revision + 1000)) is permission.Kinship.AHEAD
        assert now.kinship(wire.Seen(history="another", revision=now.revision)) is permission.Kinship.FOREIGN
        assert now.kinship(wire.Seen(history="another", revision=1)) is permission.Kinship.FORGOTTEN


async def test_a_copy_of_the_first_of_two_restores_is_thrown_away_after_the_second() -> None:
    """Safety S18: both are of one backup, so the breaks stand at one revision. The controller was cut off, and
    the store has overtaken what it had: no revision goes back, its watch goes on as if nothing had been."""
    async with cloud.running() as c:
        assert isinstance(c.store, memory.Memory)
        saved = c.store.backup()
        c.store.restore(saved)
        await commit_cloud.add_nonce(c.writer)
        (lost,) = await c.create()
        async with mirrored(c) as (copy, weather):
            before = await copy.fresh()
            assert before.instance(lost) is not None
            weather.partition(True)
            c.store.restore(saved)
            await commit_cloud.add_nonce(c.writer)
            ids = [(await c.create())[0] for _ in range(3)]
            now = await c.look()
            assert (now.fence, now.breach.revision) == (before.fence, before.breach.revision), "else it shows nothing"
            assert now.revision > before.revision
            weather.partition(False)

            async def shown() -> view.Snapshot | None:
                try:
                    return await copy.fresh()
                except errors.Unavailable:
                    return None

            async with asyncio.timeout(60):
                while (after := await shown()) is None:
                    await asyncio.sleep(0.01)
            assert after.breach == now.breach
            assert after.instance(lost) is None
            assert all(after.instance(id) is not None for id in ids)


@pytest.mark.parametrize("contradicted", [True, False])
async def test_what_was_listed_before_the_break_is_listed_once_more(contradicted: bool) -> None:
    """Safety S18: something is written between a restore and its break, and the store is restored again before this
    controller has proved it. No nonce and no revision tells the two apart."""
    async with cloud.running() as c:
        assert isinstance(c.store, memory.Memory)
        saved, gate = c.store.backup(), asyncio.Event()

        async def prove(why: str, before: Sequence[permission.Link]) -> None:
            await gate.wait()
            await commit_cloud.add_nonce(c.writer, why, before)

        async with mirrored(c, prove) as (copy, weather):
            if contradicted:  # its copy is thrown away: the revision goes back
                await c.create()
            gate.set()
            await until(lambda: copy.ready)
            gate.clear()
            if not contradicted:
                saved = c.store.backup()
            c.store.restore(saved)
            copy.doubt()
            (ghost,) = await c.create()
            await until(lambda: copy.listed and copy.snapshot().instance(ghost) is not None)
            weather.partition(True)
            c.store.restore(saved)
            (real,) = await c.create()
            await commit_cloud.add_nonce(c.writer)
            weather.partition(False)
            await until(lambda: copy.snapshot().breach.nonce)
            gate.set()
            await until(lambda: copy.ready)
            assert copy.snapshot().instance(ghost) is None
            assert copy.snapshot().instance(real) is not None


async def test_a_write_stands_in_the_view_of_its_own_revision() -> None:
    """Safety S18: a nonce may have been added between the view that a write was decided on and the write."""
    async with cloud.running() as c, mirrored(c) as (copy, _):
        before = await copy.fresh()
        await commit_cloud.add_nonce(c.writer)
        (id,) = await c.create()
        revision = (await c.kept(id)).revision
        now = await copy.fresh()
        assert now.kinship(await copy.seen_at(revision)) is permission.Kinship.OWN
        assert now.kinship(wire.Seen(history=before.history, revision=revision)) is permission.Kinship.FOREIGN


async def test_only_the_node_concerned_is_woken() -> None:
    async with cloud.running() as c, mirrored(c) as (copy, _):
        mine, other = await c.join(), await c.join()
        after = (await copy.fresh()).revision
        mine_changed = asyncio.create_task(copy.node_changed(mine, after))
        other_changed = asyncio.create_task(copy.node_changed(other, after))
        await c.create(homes=[mine])
        await asyncio.wait_for(mine_changed, 60)
        await copy.fresh()
        assert not other_changed.done()
        other_changed.cancel()
        await asyncio.gather(other_changed, return_exceptions=True)


async def test_a_broken_value_is_absent_and_named() -> None:
    async with cloud.running() as c, mirrored(c) as (copy, _):
        (id,) = await c.create()
        await c.store.commit(base.Txn((), (base.Put(schema.instance(id), b"no JSON"),)))
        snapshot = await copy.fresh()
        assert snapshot.instance(id) is None
        assert list(copy.broken) == [schema.instance(id)]


async def test_indexes_follow_every_change() -> None:
    async with cloud.running() as c, mirrored(c) as (copy, _):
        node = await c.join(facts=nouns.facts(slots=10))
        ids = await c.create(3, script=model.Script(key="s"))
        await c.place(node, *ids[:2])
        await c.terminate(ids[2])
        await c.say(node, 1, ("stray", 1))
        live, listed = await copy.fresh(), await c.look()
        for snapshot in (live, listed):
            assert {kept.noun.id for kept in snapshot.instances_on(node)} == set(ids[:2])
            assert {kept.noun.id for kept in snapshot.unacknowledged()} == set(ids[:2])
            assert [kept.noun.id for kept in snapshot.in_state(model.State.TERMINATED)] == [ids[2]]
            assert snapshot.waiting_count() == 0
            assert snapshot.script_users("s") == 3
            assert snapshot.history == live.history


async def test_a_store_that_is_slow_is_proved_all_the_same() -> None:
    """Safety S18, S25: its past takes several questions, which together may take longer than one proof of health lasts.
    A slow store costs latency, and a controller that was frozen once must not stay red for that."""
    async with cloud.running() as c:
        weather, proved = flaky.Flaky(c.store), 0

        async def prove(_why: str, _before: object) -> None:
            nonlocal proved
            for _ in range(6):
                await weather.range(schema.FORMAT_KEY)
            proved += 1

        copy = mirror.Mirror(weather, c.world, prove)
        task = asyncio.create_task(copy.run())
        try:
            await until(lambda: copy.ready)
            weather.delay = lambda: 0.2  # each way
            copy.doubt()
            assert not copy.ready
            await until(lambda: copy.ready)
            assert proved >= 2
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
