"""What every store keeps (covey/store/base.py), shown on memory and on a real etcd by the same tests."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from covey import errors, world
from covey.decide import permission
from covey.store import base, etcd, limits, memory
from tests.sim import clockwork, sea
from tests.support import etcd as etcd_server
from tests.support import flaky

DEADLINE_S = 90


class Bench:
    """One store's data, and as many clients of it as a test asks for. Keys of a test live below `prefix`."""

    def __init__(self, client: Callable[[], base.Store], prefix: str) -> None:
        self._client = client
        self._made: list[base.Store] = []
        self.prefix = prefix
        self.end = base.prefix_end(prefix)

    def client(self) -> base.Store:
        self._made.append(self._client())
        return self._made[-1]

    def key(self, name: str) -> str:
        return self.prefix + name

    async def close(self) -> None:
        for store in self._made:
            await store.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[etcd_server.Cluster]:
    with etcd_server.running() as running:
        yield running


@pytest.fixture(scope="module")
def alone() -> Iterator[etcd_server.Cluster]:
    """An etcd in which nothing else happens: leases of other tests that end would count as revisions."""
    with etcd_server.running() as running:
        yield running


class _Chancy(world.System, clockwork.World):
    """The real clock, and seeded chance."""

    def __init__(self) -> None:
        self.chance = random.Random(1)


def _by_line() -> Callable[[], base.Store]:
    """What controllers of a simulation have of a store, in calm weather: the simulated one keeps the promises too."""
    ocean = sea.Sea(_Chancy(), lambda _: None)

    def line() -> base.Store:
        calm = sea.Line(ocean, random.Random(1), lambda: flaky.Fate.FINE)
        calm.flaky.delay = lambda: 0.0  # else what is sent at once arrives in any order
        return calm

    return line


@pytest.fixture(params=["memory", "simulated", "etcd"])
async def bench(request: pytest.FixtureRequest, cluster: etcd_server.Cluster) -> AsyncIterator[Bench]:
    real = world.System()
    prefix = f"/{real.token()}/"
    if request.param == "memory":
        made = Bench(memory.Memory(real).client, prefix)
    elif request.param == "simulated":
        made = Bench(_by_line(), prefix)
    else:
        made = Bench(lambda: etcd.Etcd(cluster.endpoints, world=real), prefix)
    yield made
    await made.close()


@pytest.fixture
def store(bench: Bench) -> base.Store:
    return bench.client()


async def put(store: base.Store, *pairs: tuple[str, bytes], lease: int = 0) -> int:
    """Write unguarded, all in one revision."""
    return (await store.commit(base.Txn((), tuple(base.Put(key, value, lease) for key, value in pairs)))).revision


async def get(store: base.Store, key: str) -> base.Kv | None:
    kvs = (await store.range(key)).kvs
    return kvs[0] if kvs else None


async def gather_until(
    watch: AsyncIterator[base.Batch], enough: Callable[[list[base.Batch]], bool]
) -> list[base.Batch]:
    """The batches of a watch until they are `enough`."""
    batches: list[base.Batch] = []
    async with asyncio.timeout(DEADLINE_S), contextlib.aclosing(watch) as opened:  # type: ignore[type-var]
        async for batch in opened:
            batches.append(batch)
            if enough(batches):
                return batches
        raise AssertionError("the watch ended by itself")


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await holds():
            await asyncio.sleep(0.02)


class TestTransactions:
    async def test_a_key_knows_when_it_was_made_and_changed(self, bench: Bench, store: base.Store) -> None:
        key = bench.key("a")
        made = await put(store, (key, b"1"))
        changed = await put(store, (key, b"2"))
        assert changed == made + 1
        assert await get(store, key) == base.Kv(key, b"2", made, changed)
        await store.commit(base.Txn((), (base.Delete(key),)))
        assert await get(store, key) is None
        again = await put(store, (key, b"3"))
        assert await get(store, key) == base.Kv(key, b"3", again, again)

    async def test_either_all_of_then_or_all_of_otherwise(self, bench: Bench, store: base.Store) -> None:
        a, b, gone = bench.key("a"), bench.key("b"), bench.key("gone")
        txn = base.Txn((base.absent(a),), (base.Put(a, b"1"), base.Put(b, b"1")), (base.Get(b), base.Get(gone)))
        first = await store.commit(txn)
        assert first == base.Outcome(True, first.revision)
        second = await store.commit(txn)
        kv = base.Kv(b, b"1", first.revision, first.revision)
        assert second == base.Outcome(False, first.revision, (kv, None))

    async def test_compares_see_the_revision_before(self, bench: Bench, store: base.Store) -> None:
        key = bench.key("a")
        outcome = await store.commit(base.Txn((base.absent(key),), (base.Put(key, b"1"), base.Get(key))))
        assert outcome.succeeded
        assert outcome.got == (base.Kv(key, b"1", outcome.revision, outcome.revision),)

    async def test_each_kind_of_compare(self, bench: Bench, store: base.Store) -> None:
        key, other = bench.key("a"), bench.key("other")
        made = await put(store, (key, b"1"))
        changed = await put(store, (key, b""))
        answers = {
            base.absent(key): False,
            base.absent(other): True,
            base.unchanged(key, changed): True,
            base.unchanged(key, made): False,
            base.unchanged(other, 0): True,
            base.same_life(key, made): True,
            base.same_life(key, changed): False,
            base.equals(key, b""): True,
            base.equals(key, b"1"): False,
            base.equals(other, b""): False,  # an absent key equals nothing, not even nothing
        }
        found = {compare: (await store.commit(base.Txn((compare,), ()))).succeeded for compare in answers}
        assert found == answers

    async def test_one_false_compare_is_enough(self, bench: Bench, store: base.Store) -> None:
        key = bench.key("a")
        made = await put(store, (key, b"1"))
        txn = base.Txn((base.unchanged(key, made), base.absent(key)), (base.Put(key, b"2"),))
        assert not (await store.commit(txn)).succeeded
        assert await get(store, key) == base.Kv(key, b"1", made, made)

    async def test_a_range_is_deleted_in_one_revision(self, bench: Bench, store: base.Store) -> None:
        await put(store, *((bench.key(f"d/{n}"), b"") for n in range(5)), (bench.key("e"), b""))
        outcome = await store.commit(base.Txn((), (base.Delete(bench.key("d/"), bench.key("d0")),)))
        page = await store.range(bench.prefix, bench.end)
        assert [kv.key for kv in page.kvs] == [bench.key("e")]
        assert page.revision == outcome.revision

    async def test_what_changes_nothing_makes_no_revision(self, bench: Bench, store: base.Store) -> None:
        before = await put(store, (bench.key("a"), b""))
        gone = base.Delete(bench.key("gone"))
        assert (await store.commit(base.Txn((), (gone, base.Get(bench.key("a")))))).revision == before

    @pytest.mark.parametrize("fits", [True, False])
    async def test_more_writes_than_one_level_takes(self, bench: Bench, store: base.Store, fits: bool) -> None:
        """A start of a hundred instances: 105 compares guard 205 writes, all or none."""
        if not fits:
            await put(store, (bench.key("guard/104"), b""))
        compares = tuple(base.absent(bench.key(f"guard/{n}")) for n in range(105))
        puts = tuple(base.Put(bench.key(f"k/{n:03}"), b"%d" % n) for n in range(205))
        gets = (base.Get(bench.key("k/204")), base.Get(bench.key("none")))
        otherwise = tuple(base.Get(bench.key(f"guard/{n}")) for n in range(120))
        outcome = await store.commit(base.Txn(compares, (*puts, *gets), otherwise))
        page = await store.range(bench.key("k/"), bench.key("k0"))
        assert outcome.succeeded is fits
        assert [kv.value for kv in page.kvs] == ([b"%d" % n for n in range(205)] if fits else [])
        assert {kv.mod_revision for kv in page.kvs} <= {outcome.revision}
        present = [kv.key if kv else None for kv in outcome.got]
        assert present == (
            [bench.key("k/204"), None] if fits else [None] * 104 + [bench.key("guard/104")] + [None] * 15
        )

    async def test_the_reply_is_the_truth_for_every_client(self, bench: Bench) -> None:
        one, other = bench.client(), bench.client()
        for n in range(20):
            revision = await put(one, (bench.key("a"), b"%d" % n))
            page = await other.range(bench.key("a"))
            assert page.kvs[0].value == b"%d" % n
            assert page.revision >= revision

    async def test_bytes_that_are_no_text_survive(self, bench: Bench, store: base.Store) -> None:
        keys = [bench.prefix + name for name in ("é", "\udcff\udc80", "𝄞", "a", "\ue000")]
        await put(store, *((key, key.encode("utf-8", "surrogateescape")) for key in keys))
        found = (await store.range(bench.prefix, bench.end)).kvs
        assert [kv.key for kv in found] == sorted(keys, key=base.to_bytes)
        assert all(base.to_bytes(kv.key) == kv.value for kv in found)


class TestRefusals:
    async def test_a_key_written_twice(self, bench: Bench, store: base.Store) -> None:
        key = bench.key("a")
        for ops in (
            (base.Put(key, b"1"), base.Put(key, b"2")),
            (base.Put(key, b"1"), base.Delete(key)),
            (base.Delete(bench.prefix, bench.end), base.Put(key, b"1")),
        ):
            with pytest.raises(errors.Rejected, match="duplicate"):
                await store.commit(base.Txn((), ops))
        assert await get(store, key) is None

    async def test_too_large(self, bench: Bench, store: base.Store) -> None:
        await put(store, (bench.key("fits"), b"x" * 1_400_000))
        with pytest.raises(errors.Rejected):
            await put(store, (bench.key("a"), b"x" * 800_000), (bench.key("b"), b"x" * 800_000))
        assert await get(store, bench.key("a")) is None

    async def test_too_many_operations(self, bench: Bench, store: base.Store) -> None:
        with pytest.raises(errors.Rejected):
            await put(store, *((bench.key(f"{n}"), b"") for n in range(limits.MAX_OPS**2)))
        with pytest.raises(errors.Rejected):
            await store.commit(base.Txn(tuple(base.absent(bench.key(f"{n}")) for n in range(limits.MAX_OPS + 1)), ()))

    async def test_as_many_operations_as_are_allowed(self, bench: Bench, store: base.Store) -> None:
        await put(store, *((bench.key(f"{n}"), b"") for n in range(64 * 64)))
        assert (await store.range(bench.prefix, bench.end, count_only=True)).total == 64 * 64

    async def test_an_empty_key(self, store: base.Store) -> None:
        with pytest.raises(errors.Rejected):
            await put(store, ("", b""))

    async def test_a_key_that_has_no_bytes(self, store: base.Store) -> None:
        """Half a surrogate pair, as JSON can carry it."""
        with pytest.raises(errors.Rejected):
            await put(store, ("/\ud800", b""))

    async def test_an_unknown_lease_writes_nothing(self, bench: Bench, store: base.Store) -> None:
        ops = (base.Put(bench.key("a"), b"1"), base.Put(bench.key("b"), b"1", 12345))
        with pytest.raises(errors.Rejected, match="lease"):
            await store.commit(base.Txn((), ops))
        assert await get(store, bench.key("a")) is None

    async def test_only_the_branch_that_runs_needs_its_leases(self, bench: Bench, store: base.Store) -> None:
        await put(store, (bench.key("a"), b"1"))
        txn = base.Txn(
            (base.absent(bench.key("a")),), (base.Put(bench.key("b"), b"", 12345),), (base.Get(bench.key("a")),)
        )
        outcome = await store.commit(txn)
        assert not outcome.succeeded
        assert outcome.got[0] is not None and outcome.got[0].value == b"1"

    async def test_a_revision_to_come(self, bench: Bench, store: base.Store) -> None:
        now = await put(store, (bench.key("a"), b""))
        with pytest.raises(errors.Rejected):
            await store.range(bench.key("a"), revision=now + 1000)
        with pytest.raises(errors.Rejected):
            await store.compact(now + 1000)


class TestOrigin:
    """Where a store is in its own life (safety S18): what a restore makes go back."""

    async def test_it_grows_with_every_write(self, bench: Bench, store: base.Store) -> None:
        before = await store.origin(0)
        revision = await put(store, (bench.key("a"), b"1"))
        after = await store.origin(revision)
        assert before.cluster == after.cluster != ""
        assert 0 < before.term <= after.term
        assert 0 < before.entries < after.entries
        assert permission.restored(before, after) == ""

    async def test_each_answer_tells_whose_it_is(self, bench: Bench, store: base.Store) -> None:
        origin = await store.origin(0)
        for page in (await store.range(bench.key("a")), await store.range(bench.prefix, bench.end)):
            assert (page.cluster, page.term) == (origin.cluster, origin.term)

    async def test_nobody_speaks_for_a_revision_to_come(self, bench: Bench, store: base.Store) -> None:
        revision = await put(store, (bench.key("a"), b"1"))
        with pytest.raises(errors.Unavailable):
            await store.origin(revision + 1000)


class TestRanges:
    async def test_pages_at_a_pinned_revision(self, bench: Bench, store: base.Store) -> None:
        pinned = await put(store, *((bench.key(f"{n:02}"), b"%d" % n) for n in range(25)))
        seen: list[bytes] = []
        start, more = bench.prefix, True
        while more:
            page = await store.range(start, bench.end, limit=10, revision=pinned)
            await put(store, (bench.key("99"), b"later"), (bench.key("00a"), b"later"))
            assert page.revision == pinned
            seen += [kv.value for kv in page.kvs]
            start, more = page.kvs[-1].key + "\0", page.more
        assert seen == [b"%d" % n for n in range(25)]

    async def test_a_range_of_any_size_comes_whole(self, bench: Bench, store: base.Store) -> None:
        for part in range(8):
            await put(store, *((bench.key(f"{part}/{n:04}"), b"x" * 2000) for n in range(400)))
        page = await store.range(bench.prefix, bench.end)
        assert (len(page.kvs), page.total, page.more) == (3200, 3200, False)
        assert [kv.key for kv in page.kvs] == sorted(kv.key for kv in page.kvs)

    async def test_only_keys_only_a_count(self, bench: Bench, store: base.Store) -> None:
        revision = await put(store, (bench.key("a"), b"1"), (bench.key("b"), b"2"))
        page = await store.range(bench.prefix, bench.end, keys_only=True)
        assert page.kvs == tuple(base.Kv(bench.key(name), b"", revision, revision) for name in "ab")
        assert (await store.range(bench.prefix, bench.end, count_only=True))[:4] == ((), revision, 2, False)

    async def test_the_oldest_first(self, bench: Bench, store: base.Store) -> None:
        for name in "cab":
            await put(store, (bench.key(name), b""))
        await put(store, (bench.key("c"), b"changed"))
        page = await store.range(bench.prefix, bench.end, oldest_first=True, limit=2)
        assert [kv.key for kv in page.kvs] == [bench.key("c"), bench.key("a")]
        assert (page.total, page.more) == (3, True)

    async def test_everything(self, bench: Bench, store: base.Store) -> None:
        await put(store, (bench.key("a"), b""))
        page = await store.range(base.EVERYTHING, base.EVERYTHING, keys_only=True)
        assert bench.key("a") in {kv.key for kv in page.kvs}

    async def test_a_serializable_read(self, bench: Bench, store: base.Store) -> None:
        await put(store, (bench.key("a"), b"1"))
        page = await store.range(bench.prefix, bench.end, serializable=True)
        assert [kv.value for kv in page.kvs] == [b"1"]

    async def test_the_past_until_it_is_compacted(self, bench: Bench, store: base.Store) -> None:
        first = await put(store, (bench.key("a"), b"1"))
        second = await put(store, (bench.key("a"), b"2"))
        await store.commit(base.Txn((), (base.Delete(bench.key("a")),)))
        assert [kv.value for kv in (await store.range(bench.key("a"), revision=first)).kvs] == [b"1"]
        await store.compact(second)
        await store.compact(second)
        assert [kv.value for kv in (await store.range(bench.key("a"), revision=second)).kvs] == [b"2"]
        with pytest.raises(errors.Compacted) as caught:
            await store.range(bench.key("a"), revision=first)
        assert caught.value.revision == second
        with pytest.raises(errors.Compacted):
            await store.range(bench.prefix, bench.end, revision=first)
        assert await get(store, bench.key("a")) is None


class TestWatches:
    async def test_from_the_past_into_the_present(self, bench: Bench, store: base.Store) -> None:
        a, b = bench.key("a"), bench.key("b")
        first = await put(store, (a, b"1"))
        second = await put(store, (b, b"1"), (a, b"2"))
        watch = store.watch(bench.prefix, bench.end, first)
        task = asyncio.create_task(gather_until(watch, lambda batches: len(batches) == 3))
        third = (await store.commit(base.Txn((), (base.Delete(a),)))).revision
        assert await task == [
            base.Batch(first, (base.Change(a, base.Kv(a, b"1", first, first)),)),
            base.Batch(
                second,
                (base.Change(b, base.Kv(b, b"1", second, second)), base.Change(a, base.Kv(a, b"2", first, second))),
            ),
            base.Batch(third, (base.Change(a, None),)),
        ]

    async def test_only_what_was_asked_for(self, bench: Bench, store: base.Store) -> None:
        first = await put(store, (bench.key("a"), b""), (bench.key("b"), b""))
        await put(store, (bench.key("other"), b""))
        last = await put(store, (bench.key("b"), b""))
        watch = store.watch(bench.key("b"), "", first)
        batches = await gather_until(watch, lambda batches: batches[-1].revision == last)
        assert [(batch.revision, [change.key for change in batch.changes]) for batch in batches] == [
            (first, [bench.key("b")]),
            (last, [bench.key("b")]),
        ]

    async def test_the_whole_key_space_shows_every_revision(self, bench: Bench, store: base.Store) -> None:
        """What the mirror stands on (safety S21): no revision is silent."""
        first = await put(store, (bench.key("0"), b""))
        last = [await put(store, (bench.key(f"{n}"), b"")) for n in range(50)][-1]
        watch = store.watch(base.EVERYTHING, base.EVERYTHING, first)
        batches = await gather_until(watch, lambda batches: batches[-1].revision >= last)
        assert [batch.revision for batch in batches] == list(range(first, last + 1))

    async def test_a_revision_to_come_is_waited_for(self, bench: Bench, store: base.Store) -> None:
        now = await put(store, (bench.key("a"), b"0"))
        watch = store.watch(bench.prefix, bench.end, now + 3)
        task = asyncio.create_task(gather_until(watch, lambda batches: True))
        for n in range(1, 4):
            await put(store, (bench.key("a"), b"%d" % n))
        (batch,) = await task
        assert (batch.revision, batch.changes[0].kv and batch.changes[0].kv.value) == (now + 3, b"3")

    async def test_large_revisions_come_whole_and_in_order(self, bench: Bench, store: base.Store) -> None:
        """A catch-up of 24 MB in revisions of 1.2 MB: etcd cuts fragments inside them (safety S20)."""
        first = await put(store, (bench.key("first"), b""))
        names = [bench.key(f"{n:03}") for n in range(120)]
        last = [await put(store, *((name, b"%05d" % n + b"x" * 10_000) for name in names)) for n in range(20)][-1]
        watch = store.watch(bench.prefix, bench.end, first)
        batches = await gather_until(watch, lambda batches: batches[-1].revision >= last)
        assert [batch.revision for batch in batches] == list(range(first, last + 1))
        assert all([change.key for change in batch.changes] == names for batch in batches[1:])
        numbers = [{change.kv.value[:5] for change in batch.changes if change.kv} for batch in batches[1:]]
        assert numbers == [{b"%05d" % n} for n in range(20)]

    async def test_many_watchers_see_the_same(self, bench: Bench, store: base.Store) -> None:
        first = await put(store, (bench.key("a"), b""))
        other = bench.client()

        def done(batches: list[base.Batch]) -> bool:
            return batches[-1].revision >= first + 100

        tasks = [
            asyncio.create_task(gather_until(client.watch(bench.prefix, bench.end, first), done))
            for client in (store, other, store)
        ]
        for n in range(100):
            await put(store, (bench.key("a"), b"%d" % n))
        seen = await asyncio.gather(*tasks)
        assert seen[0] == seen[1] == seen[2]
        assert [batch.revision for batch in seen[0]] == list(range(first, first + 101))

    async def test_a_start_that_was_compacted(self, bench: Bench, store: base.Store) -> None:
        first = await put(store, (bench.key("a"), b"1"))
        await put(store, (bench.key("a"), b"2"))
        last = await put(store, (bench.key("a"), b"3"))
        await store.compact(last)
        with pytest.raises(errors.Compacted) as caught:
            await gather_until(store.watch(bench.prefix, bench.end, first), lambda batches: True)
        assert caught.value.revision == last

    async def test_compaction_does_not_disturb_who_has_seen_all(self, bench: Bench, store: base.Store) -> None:
        first = await put(store, (bench.key("a"), b"0"))
        watch = store.watch(bench.prefix, bench.end, first)
        assert (await anext(watch)).revision == first
        now = await put(store, (bench.key("a"), b"1"))
        assert (await anext(watch)).revision == now
        await store.compact(now)
        last = await put(store, (bench.key("a"), b"2"))
        assert [batch.revision for batch in await gather_until(watch, lambda batches: True)] == [last]

    async def test_closing_the_store_ends_them(self, bench: Bench) -> None:
        store = bench.client()
        first = await put(store, (bench.key("a"), b""))
        watch = store.watch(bench.prefix, bench.end, first)
        await anext(watch)
        waiting = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0)
        await store.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        with pytest.raises(errors.Unavailable):
            await put(store, (bench.key("a"), b""))
        with pytest.raises(errors.Unavailable):
            await store.range(bench.key("a"))


class TestLeases:
    async def test_its_keys_end_with_it_in_one_revision(self, bench: Bench, store: base.Store) -> None:
        lease = await store.grant(2)
        first = await put(store, (bench.key("a"), b""), (bench.key("b"), b""), lease=lease.id)
        kv = await get(store, bench.key("a"))
        assert kv is not None and kv.lease == lease.id
        watch = store.watch(bench.prefix, bench.end, first + 1)
        (batch,) = await gather_until(watch, lambda batches: True)
        assert {change.key for change in batch.changes} == {bench.key("a"), bench.key("b")}
        assert all(change.kv is None for change in batch.changes)
        assert lease.lost, "the holder knows before anybody else can see it"
        with pytest.raises(errors.LeaseLost):
            await lease.keep_alive()

    async def test_kept_alive_it_outlives_its_time(self, bench: Bench, store: base.Store) -> None:
        kept, other = await store.grant(3), await store.grant(3)
        await put(store, (bench.key("kept"), b""), lease=kept.id)
        await put(store, (bench.key("other"), b""), lease=other.id)
        keeping = asyncio.create_task(kept.keep_alive())

        async def other_is_gone() -> bool:
            return await get(store, bench.key("other")) is None

        await eventually(other_is_gone)
        assert not kept.lost
        assert await get(store, bench.key("kept")) is not None
        keeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await keeping

    async def test_others_may_keep_it_alive(self, bench: Bench, store: base.Store) -> None:
        """As controllers do for agents (safety S8): many in one go, zero for one that is gone."""
        leases = [await store.grant(30) for _ in range(3)]
        gone = await store.grant(30)
        await gone.revoke()
        left_s = await bench.client().renew([*(lease.id for lease in leases), gone.id, leases[0].id])
        assert left_s == {**{lease.id: 30.0 for lease in leases}, gone.id: 0.0}
        assert await store.renew([]) == {}

    async def test_revoked_it_takes_its_keys_along(self, bench: Bench, store: base.Store) -> None:
        lease = await store.grant(30)
        await put(store, (bench.key("a"), b""), lease=lease.id)
        await lease.revoke()
        await lease.revoke()
        assert lease.lost
        assert await get(store, bench.key("a")) is None

    async def test_a_holder_learns_that_others_ended_it(self, bench: Bench, store: base.Store) -> None:
        lease = await store.grant(3)
        keeping = asyncio.create_task(lease.keep_alive())
        await put(store, (bench.key("a"), b""), lease=lease.id)
        await end_lease(bench, lease.id)
        with pytest.raises(errors.LeaseLost):
            async with asyncio.timeout(DEADLINE_S):
                await keeping
        assert lease.lost

    async def test_a_key_leaves_its_lease_with_the_next_write(self, bench: Bench, store: base.Store) -> None:
        lease = await store.grant(30)
        await put(store, (bench.key("a"), b""), (bench.key("b"), b""), lease=lease.id)
        await put(store, (bench.key("a"), b""))
        await lease.revoke()
        assert await get(store, bench.key("a")) is not None
        assert await get(store, bench.key("b")) is None

    async def test_closing_the_store_ends_the_keeping(self, bench: Bench) -> None:
        store = bench.client()
        lease = await store.grant(30)
        keeping = asyncio.create_task(lease.keep_alive())
        await bench.client().renew([lease.id])
        await store.close()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(DEADLINE_S):
                await keeping

    async def test_no_lease_without_time(self, store: base.Store) -> None:
        with pytest.raises(errors.Rejected):
            await store.grant(0)


async def end_lease(bench: Bench, id: int) -> None:
    """End somebody else's lease, as an operator might."""
    client = bench.client()
    if isinstance(client, memory.Memory | sea.Line):
        client.end_lease(id)
    elif isinstance(client, etcd.Etcd):
        await client.admin.end_lease(id)


class TestGroupCommit:
    """Safety S23, by what callers see."""

    async def test_a_crowd_of_strangers_all_succeed(self, bench: Bench, store: base.Store) -> None:
        keys = [bench.key(f"{n}") for n in range(500)]
        outcomes = await asyncio.gather(
            *(store.commit(base.Txn((base.absent(key),), (base.Put(key, b""),))) for key in keys)
        )
        assert all(outcome.succeeded for outcome in outcomes)
        mods = {kv.key: kv.mod_revision for kv in (await store.range(bench.prefix, bench.end)).kvs}
        assert [mods[key] for key in keys] == [outcome.revision for outcome in outcomes]

    async def test_of_many_who_want_one_key_one_gets_it(self, bench: Bench, store: base.Store) -> None:
        key = bench.key("a")
        outcomes = await asyncio.gather(
            *(store.commit(base.Txn((base.absent(key),), (base.Put(key, b"%d" % n),))) for n in range(50))
        )
        assert [outcome.succeeded for outcome in outcomes].count(True) == 1

    async def test_no_write_skew(self, bench: Bench, store: base.Store) -> None:
        """Each writes what the other compares: in one batch both would pass."""
        a, b = bench.key("a"), bench.key("b")
        for _ in range(20):
            await store.commit(base.Txn((), (base.Delete(bench.prefix, bench.end),)))
            one, other = await asyncio.gather(
                store.commit(base.Txn((base.absent(b),), (base.Put(a, b""),))),
                store.commit(base.Txn((base.absent(a),), (base.Put(b, b""),))),
            )
            assert [one.succeeded, other.succeeded] == [True, False]

    async def test_writes_to_one_key_keep_their_order(self, bench: Bench, store: base.Store) -> None:
        outcomes = await asyncio.gather(*(put(store, (bench.key(f"{n % 7}"), b"%d" % n)) for n in range(700)))
        assert all(outcomes[n] < outcomes[n + 7] for n in range(693))
        last = {kv.value for kv in (await store.range(bench.prefix, bench.end)).kvs}
        assert last == {b"%d" % n for n in range(693, 700)}

    async def test_only_the_guilty_one_fails(self, bench: Bench, store: base.Store) -> None:
        lost = await store.grant(30)
        await lost.revoke()
        results = await asyncio.gather(
            *(put(store, (bench.key(f"{n:02}"), b""), lease=lost.id if n == 31 else 0) for n in range(60)),
            return_exceptions=True,
        )
        assert [n for n, result in enumerate(results) if isinstance(result, BaseException)] == [31]
        assert isinstance(results[31], errors.Rejected)
        assert (await store.range(bench.prefix, bench.end, count_only=True)).total == 59

    async def test_who_gives_up_waiting_disturbs_nobody(self, bench: Bench, store: base.Store) -> None:
        tasks = [asyncio.create_task(put(store, (bench.key(f"{n:02}"), b""))) for n in range(50)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        present = {kv.key for kv in (await store.range(bench.prefix, bench.end)).kvs}
        assert {bench.key(f"{n:02}") for n in range(1, 50, 2)} <= present
        assert not any(isinstance(result, BaseException) for result in results[1::2])


class TestLikeness:
    """Memory is a model of etcd: one random program, the same answers to every step."""

    @pytest.mark.parametrize("seed", range(4))
    async def test_the_same_program_gives_the_same_answers(self, alone: etcd_server.Cluster, seed: int) -> None:
        real = world.System()
        prefix = f"/like-{real.token()}/"
        stores: tuple[base.Store, base.Store] = (
            memory.Memory(real),
            etcd.Etcd(alone.endpoints, world=real),
        )
        try:
            told = [await play(store, random.Random(seed), prefix) for store in stores]
        finally:
            for store in stores:
                await store.close()
        assert len(told[0]) > 300
        for step, (ours, theirs) in enumerate(zip(*told, strict=True)):
            assert ours == theirs, f"step {step}"


async def play(store: base.Store, chance: random.Random, prefix: str) -> list[object]:
    """Run a random program and tell what was seen, with revisions counted from its start."""
    origin = await put(store, (prefix + "origin", b""))
    end = base.prefix_end(prefix)
    seen: list[object] = []
    for _ in range(300):
        txn = random_txn(chance, prefix, origin)
        try:
            outcome = await store.commit(txn)
        except errors.Rejected:
            seen.append("rejected")
            continue
        got = tuple(relative(kv, origin) for kv in outcome.got)
        seen.append((outcome.succeeded, outcome.revision - origin, got))
        origin_page = await store.range(prefix, end, revision=chance.randint(origin, outcome.revision))
        seen.append([relative(kv, origin) for kv in origin_page.kvs])
    last = await put(store, (prefix + "end", b""))
    watch = store.watch(prefix, end, origin)
    for batch in await gather_until(watch, lambda batches: batches[-1].revision >= last):
        changes = [(change.key, relative(change.kv, origin)) for change in batch.changes]
        seen.append((batch.revision - origin, changes))
    return seen


def random_txn(chance: random.Random, prefix: str, origin: int) -> base.Txn:
    keys = [f"{prefix}{name}" for name in "abcdefgh"]

    def compare() -> base.Compare:
        revision = chance.choice([0, origin + chance.randint(1, 200)])
        made = (base.absent, base.same_life, base.unchanged, base.equals)[chance.randrange(4)]
        if made is base.absent:
            return base.absent(chance.choice(keys))
        if made is base.equals:
            return base.equals(chance.choice(keys), chance.choice([b"", b"1", b"2"]))
        return base.Compare(chance.choice(keys), chance.choice([base.Target.CREATE, base.Target.MOD]), revision)

    def op() -> base.Op:
        kind = chance.randrange(6)
        if kind < 3:
            return base.Put(chance.choice(keys), chance.choice([b"", b"1", b"2"]))
        if kind == 3:
            return base.Delete(chance.choice(keys))
        if kind == 4:
            start, end = sorted(chance.sample(keys, 2))
            return base.Delete(start, end)
        return base.Get(chance.choice(keys))

    return base.Txn(
        tuple(compare() for _ in range(chance.randrange(3))),
        tuple(op() for _ in range(chance.randrange(4))),
        tuple(op() for _ in range(chance.randrange(3))),
    )


def relative(kv: base.Kv | None, origin: int) -> object:
    return kv and kv._replace(create_revision=kv.create_revision - origin, mod_revision=kv.mod_revision - origin)
