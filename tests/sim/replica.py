"""One controller of the simulation: the real mirror, commits and loop behind a flaky view of one store in memory.

What HTTP would carry is a method here. `Gone` stands for every connection that fails: the caller cannot know whether
the request was done. A replica can be killed and started again; it keeps nothing.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import Sequence

from covey import errors, model, wire
from covey.controller import hosts, loop, wanted
from covey.decide import deadlines
from covey.store import (
    commit,
    commit_births,
    commit_cloud,
    commit_instances,
    commit_nodes,
    commit_reports,
    memory,
    mirror,
    schema,
    view,
)
from tests.sim import clockwork
from tests.support import flaky

_S = 1_000_000_000
SPANS = deadlines.Spans(terminated_ns=10 * _S, error_ns=120 * _S, unwanted_ns=20 * _S, lost_ns=3600 * _S)


class Gone(Exception):
    """The connection broke, or the replica answered 503: what was asked may or may not have been done."""


class Stale(Exception):
    """409: join again."""


class Replica:
    """`store` is this replica's view of the data; `weather` says what it does to each commit."""

    def __init__(self, name: str, world: clockwork.World, store: memory.Memory, weather: object) -> None:
        self.name = name
        self.world = world
        self.flaky = flaky.Flaky(store, weather)  # type: ignore[arg-type]
        self.up = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """A new process: nothing is known."""
        self.up = True
        self.mirror = mirror.Mirror(self.flaky, self.world)
        self.writer = commit.Writer(self.flaky, self.world, who=self.name)
        self.homes = hosts.Homes(self.world)
        self.loop = loop.Loop(self.mirror, self.writer, self.world, me=self.name, homes=self.homes, spans=SPANS)
        for body in (self.mirror.run, self.loop.run, self._announce):
            self._tasks.append(asyncio.create_task(body()))

    async def kill(self) -> None:
        """As kill -9: whatever it was doing stays as it is."""
        self.up = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def _announce(self) -> None:
        while True:
            with contextlib.suppress(errors.StoreError):
                await commit_cloud.start(self.writer)
                lease = await self.flaky.grant(15)
                noun = schema.Controller(id=self.name, version="", format=schema.FORMAT, url="", started_ns=0)
                await commit_cloud.announce(self.writer, noun, lease)
                await lease.keep_alive()
            await asyncio.sleep(1)

    # ---- people

    async def create(self, ids: Sequence[str], spec: model.Spec, key: str = "") -> tuple[str, ...]:
        """POST /api/v1/vm. Raises Gone."""
        body = hashlib.sha256(repr(spec).encode()).hexdigest()
        start = commit_births.Start(spec=spec, ids=tuple(map(model.InstanceId, ids)), who="user", body=body, key=key)
        try:
            snapshot = await self._fresh()
            with self.homes.reserve(snapshot, spec, len(ids)) as home:
                answer = await commit_births.create(self.writer, snapshot, start, home.nodes)
                if isinstance(answer, commit_births.Created):
                    home.revision = answer.revision
        except errors.StoreError as error:
            raise Gone from error
        assert not isinstance(answer, commit_births.KeyReused), "nobody reuses a key with another body"
        return answer.ids

    async def terminate(self, id: str) -> bool:
        """DELETE /api/v1/vm. False: not found. Raises Gone."""
        decision = model.Decision(who="user", why="terminate request")
        try:
            done = await commit_instances.terminate(self.writer, await self._fresh(), model.InstanceId(id), decision)
        except errors.StoreError as error:
            raise Gone from error
        return not isinstance(done, commit.Missing)

    async def look(self) -> view.Snapshot:
        """GET. Raises Gone."""
        try:
            return await self._fresh()
        except errors.StoreError as error:
            raise Gone from error

    # ---- agents

    async def join(self, ask: wire.Join) -> commit_nodes.Joined:
        try:
            joined = await commit_nodes.join(self.writer, await self._fresh(), ask)
        except errors.StoreError as error:
            raise Gone from error
        assert isinstance(joined, commit_nodes.Joined), joined
        return joined

    async def wanted(self, node: model.NodeId, session: int, tag: str) -> wanted.NodeWants:
        """Parks for 10 s at most."""
        try:
            snapshot = await self._caller(node, session)
            wants = wanted.for_node(snapshot, node)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wire.POLL_LIMIT_S):
                    while wants.tag == tag:
                        await self.mirror.node_changed(node, snapshot.revision)
                        if not self.mirror.ready:
                            raise Gone
                        snapshot = self.mirror.snapshot()
                        wants = wanted.for_node(snapshot, node)
        except errors.StoreError as error:
            raise Gone from error
        return wants

    async def launch(self, node: model.NodeId, session: int, id: str, epoch: int, nonce: str) -> bool:
        try:
            snapshot = await self._caller(node, session)
            answer = await commit_instances.launch(
                self.writer, snapshot, node, session, model.InstanceId(id), epoch, nonce
            )
        except errors.StoreError as error:
            raise Gone from error
        if isinstance(answer, commit_instances.Denied) and answer.stale_session:
            raise Stale
        return isinstance(answer, commit_instances.Granted)

    async def report(
        self, node: model.NodeId, session: int, items: Sequence[wire.Item], word: model.Word | None
    ) -> tuple[int, ...]:
        try:
            snapshot = await self._caller(node, session)
            answer = await commit_reports.report(self.writer, snapshot, node, session, items)
            if isinstance(answer, commit_reports.StaleSession):
                raise Stale
            if word is not None:
                await commit_nodes.say(self.writer, snapshot, node, session, word)
        except errors.StoreError as error:
            raise Gone from error
        return answer.settled

    async def _caller(self, node: model.NodeId, session: int) -> view.Snapshot:
        """Each message renews the lease once (safety S8)."""
        snapshot = await self._fresh()
        life = snapshot.session(node)
        if life is None or life.noun.counter != session:
            raise Stale
        left = await self.flaky.renew([life.noun.lease])
        if left[life.noun.lease] <= 0:
            raise Stale
        return snapshot

    async def _fresh(self) -> view.Snapshot:
        if not self.up:
            raise Gone
        if not self.mirror.ready:
            raise errors.Unavailable(self.mirror.trouble)
        return await self.mirror.fresh()
