"""Ten minutes without controllers, store or agents, in virtual time: VMs that were healthy are healthy afterwards.

The rules: no stored time is compared with a clock, a time-out is what one controller saw by itself, ready all the while
(safety S9); a launched instance is never placed again, however long its node was silent (S1). The same with real
processes, in less time: tests/cluster/test_troubles.py.
"""

import asyncio
import multiprocessing
from collections import Counter

import pytest

from covey import model
from tests.sim import clockwork, story

OUTAGE_S = 600.0
SETTLED_S = 120.0
BUSY = 2  # instances, and hosts, each of which has room for one at least


class Outage(story.Story):
    """Some instances run; then what `what` names is away for ten minutes."""

    def __init__(self, what: str) -> None:
        super().__init__(hosts=BUSY)
        self._what = what

    async def _live(self, world: clockwork.World) -> Counter[str]:
        self._build(world)
        self.weather.clear()
        while len(self._started()) < BUSY:
            await asyncio.sleep(2.0)
            if len(self.truth.instances) < BUSY:
                await self.clients[0].start([])
        await self._until(lambda: self.truth.unsettled(self.nodes), SETTLED_S)
        before = self._started()
        await self._away()
        await asyncio.sleep(SETTLED_S)
        await self._until(lambda: self.truth.unsettled(self.nodes), SETTLED_S)
        assert self._started() == before
        assert not self.truth.failed
        assert {(key, phase) for node in self.nodes for key, phase in node.bodies().items()} == {
            ((id, epoch), "running") for id, _, epoch in before
        }
        if self.truth.broken.done():
            self.truth.broken.result()
        return self.truth.counts

    def _started(self) -> set[tuple[str, str, int]]:
        """(instance, node, epoch) of those that run."""
        found = self.truth.instances.values()
        return {(one.id, one.node, one.epoch) for one in found if one.state is model.State.STARTED}

    async def _away(self) -> None:
        processes = [one.process for one in (self.replicas if "controllers" in self._what else self.nodes)]
        if self._what == "controllers are killed":
            for one in self.replicas:
                one.kill()
            await asyncio.sleep(OUTAGE_S)
            for one in self.replicas:
                one.start()
        elif self._what == "the store cannot be reached":
            for one in self.replicas:
                one.line.flaky.partition(True)
            await asyncio.sleep(OUTAGE_S)
            for one in self.replicas:
                one.line.flaky.partition(False)
        else:
            for process in processes:
                process.freeze()
            await asyncio.sleep(OUTAGE_S)
            for process in processes:
                process.thaw()


def _live_through(what: str) -> None:
    clockwork.run(1, Outage(what))


@pytest.mark.parametrize(
    "what", ["controllers are killed", "controllers are frozen", "the store cannot be reached", "agents are frozen"]
)
def test_ten_minutes_away_fail_no_vm(what: str) -> None:
    child = multiprocessing.get_context("spawn").Process(target=_live_through, args=(what,))
    child.start()
    child.join(100)
    child.kill()
    assert child.exitcode == 0
