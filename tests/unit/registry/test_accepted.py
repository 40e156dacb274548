"""What etcd keeps of accepted entries, and for how long (safety S34)."""

import asyncio
from collections.abc import Mapping, Sequence

import msgspec
import pytest

from covey.registry import accepted, elected, heads, peers
from covey.store import base, memory
from tests.support import virtual

ME, YOU, THEY = "http://me", "http://you", "http://they"
LOG = "templates/one"


class World:
    def boot_ns(self) -> int:
        return int(asyncio.get_running_loop().time() * 1e9)


class Logs:
    """One server's log, and its fold."""

    def __init__(self) -> None:
        self.entries: list[bytes] = []

    async def fold(self, log: str) -> heads.Fold:
        found = heads.Fold(1)
        found.add(self.entries)
        return found

    async def look(self) -> None:
        return

    def all(self) -> dict[str, peers.Head]:
        return self.told(len(self.entries)).heads

    async def read(self, positions: Mapping[str, int]) -> dict[str, list[bytes]]:
        return {name: self.entries[number:] for name, number in positions.items()}

    async def append(self, log: str, number: int, entry: bytes) -> bool:
        assert number == len(self.entries)
        self.entries.append(entry)
        return True

    def told(self, count: int) -> peers.Inventory:
        """The word of a server that has the first of them."""
        fold = heads.Fold(1)
        fold.add(self.entries[:count])
        return peers.Inventory(term=1, holder=ME, heads={LOG: fold.head})


class Holder:
    def __init__(self, bounds: accepted.Bounds) -> None:
        self.store = memory.Memory(World())  # type: ignore[arg-type]
        self.logs = Logs()
        self.accepted = accepted.Accepted(self.store, self.logs, self.logs, bounds)  # type: ignore[arg-type]
        self.reign = 0

    async def take(self) -> None:
        reign = msgspec.json.encode(elected.Reign(holder=ME, term=1, id="1"))
        await self.store.commit(base.Txn((), (base.Delete(elected.ROLE_KEY),)))
        await self.store.commit(base.Txn((), (base.Put(elected.ROLE_KEY, reign),)))
        self.reign = (await self.store.range(elected.ROLE_KEY)).kvs[0].create_revision

    async def accept(self, *entries: bytes, linked: bool = True) -> None:
        fold = await self.logs.fold(LOG)
        for number, entry in enumerate(entries, len(self.logs.entries)):
            fold.add([entry])
            await self.store.commit(
                base.Txn(
                    (),
                    (
                        base.Put(elected.accepted_key(LOG, number), entry),
                        base.Put(elected.head_key(LOG), str(number + 1).encode()),
                        base.Put(elected.chain_key(LOG), fold.chain(number + 1).encode()),
                    ),
                )
            )
            if linked:
                self.logs.entries.append(entry)

    async def stand(self) -> accepted.Stand:
        return (await self.accepted.stands())[LOG]

    async def contains(self) -> bool:
        """Whether this server has everything that was accepted."""
        return accepted.contains(await self.logs.fold(LOG), await self.stand())

    async def kept(self) -> list[int]:
        """The numbers of the entries that etcd keeps."""
        page = await self.store.range(elected.ACCEPTED, base.prefix_end(elected.ACCEPTED))
        return [elected.parse_accepted(kv.key)[1] for kv in page.kvs]

    async def prune(self, told: Mapping[str, peers.Inventory], urls: Sequence[str] = (YOU, THEY)) -> list[int]:
        """The numbers that are kept then."""
        await self.accepted.prune(told, urls, self.reign)
        return await self.kept()


FEW = accepted.Bounds(3, 1 << 20)


def holder(bounds: accepted.Bounds = FEW) -> Holder:
    return Holder(bounds)


def test_what_all_have_goes_and_what_one_lacks_stays() -> None:
    async def story() -> None:
        one = holder()
        await one.take()
        await one.accept(b"0", b"1", b"2")
        assert await one.prune({YOU: one.logs.told(3), THEY: one.logs.told(1)}) == [1, 2]
        assert one.accepted.kept == accepted.Kept(entries=2, size_bytes=2, waits_for=(THEY,))
        assert await one.prune({YOU: one.logs.told(3)}) == [1, 2]
        assert one.accepted.kept.waits_for == (THEY,)
        assert await one.prune({YOU: one.logs.told(3), THEY: one.logs.told(3)}) == []
        assert one.accepted.kept == accepted.Kept()

    virtual.run(story())


def test_a_server_that_is_away_does_not_fill_etcd() -> None:
    """Of what it lacks the newest is kept; the rest goes when a second server has it."""

    async def story() -> None:
        one = holder()
        await one.take()
        await one.accept(*(b"%d" % number for number in range(8)))
        assert await one.prune({YOU: one.logs.told(4)}) == [4, 5, 6, 7]  # 4 is beyond the bound, and here alone
        assert await one.prune({YOU: one.logs.told(8)}) == [5, 6, 7]
        assert one.accepted.kept == accepted.Kept(entries=3, size_bytes=3, waits_for=(THEY,), dropped=5)

    virtual.run(story())


def test_nothing_fills_etcd_when_all_others_are_away() -> None:
    async def story() -> None:
        one = holder()
        await one.take()
        await one.accept(*(b"%d" % number for number in range(20)))
        assert await one.prune({}) == list(range(20 - 3 * accepted.HARD, 20))
        large = holder(accepted.Bounds(1000, 100))
        await large.take()
        await large.accept(*(bytes(30) for _ in range(20)))
        assert await large.prune({}, [YOU]) == list(range(20 - 400 // 30, 20))

    virtual.run(story())


@pytest.mark.parametrize("away", [{}, {YOU: 20}])
def test_what_is_not_here_is_never_taken_away(away: dict[str, int]) -> None:
    """Its process may have died before it was linked: it is entered first."""

    async def story() -> None:
        one = holder()
        await one.take()
        await one.accept(*(b"%d" % number for number in range(20)), linked=False)
        assert await one.prune({url: one.logs.told(count) for url, count in away.items()}) == list(range(20))
        await one.accepted.complete()
        assert one.logs.entries == [b"%d" % number for number in range(20)]

    virtual.run(story())


def test_who_holds_the_role_no_more_takes_nothing_away() -> None:
    async def story() -> None:
        one = holder()
        await one.take()
        await one.accept(b"0")
        before = one.reign
        await one.take()
        one.reign = before
        assert await one.prune({YOU: one.logs.told(1), THEY: one.logs.told(1)}) == [0]

    virtual.run(story())


# ---- what was given up by force ------------------------------------------------------------------------------------


def returned(one: Holder, *entries: bytes) -> Holder:
    """Another server on the same store, with other entries."""
    other = Holder(FEW)
    other.store = one.store
    other.logs.entries = list(entries)
    other.accepted = accepted.Accepted(one.store, other.logs, other.logs, FEW)  # type: ignore[arg-type]
    return other


def test_a_log_of_given_up_entries_is_not_what_was_accepted_however_long_it_is() -> None:
    async def story() -> None:
        one = holder()
        await one.take()
        await one.accept(b"0", b"1", b"2")
        one.logs.entries = [b"0"]  # this server has the first of them alone, and etcd none
        await one.store.commit(base.Txn((), (base.Delete(elected.accepted_key(LOG, 0), elected.accepted_key(LOG, 9)),)))
        assert not await one.contains()
        await one.accepted.give_up(one.reign)
        assert await one.contains()
        assert (await one.stand()).count == 1
        old = returned(one, b"0", b"1", b"2")
        assert await old.contains()  # nothing was accepted in place of what it has more
        await one.accept(b"new 1")
        assert not await old.contains()
        await one.accept(b"new 2", b"new 3")
        old.logs.entries = [b"0", b"1", b"2"]
        await old.accepted.complete()  # the next that it lacks by number is the last of the new ones
        assert old.logs.entries == [b"0", b"1", b"2"]
        assert not await old.contains()
        follower = returned(one, b"0")
        await follower.accepted.complete()
        assert follower.logs.entries == one.logs.entries
        assert await follower.contains()

    virtual.run(story())


def test_who_is_made_the_holder_by_force_gives_up_what_stands_in_place_of_its_own() -> None:
    async def story() -> None:
        one = holder()
        await one.take()
        await one.accept(b"0", b"1", b"2", b"3")
        old = returned(one, b"0", b"1", b"other 2", b"other 3", b"other 4")
        await old.take()
        assert not await old.contains()
        await old.accepted.give_up(old.reign)
        assert await old.contains()
        assert (await old.stand()).count == 5
        assert await old.kept() == [0, 1]
        assert not await one.contains()

    virtual.run(story())


def test_a_new_reign_records_how_its_logs_stand() -> None:
    """Those that etcd has never heard of, or knows by their count alone, or less of than there is (safety S34)."""

    async def story() -> None:
        one = holder()
        await one.take()
        one.logs.entries = [b"0", b"1"]
        assert await one.accepted.record(one.reign)
        lacks = returned(one, b"0")
        assert not await lacks.contains()
        backup = one.store.backup()
        await one.accept(b"2")
        one.store.restore(backup)
        assert (await one.stand()).count == 2
        assert await one.accepted.record(one.reign)
        assert (await one.stand()).count == 3
        await one.store.commit(base.Txn((), (base.Put(elected.head_key(LOG), b"3"),)))
        other = returned(one, b"0", b"1", b"another")
        assert await other.contains()  # an older Covey wrote the head, and no chain
        assert await one.accepted.record(one.reign)
        assert not await other.contains()
        before = one.reign
        await one.take()
        one.logs.entries.append(b"3")
        assert not await one.accepted.record(before)
        assert (await one.stand()).count == 3

    virtual.run(story())
