"""What goes wrong, at random: each fault is a coroutine that begins something, waits, and ends it.

store       commits lost before or after they were applied, or applied late; a controller cut off or deaf; a slow watch;
            lost reads; compaction under a watch; leases that end early or late
network     a node, or a controller, cut off in one direction or both; messages lost; slowness
controllers killed, killed around a commit, frozen, restarted in good order, all away at once; their clocks jump
nodes       agents killed, killed at a failpoint, frozen; power lost; files damaged; a hypervisor that is out of order
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

from tests.sim import network, replica, sea
from tests.sim import node as nodes
from tests.support import flaky

FAILPOINTS = (
    *("agent.accepted", "agent.pulled", "agent.prepared", "agent.granted", "agent.launched", "agent.started"),
    *("agent.answered", "agent.booted", "agent.destroying", "agent.destroyed", "agent.told"),
    *("synthetic.forking", "synthetic.forked", "synthetic.destroy"),
)


class Weather:
    """`bad` 0…1: how likely each single message of the store suffers."""

    def __init__(
        self,
        chance: random.Random,
        ocean: sea.Sea,
        net: network.Net,
        replicas: Sequence[replica.Replica],
        cloud: Sequence[nodes.Node],
        tell: Callable[[str], None],
        start_at: Callable[[str], Awaitable[None]],
    ) -> None:
        """`start_at`: some client starts something at the controller of this name."""
        self._chance = chance
        self._sea = ocean
        self._net = net
        self._replicas = replicas
        self._nodes = cloud
        self._tell = tell
        self._start_at = start_at
        self.bad = 0.0
        self.calm = True
        self.tears = True  # records of VMs are damaged now and then
        self._faults: tuple[Callable[[float], Awaitable[None]], ...] = (
            *(self.cut_controller_from_store, self.deafen_controller, self.slow_watch, self.lose_reads, self.compact),
            *(self.deafen_controller_at_create, self.deafen_controller_at_create),
            *(self.end_lease, self.delay_lease, self.cut_node, self.cut_node_one_way, self.cut_controller),
            *(
                self.lose_messages,
                self.delay_messages,
                self.kill_controller,
                self.kill_controller_at_commit,
                self.freeze_controller,
            ),
            *(self.restart_controller, self.kill_all_controllers, self.jump_controller_clock, self.kill_agent),
            *(self.kill_agent_at_failpoint, self.kill_agent_at_failpoint, self.freeze_agent, self.lose_power),
            *(self.jump_node_clock, self.break_hypervisor, self.have_trouble),
        )

    def fate(self) -> flaky.Fate:
        """Of one commit."""
        if self.calm or self._chance.random() > self.bad:
            return flaky.Fate.FINE
        return self._chance.choice(list(flaky.Fate))

    async def something(self) -> None:
        """One fault at random, begun and ended."""
        fault = self._chance.choice(self._faults)
        for_s = self._chance.choice((0.5, 3.0, 3.0, 12.0, 45.0))
        self._tell(f"fault: {fault.__name__.replace('_', ' ')}, {for_s:g} s")
        await fault(for_s)

    def clear(self) -> None:
        """The sun comes out: everything works again, and what was late arrives."""
        self.calm = True
        self._net.heal()
        self._sea.surface_all()
        for one in self._replicas:
            one.line.flaky.partition(False)
            one.line.flaky.watch_delay_s = one.line.read_loss = 0.0
            one.line.doom = ""
            one.process.thaw()
            one.start()
        for node in self._nodes:
            node.killed_at = node.frozen_at = ""
            node.process.thaw()
            node.temper.trouble, node.temper.broken = 0.0, False
            node.start()

    def _replica(self) -> replica.Replica:
        return self._chance.choice(self._replicas)

    def _node(self) -> nodes.Node:
        return self._chance.choice(self._nodes)

    # ---- store -----------------------------------------------------------------------------------------------------

    async def cut_controller_from_store(self, for_s: float) -> None:
        one = self._replica()
        one.line.flaky.partition(True)
        await asyncio.sleep(for_s)
        one.line.flaky.partition(False)

    async def deafen_controller(self, for_s: float) -> None:
        """What it writes is done, and it never learns so."""
        one = self._replica()
        one.line.flaky.partition(True, deaf=True)
        await asyncio.sleep(for_s)
        one.line.flaky.partition(False)

    async def deafen_controller_at_create(self, for_s: float) -> None:
        """A start is stored, and the controller that stored it must tell its client that it does not know."""
        one = self._replica()
        one.line.doom = "deaf"
        await asyncio.gather(asyncio.sleep(max(for_s, 15.0)), self._start_at(one.name))
        one.line.doom = ""
        one.line.flaky.partition(False)

    async def slow_watch(self, for_s: float) -> None:
        one = self._replica()
        one.line.flaky.watch_delay_s = self._chance.choice((0.01, 0.2, 3.0))
        await asyncio.sleep(for_s)
        one.line.flaky.watch_delay_s = 0.0

    async def lose_reads(self, for_s: float) -> None:
        one = self._replica()
        one.line.read_loss = 0.3
        await asyncio.sleep(for_s)
        one.line.read_loss = 0.0

    async def compact(self, _for_s: float) -> None:
        """Whoever watches from further back must list again."""
        self._sea.data.compact(self._sea.data.revision)

    async def end_lease(self, _for_s: float) -> None:
        """A leader that wakes may end leases that are not over (etcd issue 15247)."""
        if ids := self._sea.short_leases():
            self._sea.data.revoke(self._chance.choice(ids))

    async def delay_lease(self, for_s: float) -> None:
        if ids := self._sea.short_leases():
            self._sea.delay_lease(self._chance.choice(ids), 2 * for_s)

    # ---- network ---------------------------------------------------------------------------------------------------

    async def cut_node(self, for_s: float) -> None:
        node = self._node()
        pairs = [pair for one in self._replicas for pair in ((node.name, one.name), (one.name, node.name))]
        await self._cut(pairs, for_s)

    async def cut_node_one_way(self, for_s: float) -> None:
        node, there = self._node(), self._chance.random() < 0.5
        await self._cut([(node.name, one.name) if there else (one.name, node.name) for one in self._replicas], for_s)

    async def cut_controller(self, for_s: float) -> None:
        """It sees the store, and nobody sees it."""
        one = self._replica()
        await self._cut([(node.name, one.name) for node in self._nodes], for_s)

    async def _cut(self, pairs: Sequence[tuple[str, str]], for_s: float) -> None:
        self._net.cuts.update(pairs)
        await asyncio.sleep(for_s)
        self._net.cuts.difference_update(pairs)

    async def lose_messages(self, for_s: float) -> None:
        self._net.loss = self._chance.choice((0.05, 0.3))
        await asyncio.sleep(for_s)
        self._net.loss = 0.0

    async def delay_messages(self, for_s: float) -> None:
        """What an agent sent comes late, also from a life that has ended."""
        self._net.lateness = self._chance.choice((0.05, 0.3))
        await asyncio.sleep(for_s)
        self._net.lateness = 0.0

    # ---- controllers -----------------------------------------------------------------------------------------------

    async def kill_controller(self, for_s: float) -> None:
        one = self._replica()
        one.kill()
        await asyncio.sleep(for_s)
        one.start()

    async def kill_controller_at_commit(self, for_s: float) -> None:
        one = self._replica()
        one.line.doom = self._chance.choice(("before", "after"))
        await asyncio.sleep(for_s)
        one.line.doom = ""
        one.start()

    async def freeze_controller(self, for_s: float) -> None:
        process = self._replica().process
        process.freeze()
        await asyncio.sleep(for_s)
        process.thaw()

    async def restart_controller(self, for_s: float) -> None:
        """SIGTERM, then a new one: a rolling upgrade."""
        one = self._replica()
        await one.stop()
        await asyncio.sleep(min(for_s, 3.0))
        one.start()

    async def kill_all_controllers(self, for_s: float) -> None:
        for one in self._replicas:
            one.kill()
        await asyncio.sleep(for_s)
        for one in self._replicas:
            one.start()
            await asyncio.sleep(self._chance.uniform(0.0, 2.0))

    async def jump_controller_clock(self, for_s: float) -> None:
        one = self._replica()
        one.world.sleep_jump(for_s)
        one.world.set_wall(self._chance.choice((-86400, -60, 60, 86400)))

    # ---- nodes -----------------------------------------------------------------------------------------------------

    async def kill_agent(self, for_s: float) -> None:
        node = self._node()
        node.kill()
        if self._chance.random() < 0.2 and self.tears:
            node.tear_record()
        await asyncio.sleep(for_s)
        node.start()

    async def kill_agent_at_failpoint(self, for_s: float) -> None:
        node = self._node()
        node.killed_at = self._chance.choice(FAILPOINTS)
        await asyncio.sleep(max(for_s, self._chance.choice((0.0, 25.0))))  # also until its lease has ended
        node.killed_at = ""
        node.start()

    async def freeze_agent(self, for_s: float) -> None:
        process = self._node().process
        process.freeze()
        await asyncio.sleep(for_s)
        process.thaw()

    async def lose_power(self, for_s: float) -> None:
        node = self._node()
        node.lose_power()
        await asyncio.sleep(for_s)
        node.start()

    async def jump_node_clock(self, for_s: float) -> None:
        node = self._node()
        node.world.sleep_jump(for_s)
        node.world.set_wall(self._chance.choice((-86400, -60, 60, 86400)))

    async def break_hypervisor(self, for_s: float) -> None:
        node = self._node()
        node.temper.broken = True
        await asyncio.sleep(for_s)
        node.temper.broken = False

    async def have_trouble(self, for_s: float) -> None:
        node = self._node()
        node.temper.trouble, node.temper.slowness_s = 0.4, self._chance.choice((0.2, 2.0))
        await asyncio.sleep(for_s)
        node.temper.trouble, node.temper.slowness_s = 0.02, 0.2
