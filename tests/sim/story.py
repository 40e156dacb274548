"""A cloud in bad weather, from one seed: random work, random faults, and what must always be true (promises I1–I7).

faults        commits lost before or after they were applied, or applied late; a replica or an agent cut off,
              killed, started again; a slow watch; messages between agents and controllers lost either way
work          starts (single, several, with and without key, repeated with their key) and terminations
checked       at every revision of the store, at every boot and destruction on a node, at every answer
in the end    the weather clears, everything is terminated, and nothing may be left: no VM, no claim, no order
"""

import asyncio
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field

import msgspec

from covey import model
from covey.store import base, memory, schema
from tests.sim import agent, clockwork, replica
from tests.support import flaky, nouns

State = model.State
_OVER = (State.TERMINATING, State.TERMINATED)
_SETTLED_S = 600.0
_CLOSED_S = 90.0  # after which no start that was given up may live on


class Broken(AssertionError):
    """A promise was broken."""


@dataclass
class Told:
    """What the outside knows."""

    accepted: set[str] = field(default_factory=set)
    keys: dict[str, tuple[str, ...]] = field(default_factory=dict)
    terminate_asked: set[str] = field(default_factory=set)
    terminate_answered: set[str] = field(default_factory=set)
    given_up: set[str] = field(default_factory=set)  # starts whose caller was told "unsure"
    boots: Counter[str] = field(default_factory=Counter)
    states: dict[str, State] = field(default_factory=dict)
    forgotten: set[str] = field(default_factory=set)
    epochs: dict[str, int] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    held: dict[str, tuple[str, int]] = field(default_factory=dict)  # instance -> where the store says it has a slot
    ledgers: dict[str, set[tuple[str, int]]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)


class Story(clockwork.Story):
    """`calm_s` seconds of faults and work, then clearing up."""

    def __init__(self, replicas: int = 3, agents: int = 4, storm_s: float = 240.0) -> None:
        self.replica_count = replicas
        self.agent_count = agents
        self.storm_s = storm_s
        self.told = Told()
        self.calm = False

    async def __call__(self, world: clockwork.World) -> Told:
        self.world = world
        self.chance = world.chance
        self._fault: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.store = memory.Memory(world)
        self.replicas = [
            replica.Replica(f"r{n}", world, self.store.client(), self._weather) for n in range(self.replica_count)
        ]
        for one in self.replicas:
            one.flaky.delay = lambda: self.chance.uniform(0.0005, 0.004)
            one.flaky.late_s = lambda: self.chance.choice((0.05, 1.0, 20.0))
            one.start()
        self.agents = [
            agent.Agent(
                f"a{n}",
                world,
                self.chance.randint(1, 3),
                self._choose,
                self._booted,
                self._destroyed,
                self._failed,
            )
            for n in range(self.agent_count)
        ]
        watching = asyncio.create_task(self._watch())
        for node in self.agents:
            node.loss, node.trouble_rate = 0.05, 0.08
            node.start()
        await self._until(watching, self._storm())
        await self._until(watching, self._clear_up())
        watching.cancel()
        for node in self.agents:
            await node.crash()
        for one in self.replicas:
            await one.kill()
            await one.writer.close()
            await one.flaky.close()
        return self.told

    async def _until(self, watching: "asyncio.Task[None]", work: Coroutine[None, None, None]) -> None:
        """Do the work, or fail as soon as the watch has seen a promise broken."""
        task = asyncio.ensure_future(work)
        done, _ = await asyncio.wait((task, watching, self._fault), return_when=asyncio.FIRST_COMPLETED)
        for first in done - {task}:
            first.result()
        task.result()

    def _failed(self, error: BaseException) -> None:
        if not self._fault.done():
            self._fault.set_exception(error)

    # ---- weather

    def _weather(self) -> flaky.Fate:
        if self.calm or self.chance.random() > 0.08:
            return flaky.Fate.FINE
        return self.chance.choice(list(flaky.Fate))

    def _choose(self) -> replica.Replica:
        return self.chance.choice(self.replicas)

    async def _storm(self) -> None:
        """Work and faults side by side."""
        ends = self.world.boot_ns() + int(self.storm_s * 1e9)
        async with asyncio.TaskGroup() as group:
            while self.world.boot_ns() < ends:
                group.create_task(self._one_deed())
                if self.chance.random() < 0.1:
                    group.create_task(self._one_fault())
                await asyncio.sleep(self.chance.expovariate(1.0))

    async def _one_deed(self) -> None:
        if self.chance.random() < 0.1:
            await asyncio.gather(*(self._start() for _ in range(4)))  # at once, by way of several replicas
        elif self.chance.random() < 0.5:
            await self._start()
        elif self.told.accepted:
            await self._terminate(self.chance.choice(sorted(self.told.accepted)))

    async def _start(self) -> None:
        key = self.world.token() if self.chance.random() < 0.5 else ""
        count = self.chance.choice((1, 1, 1, 2, 5))
        spec = nouns.spec(priority=self.chance.choice((1, 1000)))
        twin = not key and self.chance.random() < 0.5
        if twin:
            spec = msgspec.structs.replace(spec, external_id=self.world.token(), name="twin")
        for _ in range(4 if key or twin else 1):
            ids = [self.world.uuid() for _ in range(count)]
            try:
                answered = await self._choose().create(ids, spec, key)
            except replica.Gone:
                if not key:
                    self.told.given_up.update(ids)
                await asyncio.sleep(self.chance.uniform(0.1, 5.0))
                continue
            self.told.given_up.difference_update(answered)
            self.told.counts["starts"] += len(answered)
            self.told.accepted.update(answered)
            for id in answered:
                self._check_end(id)
            if key and self.told.keys.setdefault(key, answered) != answered:
                raise Broken(f"I7: one key, two answers: {answered} and {self.told.keys[key]}")
            await self._all_show(answered)
            if not key or self.chance.random() < 0.7:
                return

    async def _all_show(self, ids: tuple[str, ...]) -> None:
        """Promise I6: what was answered is shown by whoever answers."""
        for one in self.replicas:
            try:
                snapshot = await one.look()
            except replica.Gone:
                continue
            for id in ids:
                if snapshot.instance(id) is None and id not in self.told.forgotten:
                    raise Broken(f"I6: {one.name} does not show {id}, which was answered before")

    async def _terminate(self, id: str) -> None:
        self.told.terminate_asked.add(id)
        try:
            found = await self._choose().terminate(id)
        except replica.Gone:
            return
        if not found and id not in self.told.forgotten:
            raise Broken(f"I1: {id} was accepted and is not found")
        self.told.counts["terminations"] += 1
        self.told.terminate_answered.add(id)

    async def _one_fault(self) -> None:
        fault = self.chance.choice(
            (
                self._cut_replica,
                self._deafen_replica,
                self._kill_replica,
                self._slow_watch,
                self._cut_agent,
                self._crash_agent,
            )
        )
        self.told.counts[fault.__name__.strip("_")] += 1
        await fault(self.chance.choice((0.5, 3.0, 10.0, 45.0)))

    async def _cut_replica(self, for_s: float) -> None:
        one = self._choose()
        one.flaky.partition(True)
        await asyncio.sleep(for_s)
        one.flaky.partition(False)

    async def _deafen_replica(self, for_s: float) -> None:
        """What it writes is done, and it never learns so."""
        one = self._choose()
        one.flaky.partition(True, deaf=True)
        await asyncio.sleep(for_s)
        one.flaky.partition(False)

    async def _kill_replica(self, for_s: float) -> None:
        one = self._choose()
        if one.up:
            await one.kill()
            await asyncio.sleep(for_s)
            one.start()

    async def _slow_watch(self, for_s: float) -> None:
        one = self._choose()
        one.flaky.watch_delay_s = self.chance.choice((0.01, 0.2, 3.0))
        await asyncio.sleep(for_s)
        one.flaky.watch_delay_s = 0.0

    async def _cut_agent(self, for_s: float) -> None:
        node = self.chance.choice(self.agents)
        node.cut = True
        await asyncio.sleep(for_s)
        node.cut = False

    async def _crash_agent(self, for_s: float) -> None:
        node = self.chance.choice(self.agents)
        await node.crash()
        await asyncio.sleep(for_s)
        await node.crash()  # another fault may have started it meanwhile
        node.start()

    # ---- what must always be true

    def _booted(self, node: str, vm: agent.Vm) -> None:
        self.told.boots[vm[0]] += 1
        self.told.counts["boots"] += 1
        if self.told.boots[vm[0]] > 1:
            raise Broken(f"I2: a second VM of {vm[0]} got past boot, on {node} in epoch {vm[1]}")
        self._check_room()

    def _check_room(self) -> None:
        for node in self.agents:
            if len(node.disk.vms) > node.slots:
                raise Broken(f"I3: {node.name} has {node.slots} slots and {len(node.disk.vms)} VMs")

    def _destroyed(self, node: str, vm: agent.Vm, phase: str) -> None:
        self.told.counts["destructions"] += 1
        allowed = self.told.terminate_asked | self.told.given_up | self.told.failed
        if phase == "running" and vm[0] not in allowed:
            raise Broken(f"I4: {node} destroyed the running VM {vm}, which nobody had asked to end")

    async def _watch(self) -> None:
        """Look at every revision of the store."""
        async for batch in self.store.client().watch(base.EVERYTHING, base.EVERYTHING, 1):
            for change in batch.changes:
                if change.key.startswith(schema.INSTANCES):
                    self._check_instance(schema.tail(change.key), change.kv)
                elif change.key.startswith(schema.LEDGERS):
                    self._note_ledger(schema.tail(change.key), change.kv)
            self._check_claims()
            self._check_room()

    def _note_ledger(self, node: str, kv: base.Kv | None) -> None:
        claims = () if kv is None else msgspec.json.decode(kv.value, type=model.Ledger).claims
        self.told.ledgers[node] = {(claim.instance, claim.epoch) for claim in claims}

    def _check_claims(self) -> None:
        """Safety S11, S13: an instance that says it holds a slot holds one, at every single revision."""
        for id, (node, epoch) in self.told.held.items():
            if (id, epoch) not in self.told.ledgers.get(node, ()):
                raise Broken(f"S11: {id} in epoch {epoch} lost its claim on {node}")

    def _check_instance(self, id: str, kv: base.Kv | None) -> None:
        told = self.told
        told.held.pop(id, None)
        if kv is None:
            if told.states.pop(id) != State.TERMINATED:
                raise Broken(f"I1: {id} was forgotten before it was over")
            told.forgotten.add(id)
            return
        instance = msgspec.json.decode(kv.value, type=model.Instance)
        if id in told.forgotten:
            raise Broken(f"S16: {id} was born twice")
        if told.states.get(id) in _OVER and instance.state not in _OVER:
            raise Broken(f"I5: {id} went from {told.states[id]} to {instance.state}")
        if instance.state == State.STARTED and not instance.launched:
            raise Broken(f"S1: {id} is started and was not launched")
        if told.epochs.get(id, 0) > instance.epoch:
            raise Broken(f"the epoch of {id} went back")
        if instance.state == State.ERROR:
            told.failed.add(id)
        if instance.claimed:
            told.held[id] = (instance.node, instance.epoch)
        told.states[id] = instance.state
        self._check_end(id)
        told.epochs[id] = instance.epoch

    def _check_end(self, id: str) -> None:
        """What was answered OK ends because it was asked to or because it failed, not behind its user's back."""
        over = id in self.told.forgotten or self.told.states.get(id) in _OVER
        if over and id in self.told.accepted - self.told.terminate_asked - self.told.failed:
            raise Broken(f"I4: {id} was answered OK and ended though nobody asked")

    # ---- the end

    async def _clear_up(self) -> None:
        """The weather clears: all that is left becomes Started, Error or Terminated; then everything is terminated and
        nothing is left (promises I1, I3)."""
        self.calm = True
        for one in self.replicas:
            one.flaky.partition(False)
            one.flaky.watch_delay_s = 0.0
            if not one.up:
                one.start()
        for node in self.agents:
            node.loss = node.trouble_rate = 0.0
            node.cut = False
        await asyncio.sleep(_CLOSED_S)
        for id in self.told.given_up & self.told.states.keys():
            if self.told.states[id] not in (*_OVER, State.ERROR):
                raise Broken(f"S15: the start of {id} was given up, and yet it is {self.told.states[id]}")
        deadline = self.world.boot_ns() + int(_SETTLED_S * 1e9)
        while left := self._left():
            if self.world.boot_ns() > deadline:
                raise Broken(f"I1/I3: after {_SETTLED_S:.0f} calm seconds there is still {left}")
            for id in sorted(self.told.states):
                if self.told.states.get(id) not in (*_OVER, State.PULLING, State.SCHEDULING) or self._late(deadline):
                    await self._terminate(id)
            await asyncio.sleep(5)
        missing = self.told.accepted - self.told.forgotten
        if missing:
            raise Broken(f"I1: accepted and lost: {missing}")

    def _late(self, deadline: int) -> bool:
        """Half of the time is given to instances that wait for room."""
        return self.world.boot_ns() > deadline - int(_SETTLED_S / 2 * 1e9)

    def _left(self) -> str:
        vms = {node.name: dict(node.disk.vms) for node in self.agents if node.disk.vms}
        data = self.store._data
        claims = [
            kv.value
            for kv in data.live(schema.LEDGERS, base.prefix_end(schema.LEDGERS), data.revision)
            if b"claims" in kv.value
        ]
        orders = [kv.key for kv in data.live(schema.ORDERS, base.prefix_end(schema.ORDERS), data.revision)]
        if not (vms or claims or orders or self.told.states):
            return ""
        return f"VMs {vms}, claims {claims}, orders {orders}, instances {self.told.states}"
