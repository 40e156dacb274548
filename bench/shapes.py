"""Load shapes of bench/starts: each runs whole life-cycles, POST → Started → DELETE → gone, and notes what they took.

isolated       random arrivals, a few a second: each finds the cloud idle
back to back   the next begins when the last is gone
steady         random arrivals at a fixed rate; each instance lives for a second
burst          all POSTs at once; when all are Started, all DELETEs at once
flat out       so many life-cycles are under way all the time
full fleet     no slot is free and more instances wait: what ends now and then makes room for the next
"""

import asyncio
import random
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from bench import load

_LIFE_S = 1.0
_AT_ONCE = 64  # starts of those that stay, and their ends
_AFTER_FAILURE_S = 0.1


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result. `rate` is of whole life-cycles a second; times are from POST to Started unless said."""

    shape: str
    lives: int
    rate: float
    p50_ms: float
    p95_ms: float
    worst_ms: float
    failed: int = 0
    of: str = "POST → Started"
    cpu_ms: dict[str, float] = field(default_factory=dict)  # of each kind of process, per life-cycle
    etcd: dict[str, float] = field(default_factory=dict)  # raft proposals and calls of each kind, per life-cycle

    @property
    def total_ms(self) -> float:
        return sum(self.cpu_ms.values())


@dataclass(slots=True)
class Lives:
    """Runs life-cycles and notes what they took."""

    api: load.Api
    watcher: load.Watcher
    times_s: list[float] = field(default_factory=list)
    whole: int = 0
    failed: int = 0

    async def live(self, hold_s: float = 0.0, between: Callable[[], Awaitable[object]] | None = None) -> None:
        """One whole life-cycle, held for a while once it is Started."""
        begun = time.perf_counter()
        try:
            id = await self.api.start()
            started = await self.watcher.until(id, "Started")
            self.times_s.append(started.at - begun)
            if hold_s:
                await asyncio.sleep(hold_s)
            if between is not None:
                await between()
            await self.api.terminate(id)
            await self.watcher.until(id, load.GONE)
            self.whole += 1
        except (TimeoutError, load.Refused, OSError):
            self.failed += 1
            await asyncio.sleep(_AFTER_FAILURE_S)

    def row(self, shape: str, took_s: float, of: str = "POST → Started") -> Row:
        times = sorted(self.times_s) or [0.0]
        cuts = statistics.quantiles(times, n=20, method="inclusive") if len(times) > 1 else times * 19
        p50, p95, worst = (value * 1000 for value in (cuts[9], cuts[18], times[-1]))
        return Row(shape, self.whole, self.whole / took_s, p50, p95, worst, self.failed, of)


async def isolated(lives: Lives, count: int, mean_gap_s: float, seed: int = 1) -> Row:
    return await _arrivals(lives, "isolated", count, mean_gap_s, 0.0, seed)


async def steady(lives: Lives, rate: float, seconds: float, seed: int = 2) -> Row:
    return await _arrivals(lives, f"steady, {rate:g}/s", max(int(rate * seconds), 1), 1 / rate, _LIFE_S, seed)


async def _arrivals(lives: Lives, shape: str, count: int, mean_gap_s: float, hold_s: float, seed: int) -> Row:
    chance = random.Random(seed)
    begun = at = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            at += chance.expovariate(1 / mean_gap_s)
            await asyncio.sleep(at - time.perf_counter())
            group.create_task(lives.live(hold_s))
    return lives.row(shape, time.perf_counter() - begun)


async def back_to_back(lives: Lives, count: int) -> Row:
    begun = time.perf_counter()
    for _ in range(count):
        await lives.live()
    return lives.row("back to back", time.perf_counter() - begun)


async def burst(lives: Lives, count: int) -> Row:
    """Nobody is terminated before everybody is Started, or has failed."""
    left = asyncio.Barrier(count)
    begun = time.perf_counter()

    async def one() -> None:
        met = False

        async def meet() -> None:
            nonlocal met
            met = True
            await left.wait()

        await lives.live(between=meet)
        if not met:
            await left.wait()

    await asyncio.gather(*(one() for _ in range(count)))
    return lives.row(f"burst of {count}", time.perf_counter() - begun)


async def flat_out(lives: Lives, flights: int, seconds: float, shape: str = "flat out") -> Row:
    """The rate is of the life-cycles that ended within the time."""
    begun = time.perf_counter()
    end = begun + seconds

    async def fly() -> None:
        while time.perf_counter() < end:
            await lives.live()

    flying = [asyncio.create_task(fly()) for _ in range(flights)]
    await asyncio.sleep(seconds)
    row = lives.row(f"{shape}, {flights} at once", time.perf_counter() - begun)
    await asyncio.gather(*flying)
    return row


async def fill(lives: Lives, count: int) -> list[str]:
    """So many instances that stay."""
    ids: list[str] = []

    async def some(share: int) -> None:
        for _ in range(share):
            id = await lives.api.start()
            await lives.watcher.until(id, "Started")
            ids.append(id)

    shares = [count // _AT_ONCE + (index < count % _AT_ONCE) for index in range(_AT_ONCE)]
    await asyncio.gather(*(some(share) for share in shares))
    return ids


async def empty(lives: Lives, ids: list[str]) -> None:
    """End those that stayed."""

    async def some(share: list[str]) -> None:
        for id in share:
            await lives.api.terminate(id)
            await lives.watcher.until(id, load.GONE)

    await asyncio.gather(*(some(ids[first::_AT_ONCE]) for first in range(_AT_ONCE)))


async def full_fleet(lives: Lives, standing: list[str], ends: int, rate: float, seed: int = 3) -> Row:
    """`standing` fill the fleet, and as many wait as are going to end. Times are from the moment at which a slot is
    free (its node has said that nothing is left of what was there) until the next instance runs on that node."""
    chance = random.Random(seed)
    api, watcher = lives.api, lives.watcher
    waiting = await asyncio.gather(*(api.start() for _ in range(ends)))
    watcher.events.clear()
    watcher.keeps = True
    begun = time.perf_counter()

    async def end(id: str) -> None:
        await api.terminate(id)
        await watcher.until(id, load.GONE)

    async with asyncio.TaskGroup() as group:
        for id in chance.sample(standing, ends):
            await asyncio.sleep(chance.expovariate(rate))
            group.create_task(end(id))
    await asyncio.gather(*(watcher.until(id, "Started") for id in waiting))
    took_s = time.perf_counter() - begun
    watcher.keeps = False
    free: dict[str, deque[float]] = defaultdict(deque)
    for _, event in watcher.events:
        if event.state == load.GONE:
            free[event.node].append(event.at)
        elif event.state == "Started" and free[event.node]:
            lives.times_s.append(event.at - free[event.node].popleft())
    lives.whole, lives.failed = len(lives.times_s), ends - len(lives.times_s)
    return lives.row(f"full fleet, {rate:g} ends/s", took_s, "slot free → next runs")
