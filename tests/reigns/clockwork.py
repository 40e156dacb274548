"""An event loop whose time jumps to the next timer, and on which *processes* run that can be frozen and killed.

Every task belongs to the process that it was started in (a context variable), and so does every callback. While a
process is frozen its callbacks are kept, timers too, and run when it thaws: what it believed to be the present then is
the past, exactly as after SIGSTOP and SIGCONT. Those of a killed one are kept for good.
"""

import asyncio
import contextlib
import contextvars
import selectors
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class Process:
    """One life of a program."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.frozen = False
        self.dead = False
        self._kept: list[tuple[Callable[..., object], tuple[Any, ...], asyncio.Handle]] = []

    def stands_still(self) -> bool:
        return self.frozen or self.dead

    def keep(self, callback: Callable[..., object], args: tuple[Any, ...], handle: asyncio.Handle) -> None:
        self._kept.append((callback, args, handle))

    def thaw(self) -> None:
        """Go on with everything that came due meanwhile."""
        self.frozen = False
        kept, self._kept = self._kept, []
        for callback, args, handle in kept:
            with self.running():
                asyncio.get_running_loop().call_soon(_late, callback, args, handle, context=_context(handle))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """What is started in here belongs to it."""
        mark = PRESENT.set(self)
        try:
            yield
        finally:
            PRESENT.reset(mark)

    def start(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        with self.running():
            return asyncio.get_running_loop().create_task(work)


PRESENT: contextvars.ContextVar[Process | None] = contextvars.ContextVar("PRESENT", default=None)


class _Selector(selectors.SelectSelector):
    now_s = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "nothing is due and nobody is ready"
        self.now_s += max(timeout, 0.0)
        return []


class Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.clock = _Selector()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now_s

    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.Handle:
        process = _of(context)
        if process is None:
            return super().call_soon(callback, *args, context=context)
        cell: list[asyncio.Handle] = []
        cell.append(super().call_soon(_run, process, callback, args, cell, context=context))
        return cell[0]

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        process = _of(context)
        if process is None:
            return super().call_at(when, callback, *args, context=context)
        cell: list[asyncio.Handle] = []
        handle = super().call_at(when, _run, process, callback, args, cell, context=context)
        cell.append(handle)
        return handle


def _of(context: contextvars.Context | None) -> Process | None:
    return PRESENT.get() if context is None else context.get(PRESENT)


def _context(handle: asyncio.Handle) -> contextvars.Context:
    found: contextvars.Context = handle._context  # type: ignore[attr-defined]
    return found


def _late(callback: Callable[..., object], args: tuple[Any, ...], handle: asyncio.Handle) -> None:
    if not handle.cancelled():
        callback(*args)


def _run(process: Process, callback: Any, args: tuple[Any, ...], cell: list[asyncio.Handle]) -> None:
    if process.stands_still():
        process.keep(callback, args, cell[0])
    else:
        callback(*args)


def run(main: Coroutine[Any, Any, T], processes: list[Process]) -> T:
    """Like asyncio.run. `processes`: all that there were; what is left of them ends with the loop."""
    loop = Loop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(main)
    finally:
        loop.run_until_complete(_end(processes))
        asyncio.set_event_loop(None)
        loop.close()


async def _end(processes: list[Process]) -> None:
    me = asyncio.current_task()
    for process in processes:
        process.dead = False
        process.thaw()
    while left := [task for task in asyncio.all_tasks() if task is not me]:
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
