"""The mirror: a copy of the store in this process, fed by a watch (safety S20, S21).

    list the whole prefix at one pinned revision ─► watch the whole key space from the next one, for ever
                     ▲                                             │ compacted: list again
                     └─────────────────────────────────────────────┘

The watch covers the whole key space because then every revision of the store is delivered, and "the mirror has
reached revision R" is a fact and not a guess from silence. Whole revisions are applied, never parts.

What ends in a guarded write need not ask first: its guards are compared in the store with what it was decided on. It
may begin from the copy as it stands (`current`), as long as the mirror is ready.

A request that must see every write answered before it (promise I6) calls `fresh`. It shares one linearizable read
that is *sent after it arrived* with all requests that wait at that moment, then waits until the mirror has reached
that read's revision. If that takes longer than 300 ms the answer comes from the store directly, once for all who
wait, and bounded; else it is Unavailable.

`ready` says whether such reads succeed and the watch keeps up. It decides nothing by itself; when it is false a
controller turns red, answers parked polls, and renews no agent's lease.

The store may be restored from a backup at any time (safety S18). A read that contradicts what was read before is a
proof: its revision went back, its cluster id is another one, or the copy lacks the newest break. The copy is then
thrown away and listed anew. Before the mirror is ready again, after that or after any other trouble, `prove` compares
the store with its own past and enters the break. What was listed without the newest break is then listed once more.
"""

import asyncio
import collections
import contextlib
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from typing import Any

from covey import errors, observe, wire
from covey import world as worlds
from covey.decide import permission
from covey.store import base, schema, view

_MS = 1_000_000
REACH_NS = 300 * _MS  # a mirror that is further behind is not waited for
LAG_NS = 2000 * _MS  # behind the reads for so long: reopen the watch, turn red
PROVED_NS = 2000 * _MS  # how old the last proof of the store may be (safety S25)
_PROBE_S = 0.5
_PROVE_S = 10.0
_RETRY_S = 0.2
_PAGE = 1000
_DIRECT_KEYS = 50_000
_DIRECT_S = 2.0
_SPACE_S = 0.02  # from one read to the next, when each answers several
_SEVERAL = 4
_READ_S = 3.0  # an election ends sooner; without a quorum the request is better off with another controller

_log = observe.log("mirror")


Prove = Callable[[str, Sequence[permission.Link]], Awaitable[object]]  # why, and the chain known before


class Mirror:
    """Run `run` as a task; read through `fresh` and `snapshot`. `prove` is called whenever the mirror would be ready
    again; without it nothing is compared with the past. `tell` hears of nodes whose wanted state may have changed."""

    def __init__(
        self,
        store: base.Store,
        world: worlds.World,
        prove: Prove | None = None,
        tell: Callable[[Collection[str]], object] = len,
    ) -> None:
        self._store = store
        self._world = world
        self._prove = prove
        self._tell = tell
        self._proven = prove is None
        self._reds = 0  # how often a trouble was seen
        self._broke = ""  # why the store is not the one that was read before; "" once that is entered
        self._before: tuple[permission.Link, ...] = ()  # the chain as it was known then
        self._discarded = 0  # the revision of the copy that was thrown away last
        self._listed_with: base.Kv | None = None  # the newest break in the last listing
        self._draft = view.Draft()
        self._snapshot: view.Snapshot | None = None
        self._listed = asyncio.Event()
        self._moved = _Bell()
        self._nodes: dict[str, _Bell] = {}
        self._node_moved: dict[str, int] = {}  # node -> revision at which its wanted state may have changed last
        self._proof = _SharedRead(store, world, lambda: self._draft.revision, self._distrust)
        self._targets: collections.deque[tuple[int, int]] = collections.deque()  # (revision shown by a probe, when)
        self._direct: asyncio.Task[view.Snapshot] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._opened_ns = 0  # when the watch was opened last
        self._proving: asyncio.Task[None] | None = None

    # ---- reading

    @property
    def revision(self) -> int:
        return self._draft.revision

    def waiting_count(self) -> int:
        """How many instances wait for a node, without the price of a snapshot."""
        return self._draft.waiting_count()

    @property
    def format(self) -> int:
        """Of the store; 0: not known yet."""
        return self._draft.format

    @property
    def broken(self) -> dict[str, str]:
        """Keys whose values are no nouns of ours."""
        return dict(self._draft.broken)

    def snapshot(self) -> view.Snapshot:
        """The cloud as this process knows it now: for loops, which may be late; requests call `fresh`."""
        if self._snapshot is None:
            self._snapshot = self._draft.freeze()
        return self._snapshot

    async def fresh(self) -> view.Snapshot:
        """A snapshot that shows every write answered before this call (promise I6). Raises Unavailable."""
        revision = await self._proof.read()
        late = False
        if self._draft.revision < revision or not self._listed.is_set():
            try:
                async with asyncio.timeout(REACH_NS / 1e9):
                    await self.reached(revision)
            except TimeoutError:
                late = True
        self._check_break()
        if self._broke:
            raise errors.Unavailable(self.trouble)
        return await self._directly(revision) if late else self.snapshot()

    async def current(self) -> view.Snapshot:
        """For a decision that a guarded transaction carries or proves (`Writer.run` with `sure`): a snapshot that may
        lack the newest writes. Raises Unavailable."""
        return self.snapshot() if self.ready else await self.fresh()

    async def seen_at(self, revision: int) -> wire.Seen:
        """The view of `revision`, which a write of this process made, as an agent remembers it (safety S18). Raises
        Unavailable when the mirror does not get there soon."""
        try:
            async with asyncio.timeout(_DIRECT_S):
                await self.reached(revision)
        except TimeoutError as error:
            raise errors.Unavailable("the copy of the store is late") from error
        return wire.Seen(history=permission.newest(self._draft.chain, revision), revision=revision)

    async def reached(self, revision: int) -> None:
        """Wait until the mirror shows `revision`."""
        while self._draft.revision < revision or not self._listed.is_set():
            await self._moved.wait()

    # ---- waking

    async def changed(self, after: int) -> int:
        """Wait until anything has changed after revision `after`; answers with the mirror's revision."""
        while self._draft.revision <= after and not self._is_discarded(after):
            await self._moved.wait()
        return self._draft.revision

    async def node_changed(self, node: str, after: int) -> None:
        """Wait until what one node should do may have changed after revision `after`."""
        bell = self._nodes.setdefault(node, _Bell())
        while not self.has_node_changed(node, after):
            await bell.wait()

    def has_node_changed(self, node: str, after: int) -> bool:
        """Whether that has happened; when it does later, `tell` is called."""
        return self._node_moved.get(node, 0) > after or self._is_discarded(after)

    def _is_discarded(self, revision: int) -> bool:
        """Whether the revision is of a copy that was thrown away: everything has changed since."""
        return self._draft.revision < revision <= self._discarded

    # ---- health

    @property
    def listed(self) -> bool:
        """Whether the first listing is done."""
        return self._listed.is_set()

    @property
    def ready(self) -> bool:
        """Whether the store was proved within 2 s and the watch keeps up with it (safety S21, S25)."""
        return self.trouble == ""

    @property
    def trouble(self) -> str:
        """Why the mirror is not ready, or "" when it is. Whoever hears of a trouble makes it last until the store's
        history is proved again."""
        why = self._trouble_of_store()
        if why:
            self._reds += 1
            self._proven = self._prove is None
        elif not self._proven:
            return f"the store was restored: {self._broke}" if self._broke else "the store's history is not proved yet"
        return why

    def _trouble_of_store(self) -> str:
        now_ns = self._world.boot_ns()
        if not self._listed.is_set():
            return "the store was not listed yet"
        if now_ns - self._proof.proved_ns > PROVED_NS:
            return "the store does not answer"
        if self.lag_ns > LAG_NS:
            return f"the watch is {self.lag_ns / 1e9:.1f} s behind the store"
        return ""

    @property
    def lag_ns(self) -> int:
        """For how long the mirror has been behind what a probe showed."""
        while self._targets and self._targets[0][0] <= self._draft.revision:
            self._targets.popleft()
        return self._world.boot_ns() - self._targets[0][1] if self._targets else 0

    def doubt(self) -> None:
        """The process was frozen (safety S24): nothing that was proved before counts."""
        self._proof.proved_ns = -PROVED_NS
        self._distrust("this process stood still", proof=False)

    # ---- feeding

    async def run(self) -> None:
        """Feed the mirror until cancelled."""
        probing = asyncio.create_task(self._probe())
        try:
            while True:
                try:
                    if not self._listed.is_set():
                        await self._list()
                    await self._follow()
                except errors.Compacted as error:
                    _log.info("the watch fell behind a compaction: listing again", revision=error.revision)
                    self._listed.clear()
                except errors.StoreError as error:
                    _log.warning("the store cannot be followed", error=str(error))
                    await asyncio.sleep(_RETRY_S)
        finally:
            for task in (probing, self._proving):
                if task is not None:
                    await _end(task)

    async def _list(self) -> None:
        """Replace the copy by a listing at one revision; what differs wakes those who wait for it."""
        new, old = await listing(self._store), self._draft
        if old.chain and permission.newest(new.chain, old.revision) != old.history:
            self._distrust("the newest nonce is not in its history")
        if new.revision < old.revision:
            self._distrust(f"its revision went back from {old.revision} to {new.revision}")
            self._discarded = old.revision
        if self._broke:
            self._proof.forget()
            self._targets.clear()
            if self._prove is None:
                self._broke = ""
        self._draft, self._listed_with = new, new.broke
        self._draft.touched |= old.touched | {*old.node_ids(), *self._draft.node_ids()}
        self._listed.set()
        self._ring()

    async def _follow(self) -> None:
        """Apply the watch from the revision after the copy's, until it ends or falls behind the reads."""
        self._watching = asyncio.create_task(self._apply_all())
        self._opened_ns = self._world.boot_ns()
        try:
            await self._watching
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise
            _log.warning("the watch is behind the store: opening it again", revision=self._draft.revision)
        finally:
            await _end(self._watching)
            self._watching = None

    async def _apply_all(self) -> None:
        batches = self._store.watch(base.EVERYTHING, base.EVERYTHING, self._draft.revision + 1)
        async with contextlib.aclosing(batches) as following:  # type: ignore[type-var]
            async for batch in following:
                if batch.revision <= self._draft.revision:
                    continue
                for change in batch.changes:
                    self._draft.apply(change)
                self._draft.revision = batch.revision
                self._ring()

    def _ring(self) -> None:
        """A whole revision was applied: forget the old snapshot and wake whoever waits for it."""
        self._snapshot = None
        for node in self._draft.touched:
            self._node_moved[node] = self._draft.revision
            bell = self._nodes.get(node)
            if bell is not None:
                bell.ring()
        self._tell(self._draft.touched)
        self._draft.touched.clear()
        self._moved.ring()

    async def _probe(self) -> None:
        """Prove the store every half second, and have a watch that is behind it opened again."""
        while True:
            with contextlib.suppress(errors.StoreError):
                revision = await self._proof.read()
                if revision > self._draft.revision and (not self._targets or revision > self._targets[-1][0]):
                    self._targets.append((revision, self._world.boot_ns()))
                self._check_break()
            self._prove_soon()
            if self._watching is not None and self.lag_ns > LAG_NS < self._world.boot_ns() - self._opened_ns:
                self._watching.cancel()  # red until what replaces it has caught up
            await asyncio.sleep(_PROBE_S)

    def _distrust(self, why: str, *, proof: bool = True) -> None:
        """The store is not, or may not be, what was read before: nothing is served until that is cleared up."""
        self._reds += 1
        self._proven = self._prove is None
        if not proof:
            return
        if not self._broke:
            _log.warning("the store was restored: its copy is thrown away", why=why, revision=self._draft.revision)
            self._broke, self._before = why, self._draft.chain
        self._list_again()

    def _list_again(self) -> None:
        self._listed.clear()
        if self._watching is not None:
            self._watching.cancel()

    def _check_break(self) -> None:
        """A copy that reaches as far as a break which a read saw, and has another one or none, was not made from the
        store of that read: it has overtaken the copy since a restore. Unless the copy's own break is newer than the
        read. Breaks are told apart by name: two may stand at one revision, when one backup was restored twice."""
        read, had = self._proof.broke, self._draft.broke
        if not self._listed.is_set() or view.is_same_break(read, had):
            return
        if _at(read) <= self._draft.revision and _at(had) <= self._proof.revision:
            self._distrust("it has a break that its copy lacks")

    def _prove_soon(self) -> None:
        """After any trouble: compare the store with its past, and enter the break, before this process is ready. That
        may take longer than a proof of health lasts: probes go on meanwhile."""
        if self._proven or self._prove is None or self._trouble_of_store():
            return
        if self._proving is None or self._proving.done():
            self._proving = asyncio.create_task(self._prove_again(self._prove))

    async def _prove_again(self, prove: Prove) -> None:
        reds = self._reds
        try:
            async with asyncio.timeout(_PROVE_S):
                await prove(self._broke, self._before)
                await self._proof.read()
        except (TimeoutError, errors.CoveyError) as error:
            _log.info("the store's history could not be proved; trying again", why=str(error))
            return
        if reds == self._reds:
            self._proven, self._broke = True, ""
            if not view.is_same_break(self._proof.broke, self._listed_with):  # listed before the break was entered
                self._list_again()

    async def _directly(self, revision: int) -> view.Snapshot:
        """The mirror is late: read everything from the store, one read for all who ask meanwhile. One that had begun
        before may lack what this request must show; then the next one is waited for."""
        for _ in range(2):
            if self._direct is None or self._direct.done():
                self._direct = asyncio.create_task(_bounded_listing(self._store))
                self._direct.add_done_callback(_seen)
            snapshot = await asyncio.shield(self._direct)
            if snapshot.revision >= revision:
                return snapshot
        raise errors.Unavailable("the copy of the store is late")


async def _bounded_listing(store: base.Store) -> view.Snapshot:
    try:
        async with asyncio.timeout(_DIRECT_S):
            return (await listing(store, limit=_DIRECT_KEYS)).freeze()
    except TimeoutError as error:
        raise errors.Unavailable("the copy of the store is late, and reading it directly took too long") from error


async def listing(store: base.Store, limit: int = 0) -> view.Draft:
    """Everything below the prefix as of one revision. Raises Compacted, Unavailable."""
    draft = view.Draft()
    revision = total = 0
    for part in schema.MIRRORED:
        key, end = part, base.prefix_end(part)
        while True:
            page = await store.range(key, end, limit=_PAGE, revision=revision)
            revision = revision or page.revision
            for kv in page.kvs:
                draft.apply(base.Change(kv.key, kv))
            total += len(page.kvs)
            if limit and total > limit:
                raise errors.Unavailable("the copy of the store is late, and it is too large to read directly")
            if not page.more:
                break
            key = page.kvs[-1].key + "\0"
    draft.revision = revision
    return draft


class _Bell:
    """Wakes everyone who waits at the moment it rings."""

    __slots__ = ("_waiter",)

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        if self._waiter is None:
            self._waiter = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._waiter)

    def ring(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        self._waiter = None


class _SharedRead:
    """One linearizable read for all requests that arrived before it was sent (safety S21).

    Each read is sent after the one before was answered, so the revision never goes back behind that, nor behind what a
    watch has delivered (`floor`); nor does the term, but for an election under way; in one and the same store the
    cluster id stays. `distrust` is told otherwise (safety S18)."""

    def __init__(
        self, store: base.Store, world: worlds.World, floor: Callable[[], int], distrust: Callable[..., None]
    ) -> None:
        self._store = store
        self._world = world
        self._floor = floor
        self._distrust = distrust
        self._term = 0
        self._cluster = ""
        self.broke: base.Kv | None = None  # the newest break at `revision`
        self._next: _Round | None = None
        self._last: _Round | None = None
        self.proved_ns = -PROVED_NS  # when the newest successful read was sent
        self.revision = 0

    async def read(self) -> int:
        """The store's revision, read after this call began. Raises Unavailable, after `_READ_S` at the latest."""
        if self._next is None or self._next.asking.done():  # done before it was sent: it was broken off
            self._next = _Round(self._read_after(self._last))
        return await self._next.wait()

    async def _read_after(self, before: "_Round | None") -> int:
        if before is not None and not before.asking.done():
            await asyncio.wait((before.asking,))
        if before is not None and before.count >= _SEVERAL:
            await asyncio.sleep(before.sent_s + _SPACE_S - asyncio.get_running_loop().time())
        self._last, self._next = self._next, None  # from here on, who comes waits for another one
        if self._last is not None:
            self._last.sent_s = asyncio.get_running_loop().time()
        sent_ns = self._world.boot_ns()
        floor = max(self.revision, self._floor())
        page = await self._store.range(schema.BREAK)
        self._judge(page, floor)
        self.proved_ns = max(self.proved_ns, sent_ns)
        self.revision = page.revision
        self.broke = page.kvs[0] if page.kvs else None
        return page.revision

    def forget(self) -> None:
        """What was read before is of another history."""
        self.revision = self._term = 0
        self.broke, self._cluster = None, ""

    def _judge(self, page: base.Page, floor: int) -> None:
        """Raises Unavailable when this cannot be the store that was read before."""
        why = ""
        if page.revision < floor:
            why = f"its revision went back from {floor} to {page.revision}"
        elif self._cluster and page.cluster and page.cluster != self._cluster:
            why = f"its cluster id is {page.cluster}, and was {self._cluster}"
        elif page.term < self._term:
            self._distrust(f"its raft term went back from {self._term} to {page.term}", proof=False)
        if why:
            self._distrust(why)
            raise errors.Unavailable(f"the store was restored: {why}")
        self._term, self._cluster = page.term, page.cluster or self._cluster


class _Round:
    """One read, and those who wait for it, each for `_READ_S` at most. A waiter costs a future and nothing else: there
    are thousands a second."""

    def __init__(self, read: Coroutine[Any, Any, int]) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: list[tuple[float, asyncio.Future[int]]] = []  # since when
        self.count = 0  # how many wait, or waited
        self.sent_s = 0.0  # on the loop's clock
        self.asking = self._loop.create_task(read)
        self.asking.add_done_callback(self._answer)
        self._patience = self._loop.call_later(_READ_S, self._give_up)

    async def wait(self) -> int:
        self.count += 1
        mine: asyncio.Future[int] = self._loop.create_future()
        self._waiting.append((self._loop.time(), mine))
        return await mine

    def _answer(self, task: "asyncio.Task[int]") -> None:
        """Each waiter gets the answer, or an exception of its own."""
        self._patience.cancel()
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        for _, one in self._waiting:
            if one.done():
                continue
            if error is None:
                one.set_result(task.result())
            elif isinstance(error, errors.CoveyError):
                one.set_exception(type(error)(*error.args))
            else:
                one.set_exception(errors.Unavailable(f"the read broke off: {error!r}"))

    def _give_up(self) -> None:
        """The read goes on, for those who came later."""
        over_s = self._loop.time() - _READ_S
        for since_s, one in self._waiting:
            if since_s <= over_s and not one.done():
                one.set_exception(errors.Unavailable("the store does not answer"))
        self._waiting = [(since_s, one) for since_s, one in self._waiting if since_s > over_s]
        next_s = self._waiting[0][0] + _READ_S - self._loop.time() if self._waiting else _READ_S
        self._patience = self._loop.call_later(max(next_s, 0.001), self._give_up)


def _at(kv: base.Kv | None) -> int:
    return 0 if kv is None else kv.mod_revision


def _seen(task: "asyncio.Task[Any]") -> None:
    """Whoever still waits gets the exception; when nobody does any more, it is not worth a complaint."""
    if not task.cancelled():
        task.exception()


async def _end(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
