"""A view of a store through bad weather: lost requests, lost replies, delays, partition. A `base.Store`.

    lost request   the store never saw it:        the caller gets Unavailable, or Unsure when it cannot know
    lost reply     the store did it:              the caller gets Unsure
    late           the store does it some time after the caller got Unsure: the zombie of safety S15
    cut            nothing comes through:         Unavailable for reads, Unsure for writes, watches stand still
    deaf           requests arrive, no answer comes back: writes are done and Unsure, reads Unavailable

`plan` scripts the next commits one by one; `weather` decides the others (all fine by default).
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from enum import StrEnum

from covey import errors
from covey.decide import permission
from covey.store import base


class Fate(StrEnum):
    FINE = "fine"
    LOST_REQUEST = "lost request"
    UNAVAILABLE = "unavailable"
    LOST_REPLY = "lost reply"
    LATE = "late"


class Flaky:
    """Wraps one client of a store."""

    def __init__(self, store: base.Store, weather: Callable[[], Fate] = lambda: Fate.FINE) -> None:
        self.store = store
        self.weather = weather
        self.delay: Callable[[], float] = lambda: 0.0
        self.late_s: Callable[[], float] = lambda: 0.05
        self.on_trouble: Callable[[Fate], None] = lambda _fate: None  # told of each commit that does not go well
        self.planned: deque[Fate] = deque()
        self.commits: list[base.Txn] = []
        self.cut = False
        self.deaf = False
        self.watch_delay_s = 0.0
        self._mended = asyncio.Event()
        self._zombies: set[asyncio.Task[None]] = set()

    def plan(self, *fates: Fate) -> None:
        """What happens to the next commits."""
        self.planned.extend(fates)

    def partition(self, cut: bool, *, deaf: bool = False) -> None:
        """`deaf`: only what comes back is lost."""
        self.cut, self.deaf = cut and not deaf, cut and deaf
        if not cut:
            self._mended.set()
            self._mended = asyncio.Event()

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
        await self._travel()
        if self.cut or self.deaf:
            raise errors.Unavailable("cut off")
        page = await self.store.range(
            key,
            end,
            limit=limit,
            revision=revision,
            keys_only=keys_only,
            count_only=count_only,
            serializable=serializable,
            oldest_first=oldest_first,
        )
        await self._travel()
        return page

    async def commit(self, txn: base.Txn, *, within_s: float | None = None) -> base.Outcome:
        fate = self.planned.popleft() if self.planned else self.weather()
        self.commits.append(txn)
        if fate != Fate.FINE:
            self.on_trouble(fate)
        await self._travel()
        if self.cut or fate == Fate.LOST_REQUEST:
            raise errors.Unsure("the request was lost")
        if fate == Fate.UNAVAILABLE:
            raise errors.Unavailable("refused")
        if fate == Fate.LATE:
            task = asyncio.get_running_loop().create_task(self._later(txn))
            self._zombies.add(task)
            task.add_done_callback(self._zombies.discard)
            raise errors.Unsure("the request is still on its way")
        outcome = await self.store.commit(txn, within_s=within_s)
        await self._travel()
        if self.cut or self.deaf or fate == Fate.LOST_REPLY:
            raise errors.Unsure("the reply was lost")
        return outcome

    async def watch(self, key: str, end: str, start_revision: int) -> AsyncIterator[base.Batch]:
        batches = self.store.watch(key, end, start_revision)
        try:
            async for batch in batches:
                while self.cut or self.deaf:
                    await self._mended.wait()
                if self.watch_delay_s:
                    await asyncio.sleep(self.watch_delay_s)
                yield batch
        finally:
            await batches.aclose()  # type: ignore[attr-defined]

    async def grant(self, ttl_s: int) -> base.Lease:
        await self._reachable()
        return await self.store.grant(ttl_s)

    async def renew(self, leases: Sequence[int]) -> dict[int, float]:
        await self._reachable()
        return await self.store.renew(leases)

    async def compact(self, revision: int) -> None:
        await self._reachable()
        await self.store.compact(revision)

    async def origin(self, revision: int) -> permission.Origin:
        await self._reachable()
        return await self.store.origin(revision)

    async def close(self) -> None:
        for task in self._zombies:
            task.cancel()
        await asyncio.gather(*self._zombies, return_exceptions=True)
        await self.store.close()

    async def settled(self) -> None:
        """Wait until no late request is on its way."""
        while self._zombies:
            await asyncio.wait(self._zombies)

    async def _later(self, txn: base.Txn) -> None:
        await asyncio.sleep(self.late_s())
        try:
            await self.store.commit(txn)
        except errors.StoreError:
            return

    async def _travel(self) -> None:
        delay_s = self.delay()
        if delay_s:
            await asyncio.sleep(delay_s)

    async def _reachable(self) -> None:
        await self._travel()
        if self.cut or self.deaf:
            raise errors.Unavailable("cut off")
