"""A cloud in bad weather, from one seed: random work, random faults, and a judge who sees everything (`truth`).

    storm      clients start, end and look; everything that can go wrong goes wrong
    calm       the weather clears, nobody wants anything new: soon all is as it must be
    end        everything is ended: nothing may be left, no VM, no claim, no order

In every third story VMs have sizes and start scripts, and some nodes count processors and memory instead of VMs. In
every fourth one the store is restored from a backup in the middle of the storm (safety S18, S19).

The program under test is the product's own: controllers with their API, mirrors, commits and loops; agents with their
workers, records and fail-over; the synthetic hypervisor; the store in memory behind a flaky line.
"""

import asyncio
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path

from covey import failpoint
from covey.store import memory
from tests.sim import clockwork, network, replica, sea, truth, weather, work
from tests.sim import node as nodes

_CALM_S = 240.0  # pauses after refusals, silent nodes and doors that are being closed take their time
_END_S = 300.0
_LOOK_S = 2.0
_RESTORED = 4  # every so many seeds
_VARIED = 3  # … VMs have sizes and scripts
_QUICK_S = 2.0
_TWICE = 0.4  # of the restores are followed by another one while nodes tell what they have
_TELLING_LOOKS = 250  # for one that does: they are patient for ten seconds
_RUN_LOOKS = 200  # for one at which some of that runs
_BACKUP_LOOKS = 100  # for a moment at which something waits for a node


def home() -> Path:
    """Where the disks of simulated hosts are: in memory where the system has such a place."""
    ram = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="covey-sim-", dir=ram if os.access(ram, os.W_OK) else None))


class Story:
    """`storm_s` seconds of faults and work, then calm, then the end. `tell` hears what happens."""

    def __init__(
        self,
        *,
        replicas: int = 3,
        hosts: int = 4,
        clients: int = 3,
        storm_s: float = 90.0,
        tell: Callable[[float, str], None] = lambda _at_s, _text: None,
    ) -> None:
        self._sizes = (replicas, hosts, clients)
        self._storm_s = storm_s
        self._teller = tell
        self._folder = home()

    async def __call__(self, world: clockwork.World) -> Counter[str]:
        failpoint.watch(self._reached)
        try:
            return await self._live(world)
        finally:
            failpoint.watch(None)
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _live(self, world: clockwork.World) -> Counter[str]:
        self._build(world)
        for step in (self._setup, self._storm, self._calm, self._end):
            self._tell(f"---- {step.__name__.strip('_')}")
            await self._unless_broken(step())
        self.truth.counts["zombies"] = self.sea.surfaced
        self.truth.counts["revisions"] = self.truth.revision
        return self.truth.counts

    def _build(self, world: clockwork.World) -> None:
        replicas, hosts, clients = self._sizes
        self._world = world
        self._chance = random.Random(f"{world.seed} story")
        self.truth = truth.Truth(self._tell)
        self.sea = sea.Sea(world, self.truth.saw)
        self.net = network.Net(random.Random(f"{world.seed} network"))
        self.replicas = [
            replica.Replica(f"r{n}", world, self.net, self.sea, lambda: self.weather.fate()) for n in range(replicas)
        ]
        urls = tuple(one.url for one in self.replicas)
        self.nodes = [
            nodes.Node(
                f"n{n}",
                self._folder / f"n{n}",
                world,
                self.net,
                urls,
                self.truth,
                slots=self._chance.randint(1, 3),
                size=nodes.Size(self._chance.choice((4, 6, 8)), self._chance.choice((8192, 12288))),
            )
            for n in range(hosts)
        ]
        self.clients = [work.Client(f"c{n}", world, self.net, self.replicas, self.truth) for n in range(clients)]
        chance = random.Random(f"{world.seed} weather")
        self.weather = weather.Weather(
            chance, self.sea, self.net, self.replicas, self.nodes, self._tell, self._start_at
        )
        self.weather.tears = not self._restores  # what a record said and the store has forgotten, nobody knows
        replica.Registry(world, self.net).start()
        for one in self.replicas:
            one.start()
        for node in self.nodes:
            node.start()
        for client in self.clients:
            client.varied = self._varied

    async def _start_at(self, controller: str) -> None:
        await self._chance.choice(self.clients).start_at(controller)

    def _tell(self, text: str) -> None:
        self._teller(asyncio.get_running_loop().time(), text)

    def hear(self, text: str) -> None:
        """A line of some program's log."""
        self._tell(text)

    def _reached(self, point: str) -> None:
        """Some agent's code is at a failpoint."""
        process = clockwork.current()
        for node in self.nodes:
            if process is node.process and process is not None and not process.dead:
                node.reached(point)

    async def _unless_broken(self, step: Coroutine[None, None, None]) -> None:
        """Do it, or fail as soon as a promise is broken."""
        task = asyncio.ensure_future(step)
        await asyncio.wait((task, self.truth.broken), return_when=asyncio.FIRST_COMPLETED)
        if self.truth.broken.done():
            self.truth.broken.result()
        task.result()

    # ---- the first minute -------------------------------------------------------------------------------------------

    @property
    def _varied(self) -> bool:
        return self._world.seed % _VARIED == 0

    async def _setup(self) -> None:
        """Some nodes count processors and memory."""
        for node in self.nodes if self._varied else []:
            while node.id not in self.truth.nodes:
                await asyncio.sleep(0.5)
            if self._chance.random() < 0.6:
                self._tell(f"operator: has {node.name} count processors and memory")
                await self.clients[0].count_sizes(node.id)

    # ---- the storm -------------------------------------------------------------------------------------------------

    async def _storm(self) -> None:
        chance, now = self._chance, asyncio.get_running_loop().time
        self.weather.calm = False
        self.weather.bad = chance.choice((0.0, 0.03, 0.1))
        fault_rate = chance.choice((0.02, 0.1, 0.3))
        ends_s = now() + self._storm_s
        async with asyncio.TaskGroup() as group:
            if self._restores:
                group.create_task(self._restore(random.Random(f"{self._world.seed} restore")))
            while now() < ends_s:
                group.create_task(self._deed())
                if chance.random() < fault_rate:
                    group.create_task(self._fault())
                await asyncio.sleep(chance.expovariate(1.0))
            for task in list(group._tasks):
                task.cancel()  # who still waits for an answer gives up

    @property
    def _restores(self) -> bool:
        return self._world.seed % _RESTORED == 0

    async def _restore(self, chance: random.Random) -> None:
        """A backup of the store at a random moment; later the store begins again from it."""
        while any(node.id not in self.truth.nodes for node in self.nodes):
            await asyncio.sleep(0.5)
        await asyncio.sleep(chance.uniform(0.0, self._storm_s / 2))
        crowded = chance.random() < 0.5
        crowd = [asyncio.create_task(self.clients[0].start(())) for _ in range(8 if crowded else 0)]
        for _ in range(_BACKUP_LOOKS):
            if waiting := self.truth.waiting():
                break
            await asyncio.sleep(0.01)
        backup = self.sea.backup()
        self.truth.backed_up()
        self._tell("operator: makes a backup")
        if not crowded:
            crowd = [asyncio.create_task(self.clients[0].start(())) for _ in range(4)]
        await asyncio.sleep(chance.uniform(0.5, self._storm_s / 3) if not crowded else 0.5)
        for _ in range(_RUN_LOOKS if crowded else 0):
            if self._running(waiting):
                break
            await asyncio.sleep(0.1)
        for start in crowd:
            start.cancel()
        await self._begin_from(backup, self.replicas if chance.random() < 0.3 else [], chance)
        if crowded:
            away = self._stay_away(waiting, chance.uniform(5.0, 30.0), chance)
        else:
            more = [asyncio.create_task(self.clients[0].start(())) for _ in range(4)]
            away = self._stay_away(self.truth.lost(), chance.uniform(0.5, 4.0), chance)
        async with asyncio.TaskGroup() as group:
            group.create_task(away)
            if chance.random() < _TWICE:
                await self._restore_again(backup, chance)
        if not crowded:
            await asyncio.gather(*more)

    async def _begin_from(
        self, backup: memory.Backup, replicas: Sequence[replica.Replica], chance: random.Random
    ) -> None:
        """Stop the store and begin it again from the backup; those replicas are away meanwhile."""
        self._tell("operator: stops the store")
        self.sea.stop()
        for one in replicas:
            one.kill()
        took_s = chance.uniform(1.0, 6.0)
        if took_s < _QUICK_S:  # sooner than anybody's last proof of the store is too old
            took_s -= 1.0
        try:
            await asyncio.sleep(took_s)
        finally:
            self._tell("operator: begins the store from the backup")
            self.truth.counts["restores"] += 1
            self.sea.begin_from(backup, cluster=chance.choice(("", self._world.token())))
            self.truth.restored(self.nodes)
        for one in replicas:
            one.start()

    async def _restore_again(self, backup: memory.Backup, chance: random.Random) -> None:
        """Some node has told a part of what it has, and stands still while the store is restored once more."""
        for node in self.nodes:
            node.frozen_at = "agent.told"
        for _ in range(_TELLING_LOOKS):
            if any(not node.frozen_at for node in self.nodes):
                break
            await asyncio.sleep(0.1)
        telling = [node for node in self.nodes if not node.frozen_at]
        for node in self.nodes:
            node.frozen_at = ""
        await self._begin_from(backup, [], chance)
        await asyncio.sleep(chance.uniform(0.0, 4.0))
        for node in telling:
            node.process.thaw()

    def _running(self, instances: set[str]) -> list[nodes.Node]:
        """The nodes on which guest code of one of them runs."""
        runs = nodes.Phase.RUNNING
        return [
            node
            for node in self.nodes
            if any(id in instances and phase is runs for (id, _), phase in node.bodies().items())
        ]

    async def _stay_away(self, unknown: set[str], for_s: float, chance: random.Random) -> None:
        """A node that runs what the backup does not know to run does not tell so for a while."""
        if knowing := self._running(unknown):
            node = chance.choice(knowing)
            self._tell(f"operator: stops the agent of {node.name}")
            node.kill()
            await asyncio.sleep(for_s)
            node.start()

    async def _fault(self) -> None:
        self.truth.counts["faults"] += 1
        await self.weather.something()

    async def _deed(self) -> None:
        chance, client = self._chance, self._chance.choice(self.clients)
        known = sorted(self.truth.accepted - self.truth.forgotten)
        roll = chance.random()
        if roll < 0.06:
            await asyncio.gather(*(chance.choice(self.clients).start(self._ids()) for _ in range(4)))
        elif roll < 0.4 or not known:
            await client.start(self._ids())
        elif roll < 0.75:
            await client.terminate(chance.choice(known))
        elif roll < 0.93:
            await client.look(chance.choice(known))
        elif roll < 0.96:
            await client.list()
        else:
            await self._operate(client)

    async def _operate(self, client: work.Client) -> None:
        """What an operator does now and then."""
        chance, node = self._chance, self._chance.choice(self.nodes)
        if not node.id:
            return
        if node.id in self.truth.removed:
            self._join_again(node)
        elif chance.random() < 0.3 and not self._restores:  # a node that is removed is not waited for
            self._tell(f"operator: removes {node.name}")
            node.crowded = True
            await client.remove(node.id)
        else:
            drain = chance.random() < 0.5
            self._tell(f"operator: {'drains' if drain else 'opens'} {node.name}")
            await client.drain(node.id, drain)

    def _join_again(self, node: nodes.Node) -> None:
        self._tell(f"operator: joins {node.name} again")
        node.kill()
        node.explicit = True
        node.start()

    def _ids(self) -> list[str]:
        return [node.id for node in self.nodes if node.id and node.id not in self.truth.removed]

    # ---- the calm and the end --------------------------------------------------------------------------------------

    async def _calm(self) -> None:
        self.weather.clear()
        await self._until(lambda: self.truth.unsettled(self.nodes), _CALM_S)

    async def _end(self) -> None:
        for node in self.nodes:
            if node.id in self.truth.removed:
                self._join_again(node)
        for node in self.nodes:
            await self.clients[0].drain(node.id, False)
        ending = asyncio.create_task(self._end_all())
        await self._until(lambda: self.truth.left(self.nodes), _END_S)
        ending.cancel()
        self.truth.check_over()

    async def _end_all(self) -> None:
        while True:
            for id, instance in sorted(self.truth.instances.items()):
                if instance.state not in truth.OVER:
                    await self.clients[0].terminate(id)
            await asyncio.sleep(1.0)

    async def _until(self, trouble: Callable[[], str], limit_s: float) -> None:
        """Wait until there is no trouble; when there is some for too long a promise is broken."""
        ends_s = asyncio.get_running_loop().time() + limit_s
        while text := trouble():
            if asyncio.get_running_loop().time() > ends_s:
                self.truth.fail(f"after {limit_s:g} fine seconds: {text}")
                return
            await asyncio.sleep(_LOOK_S)
