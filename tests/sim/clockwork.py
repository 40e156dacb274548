"""Virtual time and seeded chance: hours pass in seconds, and one seed gives one story.

The event loop never sleeps: when nothing is ready its clock jumps to the next timer. There are no threads, no sockets
and no other process in a simulation, so nothing outside can change the order of things.
"""

import asyncio
import random
import selectors
import uuid
from collections.abc import Coroutine
from typing import Any

_WALL_NS = 1_700_000_000_000_000_000


class Stuck(Exception):
    """Everybody waits for somebody: a deadlock."""


class _Selector(selectors.SelectSelector):
    """Where a real loop would sleep, time jumps."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Stuck("nothing is due and nobody is ready")
        self.now_s += max(timeout, 0.0)
        return []


class Loop(asyncio.SelectorEventLoop):
    """An event loop in virtual time."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s


class World:
    """Clock and chance of one simulation; a `covey.world.World`."""

    def __init__(self, loop: Loop, seed: int) -> None:
        self._loop = loop
        self.chance = random.Random(seed)

    def boot_ns(self) -> int:
        return int(self._loop.time() * 1e9)

    def wall_ns(self) -> int:
        return _WALL_NS + self.boot_ns()

    def token(self) -> str:
        return f"{self.chance.getrandbits(64):016x}"

    def secret(self) -> str:
        return f"{self.chance.getrandbits(256):064x}"

    def uuid(self) -> str:
        return str(uuid.UUID(int=self.chance.getrandbits(128), version=4))


def run(seed: int, story: "Story") -> Any:
    """Live through one story to its end."""
    loop = Loop()
    try:
        return loop.run_until_complete(story(World(loop, seed)))
    finally:
        while left := asyncio.all_tasks(loop):  # some begin when others end
            loop.run_until_complete(_end(left))
        loop.close()


async def _end(tasks: "set[asyncio.Task[Any]]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Story:
    """What `run` lives through."""

    def __call__(self, world: World) -> Coroutine[Any, Any, Any]:
        raise NotImplementedError
