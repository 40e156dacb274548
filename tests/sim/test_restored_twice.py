"""One backup is restored twice while a controller is cut off: it must find out, although no revision contradicts it.

Both breaks stand at one revision, for a break is the first thing that is written to a restored store. By the time the
controller comes back the store has overtaken its copy. A node that reaches no other controller is held all the same,
and tells the store what it runs (safety S18, S19).
"""

import asyncio
import multiprocessing
from collections import Counter

from covey import model
from covey.store import base, memory, schema
from tests.sim import clockwork, story

SETTLED_S = 120.0


class Twice(story.Story):
    def __init__(self) -> None:
        super().__init__(replicas=2, hosts=2, clients=1)

    async def _live(self, world: clockwork.World) -> Counter[str]:
        self._build(world)
        self.weather.clear()
        await self._unless_broken(self._restored_twice())
        return self.truth.counts

    async def _restored_twice(self) -> None:
        await self._until(lambda: "" if self._joined() else "not all have joined", SETTLED_S)
        backup = self.sea.backup()
        self.truth.backed_up()
        for node in self.nodes:
            await self.clients[0].start([node.id])
        await self._until(lambda: self.truth.unsettled(self.nodes), SETTLED_S)
        await self._begin_again(backup)
        await self._until(lambda: self.truth.unsettled(self.nodes), SETTLED_S)
        await self._cut_off(backup)
        await self._until(lambda: self.truth.unsettled(self.nodes), SETTLED_S)
        assert [one.state for one in self.truth.instances.values()].count(model.State.STARTED) >= len(self.nodes)

    def _joined(self) -> bool:
        return all(node.id in self.truth.nodes for node in self.nodes)

    async def _begin_again(self, backup: memory.Backup) -> None:
        """The store is as it was at the backup, under the same names, for long enough that everybody has noticed."""
        self.sea.stop()
        await asyncio.sleep(5.0)
        self.sea.begin_from(backup, cluster="")
        self.truth.restored(self.nodes)

    async def _cut_off(self, backup: memory.Backup) -> None:
        """One controller sees nothing of the second restore, and is the only one that one of the nodes reaches."""
        away, other = self.replicas
        node = self.nodes[0]
        first = await self._break()
        away.line.flaky.partition(True)
        self.net.cuts.update(((node.name, other.name), (other.name, node.name)))
        await self._begin_again(backup)
        assert away.program is not None
        had = away.program._mirror.revision
        while self.sea.data.revision <= had:
            await self.clients[0].start([])
        second = await self._break()
        assert (first.mod_revision, first.value != second.value) == (second.mod_revision, True), "else it shows nothing"
        away.line.flaky.partition(False)

    async def _break(self) -> base.Kv:
        (kv,) = (await self.sea.range(schema.BREAK)).kvs
        return kv


def _live_through() -> None:
    clockwork.run(1, Twice())


def test_a_controller_that_was_cut_off_from_the_second_restore_of_a_backup_finds_out() -> None:
    child = multiprocessing.get_context("spawn").Process(target=_live_through)
    child.start()
    child.join(280)
    child.kill()
    assert child.exitcode == 0
