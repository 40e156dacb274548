"""What runs while members die: writers whose every attempt can be found again, a watcher of them all; and the verdict.

Each attempt writes a value of its own, guarded by the revision that its writer believes in. So etcd's history, told by
`etcdctl`, says of every attempt whether it was applied, and this must hold:

    applied        in history once, at the revision that was answered
    refused        not in history
    unavailable    not in history
    unsure         in history at most once
"""

import asyncio
import collections
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import StrEnum

from covey import errors
from covey.store import base
from tests.support import etcd as etcd_server

BREATH_S = 0.004  # between two attempts of a writer, some times over


class End(StrEnum):
    """How an attempt ended for its writer."""

    APPLIED = "applied"
    REFUSED = "refused"
    UNAVAILABLE = "unavailable"
    UNSURE = "unsure"


@dataclass
class Attempt:
    value: bytes
    end: End
    revision: int
    ended_at: float


@dataclass
class Verdict:
    """The books, closed. `events` is what happened by etcd's word; the lists should be empty."""

    attempts: list[Attempt]
    events: int
    lost: list[object]
    doubled: list[object]
    disordered: bool
    misreported: list[Attempt]

    def count(self, end: End) -> int:
        return sum(attempt.end is end for attempt in self.attempts)

    def stall_s(self, since: float, until: float) -> float:
        """The longest time between two successes from `since` to `until`."""
        times = [
            since,
            *sorted(a.ended_at for a in self.attempts if a.end is End.APPLIED and since < a.ended_at < until),
        ]
        return max(later - earlier for earlier, later in zip(times, [*times[1:], until], strict=True))

    def recovery_s(self, healed: float) -> float:
        """From `healed` to the next success."""
        return min(a.ended_at for a in self.attempts if a.end is End.APPLIED and a.ended_at > healed) - healed

    def assert_sound(self) -> None:
        assert not self.misreported, self.misreported[:5]
        assert not self.lost, f"{len(self.lost)} events were lost: {self.lost[:5]}"
        assert not self.doubled, f"{len(self.doubled)} events were doubled: {self.doubled[:5]}"
        assert not self.disordered, "revisions came out of order or in pieces"

    def figures(self) -> dict[str, object]:
        return {
            "answered": self.count(End.APPLIED) + self.count(End.REFUSED),
            "unsure": self.count(End.UNSURE),
            "unavailable": self.count(End.UNAVAILABLE),
            "events": self.events,
            "lost": len(self.lost),
            "doubled": len(self.doubled),
            "misreported": len(self.misreported),
        }


@dataclass
class Load:
    """Writers that count up a key each, and a watcher."""

    cluster: etcd_server.Cluster
    store: base.Store
    prefix: str
    first_revision: int = 0
    attempts: list[Attempt] = field(default_factory=list)
    batches: list[base.Batch] = field(default_factory=list)
    _stopping: bool = False

    @contextlib.asynccontextmanager
    async def running(self, writers: int = 8) -> AsyncIterator["Load"]:
        """Writers and watcher run while the context is open; its end ends them."""
        keys = [f"{self.prefix}{n}" for n in range(writers)]
        made = await self.store.commit(base.Txn((), tuple(base.Put(key, b"0") for key in keys)))
        self.first_revision = made.revision + 1
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(self._watch())
            writing = [group.create_task(self._write(key, made.revision, pace)) for pace, key in enumerate(keys, 1)]
            await asyncio.sleep(1)  # a quiet time before the trouble
            yield self
            self._stopping = True
            await asyncio.wait(writing)
            last = await self._last_revision()
            async with asyncio.timeout(120):
                while not self.batches or self.batches[-1].revision < last:
                    await asyncio.sleep(0.02)
            watching.cancel()

    async def goes_on(self) -> None:
        """Until writes succeed that ended after this moment, several of them; at once when all is well."""
        known, ended_after = len(self.attempts), time.monotonic()
        async with asyncio.timeout(60):
            while sum(a.end is End.APPLIED and a.ended_at > ended_after for a in self.attempts[known:]) < 10:
                await asyncio.sleep(0.02)

    async def verdict(self) -> Verdict:
        """Compare what was believed with what was."""
        history = await self.cluster.history(self.prefix, self.first_revision, await self._last_revision())
        told = [
            (batch.revision, change.key, change.kv.value if change.kv else None)
            for batch in self.batches
            for change in batch.changes
        ]
        happened, seen = collections.Counter(history), collections.Counter(told)
        revisions = [batch.revision for batch in self.batches]
        return Verdict(
            attempts=self.attempts,
            events=len(history),
            lost=list((happened - seen).elements()),
            doubled=list((seen - happened).elements()),
            disordered=revisions != sorted(set(revisions)),
            misreported=self._misreported(history),
        )

    def _misreported(self, history: list[tuple[int, str, bytes | None]]) -> list[Attempt]:
        applied: dict[bytes | None, list[int]] = {}
        for revision, _, value in history:
            applied.setdefault(value, []).append(revision)
        wrong = []
        for attempt in self.attempts:
            at = applied.get(attempt.value, [])
            right = {
                End.APPLIED: at == [attempt.revision],
                End.REFUSED: not at,
                End.UNAVAILABLE: not at,
                End.UNSURE: len(at) <= 1,
            }
            if not right[attempt.end]:
                wrong.append(attempt)
        return wrong

    async def _write(self, key: str, believed: int, pace: int) -> None:
        """Attempt after attempt; writers of different pace keep out of step, so that some are always under way."""
        number = 0
        while not self._stopping:
            number += 1
            value = f"{key}#{number}".encode()
            attempt = await self._attempt(base.Txn((base.unchanged(key, believed),), (base.Put(key, value),)), value)
            self.attempts.append(attempt)
            believed = attempt.revision if attempt.end is End.APPLIED else await self._look(key)
            await asyncio.sleep(BREATH_S * (pace * number % 5))

    async def _attempt(self, txn: base.Txn, value: bytes) -> Attempt:
        try:
            outcome = await self.store.commit(txn)
        except errors.Unavailable:
            return Attempt(value, End.UNAVAILABLE, 0, time.monotonic())
        except errors.Unsure:
            return Attempt(value, End.UNSURE, 0, time.monotonic())
        return Attempt(value, End.APPLIED if outcome.succeeded else End.REFUSED, outcome.revision, time.monotonic())

    async def _look(self, key: str) -> int:
        while True:
            try:
                return (await self.store.range(key)).kvs[0].mod_revision
            except errors.Unavailable:
                await asyncio.sleep(BREATH_S)

    async def _watch(self) -> None:
        async for batch in self.store.watch(self.prefix, base.prefix_end(self.prefix), self.first_revision):
            self.batches.append(batch)

    async def _last_revision(self) -> int:
        """The newest revision of our keys, by etcdctl's word."""
        answer = json.loads(await asyncio.to_thread(self.cluster.ctl, "get", "--prefix", self.prefix, "-w", "json"))
        return max(int(kv["mod_revision"]) for kv in answer["kvs"])
