"""A cloud of commits over one store in memory, for tests of what a write does.

async with cloud.running() as c:
    node = await c.join()                     # a node that is alive
    id, = await c.create()                    # waits
    await c.place(node, id)
    snapshot = await c.look()                 # as of now, read from the store itself
"""

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from covey import model, wire
from covey import world as worlds
from covey.store import (
    base,
    codec,
    commit,
    commit_births,
    commit_cloud,
    commit_instances,
    commit_nodes,
    commit_reports,
    memory,
    mirror,
    view,
)
from tests.support import flaky, nouns

Said = wire.ReportEvent
WHO = model.Decision(who="tester", why="the test says so")


class Hasty(worlds.System):
    """A clock that can be put forward, so that no test depends on how quick the machine is."""

    ahead_ns = 0

    def boot_ns(self) -> int:
        return super().boot_ns() + self.ahead_ns


class Cloud:
    def __init__(self, store: base.Store, world: worlds.World) -> None:
        self.store = store
        self.flaky = flaky.Flaky(store)
        self.world = world
        self.writer = commit.Writer(self.flaky, world, who="controller-1")

    def until_trouble_ns(self) -> int:
        """The limit of a request whose time is up as soon as the next commit does not go well."""
        clock = self.world
        assert isinstance(clock, Hasty)

        def put_forward(_fate: flaky.Fate) -> None:
            clock.ahead_ns += 60_000_000_000
            self.flaky.on_trouble = lambda _: None

        self.flaky.on_trouble = put_forward
        return clock.boot_ns() + 60_000_000_000

    async def look(self) -> view.Snapshot:
        return (await mirror.listing(self.store)).freeze()

    async def instance(self, id: str) -> model.Instance:
        kept = (await self.look()).instance(id)
        assert kept is not None, f"instance {id} is not there"
        return kept.noun

    async def kept(self, id: str) -> codec.Kept[model.Instance]:
        kept = (await self.look()).instance(id)
        assert kept is not None, f"instance {id} is not there"
        return kept

    async def claims(self, node: str) -> list[tuple[str, int]]:
        ledger = (await self.look()).ledger(node)
        return [] if ledger is None else [(claim.instance, claim.epoch) for claim in ledger.noun.claims]

    async def join(self, **changes: Any) -> model.NodeId:
        joined = await commit_nodes.join(self.writer, await self.look(), nouns.join(**changes))
        assert isinstance(joined, commit_nodes.Joined), joined
        return joined.node.noun.id

    async def create(self, count: int = 1, homes: Sequence[model.NodeId] = (), **changes: Any) -> tuple[str, ...]:
        start = commit_births.Start(
            spec=nouns.spec(**changes), ids=tuple(nouns.instance_id() for _ in range(count)), who="tester"
        )
        created = await commit_births.create(self.writer, await self.look(), start, homes)
        assert isinstance(created, commit_births.Created), created
        return created.ids

    async def place(self, node: str, *ids: str) -> int | commit.Lost:
        return await commit_instances.place(
            self.writer, await self.look(), model.NodeId(node), [model.InstanceId(id) for id in ids]
        )

    async def launch(self, node: str, id: str, epoch: int = 1, nonce: str = "n", session: int = 1) -> object:
        return await commit_instances.launch(
            self.writer, await self.look(), model.NodeId(node), session, model.InstanceId(id), epoch, nonce
        )

    async def report(self, node: str, *items: wire.Item, session: int = 1) -> object:
        return await commit_reports.report(self.writer, await self.look(), model.NodeId(node), session, items)

    async def say(self, node: str, messages: int, *vms: tuple[str, int], session: int = 1) -> object:
        seen = tuple(model.VmSeen(instance=model.InstanceId(id), epoch=epoch, running=True) for id, epoch in vms)
        word = model.Word(node=model.NodeId(node), session=session, messages=messages, at_ns=0, vms=seen)
        return await commit_nodes.say(self.writer, await self.look(), model.NodeId(node), session, word)

    async def terminate(self, id: str) -> commit_instances.Outcome:
        return await commit_instances.terminate(self.writer, await self.look(), model.InstanceId(id), WHO)

    async def started(self, node: str, id: str) -> None:
        """Take a placed instance to Started."""
        await self.launch(node, id)
        await self.report(node, nouns.item(Said.BOOTED, model.InstanceId(id), vm=nouns.vm()))

    async def values(self, prefix: str) -> list[base.Kv]:
        return list((await self.store.range(prefix, base.prefix_end(prefix))).kvs)


@contextlib.asynccontextmanager
async def running(world: worlds.World | None = None) -> AsyncIterator[Cloud]:
    world = world or Hasty()
    cloud = Cloud(memory.Memory(world), world)
    try:
        assert isinstance(await commit_cloud.start(cloud.writer), commit_cloud.Cloud)
        yield cloud
    finally:
        await cloud.writer.close()
        await cloud.flaky.close()
