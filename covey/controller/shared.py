"""One question for all who ask it at the same moment, without ever serving an answer that is older than the asker.

Whoever arrives before the question is sent shares it; whoever arrives after that waits for the next one, which is sent
when the present one is answered. So a burst costs two questions, and no answer rests on a view from before the request
(safety S14, S21). Nothing is cached.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Shared(Generic[K, V]):
    """`ask` puts the question of one key; it must end by a time limit of its own."""

    def __init__(self, ask: Callable[[K], Awaitable[V]]) -> None:
        self._ask = ask
        self._gathering: dict[K, asyncio.Task[V]] = {}
        self._asking: dict[K, asyncio.Task[V]] = {}

    async def get(self, key: K) -> V:
        task = self._gathering.get(key)
        if task is None:
            task = self._gathering[key] = asyncio.create_task(self._run(key))
            task.add_done_callback(_look_at)
        return await asyncio.shield(task)

    async def close(self) -> None:
        tasks = [*self._gathering.values(), *self._asking.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, key: K) -> V:
        before = self._asking.get(key)
        if before is None:
            await asyncio.sleep(0)  # who arrived in this turn of the loop is in
        else:
            await asyncio.wait({before})
        mine = self._asking[key] = self._gathering.pop(key)
        try:
            return await self._ask(key)
        finally:
            if self._asking.get(key) is mine:
                del self._asking[key]


def _look_at(task: "asyncio.Task[V]") -> None:
    """Every waiter may have gone: an exception is then nobody's."""
    if not task.cancelled():
        task.exception()
