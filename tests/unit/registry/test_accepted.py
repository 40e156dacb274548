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
        for number, entry in enumerate(entries, len(self.logs.entries)):
            await self.store.commit(base.Txn((), (base.Put(elected.accepted_key(LOG, number), entry),)))
            if linked:
                self.logs.entries.append(entry)

    async def prune(self, told: Mapping[str, peers.Inventory], urls: Sequence[str] = (YOU, THEY)) -> list[int]:
        """The numbers that are kept then."""
        await self.accepted.prune(told, urls, self.reign)
        page = await self.store.range(elected.ACCEPTED, base.prefix_end(elected.ACCEPTED))
        return [elected.parse_accepted(kv.key)[1] for kv in page.kvs]


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
