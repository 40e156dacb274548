"""Parked polls are woken by what concerns them; what concerns all wakes a slice at a time (safety S8, S25)."""

import asyncio
import contextlib
import itertools

from covey import model
from covey.controller import parking
from tests.unit.controller import cloud

MANY = 10 * parking.SLICE
LONG_S = 60.0


class Polls:
    """Parked polls of nodes 0, 1, 2 …, and which of them were woken."""

    def __init__(self, count: int) -> None:
        self.place = parking.Parking()
        self.woken: list[int] = []
        self.gave_way: list[int] = []
        self._tasks = [self.park(number) for number in range(count)]

    def park(self, number: int, limit_s: float = LONG_S) -> "asyncio.Task[None]":
        return asyncio.create_task(self._poll(number, limit_s))

    async def _poll(self, number: int, limit_s: float) -> None:
        with self.place.spot(model.NodeId(str(number))) as spot:
            await spot.wait(limit_s)
            (self.gave_way if spot.gives_way else self.woken).append(number)

    async def __aenter__(self) -> "Polls":
        await cloud.until(lambda: len(self.place) == len(self._tasks))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.place.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def test_a_change_wakes_the_polls_it_concerns_at_once_and_no_other() -> None:
    async with Polls(MANY) as polls:
        polls.place.changed({"3", "7", "nobody"})
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert sorted(polls.woken) == [3, 7]
        assert len(polls.place) == MANY - 2


async def test_what_concerns_all_wakes_a_slice_at_a_time() -> None:
    async with Polls(MANY) as polls:
        polls.place.changed({str(number) for number in range(MANY)})
        turns = [0]
        while len(polls.woken) < MANY:
            await asyncio.sleep(0)  # one turn of the loop
            if len(polls.woken) != turns[-1]:
                turns.append(len(polls.woken))
        steps = [later - earlier for earlier, later in itertools.pairwise(turns)]
        assert max(steps) <= parking.SLICE
        assert len(steps) >= MANY // parking.SLICE


async def test_a_single_change_does_not_wait_behind_all_the_others() -> None:
    async with Polls(MANY) as polls:
        polls.place.alarm(True)
        last = MANY - 1
        polls.place.changed({str(last)})
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert last in polls.woken
        assert len(polls.woken) < MANY // 2


async def test_the_alarm_wakes_every_poll_once() -> None:
    async with Polls(MANY) as polls:
        polls.place.alarm(True)
        await cloud.until(lambda: len(polls.woken) == MANY)
        assert sorted(polls.woken) == list(range(MANY))
        assert len(polls.place) == 0
        polls.place.alarm(False)
        assert not polls.place.alarmed


async def test_a_newer_poll_of_the_same_node_takes_the_oldest_ones_place() -> None:
    async with Polls(1) as polls:
        more = [polls.park(0) for _ in range(parking.SPOTS)]
        await cloud.until(lambda: polls.gave_way == [0])
        assert len(polls.place) == parking.SPOTS
        assert polls.woken == []
        for task in more:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*more)


async def test_time_is_up_for_a_poll_that_nobody_wakes() -> None:
    async with Polls(0) as polls:
        await polls.park(0, limit_s=0.01)
        assert polls.woken == [0]
        assert len(polls.place) == 0
