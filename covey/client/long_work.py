"""Long work in a worker thread that ends soon after its caller was cancelled, and never outlives it.

An abandoned thread would go on writing to files that the next try works on, and would keep a program from ending.
"""

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

Moved = Callable[[int], None]  # to be called every now and then with what is done so far; raises Stopped


class Stopped(Exception):
    """Nobody waits for this work any more."""


async def run(work: Callable[[Moved], T], progress: Moved | None = None) -> T:
    """What `work` returns. It is given a function to call as it goes on."""
    stop = threading.Event()

    def moved(done: int) -> None:
        if stop.is_set():
            raise Stopped
        if progress is not None:
            progress(done)

    working = asyncio.ensure_future(asyncio.to_thread(work, moved))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.gather(working, return_exceptions=True)
        raise
