"""The control loop: wake → snapshot → decide → commit. Every replica runs it, all the time.

Correctness needs no leader: each commit compares what it was decided on, so two loops at once end in "it had already
happened". For thrift, the replica that started first acts at once, and the others only on what it has left standing
for a while: so conflicts are rare and nothing waits for a dead replica for long.

    place    a change has come and instances wait, or    plan, one transaction per node
             a pause after a refusal is over
    watch    every half second, nodes every five         spans that are over: withdraw, re-place, fail, forget, order
    sweep    hourly                                      lengthen the history chain, compact, remove what nothing needs

Nothing is decided while the mirror is not ready, and then every observation starts over (safety S9).
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence

from covey import errors, model, observe
from covey import world as worlds
from covey.controller import hosts, observation, waiting, watchlist
from covey.decide import deadlines, placement, retention
from covey.store import base, commit, commit_adopt, commit_cloud, commit_instances, commit_nodes, mirror, schema, view

_NS = 1_000_000_000
_TICK_S = 0.5
_FROZEN_NS = 2 * _NS  # a loop that slept longer than this may have missed anything (safety S24)
_TURN_NS = 1 * _NS
_NODES_NS = 5 * _NS  # between two looks at every node
_SECOND_TURN_S = 0.3  # how long other replicas leave waiting instances to the first
_PATIENCE_NS = 1 * _NS
_PAUSE_S = 0.2
_PER_NODE = 25  # placements in one transaction
_AT_ONCE = 64
_FORGOTTEN = 20  # instances in one transaction: each may need four operations
_CATCH_UP_S = 1.0
_SAMPLE_NS = 60 * _NS
_HOUR_NS = 3600 * _NS
_PAGE = 1000

_log = observe.log("loop")


class Loop:
    """One replica's loops. `me` is this controller's id; `spans` come from the settings."""

    def __init__(
        self,
        copy: mirror.Mirror,
        writer: commit.Writer,
        world: worlds.World,
        *,
        me: str,
        queue: waiting.Waiting | None = None,
        spans: deadlines.Spans = deadlines.Spans(),  # noqa: B008 - immutable
    ) -> None:
        self._mirror = copy
        self._writer = writer
        self._world = world
        self._me = me
        self._spans = spans
        self._waiting = queue or waiting.Waiting(world, hosts.Fleet())
        self._fleet = self._waiting.fleet
        self._observed = observation.Observation()
        self._observed_nodes: deadlines.Observed = {}
        self._nodes_looked_ns = -_NODES_NS
        self._pause_ends_ns: int | None = None
        self._nap: asyncio.Timeout | None = None
        self._look_again = False
        self._samples: list[retention.Sample] = []

    @property
    def silent(self) -> frozenset[str]:
        """Nodes whose messages stand still although their lease lives (safety S8)."""
        return self._fleet.silent

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._repeat("place", self._place_forever))
            group.create_task(self._repeat("watch", self._watch_forever))
            group.create_task(self._repeat("sweep", self._sweep_forever))

    async def _repeat(self, name: str, body: Callable[[], Awaitable[None]]) -> None:
        """The one place where the loop's faults are caught: say it, pause, read everything anew."""
        while True:
            try:
                await body()
            except errors.CoveyError as error:
                _log.warning("a turn failed", turn=name, error=str(error))
            await asyncio.sleep(_PAUSE_S)

    # ---- placing

    async def _place_forever(self) -> None:
        after = 0
        while True:
            after = await self._change(after)
            self._pause_ends_ns = None
            if not self._mirror.ready:
                await asyncio.sleep(_PAUSE_S)
                after = 0
                self._waiting.forget()
            elif self._mirror.waiting_count() == 0:
                self._waiting.forget()
            else:
                after = await self._place(self._mirror.snapshot())

    async def _change(self, after: int) -> int:
        """Wait for a change after this revision, or for what no change announces: the end of a pause, and that a node
        counts as silent or does so no longer."""
        left_s = None if self._pause_ends_ns is None else (self._pause_ends_ns - self._world.boot_ns()) / _NS
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0 if self._look_again else left_s) as self._nap:
                after = await self._mirror.changed(after)
        self._nap, self._look_again = None, False
        return after

    def _wake(self) -> None:
        """Plan again although the store has not changed."""
        self._look_again = True
        if self._nap is not None and not self._nap.expired():
            self._nap.reschedule(asyncio.get_running_loop().time())

    async def _place(self, snapshot: view.Snapshot) -> int:
        """Plan once and commit it; answers with the revision after whose change to plan again."""
        if not self._first(snapshot):
            await asyncio.sleep(_SECOND_TURN_S)
            standing = self._mirror.snapshot()
            old = {kept.noun.id for kept in snapshot.waiting()}
            if not any(kept.noun.id in old for kept in standing.waiting()):
                return snapshot.revision
            snapshot = standing
        begun_ns = self._world.boot_ns()
        plan = self._waiting.plan(snapshot)
        spent_ns = self._world.boot_ns() - begun_ns
        self._pause_ends_ns = plan.pause_ends_ns
        revision = await self._commit_places(snapshot, plan.decisions)
        await asyncio.sleep(2 * spent_ns / _NS)  # never more than a third of the time is spent on planning
        return max(revision, snapshot.revision)

    async def _commit_places(self, snapshot: view.Snapshot, plan: list[placement.Place | placement.Wait]) -> int:
        """One transaction per node. Answers with the newest revision made, once the mirror shows it."""
        by_node: dict[model.NodeId, list[model.InstanceId]] = {}
        for decision in plan:
            if isinstance(decision, placement.Place):
                by_node.setdefault(decision.node, []).append(decision.instance)
        results = await _all(
            functools.partial(commit_instances.place, self._writer, snapshot, node, ids[:_PER_NODE])
            for node, ids in by_node.items()
        )
        made = [result for result in results if isinstance(result, int)]
        if made:
            _log.debug("placed", instances=sum(map(len, by_node.values())), nodes=len(by_node))
            await self._seen(max(made))
        elif by_node:
            await self._seen(snapshot.revision + 1)
        whole = len(made) == len(by_node) and all(len(ids) <= _PER_NODE for ids in by_node.values())
        return self._mirror.revision if whole and by_node else 0 if by_node else snapshot.revision

    async def _seen(self, revision: int) -> None:
        """Wait until the mirror shows a write, so that the next decision is not made without it; but not for ever."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CATCH_UP_S):
                await self._mirror.reached(revision)

    def _first(self, snapshot: view.Snapshot) -> bool:
        """Whether this replica has the first turn: the oldest one alive has."""
        oldest = min(snapshot.controllers(), key=lambda kept: (kept.created, kept.noun.id), default=None)
        return oldest is None or oldest.noun.id == self._me

    # ---- deadlines

    async def _watch_forever(self) -> None:
        self._observed.forget()
        self._observed_nodes = {}
        last_ns = self._world.boot_ns()
        while True:
            await asyncio.sleep(_TICK_S)
            now_ns = self._world.boot_ns()
            if not self._mirror.ready or now_ns - last_ns > _FROZEN_NS:
                self._observed.forget()  # not ready all the while: every span starts over
                self._observed_nodes = {}
            last_ns = now_ns
            if self._mirror.ready:
                await self._watch(self._mirror.snapshot(), now_ns)

    async def _watch(self, snapshot: view.Snapshot, now_ns: int) -> None:
        self._observed.look(snapshot, now_ns)
        patience_ns = 0 if self._first(snapshot) else _PATIENCE_NS
        mine = self._observed.ripe(self._spans, now_ns, patience_ns)
        if now_ns - self._nodes_looked_ns >= min(_NODES_NS, self._spans.silent_ns // 20):
            mine += self._watch_nodes(snapshot, now_ns, patience_ns)
        spent = [thing.id for thing in mine if thing.kind == deadlines.Kind.TERMINATED]
        rest = [thing for thing in mine if thing.kind != deadlines.Kind.TERMINATED]
        works: list[Callable[[], Awaitable[object]]] = [
            *(functools.partial(self._replace, snapshot, kept) for kept in watchlist.stranded(snapshot, self.silent)),
            *(functools.partial(self._act, snapshot, thing) for thing in sorted(rest, key=_can_wait)),
            *(
                functools.partial(self._forget, snapshot, spent[start : start + _FORGOTTEN])
                for start in range(0, len(spent), _FORGOTTEN)
            ),
            *(functools.partial(self._give_up, snapshot, kept) for kept in watchlist.hopeless(snapshot)),
            *(functools.partial(self._clear, snapshot, id) for id in watchlist.unfinished_removals(snapshot)),
        ]
        in_time = functools.partial(self._in_time, now_ns + _TURN_NS)
        try:
            await _all(functools.partial(in_time, work) for work in works)
        except errors.CoveyError as error:  # of one of them, perhaps for ever: the others' spans must not start over
            _log.warning("a turn failed", turn="watch", error=str(error))

    def _watch_nodes(self, snapshot: view.Snapshot, now_ns: int, patience_ns: int) -> list[deadlines.Thing]:
        """Note which nodes are silent; answers with the instances that are lost with theirs."""
        self._nodes_looked_ns = now_ns
        self._observed_nodes = deadlines.observe(self._observed_nodes, watchlist.nodes(snapshot, self.silent), now_ns)
        self._note_silent(deadlines.ripe(self._observed_nodes, self._spans, now_ns))
        over = deadlines.ripe(self._observed_nodes, self._spans, now_ns, patience_ns)
        return [thing for thing in over if thing.kind == deadlines.Kind.LOST]

    async def _in_time(self, end_ns: int, work: Callable[[], Awaitable[object]]) -> object:
        """What a turn does not get to is left to the next one: a turn that lasted long would count as frozen."""
        return await work() if self._world.boot_ns() < end_ns else None

    def _note_silent(self, over: list[deadlines.Thing]) -> None:
        silent = frozenset(thing.id for thing in over if thing.kind == deadlines.Kind.SILENT)
        for id in silent - self.silent:
            _log.warning("a node is silent although its lease lives", node=id)
        if silent != self.silent:
            self._fleet.silent = silent
            self._wake()

    async def _replace(self, snapshot: view.Snapshot, kept: commit_instances.Instance) -> object:
        """Its node is lost before it was launched: it waits for another one."""
        decision = model.Decision(who=self._writer.who, why="Its node was lost before the VM ran")
        return await commit_instances.withdraw(self._writer, snapshot, kept, decision, node_lost=True)

    async def _give_up(self, snapshot: view.Snapshot, kept: commit_instances.Instance) -> object:
        return await commit_instances.fail(self._writer, snapshot, kept, "The node asked for was removed")

    async def _forget(self, snapshot: view.Snapshot, ids: Sequence[str]) -> object:
        found = [kept for id in ids if (kept := snapshot.instance(id)) is not None]
        return await commit_instances.forget(self._writer, snapshot, found)

    async def _clear(self, snapshot: view.Snapshot, node: str) -> object:
        return await commit_nodes.clear_removed(self._writer, snapshot, model.NodeId(node), self._writer.who)

    async def _act(self, snapshot: view.Snapshot, thing: deadlines.Thing) -> object:
        """What follows when a span is over."""
        if thing.kind == deadlines.Kind.UNWANTED:
            decision = model.Decision(who=self._writer.who, why="no instance wants this VM")
            return await commit_nodes.order(
                self._writer,
                snapshot,
                model.NodeId(thing.node),
                model.InstanceId(thing.id),
                thing.epoch,
                decision,
            )
        if thing.kind == deadlines.Kind.BREAK:
            return await commit_adopt.settle(self._writer, snapshot)
        kept = snapshot.instance(thing.id)
        if kept is None:
            return None
        match thing.kind:
            case deadlines.Kind.UNACKNOWLEDGED:
                decision = model.Decision(who=self._writer.who, why="Its node did not acknowledge the placement")
                return await commit_instances.withdraw(self._writer, snapshot, kept, decision)
            case deadlines.Kind.STALLED:
                decision = model.Decision(who=self._writer.who, why="Its node shows no progress with it")
                return await commit_instances.withdraw(self._writer, snapshot, kept, decision)
            case deadlines.Kind.WAITING:
                return await commit_instances.age(self._writer, snapshot, kept)
            case deadlines.Kind.LOST:
                return await commit_instances.fail(self._writer, snapshot, kept, "Its node was not heard of for a day")
            case deadlines.Kind.ERROR:
                decision = model.Decision(who=self._writer.who, why="it was in Error for a day")
                return await commit_instances.reap(self._writer, snapshot, kept, decision)
        return None

    # ---- retention

    async def _sweep_forever(self) -> None:
        swept_ns = self._world.boot_ns()
        while True:
            await asyncio.sleep(_SAMPLE_NS / _NS)
            now_ns = self._world.boot_ns()
            if not self._mirror.ready:
                continue
            snapshot = self._mirror.snapshot()
            self._samples = retention.trimmed([*self._samples, (snapshot.revision, now_ns)], now_ns)
            if not self._first(snapshot):
                continue
            await self._compact(now_ns)
            if now_ns - swept_ns >= _HOUR_NS:
                swept_ns = now_ns
                await commit_cloud.add_nonce(self._writer)
                snapshot = await self._mirror.fresh()
                await commit_cloud.sweep(self._writer, snapshot, await commit_cloud.old_nonces(self._writer))
                await sweep(self._writer, snapshot)

    async def _compact(self, now_ns: int) -> None:
        """Drop history older than a quarter of an hour, if there is any that this process knows the age of (S28)."""
        revision = retention.compact_to(self._samples, now_ns)
        if revision:
            await self._writer.store.compact(revision)


def _can_wait(thing: deadlines.Thing) -> bool:
    """What thousands may come to at the same moment, and nobody is in a hurry for."""
    return thing.kind == deadlines.Kind.WAITING


async def sweep(writer: commit.Writer, snapshot: view.Snapshot) -> int:
    """Remove scripts and outputs without an instance, and remembered requests beyond the limit. Answers with how many
    keys went."""
    done = 0
    users: Mapping[str, Callable[[str], int]] = {
        schema.SCRIPTS: lambda key: snapshot.script_users(schema.tail(key)),
        schema.OUTPUTS: lambda key: int(snapshot.instance(key.split("/")[-2]) is not None),
    }
    for prefix, count in users.items():
        async for kvs in _pages(writer.store, prefix):
            useless = [kv for kv in kvs if retention.unreferenced(count(kv.key), kv.mod_revision, snapshot.revision)]
            done += await commit_cloud.sweep(writer, snapshot, useless)
    for prefix in (schema.KEYS, schema.TWINS):
        total = (await writer.store.range(prefix, base.prefix_end(prefix), count_only=True)).total
        excess = retention.beyond_limit(total)
        if excess:
            page = await writer.store.range(
                prefix, base.prefix_end(prefix), limit=excess, keys_only=True, oldest_first=True
            )
            done += await commit_cloud.sweep(writer, snapshot, page.kvs)
    return done


async def _pages(store: base.Store, prefix: str) -> AsyncIterator[tuple[base.Kv, ...]]:
    """The keys below a prefix, without their values, page by page."""
    key = prefix
    while True:
        page = await store.range(key, base.prefix_end(prefix), limit=_PAGE, keys_only=True)
        yield page.kvs
        if not page.more:
            return
        key = page.kvs[-1].key + "\0"


async def _all(works: Iterable[Callable[[], Awaitable[object]]]) -> list[object]:
    """Do them all, some at once, and raise the first fault only when all have ended."""
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(work: Callable[[], Awaitable[object]]) -> object:
        async with gate:
            return await work()

    results = await asyncio.gather(*(one(work) for work in works), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return list(results)
