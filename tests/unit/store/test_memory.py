"""Memory's leases on a clock of its own, as a simulation runs them. The rest is in tests/contract/test_store.py."""

import asyncio

import pytest

from covey import errors, world
from covey.store import base, memory


class Hand(world.System):
    """A clock that is moved by hand."""

    ns = 0

    def boot_ns(self) -> int:
        return self.ns

    def pass_s(self, seconds: float) -> None:
        self.ns += int(seconds * 1e9)


@pytest.fixture
def hand() -> Hand:
    return Hand()


@pytest.fixture
def store(hand: Hand) -> memory.Memory:
    return memory.Memory(hand)


async def test_a_lease_is_over_when_its_time_is_though_no_timer_rang(store: memory.Memory, hand: Hand) -> None:
    lease = await store.grant(10)
    await store.commit(base.Txn((), (base.Put("a", b"", lease.id),)))
    hand.pass_s(9.9)
    assert [lease.lost, (await store.range("a")).total] == [False, 1]
    hand.pass_s(0.2)
    assert (await store.commit(base.Txn((base.absent("a"),), ()))).succeeded
    assert lease.lost
    with pytest.raises(errors.Rejected):
        await store.commit(base.Txn((), (base.Put("b", b"", lease.id),)))


async def test_a_renewal_counts_from_when_it_is_made(store: memory.Memory, hand: Hand) -> None:
    lease = await store.grant(10)
    hand.pass_s(9)
    assert await store.client().renew([lease.id, 99]) == {lease.id: 10.0, 99: 0.0}
    hand.pass_s(9)
    assert [lease.lost] == [False]
    hand.pass_s(1)
    assert lease.lost


async def test_many_leases_end_each_in_its_own_revision(store: memory.Memory, hand: Hand) -> None:
    leases = [await store.grant(seconds) for seconds in (3, 1, 2)]
    for number, lease in enumerate(leases):
        await store.commit(base.Txn((), (base.Put(f"k{number}", b"", lease.id),)))
    start = (await store.range("k0")).revision
    hand.pass_s(5)
    watch = store.watch("k", "l", start + 1)
    assert [[change.key for change in (await anext(watch)).changes] for _ in range(3)] == [["k1"], ["k2"], ["k0"]]


async def test_a_slow_watcher_is_told_that_its_place_is_gone(store: memory.Memory) -> None:
    for n in range(5):
        await store.commit(base.Txn((), (base.Put("a", b"%d" % n),)))
    watch = store.watch("a", "", 2)
    assert (await anext(watch)).revision == 2
    await store.compact(5)
    with pytest.raises(errors.Compacted) as caught:
        await anext(watch)
    assert caught.value.revision == 5


async def test_compaction_forgets_keys_that_are_no_more(store: memory.Memory) -> None:
    await store.commit(base.Txn((), (base.Put("a", b""),)))
    await store.commit(base.Txn((), (base.Delete("a"),)))
    last = (await store.commit(base.Txn((), (base.Put("b", b""),)))).revision
    await store.compact(last)
    assert [kv.key for kv in (await store.range(base.EVERYTHING, base.EVERYTHING, revision=last)).kvs] == ["b"]
    made = await store.commit(base.Txn((base.absent("a"),), (base.Put("a", b""), base.Get("a"))))
    assert made.got[0] is not None and made.got[0].create_revision == made.revision


async def test_one_client_closes_and_the_others_go_on(store: memory.Memory) -> None:
    other = store.client()
    watch = other.watch("a", "", 1)
    waiting = asyncio.ensure_future(anext(watch))
    await store.close()
    await other.commit(base.Txn((), (base.Put("a", b""),)))
    assert (await waiting).changes[0].key == "a"
