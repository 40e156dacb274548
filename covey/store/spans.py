"""Leases shared by keys that live for a span: all that are written within an hour (or a minute) end together.

A lease for each key would cost a proposal for each. Those who need a new one at the same moment get the same: after a
pause, or at the top of a flood, they come by the hundred.
"""

import asyncio

from covey import errors
from covey import world as worlds
from covey.store import base

DAY = -1  # as a lease: one that ends a day or an hour more from now
WEEK = -2  # … seven days
MONTH = -3  # … thirty days
MINUTE = -4  # one that ends a minute or two from now

_HOUR_S = 3600
_SPANS_S = {DAY: (24 * _HOUR_S, _HOUR_S), WEEK: (7 * 24 * _HOUR_S, _HOUR_S), MONTH: (30 * 24 * _HOUR_S, _HOUR_S)}
_SPANS_S |= {MINUTE: (60, 60)}  # how long a key lives at least, and for how long one lease is given to new keys


class Spans:
    """One per process. Holds nothing that is not got again."""

    def __init__(self, store: base.Store, world: worlds.World) -> None:
        self._store = store
        self._world = world
        self._known: dict[int, tuple[int, int]] = {}  # span -> (lease id, boot_ns when it was asked for)
        self._granting: dict[int, asyncio.Task[int]] = {}

    async def lease_out(self, ops: tuple[base.Op, ...]) -> tuple[base.Op, ...]:
        """`ops` with real leases in place of DAY, WEEK, MONTH and MINUTE."""
        if not any(isinstance(op, base.Put) and op.lease < 0 for op in ops):
            return ops
        ids = {span: await self._lease(span) for span in {op.lease for op in ops if isinstance(op, base.Put)}}
        return tuple(op._replace(lease=ids[op.lease]) if isinstance(op, base.Put) else op for op in ops)

    def forget(self) -> None:
        """Perhaps one ended early: the next ones are new."""
        self._known.clear()

    async def close(self) -> None:
        tasks = list(self._granting.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _lease(self, span: int) -> int:
        if span >= 0:
            return span
        known = self._known.get(span)
        if known is not None and self._world.boot_ns() - known[1] <= _SPANS_S[span][1] * 1_000_000_000:
            return known[0]
        task = self._granting.get(span)
        if task is None:
            task = self._granting[span] = asyncio.get_running_loop().create_task(self._grant(span))
            task.add_done_callback(_look_at)
        try:
            return await asyncio.shield(task)
        except errors.StoreError as error:  # each gets an exception of its own
            raise type(error)(*error.args) from error

    async def _grant(self, span: int) -> int:
        least_s, shared_s = _SPANS_S[span]
        now_ns = self._world.boot_ns()
        try:
            lease = await self._store.grant(least_s + shared_s)
        finally:
            del self._granting[span]
        self._known[span] = (lease.id, now_ns)
        return lease.id


def _look_at(task: "asyncio.Task[int]") -> None:
    """Every waiter may have gone: an exception is then nobody's."""
    if not task.cancelled():
        task.exception()
