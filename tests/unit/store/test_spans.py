"""Leases that many keys share: how many are asked for, and what those hear who wait for one."""

import asyncio

import pytest

from covey import errors, world
from covey.store import base, memory, spans


class Clock(world.System):
    def __init__(self) -> None:
        self.ns = 0

    def boot_ns(self) -> int:
        return self.ns


class Counting(memory.Memory):
    """Grants when it is let, and fails when it is told to."""

    def __init__(self, clock: world.World) -> None:
        super().__init__(clock)
        self.asked: list[int] = []
        self.gate = asyncio.Event()
        self.fault: errors.StoreError | None = None

    async def grant(self, ttl_s: int) -> memory.Lease:
        self.asked.append(ttl_s)
        await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        return await super().grant(ttl_s)


PUTS = (base.Put("a", b"", spans.DAY), base.Put("b", b"", spans.WEEK), base.Put("c", b""))


def leases(ops: tuple[base.Op, ...]) -> list[int]:
    return [op.lease for op in ops if isinstance(op, base.Put)]


async def test_a_crowd_shares_one_lease_for_an_hour() -> None:
    clock = Clock()
    store = Counting(clock)
    shared = spans.Spans(store, clock)
    crowd = [asyncio.create_task(shared.lease_out(PUTS)) for _ in range(50)]
    store.gate.set()
    first, *others = [leases(ops) for ops in await asyncio.gather(*crowd)]
    assert sorted(store.asked) == [25 * 3600, (7 * 24 + 1) * 3600]
    assert first[0] > 0 < first[1] and first[0] != first[1] and first[2] == 0
    assert all(other == first for other in others)
    clock.ns = 3600 * 10**9
    assert leases(await shared.lease_out(PUTS)) == first
    clock.ns += 1
    assert leases(await shared.lease_out(PUTS)) != first and len(store.asked) == 4
    shared.forget()
    await shared.lease_out(PUTS[:1])
    assert len(store.asked) == 5


async def test_a_grant_that_fails_is_told_to_each_and_tried_again_by_the_next() -> None:
    clock = Clock()
    store = Counting(clock)
    store.fault = errors.Unavailable("no quorum")
    shared = spans.Spans(store, clock)
    crowd = [asyncio.create_task(shared.lease_out(PUTS[:1])) for _ in range(3)]
    store.gate.set()
    told = await asyncio.gather(*crowd, return_exceptions=True)
    assert [str(error) for error in told] == ["no quorum"] * 3 and len(set(map(id, told))) == 3
    store.fault = None
    assert leases(await shared.lease_out(PUTS[:1]))[0] > 0
    assert len(store.asked) == 2


async def test_who_gives_up_takes_nobody_along() -> None:
    clock = Clock()
    store = Counting(clock)
    shared = spans.Spans(store, clock)
    hasty, patient = (asyncio.create_task(shared.lease_out(PUTS[:1])) for _ in range(2))
    await asyncio.sleep(0)
    hasty.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hasty
    store.gate.set()
    assert leases(await patient)[0] > 0 and len(store.asked) == 1


async def test_nothing_is_left_when_it_is_closed() -> None:
    clock = Clock()
    store = Counting(clock)
    shared = spans.Spans(store, clock)
    waiting = asyncio.create_task(shared.lease_out(PUTS[:1]))
    await asyncio.sleep(0.01)
    await shared.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting
