"""Creating instances: all or none, once whatever is repeated or lost (safety S15, S16, S17)."""

import asyncio

import msgspec
import pytest

from covey import errors, model
from covey.store import base, commit, commit_births, commit_cloud, commit_instances, schema
from tests.support import cloud, flaky, nouns

Fate = flaky.Fate
State = model.State


def start(count: int = 1, **changes: object) -> commit_births.Start:
    ids = tuple(nouns.instance_id() for _ in range(count))
    values: dict[str, object] = {"spec": nouns.spec(), "ids": ids, "who": "tester", "body": "b"}
    return commit_births.Start(**(values | changes))  # type: ignore[arg-type]


async def create(c: cloud.Cloud, what: commit_births.Start, until_ns: int = 0) -> commit_births.Answer:
    return await commit_births.create(c.writer, await c.look(), what, until_ns=until_ns)


async def test_a_hundred_instances_are_born_in_one_transaction() -> None:
    """Safety S17: one transaction, all or none."""
    async with cloud.running() as c:
        before = len(c.flaky.commits)
        answer = await create(c, start(100, key="k", spec=nouns.spec(external_id="e", name="n")))
        assert isinstance(answer, commit_births.Created)
        assert len(c.flaky.commits) == before + 1
        snapshot = await c.look()
        assert snapshot.instance_count(State.SCHEDULING) == 100
        in_order = sorted(snapshot.instances(), key=lambda kept: kept.noun.created_ns)
        assert tuple(kept.noun.id for kept in in_order) == answer.ids


async def test_the_same_key_and_body_gets_the_same_answer() -> None:
    """Safety S17."""
    async with cloud.running() as c:
        first = await create(c, start(2, key="k"))
        again = await create(c, start(2, key="k"))
        assert isinstance(first, commit_births.Created)
        assert again == commit_births.Repeated(first.ids)
        assert (await c.look()).instance_count() == 2


async def test_the_same_key_with_another_body_is_refused() -> None:
    """Safety S17."""
    async with cloud.running() as c:
        await create(c, start(key="k"))
        assert await create(c, start(key="k", body="other")) == commit_births.KeyReused()
        assert (await c.look()).instance_count() == 1


async def test_two_at_once_with_one_key_make_one() -> None:
    """Promise I7: a balancer may repeat a request while the first is still on its way."""
    async with cloud.running() as c:
        answers = await asyncio.gather(*(create(c, start(key="k")) for _ in range(10)))
        assert sum(isinstance(answer, commit_births.Created) for answer in answers) == 1
        assert len({answer.ids for answer in answers if not isinstance(answer, commit_births.KeyReused)}) == 1


TWIN = nouns.spec(external_id="e", name="n")


async def test_a_twin_finds_the_instance_while_it_is_of_use() -> None:
    """Safety S17: external_id and name of a start."""
    async with cloud.running() as c:
        first = await create(c, start(spec=TWIN))
        assert isinstance(first, commit_births.Created)
        assert await create(c, start(spec=TWIN)) == commit_births.Repeated(first.ids)
        await c.terminate(first.ids[0])
        assert isinstance(await create(c, start(spec=TWIN)), commit_births.Created)


@pytest.mark.parametrize("spent", [State.TERMINATING, State.TERMINATED, State.ERROR])
async def test_a_twin_that_is_of_no_use_any_more_is_not_found(spent: State) -> None:
    """A CI job that is tried again names its start as before, while the old instance may still be shown."""
    async with cloud.running() as c:
        first = await create(c, start(spec=TWIN))
        assert isinstance(first, commit_births.Created)
        kept = (await c.look()).instance(first.ids[0])
        assert kept is not None
        ended = msgspec.structs.replace(kept.noun, state=spent)
        await c.store.commit(base.Txn((), (base.Put(schema.instance(first.ids[0]), schema.encode(ended)),)))
        second = await create(c, start(spec=TWIN))
        assert isinstance(second, commit_births.Created)
        assert await create(c, start(spec=TWIN)) == commit_births.Repeated(second.ids)


async def test_a_twin_asks_for_the_same_in_the_same_words() -> None:
    """Another template or tag below the same names is another request."""
    async with cloud.running() as c:
        first = await create(c, start(spec=TWIN))
        assert isinstance(await create(c, start(spec=TWIN, body="other")), commit_births.Created)
        assert isinstance(first, commit_births.Created)
        assert (await c.look()).instance_count() == 2


@pytest.mark.parametrize("names", [{"external_id": "profile"}, {"name": "n"}, {}])
async def test_the_same_external_id_alone_is_no_twin(names: dict[str, str]) -> None:
    """Many instances may share one external id."""
    async with cloud.running() as c:
        spec = nouns.spec(**names)
        assert isinstance(await create(c, start(spec=spec)), commit_births.Created)
        assert isinstance(await create(c, start(spec=spec)), commit_births.Created)


async def test_a_twin_younger_than_the_snapshot_is_found() -> None:
    async with cloud.running() as c:
        old = await c.look()
        first = await create(c, start(spec=TWIN))
        assert isinstance(first, commit_births.Created)
        again = await commit_births.create(c.writer, old, start(spec=TWIN))
        assert again == commit_births.Repeated(first.ids)


@pytest.mark.parametrize(
    "fates",
    [
        (Fate.LOST_REPLY,),
        (Fate.LOST_REQUEST,),
        (Fate.LOST_REPLY, Fate.LOST_REPLY),
        (Fate.LOST_REPLY, Fate.UNAVAILABLE),  # "not done" is said of that copy, not of the one before it
    ],
)
async def test_unsure_is_sent_again_until_it_is_definite(fates: tuple[flaky.Fate, ...]) -> None:
    """Safety S15: whatever was lost, the caller learns of one creation."""
    async with cloud.running() as c:
        await create(c, start())  # shared leases are there now
        c.flaky.plan(*fates)
        what = start()
        answer = await create(c, what)
        assert isinstance(answer, commit_births.Created)
        assert answer.ids == what.ids
        assert (await c.look()).instance_count() == 2
        sent = c.flaky.commits[-1 - len(fates) :]
        assert {txn[:2] for txn in sent} == {sent[0][:2]}, "the same transaction, not another one"


async def test_unavailable_is_reported_and_nothing_was_done() -> None:
    async with cloud.running() as c:
        c.flaky.plan(Fate.UNAVAILABLE)
        with pytest.raises(errors.Unavailable):
            await create(c, start())
        assert (await c.look()).instance_count() == 0


async def test_nothing_is_sent_for_a_request_that_is_too_old() -> None:
    """Safety S24."""
    async with cloud.running() as c:
        before = len(c.flaky.commits)
        with pytest.raises(errors.Unavailable):
            await create(c, start(), until_ns=c.world.boot_ns() - 1)
        assert len(c.flaky.commits) == before


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
        async with asyncio.timeout(20):
            while c.writer.unfinished:
                await asyncio.sleep(0.05)
        assert isinstance(await create(c, start()), commit_births.Created)
        assert (await c.look()).instance_count() == 2


async def test_the_door_is_closed_although_the_store_was_restored_meanwhile() -> None:
    """Safety S15, S18: a break shuts out what was decided before it, but not what puts an end to it."""
    async with cloud.running() as c:
        await create(c, start())
        c.flaky.plan(Fate.LOST_REPLY, Fate.UNAVAILABLE)  # the second is the first attempt to close the door
        what = start()
        with pytest.raises(errors.Unsure):
            await create(c, what, until_ns=c.until_trouble_ns())
        while c.flaky.planned:
            await asyncio.sleep(0.001)
        await commit_cloud.add_nonce(c.writer, "the test says so")
        async with asyncio.timeout(10):
            while c.writer.unfinished:
                await asyncio.sleep(0.05)
        assert (await c.instance(what.ids[0])).state == State.TERMINATED


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


async def test_a_zombie_create_does_not_bring_back_a_forgotten_instance() -> None:
    """Safety S16: the instance came, ended and was forgotten before an old copy of its creation arrived."""
    async with cloud.running() as c:
        answer = await create(c, start())
        assert isinstance(answer, commit_births.Created)
        zombie = c.flaky.commits[-1]
        await c.terminate(answer.ids[0])
        assert await commit_instances.forget(c.writer, await c.look(), [await c.kept(answer.ids[0])]) == 1
        assert (await c.store.commit(zombie)).succeeded is False
        assert (await c.look()).instance(answer.ids[0]) is None


async def test_created_and_placed_in_one_transaction() -> None:
    async with cloud.running() as c:
        node = await c.join()
        (id,) = await c.create(homes=[node])
        instance = await c.instance(id)
        assert (instance.state, instance.node, instance.epoch) == (State.PULLING, node, 1)
        assert await c.claims(node) == [(id, 1)]


async def test_a_home_that_has_changed_means_waiting() -> None:
    """Safety S11: the ledger that was looked at is not the one there is."""
    async with cloud.running() as c:
        node = await c.join()
        stale = await c.look()
        await c.create(homes=[node])
        what = start()
        await commit_births.create(c.writer, stale, what, [node])
        assert (await c.instance(what.ids[0])).state == State.SCHEDULING
        assert len(await c.claims(node)) == 1


async def test_events_and_births_end_by_themselves() -> None:
    async with cloud.running() as c:
        await create(c, start(key="k"))
        for prefix in (schema.BORN, schema.EVENTS, schema.KEYS):
            assert all(kv.lease for kv in await c.values(prefix)), prefix


async def test_every_transaction_compares_the_format() -> None:
    """Safety S27: a store of another format takes nothing from this program."""
    async with cloud.running() as c:
        (id,) = await c.create()
        await c.store.commit(base.Txn((), (base.Put(schema.FORMAT_KEY, b'{"format":2}'),)))
        with pytest.raises(errors.Rejected, match="format"):
            await create(c, start())
        with pytest.raises(errors.Rejected, match="format"):
            await c.terminate(id)
        assert (await c.instance(id)).state == State.SCHEDULING
        assert not isinstance(await c.look(), commit.Lost)
