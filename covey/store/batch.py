"""Group commit: transactions that are ready at the same moment travel in one (safety S23).

A store's price is per proposal, not per key: a hundred independent transactions in one proposal cost about as much
time as three alone. They queue here; up to `in_flight` batches are under way, and what comes meanwhile waits for the
next one, so batches grow by themselves when there is much to do, and a lonely transaction goes at once and alone.

    queue ──► take: oldest first, what fits and conflicts with nobody ──► send ──► each its own Outcome

What keeps it right:

1. All compares of a batch see the revision before it. So two transactions share a batch only if neither reads or
   writes what the other writes; else both could pass where only one may.
2. Nothing overtakes an earlier transaction that it conflicts with: neither one in the queue nor one under way.
3. A lost reply of the batch is `Unsure` for each; `Unavailable` is so for each.
4. A refused batch (a lost lease, a full store) is split and resent until the guilty one is alone.
5. When many come, but so that they make small batches (a proposal's price is shared by few then), the next batch waits
   some milliseconds for company. How many come is seen from what left lately; a lonely one still goes at once. It is
   a store with much to do that company helps, and such a one answers slowly: so nobody waits for company longer than
   some times as long as the store takes lately, and where it is quick a chain of transactions is quick as well.
6. The queue is bounded, in transactions and in bytes: when a store falls behind, what comes then is Unavailable at
   once, and nothing of it was done.
"""

import asyncio
import functools
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from covey import errors
from covey.store import base, limits

QUEUE_LIMIT = 4096  # transactions: some seconds of the fastest store measured
QUEUE_BYTES = 64 << 20
COMPANY = 48  # transactions in a batch that need no more company
LINGER_S = 0.06  # the longest that a batch waits for it …
LINGER_TIMES = 3.0  # … and for so many times as long as batches are under way lately
_WORTH = 16  # not at all, when fewer would come in that time
_MEMORY_S = 0.2  # how far back "lately" goes
_NEWEST = 0.2  # the part that one batch has in how long they take lately
LOOK_AHEAD = 1024  # how far down a queue of conflicting transactions a batch looks for members

Send = Callable[[Sequence[base.Txn], float], Awaitable[Sequence[base.Outcome]]]


@dataclass(slots=True)
class Footprint:
    """What transactions read and write, whichever branch runs."""

    reads: set[str] = field(default_factory=set)
    writes: set[str] = field(default_factory=set)
    ranges: list[tuple[str, str]] = field(default_factory=list)  # deleted

    @classmethod
    def of(cls, txn: base.Txn) -> "Footprint":
        found = cls({compare.key for compare in txn.compares})
        for op in (*txn.then, *txn.otherwise):
            if isinstance(op, base.Get):
                found.reads.add(op.key)
            elif isinstance(op, base.Delete) and op.end:
                found.ranges.append((op.key, op.end))
            else:
                found.writes.add(op.key)
        return found

    def add(self, other: "Footprint") -> None:
        self.reads |= other.reads
        self.writes |= other.writes
        self.ranges += other.ranges

    def conflicts(self, other: "Footprint") -> bool:
        """One of the two writes what the other reads or writes."""
        return (
            not self.writes.isdisjoint(other.writes)
            or not self.writes.isdisjoint(other.reads)
            or not self.reads.isdisjoint(other.writes)
            or self._sweeps(other)
            or other._sweeps(self)
        )

    def _sweeps(self, other: "Footprint") -> bool:
        """A range deleted here holds a key used there. Two deleted ranges count as a conflict."""
        if not self.ranges:
            return False
        keys = other.reads | other.writes
        return bool(other.ranges) or any(base.within(key, *span) for span in self.ranges for key in keys)


@dataclass(slots=True, eq=False)
class _Waiting:
    txn: base.Txn
    footprint: Footprint
    ops: int
    size_bytes: int
    deadline_ns: int
    done: asyncio.Future[base.Outcome]


class Batcher:
    """The queue before a store. `send` applies some transactions in one proposal within the seconds it is given."""

    def __init__(
        self,
        send: Send,
        *,
        now_ns: Callable[[], int],
        timeout_s: float,
        attempt_s: float,
        in_flight: int = 3,
        linger_s: float = LINGER_S,
    ) -> None:
        self._send = send
        self._now_ns = now_ns
        self._timeout_s = timeout_s
        self._attempt_s = attempt_s
        self._in_flight = in_flight
        self._queue: list[_Waiting] = []
        self._queued_bytes = 0
        self._flying: dict[asyncio.Task[None], Footprint] = {}
        self._linger_s = linger_s
        self._left_s = 0.0  # when the last batch left, on the loop's clock
        self._left = 0.0  # how many have left lately
        self._takes_s = 0.0  # how long a batch is under way lately
        self._pumping: asyncio.Handle | None = None  # the next take-off
        self._lingers = False  # it waits for company
        self._closed = False

    async def commit(self, txn: base.Txn, within_s: float | None = None) -> base.Outcome:
        """Apply `txn`, in whatever company. Nothing is sent after `within_s` (at most `timeout_s`); ends one attempt
        later at the latest."""
        weight = limits.check(txn)
        if self._closed:
            raise errors.Unavailable("the store is closed")
        loop = asyncio.get_running_loop()
        if self._is_full(weight.size_bytes):
            self._forget_ended()
        if self._is_full(weight.size_bytes):
            raise errors.Unavailable("the store is behind with what it was given; nothing was done")
        limit_s = self._timeout_s if within_s is None else min(within_s, self._timeout_s)
        deadline_ns = self._now_ns() + int(limit_s * 1e9)
        waiting = _Waiting(txn, Footprint.of(txn), *weight, deadline_ns, loop.create_future())
        self._queue.append(waiting)
        self._queued_bytes += weight.size_bytes
        self._pump_soon()
        return await waiting.done

    async def close(self) -> None:
        """Nothing more is sent. What waits fails as Unavailable, what is under way as Unsure."""
        self._closed = True
        if self._pumping is not None:
            self._pumping.cancel()
        _fail(self._queue, errors.Unavailable("the store is closed"))
        self._queue = []
        flying = list(self._flying)
        for task in flying:
            task.cancel()
        await asyncio.gather(*flying, return_exceptions=True)

    def _pump_soon(self) -> None:
        """Take off in the loop's next round: what is committed in this one comes along; or when there is company."""
        if not self._queue or len(self._flying) >= self._in_flight or self._closed:
            return
        loop = asyncio.get_running_loop()
        if self._pumping is None:
            wait_s = self._patience_s(loop.time())
            self._lingers = wait_s > 0
            self._pumping = loop.call_later(wait_s, self._pump) if self._lingers else loop.call_soon(self._pump)
        elif self._lingers and len(self._queue) >= COMPANY:
            self._lingers = False
            self._pumping.cancel()
            self._pumping = loop.call_soon(self._pump)

    def _patience_s(self, now_s: float) -> float:
        """How long the next batch may wait for company: as long as it takes `COMPANY` to come at the rate of lately,
        counted from the last take-off; not at all when that would bring nobody."""
        per_s = self._left * math.exp((self._left_s - now_s) / _MEMORY_S) / _MEMORY_S
        most_s = min(self._linger_s, LINGER_TIMES * self._takes_s)
        if len(self._queue) >= COMPANY or per_s * most_s < _WORTH:
            return 0.0
        return self._left_s + min(COMPANY / per_s, most_s) - now_s

    def _pump(self) -> None:
        self._pumping = None
        while not self._closed and len(self._flying) < self._in_flight and (taken := self._take()):
            self._note(len(taken))
            footprint = Footprint()
            for waiting in taken:
                footprint.add(waiting.footprint)
            task = asyncio.get_running_loop().create_task(self._fly(taken))
            self._flying[task] = footprint
            task.add_done_callback(functools.partial(self._landed, taken, self._left_s))

    def _note(self, count: int) -> None:
        """So many leave now."""
        now_s = asyncio.get_running_loop().time()
        self._left = self._left * math.exp((self._left_s - now_s) / _MEMORY_S) + count
        self._left_s = now_s

    def _landed(self, taken: Sequence[_Waiting], left_s: float, task: asyncio.Task[None]) -> None:
        del self._flying[task]
        self._takes_s += _NEWEST * (asyncio.get_running_loop().time() - left_s - self._takes_s)
        if task.cancelled():
            _fail(taken, errors.Unsure("the store was closed while the transaction was under way"))
        elif fault := task.exception():  # a flaw of ours; nobody must wait for ever because of it
            _fail(taken, errors.Unsure(f"the batch broke: {fault!r}"))
        self._pump_soon()

    def _take(self) -> list[_Waiting]:
        """The next batch; empty when everything that waits conflicts with what is under way."""
        self._forget_ended()
        taken: list[_Waiting] = []
        batch, before = Footprint(), Footprint()
        ops = size = 0
        for waiting in self._queue[:LOOK_AHEAD]:
            more, larger = max(ops, waiting.ops), size + waiting.size_bytes
            if taken and (len(taken) + 1 + more > limits.MAX_OPS or larger > limits.MAX_BYTES):
                break
            own = waiting.footprint
            if before.conflicts(own) or batch.conflicts(own) or self._in_the_air(own):
                before.add(own)
                continue
            taken.append(waiting)
            batch.add(own)
            ops, size = more, larger
        chosen = set(map(id, taken))
        self._queue = [one for one in self._queue if id(one) not in chosen]
        self._queued_bytes = sum(one.size_bytes for one in self._queue)
        return taken

    def _is_full(self, more_bytes: int) -> bool:
        return len(self._queue) >= QUEUE_LIMIT or self._queued_bytes + more_bytes > QUEUE_BYTES

    def _forget_ended(self) -> None:
        """Those whose time is up are told; those that nobody waits for any more go without a word."""
        now = self._now_ns()
        _fail([one for one in self._queue if one.deadline_ns <= now], errors.Unavailable("waited too long to be sent"))
        self._queue = [one for one in self._queue if not one.done.done()]
        self._queued_bytes = sum(one.size_bytes for one in self._queue)

    def _in_the_air(self, footprint: Footprint) -> bool:
        return any(flying.conflicts(footprint) for flying in self._flying.values())

    async def _fly(self, taken: Sequence[_Waiting]) -> None:
        """Send a batch and tell each how it went."""
        oldest_s = (min(waiting.deadline_ns for waiting in taken) - self._now_ns()) / 1e9
        try:
            outcomes = await self._send([waiting.txn for waiting in taken], max(oldest_s, self._attempt_s))
        except (errors.Rejected, errors.NoSpace) as refusal:
            if len(taken) == 1:
                _fail(taken, refusal)
                return
            middle = len(taken) // 2
            await self._fly_again(taken[:middle])
            await self._fly_again(taken[middle:])
        except errors.StoreError as fault:
            _fail(taken, fault)
        else:
            for waiting, outcome in zip(taken, outcomes, strict=True):
                if not waiting.done.done():
                    waiting.done.set_result(outcome)

    async def _fly_again(self, taken: Sequence[_Waiting]) -> None:
        """A part of a refused batch, but for those whose time is up meanwhile: of them nothing was done."""
        now = self._now_ns()
        _fail([one for one in taken if one.deadline_ns <= now], errors.Unavailable("waited too long to be sent"))
        if left := [one for one in taken if one.deadline_ns > now]:
            await self._fly(left)


def _fail(waiting: Sequence[_Waiting], fault: errors.StoreError) -> None:
    """Each gets an exception of its own: one object raised in many tasks would mix their tracebacks."""
    for one in waiting:
        if not one.done.done():
            one.done.set_exception(type(fault)(*fault.args))
