"""The store in memory: etcd's model without etcd, for simulations, tests and trying things out.

It keeps the promises of `store.base` and refuses what etcd refuses, so that nothing passes here that fails there.
A `Memory` is one client; `client()` makes another one of the same data, so that a simulation can put a flaky view
before each. Nothing survives the process.

    data ── keys     key → its versions, oldest first (a deletion is a version too)
         ├─ sorted   all keys that have versions, in the order of their bytes
         ├─ log      one Batch per revision after the compacted one
         └─ leases   id → when it ends, and its keys

`Data.backup` and `Data.restore` do what a snapshot of etcd and its restore do, also while clients are connected: the
revision goes back, and counts on from there.

Time is the world's `boot_ns`. A lease that is over has no effect on anything that is asked later: every call first
ends what is due; a timer does the same when nobody calls, so that watchers learn of it.
"""

import asyncio
import bisect
import contextlib
import heapq
import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from covey import errors, world
from covey.decide import permission
from covey.store import base, limits

_NS = 1_000_000_000


class Memory:
    """A client of data in this process; a `base.Store`."""

    def __init__(self, world: world.World, data: "Data | None" = None) -> None:
        self._data = Data(world) if data is None else data
        self._closed = asyncio.Event()

    def client(self) -> "Memory":
        """Another client of the same data."""
        return Memory(self._data.world, self._data)

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
        await self._turn()
        data = self._data
        if revision > data.revision:
            raise errors.Rejected(f"revision {revision} is in the future")
        if 0 < revision < data.compacted:
            raise errors.Compacted(data.compacted)
        kvs = list(data.live(key, end, revision or data.revision))
        total = len(kvs)
        if oldest_first:
            kvs.sort(key=lambda kv: kv.create_revision)
        if limit:
            kvs = kvs[:limit]
        if keys_only:
            kvs = [kv._replace(value=b"") for kv in kvs]
        more = not count_only and len(kvs) < total
        found = () if count_only else tuple(kvs)
        return base.Page(found, revision or data.revision, total, more, data.term, data.cluster)

    async def commit(self, txn: base.Txn, *, within_s: float | None = None) -> base.Outcome:
        limits.check(txn)
        await self._turn()
        return self._data.apply(txn)

    async def watch(self, key: str, end: str, start_revision: int) -> AsyncIterator[base.Batch]:
        await self._turn()
        data = self._data
        wanted = start_revision if start_revision > 0 else data.revision + 1
        while True:
            while wanted <= data.revision:
                if wanted < data.compacted:
                    raise errors.Compacted(data.compacted)
                batch = data.log.get(wanted, base.Batch(wanted, ()))  # revision 1 is the empty store
                wanted += 1
                if not batch.changes:
                    continue
                if key == end == base.EVERYTHING:
                    yield batch
                elif changes := tuple(change for change in batch.changes if base.within(change.key, key, end)):
                    yield base.Batch(batch.revision, changes)
            if wanted < data.compacted:
                raise errors.Compacted(data.compacted)
            await self._until(data.moved)

    async def grant(self, ttl_s: int) -> "Lease":
        await self._turn()
        if ttl_s <= 0:
            raise errors.Rejected("a lease lives at least one second")
        return Lease(self, self._data.grant(ttl_s), ttl_s)

    async def renew(self, leases: Sequence[int]) -> dict[int, float]:
        await self._turn()
        return {id: self.renew_nowait(id) for id in leases}

    async def compact(self, revision: int) -> None:
        await self._turn()
        if revision > self._data.revision:
            raise errors.Rejected(f"revision {revision} is in the future")
        self._data.compact(revision)

    async def origin(self, revision: int) -> permission.Origin:
        await self._turn()
        data = self._data
        if revision > data.revision:
            raise errors.Unavailable("the store has not reached this revision")
        return permission.Origin(data.cluster, data.term, data.index)

    async def close(self) -> None:
        self._closed.set()
        self._data.wake()

    def backup(self) -> "Backup":
        """See `Data.backup`; no part of `base.Store`."""
        return self._data.backup()

    def restore(self, backup: "Backup", *, cluster: str = "") -> None:
        """See `Data.restore`; no part of `base.Store`."""
        self._data.restore(backup, cluster=cluster)

    def end_lease(self, id: int) -> None:
        """End somebody's lease and delete its keys, as an operator may; no part of `base.Store`."""
        self._data.revoke(id)

    def renew_nowait(self, id: int) -> float:
        """Keep one lease alive: seconds left; no part of `base.Store`."""
        return self._data.renew(id)

    def lives(self, id: int) -> bool:
        """Whether a lease is not over; no part of `base.Store`."""
        self._data.expire()
        return id in self._data.leases

    async def sleep(self, seconds: float) -> None:
        """Wait; ends with CancelledError when this client is closed meanwhile."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closed.wait()
                raise asyncio.CancelledError

    async def _turn(self) -> None:
        """What every call begins with: let others run, as a call over the network does, and end what is due."""
        await asyncio.sleep(0)
        if self._closed.is_set():
            raise errors.Unavailable("the store is closed")
        self._data.expire()

    async def _until(self, moved: asyncio.Event) -> None:
        await moved.wait()
        if self._closed.is_set():
            raise asyncio.CancelledError


class Lease:
    """A lease on memory; a `base.Lease`. Clock and store are one, so it is lost exactly when the store has ended it."""

    def __init__(self, client: Memory, id: int, ttl_s: int) -> None:
        self.id = id
        self.ttl_s = float(ttl_s)
        self._client = client

    @property
    def lost(self) -> bool:
        return not self._client.lives(self.id)

    async def keep_alive(self) -> None:
        while self._client.renew_nowait(self.id):
            await self._client.sleep(self.ttl_s / 3)
        raise errors.LeaseLost(f"lease {self.id:x} is lost")

    async def revoke(self) -> None:
        self._client.end_lease(self.id)


@dataclass
class _Held:
    """A living lease."""

    ttl_ns: int
    ends_ns: int
    keys: set[str] = field(default_factory=set)


class Backup(NamedTuple):
    """All of a store's data at one moment: keys with their history, and leases."""

    revision: int
    compacted: int
    log: dict[int, base.Batch]
    versions: dict[str, list[tuple[int, base.Kv | None]]]
    ttls_ns: dict[int, int]


_FIRST_INDEX = 8  # an etcd's log holds so many entries before a client's first: its members, an election, its version


class Data:
    """What the store holds; every method is one instant."""

    def __init__(self, world: world.World) -> None:
        self.world = world
        self.revision = 1
        self.compacted = 0
        self.log: dict[int, base.Batch] = {}
        self.leases: dict[int, _Held] = {}
        self.cluster, self.term, self.index = "memory", 2, _FIRST_INDEX  # safety S18
        self.moved = asyncio.Event()
        self._versions: dict[str, list[tuple[int, base.Kv | None]]] = {}
        self._sorted: list[bytes] = []
        self._lease_ids = itertools.count(1)
        self._ends: list[tuple[int, int]] = []  # heap of (not before, lease id); renewals are looked up when due
        self._timer: asyncio.TimerHandle | None = None

    # Reading

    def at(self, key: str, revision: int) -> base.Kv | None:
        """The key as it stood at `revision`."""
        versions = self._versions.get(key, ())
        for changed, kv in reversed(versions):
            if changed <= revision:
                return kv
        return None

    def live(self, key: str, end: str, revision: int) -> Iterator[base.Kv]:
        """The keys of [key, end) that existed at `revision`, ascending."""
        if not end:
            names = [key]
        else:
            first = bisect.bisect_left(self._sorted, base.to_bytes(key))
            last = None if end == base.EVERYTHING else bisect.bisect_left(self._sorted, base.to_bytes(end))
            names = [base.to_text(name) for name in self._sorted[first:last]]
        return (kv for name in names if (kv := self.at(name, revision)) is not None)

    # Writing

    def apply(self, txn: base.Txn) -> base.Outcome:
        """The transaction, whole or not at all."""
        self.index += 1
        succeeded = all(self._holds(compare) for compare in txn.compares)
        for op in txn.then if succeeded else txn.otherwise:  # etcd, too, looks only at the branch that runs
            if isinstance(op, base.Put) and op.lease and op.lease not in self.leases:
                raise errors.Rejected("requested lease not found")
        changes: list[base.Change] = []
        got: list[base.Kv | None] = []
        for op in txn.then if succeeded else txn.otherwise:
            if isinstance(op, base.Get):
                got.append(self.at(op.key, self.revision + 1))
            elif isinstance(op, base.Put):
                changes.append(self._put(op))
            else:
                changes += [self._delete(kv) for kv in list(self.live(op.key, op.end, self.revision + 1))]
        self._seal(changes)
        return base.Outcome(succeeded, self.revision, tuple(got))

    # Backups

    def backup(self) -> Backup:
        """As `etcdctl snapshot save`."""
        versions = {key: list(versions) for key, versions in self._versions.items()}
        ttls_ns = {id: held.ttl_ns for id, held in self.leases.items()}
        return Backup(self.revision, self.compacted, dict(self.log), versions, ttls_ns)

    def restore(self, backup: Backup, *, cluster: str = "") -> None:
        """As `etcdctl snapshot restore` and a new start, with the same names unless `cluster` is another one: log and
        term begin anew, and each lease gets its whole time again. Watches stay as they are, and wait for their next
        revision."""
        self.revision, self.compacted, self.log = backup.revision, backup.compacted, dict(backup.log)
        self._versions = {key: list(versions) for key, versions in backup.versions.items()}
        self._sorted = sorted(map(base.to_bytes, self._versions))
        self.cluster, self.term, self.index = cluster or self.cluster, 2, _FIRST_INDEX
        now_ns = self.world.boot_ns()
        self.leases = {id: _Held(ttl_ns, now_ns + ttl_ns) for id, ttl_ns in backup.ttls_ns.items()}
        for key in self._versions:
            kv = self.at(key, self.revision)
            if kv is not None and kv.lease in self.leases:
                self.leases[kv.lease].keys.add(key)
        self._ends = sorted((held.ends_ns, id) for id, held in self.leases.items())
        self._arm()
        self.wake()

    def _holds(self, compare: base.Compare) -> bool:
        kv = self.at(compare.key, self.revision)
        if compare.target is base.Target.VALUE:
            return kv is not None and kv.value == compare.value
        if compare.target is base.Target.CREATE:
            return compare.revision == (kv.create_revision if kv else 0)
        return compare.revision == (kv.mod_revision if kv else 0)

    def _put(self, op: base.Put) -> base.Change:
        revision = self.revision + 1
        before = self.at(op.key, revision)
        kv = base.Kv(op.key, op.value, before.create_revision if before else revision, revision, op.lease)
        self._leave(before)
        if op.lease:
            self.leases[op.lease].keys.add(op.key)
        return self._enter(op.key, kv)

    def _delete(self, kv: base.Kv) -> base.Change:
        self._leave(kv)
        return self._enter(kv.key, None)

    def _leave(self, kv: base.Kv | None) -> None:
        """A version that is no longer the newest frees its key from its lease."""
        if kv is not None and kv.lease in self.leases:
            self.leases[kv.lease].keys.discard(kv.key)

    def _enter(self, key: str, kv: base.Kv | None) -> base.Change:
        if key not in self._versions:
            self._versions[key] = []
            bisect.insort(self._sorted, base.to_bytes(key))
        self._versions[key].append((self.revision + 1, kv))
        return base.Change(key, kv)

    def _seal(self, changes: Sequence[base.Change]) -> None:
        """Make the changes one revision and tell the watchers."""
        if changes:
            self.revision += 1
            self.log[self.revision] = base.Batch(self.revision, tuple(changes))
            self.wake()

    def wake(self) -> None:
        """Let every watcher look again."""
        self.moved.set()
        self.moved = asyncio.Event()

    def compact(self, revision: int) -> None:
        """Forget what was superseded or deleted before `revision`."""
        if revision <= self.compacted:
            return
        for gone in range(self.compacted, revision):
            self.log.pop(gone, None)
        self.compacted = revision
        for key, versions in list(self._versions.items()):
            kept = next((n for n, version in reversed(list(enumerate(versions))) if version[0] <= revision), 0)
            del versions[:kept]
            if len(versions) == 1 and versions[0][0] < revision and versions[0][1] is None:
                del self._versions[key]
                del self._sorted[bisect.bisect_left(self._sorted, base.to_bytes(key))]
        self.wake()

    # Leases

    def grant(self, ttl_s: int) -> int:
        self.index += 1
        id = next(self._lease_ids)
        held = self.leases[id] = _Held(ttl_s * _NS, self.world.boot_ns() + ttl_s * _NS)
        heapq.heappush(self._ends, (held.ends_ns, id))
        self._arm()
        return id

    def renew(self, id: int) -> float:
        """Seconds left, 0 when it is gone."""
        self.expire()
        held = self.leases.get(id)
        if held is None:
            return 0.0
        held.ends_ns = self.world.boot_ns() + held.ttl_ns
        return held.ttl_ns / _NS

    def revoke(self, id: int) -> None:
        """End a lease and delete its keys, all in one revision."""
        held = self.leases.pop(id, None)
        if held is not None:
            living = (self.at(key, self.revision) for key in sorted(held.keys, key=base.to_bytes))
            self._seal([self._delete(kv) for kv in living if kv is not None])

    def expire(self) -> None:
        """End the leases that are over."""
        now = self.world.boot_ns()
        while self._ends and self._ends[0][0] <= now:
            _, id = heapq.heappop(self._ends)
            held = self.leases.get(id)
            if held is None:
                continue
            if held.ends_ns <= now:
                self.revoke(id)
            else:
                heapq.heappush(self._ends, (held.ends_ns, id))

    def _arm(self) -> None:
        """See to it that `expire` runs when the next lease may be over."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._ends:
            wait_ns = max(self._ends[0][0] - self.world.boot_ns(), 0)
            self._timer = asyncio.get_running_loop().call_later(wait_ns / _NS + 0.001, self._ring)

    def _ring(self) -> None:
        self.expire()
        self._arm()
