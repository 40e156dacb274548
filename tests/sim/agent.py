"""A model of an agent with a hypervisor whose VMs are records. Not the product's agent: the smallest thing that obeys
its protocol (safety S1–S6), so that what it shows is the controllers' doing.

On disk (survives a crash): node id, secrets, VMs, tombstones. In memory: the session's counter, the queue of reports.
VMs run on while the agent is down.
"""

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from covey import model, wire
from covey.controller import wanted
from tests.sim import clockwork, replica
from tests.support import nouns

T = TypeVar("T")
Said = wire.ReportEvent
Verb = wire.Verb
Vm = tuple[str, int]  # (instance, epoch)

_CALL_S = 15.0


@dataclass
class Disk:
    """What a crash leaves."""

    host_key: str
    node: model.NodeId = model.NOWHERE
    secret: str = ""  # of the last session known
    offered: str = ""  # of the session that is being joined, on disk before it is sent (safety S7)
    vms: dict[Vm, str] = field(default_factory=dict)  # prepared | launched | running | ended
    refused: set[Vm] = field(default_factory=set)
    graves: dict[str, int] = field(default_factory=dict)  # instance -> epoch, and every older one
    messages: int = 0


class Agent:
    """`choose` gives a replica to talk to. `on_boot` and `on_destroy` tell the story's checks what happened."""

    def __init__(
        self,
        name: str,
        world: clockwork.World,
        slots: int,
        choose: Callable[[], replica.Replica],
        on_boot: Callable[[str, Vm], None],
        on_destroy: Callable[[str, Vm, str], None],
        on_fault: Callable[[BaseException], None],
    ) -> None:
        self.name = name
        self.world = world
        self.slots = slots
        self.disk = Disk(host_key=f"key of {name}")
        self.cut = False
        self.loss = 0.0
        self.trouble_rate = 0.0
        self._choose = choose
        self._on_boot = on_boot
        self._on_destroy = on_destroy
        self._on_fault = on_fault
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._session = 0
        self._seq = 0
        self._queue: list[wire.Item] = []
        self._busy: dict[Vm, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._tasks = [asyncio.create_task(self._live())]
        self._tasks[0].add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        """A model that fails must not pass for one that is slow."""
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, replica.Gone | replica.Stale):
            self._on_fault(error)

    async def crash(self) -> None:
        tasks = [*self._tasks, *self._busy.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- life

    async def _live(self) -> None:
        while True:
            # A task of its own: on Python 3.11 one that survives a failed group stays half cancelled.
            with contextlib.suppress(replica.Gone, replica.Stale):
                await asyncio.create_task(self._one_session())
            self._session = 0
            await asyncio.sleep(self.world.chance.uniform(0.1, 1.0))

    async def _one_session(self) -> None:
        await self._join()
        self._say_again()
        with contextlib.suppress(ExceptionGroup):  # of Stale; other faults are told by `_ended` of the tasks
            async with asyncio.TaskGroup() as group:
                for body in (self._poll(), self._report()):
                    group.create_task(body).add_done_callback(self._ended)

    async def _join(self) -> None:
        self.disk.offered = self.disk.offered or self.world.secret()
        ask = wire.Join(
            host_key=self.disk.host_key,
            secret=self.disk.offered,
            last_secret=self.disk.secret,
            node=self.disk.node,
            facts=nouns.facts(name=self.name, slots=self.slots),
        )
        while True:
            try:
                joined = await self._call(lambda one: one.join(ask))
                break
            except replica.Gone:
                await asyncio.sleep(self.world.chance.uniform(0.1, 1.0))
        self.disk.node = joined.node.noun.id
        self.disk.secret, self.disk.offered = self.disk.offered, ""
        self._session = joined.session.noun.counter

    def _say_again(self) -> None:
        """A new session tells what stands (safety S3: facts, any number of times)."""
        self._queue.clear()
        for vm, phase in self.disk.vms.items():
            if phase == "running":
                self._say(Said.BOOTED, vm, vm_info=True)
            elif phase in ("launched", "ended") and vm not in self._busy:
                self.disk.vms[vm] = "ended"
                self._say(Said.FAILED, vm, message="launched and absent")
        for vm in self.disk.refused:
            self._say(Said.REFUSED, vm, message="cannot")

    # ---- wanted

    async def _poll(self) -> None:
        tag = ""
        while True:
            wants = await self._again(functools.partial(self._ask, tag))
            for want in wants.wanted:
                self._take(want)
            tag = wants.tag
            self._wake.set()

    async def _ask(self, tag: str, one: replica.Replica) -> wanted.NodeWants:
        return await one.wanted(self.disk.node, self._session, tag)

    def _take(self, want: wire.Wanted) -> None:
        vm = (str(want.instance), want.epoch)
        if want.verb == Verb.DESTROY:
            self.disk.graves[want.instance] = max(want.epoch, self.disk.graves.get(want.instance, 0))
            self._work((vm[0], -1 - vm[1]), self._destroy(vm))  # beside the worker that it will end
        elif self.disk.graves.get(want.instance, -1) >= want.epoch:
            self._say(Said.GONE, vm)
        elif want.verb == Verb.RUN and vm not in self.disk.vms and vm not in self.disk.refused:
            if want.launched:
                self._say(Said.FAILED, vm, message="launched and absent")  # safety S4
            else:
                self._say(Said.ACKNOWLEDGED, vm)
                self._work(vm, self._run(vm))
        elif want.verb == Verb.RUN and self.disk.vms.get(vm) == "prepared":
            self._work(vm, self._run(vm))

    def _work(self, vm: Vm, body: Coroutine[None, None, None]) -> None:
        """One worker per VM (safety S6)."""
        if vm in self._busy:
            body.close()
            return
        task = asyncio.create_task(body)
        self._busy[vm] = task
        task.add_done_callback(lambda _: self._busy.pop(vm, None))
        task.add_done_callback(self._ended)

    async def _run(self, vm: Vm) -> None:
        if vm not in self.disk.vms:
            if self.world.chance.random() < self.trouble_rate:
                self.disk.refused.add(vm)
                self._say(Said.REFUSED, vm, message="cannot")
                return
            self.disk.vms[vm] = "prepared"
        quick = self.world.chance.random() < 0.7
        await asyncio.sleep(self.world.chance.uniform(0.0, 3.0 if quick else 60.0))  # pulling
        self._say(Said.PROGRESS, vm, progress=0.5)
        nonce = f"{self._session}"
        while True:
            try:
                granted = await self._call(lambda one: one.launch(self.disk.node, self._session, vm[0], vm[1], nonce))
                break
            except replica.Gone:
                await asyncio.sleep(self.world.chance.uniform(0.1, 0.5))
            except replica.Stale:
                return
        if not granted or self._buried(vm):
            return
        self.disk.vms[vm] = "launched"
        await asyncio.sleep(self.world.chance.uniform(0.0, 1.0))  # booting
        if self._buried(vm):
            return
        if self.world.chance.random() < self.trouble_rate:
            self.disk.vms[vm] = "ended"
            self._say(Said.FAILED, vm, message="it crashed")
            return
        self.disk.vms[vm] = "running"
        self._on_boot(self.name, vm)
        self._say(Said.BOOTED, vm, vm_info=True)

    def _buried(self, vm: Vm) -> bool:
        return self.disk.graves.get(vm[0], -1) >= vm[1]

    async def _destroy(self, vm: Vm) -> None:
        """This epoch and every older one; `gone` when nothing is left."""
        known = dict.fromkeys([*self.disk.vms, *self._busy])
        older = [other for other in known if other[0] == vm[0] and 0 <= other[1] <= vm[1]]
        for other in older:
            worker = self._busy.get(other)
            if worker is not None:
                worker.cancel()
                await asyncio.gather(worker, return_exceptions=True)
        await asyncio.sleep(self.world.chance.uniform(0.0, 0.5))
        for other in older:
            phase = self.disk.vms.pop(other, "")
            if phase:
                self._on_destroy(self.name, other, phase)
        self.disk.refused = {other for other in self.disk.refused if other[0] != vm[0] or other[1] > vm[1]}
        self._say(Said.GONE, vm)

    # ---- reports

    def _say(self, event: Said, vm: Vm, *, vm_info: bool = False, **more: object) -> None:
        self._seq += 1
        info = {"vm": nouns.vm(name=vm[0])} if vm_info else {}
        self._queue.append(
            wire.Item(instance=model.InstanceId(vm[0]), epoch=vm[1], seq=self._seq, event=event, **info, **more)  # type: ignore[arg-type]
        )
        self._wake.set()

    async def _report(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wire.HEARTBEAT_S):
                    await self._wake.wait()
            self._wake.clear()
            items = tuple(self._queue[:50])
            word = self._word()
            settled = await self._again(functools.partial(self._tell, items, word))
            done = {id(items[index]) for index in settled}
            self._queue = [item for item in self._queue if id(item) not in done]

    async def _tell(self, items: Sequence[wire.Item], word: model.Word, one: replica.Replica) -> tuple[int, ...]:
        return await one.report(self.disk.node, self._session, items, word)

    def _word(self) -> model.Word:
        self.disk.messages += 1
        vms = tuple(
            model.VmSeen(instance=model.InstanceId(vm[0]), epoch=vm[1], running=phase == "running")
            for vm, phase in self.disk.vms.items()
        )
        return model.Word(node=self.disk.node, session=self._session, messages=self.disk.messages, at_ns=0, vms=vms)

    # ---- transport

    async def _again(self, ask: Callable[[replica.Replica], Awaitable[T]]) -> T:
        """Ask until somebody answers."""
        while True:
            try:
                return await self._call(ask)
            except replica.Gone:
                await asyncio.sleep(self.world.chance.uniform(0.1, 0.5))

    async def _call(self, ask: Callable[[replica.Replica], Awaitable[T]]) -> T:
        """One request to one replica over a bad line."""
        chance = self.world.chance
        await asyncio.sleep(chance.uniform(0.0005, 0.005))
        if self.cut or chance.random() < self.loss:
            await asyncio.sleep(0.5)
            raise replica.Gone
        try:
            async with asyncio.timeout(_CALL_S):
                answer = await ask(self._choose())
        except TimeoutError as error:
            raise replica.Gone from error
        await asyncio.sleep(chance.uniform(0.0005, 0.005))
        if self.cut or chance.random() < self.loss:
            raise replica.Gone
        return answer
