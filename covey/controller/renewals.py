"""Keeping nodes' leases alive on their agents' behalf (safety S8).

Each message of an agent's session renews its lease once; nothing else does: no parked poll, no open socket, no timer.
Renewals that come in while one batch is on its way travel together in the next. A message that comes soon after a
renewal was sent rests on that one; one that comes later asks for the next, which is sent within a quarter of a second,
and does not wait for it; only where the last one is too old does it wait (how long each is: `decide.heartbeat`). An
agent learns how old the renewal is that its answer rests on, and believes in its lease from *its* clock when it sent
the message, less that age: so what it believes ends no later than what etcd was asked for, whichever renewal that was.
"""

import asyncio
import contextlib
import math
from typing import NamedTuple

from covey import errors, wire, world
from covey.decide import heartbeat
from covey.store import base

_GATHER_S = heartbeat.GATHER_S / 2  # how long a batch gathers leases for whose renewal nobody waits


class Renewed(NamedTuple):
    """A renewal that the store has confirmed: sent when, for how long."""

    sent_ns: int
    left_s: float


class LeaseGone(errors.CoveyError):
    """The lease has ended: the agent must join again."""


class _Batch:
    """Leases that are renewed together. `done` is None for one that the store could not be asked about."""

    def __init__(self) -> None:
        self.leases: set[int] = set()
        self.due = asyncio.Event()  # somebody waits for it
        self.done: asyncio.Future[dict[int, Renewed]] = asyncio.get_running_loop().create_future()


class Renewals:
    """`renewed` is called once per message from a live session."""

    def __init__(self, store: base.Store, world: world.World) -> None:
        self._store = store
        self._world = world
        self._next: _Batch | None = None
        self._sending: asyncio.Task[None] | None = None
        self._last: dict[int, Renewed] = {}

    async def renewed(self, lease: int, arrived_ns: int, told_s: float = heartbeat.MOST_S) -> wire.LeaseTerms:
        """Renew and say what the agent may believe; `told_s` is the interval that agents are told. When the store
        cannot be asked, the terms rest on the last renewal known here, with its age; without any they are worth
        nothing. Raises LeaseGone."""
        recent = self._last.get(lease)
        lives = recent is not None and recent.left_s > 0
        age_s = (arrived_ns - recent.sent_ns) / 1e9 if recent is not None and lives else math.inf
        if recent is not None and age_s < heartbeat.shared_s(told_s):
            return _terms(recent, arrived_ns)
        if self._next is None:
            self._next = _Batch()
            self._sending = asyncio.create_task(self._send(self._next, self._sending))
        batch = self._next
        batch.leases.add(lease)
        if recent is not None and age_s < heartbeat.oldest_s(told_s):
            return _terms(recent, arrived_ns)
        batch.due.set()
        fresh = (await asyncio.shield(batch.done)).get(lease)
        known = fresh or self._last.get(lease)
        if known is None:
            return wire.LeaseTerms(ttl_s=wire.LEASE_TTL_S, age_s=wire.LEASE_TTL_S)
        if known.left_s <= 0:
            self._last.pop(lease, None)
            raise LeaseGone("the node's lease has ended")
        return _terms(known, arrived_ns)

    async def close(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.gather(self._sending, return_exceptions=True)

    async def _send(self, batch: _Batch, before: "asyncio.Task[None] | None") -> None:
        if before is not None and not before.done():
            await asyncio.wait({before})
        await asyncio.sleep(0)
        if not batch.due.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(batch.due.wait(), _GATHER_S)
        self._next = None  # who comes from here on is in the next batch
        renewed: dict[int, Renewed] = {}
        sent_ns = self._world.boot_ns()
        try:
            answered = await self._store.renew(sorted(batch.leases))
            renewed = {lease: Renewed(sent_ns, left_s) for lease, left_s in answered.items()}
        except errors.StoreError:
            pass
        finally:
            self._remember(renewed, sent_ns)
            if not batch.done.done():
                batch.done.set_result(renewed)

    def _remember(self, renewed: dict[int, Renewed], now_ns: int) -> None:
        """What is older than a lease's life says nothing any more."""
        self._last.update(renewed)
        if len(self._last) > 2 * len(renewed) + 1000:
            horizon_ns = now_ns - int(wire.LEASE_TTL_S * 1e9)
            self._last = {lease: known for lease, known in self._last.items() if known.sent_ns > horizon_ns}


def _terms(known: Renewed, arrived_ns: int) -> wire.LeaseTerms:
    return wire.LeaseTerms(ttl_s=known.left_s, age_s=max(arrived_ns - known.sent_ns, 0) / 1e9)
