"""One node: a host with a disk, the product's agent on it, and the synthetic hypervisor.

    disk        a folder in memory. Survives the agent; VMs live on it and run on while no agent does
    agent       a process; each life has the folder as its predecessor left it: a killed one may scribble while its
                stack unwinds, so it keeps the old folder, and the next life gets a copy made at the instant of death
    hypervisor  the shipped synthetic one, with slow days and bad days of its own, telling the story what it does

`Killed` ends a process in the middle of a line of its code, where `covey.failpoint` marks one.
"""

import asyncio
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from covey import durable, errors, model
from covey.agent import agent, hypervisor, parts, synthetic
from covey.client import http
from tests.sim import clockwork, network

Phase = hypervisor.Phase
Key = tuple[str, int]  # (instance, epoch)

_BOOT_LIMIT_S = 20.0
_RESTART_S = 1.0


class Size(NamedTuple):
    """Processors and memory."""

    vcpu: int
    ram_mb: int


def size(of: model.Spec | model.Claim) -> Size:
    """What a VM takes."""
    return Size(of.vcpu or model.DEFAULT_VCPU, of.vram_mb or model.DEFAULT_RAM_MB)


class Killed(BaseException):
    """The process died here."""


class Witness(Protocol):
    """Who is told what really happens on a node."""

    def prepared(self, node: "Node", key: Key) -> None: ...

    def ran(self, node: "Node", key: Key) -> None: ...

    def scripted(self, node: "Node", key: Key) -> None: ...

    def destroyed(self, node: "Node", key: Key, *, had_run: bool) -> None: ...


class Temper:
    """How well the host does. All zero: a good day."""

    def __init__(self) -> None:
        self.trouble = 0.0  # of steps that fail
        self.slowness_s = 0.2
        self.broken = False  # the host cannot run VMs at all


class Node:
    """One host. `name` is its name in the network as well; `id` what the cloud calls it."""

    def __init__(
        self,
        name: str,
        folder: Path,
        world: clockwork.World,
        net: network.Net,
        urls: tuple[str, ...],
        witness: Witness,
        slots: int,
        size: Size,
    ) -> None:
        self.name = name
        self.world = clockwork.HostWorld(world, name)
        self.chance = random.Random(f"{world.seed} {name} temper")
        self.temper = Temper()
        self.slots = slots
        self.size = size
        self.process = clockwork.Process(name)
        self.process.kill()
        self.killed_at = ""  # the failpoint at which the agent is to die
        self.frozen_at = ""  # … to stand still
        self.explicit = False
        self.crowded = False  # it was removed and joined again: what it runs from before counts only once it said so
        self.agent: agent.Agent | None = None
        self._net = net
        self._urls = urls
        self._witness = witness
        self._home = folder
        self._lives = 0
        self._folder = folder / "0"
        self._folder.mkdir(parents=True)

    @property
    def id(self) -> str:
        """ "" as long as it never joined."""
        path = self._folder / "node.json"
        return "" if not path.exists() else str(msgspec.json.decode(path.read_bytes()).get("node", ""))

    def bodies(self) -> dict[Key, Phase]:
        """What is on its disk, and whether it runs: the truth, whoever asks."""
        found: dict[Key, Phase] = {}
        for vm in self._vms():
            phase = Phase.ENDED if vm.powered_off and vm.phase is Phase.RUNNING else vm.phase
            found[vm.instance, vm.epoch] = phase
        return found

    def taken(self) -> Size:
        """Processors and memory of all that is on its disk."""
        sizes = [size(vm.spec) for vm in self._vms()]
        return Size(sum(one.vcpu for one in sizes), sum(one.ram_mb for one in sizes))

    def _vms(self) -> list[synthetic._Vm]:
        paths = sorted(self._folder.glob("vms/*/vm.json"))
        return [msgspec.json.decode(path.read_bytes(), type=synthetic._Vm) for path in paths]

    # ---- lives of the agent ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin another life of the agent. Harmless when one lives."""
        if not self.process.dead:
            return
        self._lives += 1
        self.process = clockwork.Process(f"{self.name}.{self._lives}")
        self.process.spawn(self._live(self.process))

    async def _live(self, process: clockwork.Process) -> None:
        driver = Driver(self, process, self._folder / "vms")
        endpoints = http.Endpoints(self._urls, exchange=self._net.exchange(self.name))
        config = agent.Config(
            data_dir=str(self._folder),
            sync=False,
            name=self.name,
            explicit=self.explicit,
            limits=parts.Limits(boot_s=_BOOT_LIMIT_S, told_at_once=1),
        )
        self.explicit = False
        self.agent = agent.Agent(config, self.world, driver, Images(self), endpoints)
        driver.woken = self.agent.wake
        try:
            await self.agent.run()
        except* errors.HypervisorError:  # never was a node, and cannot be one now: the program ends, and is begun again
            clockwork.depart(self._begin_again(process))

    async def _begin_again(self, process: clockwork.Process) -> None:
        """As a supervisor does."""
        await asyncio.sleep(_RESTART_S)
        if self.process is process:
            self.kill()
            self.start()

    def kill(self) -> None:
        """kill -9 of the agent. VMs run on."""
        if self.process.dead:
            return
        self.process.kill()
        before, self._folder = self._folder, self._home / str(self._lives)
        shutil.copytree(before, self._folder)
        shutil.rmtree(before, ignore_errors=True)

    def reached(self, point: str) -> None:
        """The agent's code is at a failpoint."""
        if point == self.killed_at:
            self.killed_at = ""
            self.kill()
            raise Killed(point)
        if point == self.frozen_at and self.chance.random() < 0.5:
            self.frozen_at = ""
            self.process.freeze()

    def lose_power(self) -> None:
        """The host stops and begins again: no VM runs any more, or is there at all where their disk was in memory. Its
        clock starts anew, files may be torn."""
        self.kill()
        self.world.reboot()
        in_memory = self.chance.random() < 0.3
        for path in sorted(self._folder.glob("vms/*/vm.json")):
            vm = msgspec.json.decode(path.read_bytes(), type=synthetic._Vm)
            if in_memory:
                shutil.rmtree(path.parent)
            elif vm.phase is Phase.RUNNING:
                durable.write(path, msgspec.structs.replace(vm, powered_off=True), fsync=False)
        for path in sorted(self._folder.glob("*/*.json")):
            if self.chance.random() < 0.3:
                path.with_name(path.name + ".tmp").write_bytes(path.read_bytes()[:-9])

    def tear_record(self) -> None:
        """One record is damaged while no agent runs."""
        records = sorted(self._folder.glob("records/*.json"))
        if records and self.process.dead:
            path = self.chance.choice(records)
            path.write_bytes(path.read_bytes()[: self.chance.randrange(40)])


class Driver(synthetic.Synthetic):
    """The hypervisor of one life of the agent, on the VMs that earlier lives left."""

    def __init__(self, node: Node, process: clockwork.Process, root: Path) -> None:
        self.woken: Callable[[], None] = lambda: None
        chance = node.chance
        knobs = synthetic.Knobs(
            name=node.name,
            slots=node.slots,
            cpu_count=node.size.vcpu,
            ram_mb=node.size.ram_mb,
            boot_s=chance.choice((0.0, 0.5, 3.0)),
            hang_share=0.02,
            vanish_share=0.03,
            vanish_s=20.0,
        )
        super().__init__(node.world, knobs, root=root, wake=lambda: self.woken())
        self._node = node
        self._process = process

    async def facts(self) -> model.Facts:
        if self._node.temper.broken:
            raise errors.HypervisorError("the hypervisor is being replaced")
        facts = await super().facts()
        return msgspec.structs.replace(facts, ip="10.0.0.1")

    async def _take(self, instance: model.InstanceId, seconds: float, step: str) -> None:
        temper, chance = self._node.temper, self._node.chance
        if step != "boot":
            await asyncio.sleep(chance.uniform(0.0, temper.slowness_s))
            if temper.broken or chance.random() < temper.trouble:
                raise errors.HypervisorError(f"the VM cannot {step} today")
        await super()._take(instance, seconds, step)

    def _save(self, vm: synthetic._Vm) -> None:
        before = self._vms.get((vm.instance, vm.epoch))
        super()._save(vm)
        if self._process.dead:
            return
        if before is None:
            self._node._witness.prepared(self._node, (vm.instance, vm.epoch))
        if vm.phase is Phase.RUNNING and (before is None or before.phase is not Phase.RUNNING):
            self._node._witness.ran(self._node, (vm.instance, vm.epoch))
        if vm.script_ns and (before is None or not before.script_ns):
            self._node._witness.scripted(self._node, (vm.instance, vm.epoch))

    def _remove(self, key: tuple[model.InstanceId, int]) -> None:
        vm = self._vms.get(key)
        super()._remove(key)
        if vm is not None and not self._process.dead:
            self._node._witness.destroyed(self._node, key, had_run=vm.phase is not Phase.PREPARED)


class Images(synthetic.Images):
    """Pulls that take their time, and fail on a bad day."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self._node = node

    async def get(
        self, holder: str, template: model.TemplateId, digest: model.Digest, progress: Callable[[float], None]
    ) -> hypervisor.Image:
        node = self._node
        quick = node.chance.random() < 0.8
        for part in range(4):
            await asyncio.sleep(node.chance.uniform(0.0, node.temper.slowness_s if quick else 4.0))
            progress((part + 1) / 4)
        if node.chance.random() < node.temper.trouble:
            raise errors.RemoteError("the registry does not answer")
        return await super().get(holder, template, digest, progress)
