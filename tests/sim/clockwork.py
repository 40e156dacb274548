"""Virtual time, seeded chance, and processes that die and freeze: hours pass in seconds, one seed gives one story.

The event loop never sleeps: when nothing is ready its clock jumps to the next timer. There are no threads, no sockets
and no other process in a simulation, so nothing outside can change the order of things.

    Process   everything that was begun in it, tasks, timers and callbacks, is of it (a context variable says so)
      kill    as kill -9: nothing of it runs ever again, not even a `finally`
      freeze  as SIGSTOP: nothing of it runs while the world goes on; `thaw` lets it run what was due meanwhile
    outside   what has left a process (a request on its way) belongs to the world: it goes on when the sender is gone
"""

import asyncio
import contextvars
import heapq
import itertools
import random
import selectors
import uuid
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_WALL_NS = 1_700_000_000_000_000_000
_graveyard: "list[asyncio.Task[Any]]" = []  # garbage collection would close them, and a dead process runs no `finally`
_process: "contextvars.ContextVar[Process | None]" = contextvars.ContextVar("process", default=None)


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


class _Handle(asyncio.Handle):
    """A callback of a process: not run when that is dead, kept when it is frozen."""

    __slots__ = ()

    def _run(self) -> None:
        owner = self._context.get(_process)  # type: ignore[attr-defined]
        if owner is None or owner.takes(self):
            super()._run()


class _Timer(_Handle, asyncio.TimerHandle):
    __slots__ = ()


class Task(asyncio.Task[T]):
    """Hashed by number, so that the order of sets of tasks follows from the seed and not from where they lie."""

    numbers = itertools.count()

    def __init__(self, body: Coroutine[Any, Any, T], **more: Any) -> None:
        self._number = next(Task.numbers)
        super().__init__(body, **more)
        self.owner: Process | None = (more.get("context") or contextvars.copy_context()).get(_process)

    def __hash__(self) -> int:
        return self._number


class _Future(asyncio.Future[Any]):
    def __init__(self, *, loop: asyncio.AbstractEventLoop) -> None:
        self._number = next(Task.numbers)
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self._number


class Loop(asyncio.SelectorEventLoop):
    """An event loop in virtual time."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)
        self.set_exception_handler(lambda _loop, _context: None)  # faults are judged where they are awaited

    def time(self) -> float:
        return self._clock.now_s

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        """Beside the story it would run in real time, and no two runs of a seed would be the same."""
        raise AssertionError(f"{func} wants a thread")

    def create_task(self, coro: Any, *, name: object = None, context: Any = None) -> Any:
        return Task(coro, loop=self, name=name, context=context)

    def create_future(self) -> Any:
        return _Future(loop=self)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        timer = _Timer(when, callback, args, self, context)
        heapq.heappush(self._scheduled, timer)  # type: ignore[attr-defined]
        timer._scheduled = True  # type: ignore[attr-defined]
        return timer

    def _call_soon(self, callback: Any, args: Any, context: Any) -> asyncio.Handle:
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)  # type: ignore[attr-defined]
        return handle


class Process:
    """One program's life. What is begun by `spawn` or `call` is of it, and so is what that begins."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False
        self.frozen = False
        self.died_at_s = 0.0
        self.thawed = asyncio.Event()
        self.ended = asyncio.Event()
        self._held: list[asyncio.Handle] = []

    def _context(self) -> contextvars.Context:
        context = contextvars.Context()
        context.run(_process.set, self)
        return context

    def spawn(self, body: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        return asyncio.get_running_loop().create_task(body, context=self._context())

    def call(self, body: Callable[[], T]) -> T:
        """Something synchronous done by this process."""
        return self._context().run(body)

    def takes(self, handle: asyncio.Handle) -> bool:
        """Whether a callback of this process may run now."""
        if self.frozen and not self.dead:
            self._held.append(handle)
        return not (self.dead or self.frozen)

    def kill(self) -> None:
        if self.dead:
            return
        self.dead, self.died_at_s = True, asyncio.get_running_loop().time()
        self._held.clear()
        _graveyard.extend(task for task in asyncio.all_tasks() if isinstance(task, Task) and task.owner is self)
        self.ended.set()

    def freeze(self) -> None:
        if not self.dead and not self.frozen:
            self.frozen = True

    def thaw(self) -> None:
        if self.frozen and not self.dead:
            self.frozen = False
            loop = asyncio.get_running_loop()
            loop._ready.extend(self._held)  # type: ignore[attr-defined]
            self._held = []
            self.thawed.set()
            self.thawed = asyncio.Event()


def current() -> Process | None:
    """Whose code is running."""
    return _process.get()


async def outside(body: Coroutine[Any, Any, T]) -> T:
    """Let the world do something for the caller: it goes on when the caller is killed, frozen or cancelled."""
    return await asyncio.shield(depart(body))


def depart(body: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
    """As `outside`, for who does not wait for it."""
    task: asyncio.Task[T] = asyncio.get_running_loop().create_task(body, context=contextvars.Context())
    task.add_done_callback(_look_at, context=contextvars.Context())
    return task


def _look_at(task: "asyncio.Task[Any]") -> None:
    """Whoever asked may have gone."""
    if not task.cancelled():
        task.exception()


class World:
    """Clock and chance of one simulation; a `covey.world.World`."""

    def __init__(self, loop: Loop, seed: int) -> None:
        self._loop = loop
        self.seed = seed
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


class HostWorld(World):
    """The clocks of one host, which agree with no other host's, and chance of its own."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world._loop, world.seed)
        self.chance = random.Random(f"{world.seed} {name}")
        self._booted_ns = self.chance.randrange(10**6) * 10**9
        self._wall_off_ns = self.chance.randrange(-300, 300) * 10**9

    def boot_ns(self) -> int:
        return self._booted_ns + super().boot_ns()

    def wall_ns(self) -> int:
        return _WALL_NS + self._wall_off_ns + int(self._loop.time() * 1e9)

    def reboot(self) -> None:
        """CLOCK_BOOTTIME begins at nothing."""
        self._booted_ns = -int(self._loop.time() * 1e9)

    def sleep_jump(self, seconds: float) -> None:
        """CLOCK_BOOTTIME counts what the host slept; nothing else of the process notices."""
        self._booted_ns += int(seconds * 1e9)

    def set_wall(self, seconds: float) -> None:
        """Somebody sets the clock on the wall, forwards or back."""
        self._wall_off_ns += int(seconds * 1e9)


def run(seed: int, story: Callable[[World], Coroutine[Any, Any, T]]) -> T:
    """Live through one story to its end. What is left of it, the dead too, is never ended: no `finally` of theirs may
    run. So a program that tells several stories forks for each (`tests.sim.__main__`)."""
    Task.numbers = itertools.count()
    loop = Loop()
    return loop.run_until_complete(story(World(loop, seed)))
