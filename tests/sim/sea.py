"""The one store of a simulation, and the line from each controller to it.

Sea    the data in memory. Sees every transaction, holds back those that are late, and lets some of them surface at
       the very moment when another transaction touches the same keys: the zombie that a guard must fear (safety S15).
       It can be taken away and restored from a backup, as by an operator; what was on its way to it is lost then (S18)
Line   one controller's view, a `base.Store`: through the weather of `tests.support.flaky`; what was sent goes on
       when the sender is killed or frozen. It may kill its own process just before a commit leaves, or just after it
       was applied and before anybody knows
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from covey import errors
from covey.store import base, memory, schema
from tests.sim import clockwork
from tests.support import flaky

_SHORT_LIVED_S = 60  # leases of nodes and controllers: those that an etcd under stress ends early or late


class Sea(memory.Memory):
    """`seen` is told of every revision at the instant at which it is made."""

    def __init__(self, world: clockwork.World, seen: Callable[[base.Batch], None]) -> None:
        self.data = _Data(world, seen)
        super().__init__(world, self.data)
        self._world = world
        self.late: list[base.Txn] = []
        self.surfaced = 0
        self.away = False
        self.restores = 0

    async def commit(self, txn: base.Txn, *, within_s: float | None = None) -> base.Outcome:
        rogue = next((late for late in self.late if _touch(late, txn)), None)
        before = rogue is not None and self._world.chance.random() < 0.5
        if rogue is not None and before:
            self._surface(rogue)
        outcome = await super().commit(txn, within_s=within_s)
        if rogue is not None and not before:
            self._surface(rogue)
        return outcome

    def hold_back(self, txn: base.Txn) -> None:
        """Apply it when somebody else touches its keys, or when the weather clears."""
        if not self.away:
            self.late.append(txn)

    def stop(self) -> None:
        """Every member ends: nobody is answered."""
        self.away = True
        self.late.clear()

    def begin_from(self, backup: memory.Backup, *, cluster: str) -> None:
        """The members begin anew with what the backup holds."""
        self.data.restore(backup, cluster=cluster)
        self.away = False
        self.restores += 1

    async def _turn(self) -> None:
        await super()._turn()
        if self.away:
            raise errors.Unavailable("the store is being restored")

    def surface_all(self) -> None:
        while self.late:
            self._surface(self.late[0])

    def _surface(self, txn: base.Txn) -> None:
        if txn in self.late:
            self.late.remove(txn)
            self.surfaced += 1
            try:
                self.data.apply(txn)
            except errors.Rejected:  # its lease has ended meanwhile
                return

    def short_leases(self) -> list[int]:
        """Those by which nodes and controllers say that they are there."""
        return [id for id, held in self.data.leases.items() if held.ttl_ns <= _SHORT_LIVED_S * 1e9]

    def delay_lease(self, id: int, seconds: float) -> None:
        """It ends later than it should: each election begins the time to live anew (safety S8)."""
        held = self.data.leases.get(id)
        if held is not None:
            held.ends_ns += int(seconds * 1e9)


class _Data(memory.Data):
    def __init__(self, world: clockwork.World, seen: Callable[[base.Batch], None]) -> None:
        super().__init__(world)
        self._seen = seen

    def _seal(self, changes: Sequence[base.Change]) -> None:
        super()._seal(changes)
        if changes:
            self._seen(self.log[self.revision])


def _touch(one: base.Txn, other: base.Txn) -> bool:
    """Whether the two are about the same keys: those that every transaction compares, and leases, do not count."""
    return not _written(one).isdisjoint(_written(other))


def _is_start_without_key(txn: base.Txn) -> bool:
    """Whether a door must be closed behind it when its reply is lost."""
    written = _written(txn)
    return any(key.startswith(schema.BORN) for key in written) and not any(
        key.startswith(schema.KEYS) for key in written
    )


def _written(txn: base.Txn) -> set[str]:
    return {op.key for op in txn.then if not isinstance(op, base.Get)}


class Line:
    """One controller's way to the sea. Lives longer than the controller's processes."""

    def __init__(self, sea: Sea, chance: random.Random, weather: Callable[[], flaky.Fate]) -> None:
        self._sea = sea
        self._chance = chance
        self.flaky = _Weathered(sea, chance, weather)
        self._listening: list[asyncio.Queue[base.Batch | errors.StoreError | None]] = []
        self.keeping: list[asyncio.Task[Any]] = []  # leases alive
        self.read_loss = 0.0
        self.closed = False
        self.doom = (
            ""  # "before", "after": when the next commit kills its process; "deaf": no reply to a start without key
        )

    async def range(
        self,
        key: str,
        end: str = "",
        *,
        limit: int = 0,
        revision: int = 0,
        keys_only: bool = False,
        count_only: bool = False,
        serializable: bool = False,
        oldest_first: bool = False,
    ) -> base.Page:
        if self.closed:
            raise errors.Unavailable("the store is closed")
        if self._chance.random() < self.read_loss:
            await asyncio.sleep(self._chance.uniform(0.0, 1.0))
            raise errors.Unavailable("the answer was lost")
        return await clockwork.outside(
            self.flaky.range(
                key,
                end,
                limit=limit,
                revision=revision,
                keys_only=keys_only,
                count_only=count_only,
                serializable=serializable,
                oldest_first=oldest_first,
            )
        )

    async def commit(self, txn: base.Txn, *, within_s: float | None = None) -> base.Outcome:
        if self.closed:
            raise errors.Unavailable("the store is closed")
        process, doom = clockwork.current(), self.doom
        if doom == "deaf" and _is_start_without_key(txn):
            self.doom = ""
            self.flaky.partition(True, deaf=True)  # it is done, and nothing is heard of it
        elif doom in ("before", "after") and process is not None:
            self.doom = ""
            if doom == "after":
                await clockwork.outside(self._last_commit(txn, process))
            process.kill()
            await asyncio.Event().wait()  # nobody hears of it
        return await clockwork.outside(self.flaky.commit(txn, within_s=within_s))

    async def _last_commit(self, txn: base.Txn, process: clockwork.Process) -> None:
        await self._sea.commit(txn)
        process.kill()

    async def watch(self, key: str, end: str, start_revision: int) -> AsyncIterator[base.Batch]:
        batches: asyncio.Queue[base.Batch | errors.StoreError | None] = asyncio.Queue()
        self._listening.append(batches)
        pump = clockwork.depart(self._pump(batches, key, end, start_revision, clockwork.current()))
        try:
            while True:
                batch = await batches.get()
                if batch is None:
                    raise asyncio.CancelledError
                if isinstance(batch, errors.StoreError):
                    raise batch
                yield batch
        finally:
            pump.cancel()
            self._listening.remove(batches)

    async def _pump(
        self,
        batches: "asyncio.Queue[base.Batch | errors.StoreError | None]",
        key: str,
        end: str,
        start: int,
        reader: clockwork.Process | None,
    ) -> None:
        """What has come over the line waits at the reader's end, also while that is frozen."""
        try:
            async for batch in self.flaky.watch(key, end, start):
                if reader is not None and reader.dead:
                    return
                batches.put_nowait(batch)
        except errors.StoreError as error:
            batches.put_nowait(error)

    async def grant(self, ttl_s: int) -> base.Lease:
        return _Lease(self, await clockwork.outside(self.flaky.grant(ttl_s)))

    async def renew(self, leases: Sequence[int]) -> dict[int, float]:
        return await clockwork.outside(self.flaky.renew(leases))

    async def compact(self, revision: int) -> None:
        await clockwork.outside(self.flaky.compact(revision))

    def end_lease(self, id: int) -> None:
        """End somebody's lease, as an operator may; no part of `base.Store`."""
        self._sea.end_lease(id)

    async def origin(self, revision: int) -> Any:
        return await clockwork.outside(self.flaky.origin(revision))

    async def close(self) -> None:
        """Nothing more is asked, and watches and the keeping of leases end, until the next process uses the line."""
        self.closed = True
        for batches in self._listening:
            batches.put_nowait(None)
        for task in self.keeping:
            task.cancel()


class _Lease:
    """A `base.Lease` renewed over a line: lost by the clock of its holder, as etcd's is."""

    def __init__(self, line: Line, granted: base.Lease) -> None:
        self.id = granted.id
        self.ttl_s = granted.ttl_s
        self._line = line
        self._granted = granted
        self._gone = False
        self._ends_s = asyncio.get_running_loop().time() + self.ttl_s

    @property
    def lost(self) -> bool:
        return self._gone or asyncio.get_running_loop().time() >= self._ends_s

    async def keep_alive(self) -> None:
        keeper = asyncio.current_task()
        assert keeper is not None
        self._line.keeping.append(keeper)
        try:
            await self._keep()
        finally:
            self._line.keeping.remove(keeper)

    async def _keep(self) -> None:
        while not self.lost:
            sent_s = asyncio.get_running_loop().time()
            try:
                left_s = (await self._line.renew([self.id]))[self.id]
            except errors.Unavailable:
                await asyncio.sleep(0.2)
                continue
            if left_s <= 0:
                self._gone = True
                break
            self._ends_s = max(self._ends_s, sent_s + left_s)
            await asyncio.sleep(self.ttl_s / 3)
        raise errors.LeaseLost(f"lease {self.id:x} is lost")

    async def revoke(self) -> None:
        self._gone = True
        if not (self._line.flaky.cut or self._line.flaky.deaf):
            await clockwork.outside(self._granted.revoke())


class _Weathered(flaky.Flaky):
    """Late transactions come some time later, or at the worst moment."""

    def __init__(self, sea: Sea, chance: random.Random, weather: Callable[[], flaky.Fate]) -> None:
        super().__init__(sea, weather)
        self._sea = sea
        self._chance = chance
        self.delay = lambda: chance.uniform(0.0005, 0.004)
        self.late_s = lambda: chance.choice((0.05, 1.0, 20.0))

    async def _later(self, txn: base.Txn) -> None:
        restores = self._sea.restores
        if self._chance.random() < 0.5:
            self._sea.hold_back(txn)
            return
        await asyncio.sleep(self.late_s())
        if restores == self._sea.restores:
            with contextlib.suppress(errors.StoreError):
                await self._sea.commit(txn)
