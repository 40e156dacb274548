"""Creating instances: all or none, once whatever is repeated or lost (safety S15, S16, S17)."""

import asyncio

import msgspec
import pytest

from covey import errors, model
from covey.store import base, commit, commit_births, commit_instances, commit_nodes, schema
from tests.support import cloud, flaky, nouns
from tests.support.births import create, start

Fate = flaky.Fate
State = model.State


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


async def test_a_home_with_room_beside_new_claims_is_still_one() -> None:
    """Safety S11: the claims that there are now are compared and rewritten."""
    async with cloud.running() as c:
        node = await c.join()
        stale = await c.look()
        (first,) = await c.create(homes=[node])
        shown: list[model.Ledger] = []

        def fits(home: model.NodeId, ledger: model.Ledger) -> bool:
            assert home == node
            shown.append(ledger)
            return len(ledger.claims) < 2

        one, two = start(), start()
        for what in (one, two):
            await commit_births.create(c.writer, stale, what, [node], fits=fits)
        assert (await c.instance(one.ids[0])).node == node
        assert (await c.instance(two.ids[0])).state == State.SCHEDULING
        assert [len(ledger.claims) for ledger in shown] == [1, 2]
        assert await c.claims(node) == [(first, 1), (one.ids[0], 1)]


@pytest.mark.parametrize("what", ["agent", "node"])
async def test_a_home_whose_node_has_another_life_is_none(what: str) -> None:
    async with cloud.running() as c:
        node = await c.join(host_key="host", secret="one")
        stale = await c.look()
        if what == "agent":
            assert await c.join(node=node, host_key="host", secret="two", last_secret="one") == node
        else:
            await commit_nodes.remove(c.writer, await c.look(), node, "operator")
        born = start()
        await commit_births.create(c.writer, stale, born, [node], fits=lambda *_: True)
        assert (await c.instance(born.ids[0])).state == State.SCHEDULING


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
