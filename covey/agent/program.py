"""The agent program: the composition root of one node, or of many synthetic ones in one process.

    start   take the data directory's parts, begin to join; nothing here waits for a controller
    ended   the one reason why an agent ends by itself: this host cannot run VMs, and never was a node
    stop    let go of everything; VMs run on

Below the agent's directory are node.json, controllers.json, records/, tombstones/ (`agent.records`), vms/ (the
hypervisor's) and images/; of many nodes each has a directory of its own, node-001 and so on.
"""

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

from covey import errors, settings, settings_reader, world
from covey.agent import (
    agent,
    contact,
    host,
    hypervisor,
    identity,
    images,
    neighbours,
    qemu,
    sharing,
    synthetic,
)
from covey.client import http, registry

_SETTLE_S = 5.0
_SHARE_PORT = 8091
_JOINS = 32  # at once, of thousands of nodes in one process: more would only wait for it, and run out of time


class Program:
    """start → (work by itself) → stop. `folder` None: nothing is kept (synthetic nodes in numbers)."""

    def __init__(
        self, chosen: settings.Agent, clock: world.World, folder: Path | None, *, explicit: bool = False
    ) -> None:
        self._chosen = chosen
        self._clock = clock
        self._folder = folder
        self._explicit = explicit
        self._sockets = http.Sockets(ca_cert=chosen.ca_cert)
        self._endpoints: list[http.Endpoints] = []
        self._contact = contact.Contact()
        self._door = asyncio.Semaphore(_JOINS)
        self._tasks: list[asyncio.Task[None]] = []
        self._running: list[agent.Agent] = []
        self._ip = ""
        self._sharing: sharing.Sharing | None = None
        self._near: neighbours.Neighbours | None = None

    async def start(self) -> None:
        """Begin. Raises SettingError for a directory that cannot be used."""
        self._ip = (await self._place()).ip
        self._running = [*self._agents()]
        if self._sharing is not None:
            await self._sharing.start(self._share_at())
        for one in self._running:
            self._tasks.append(asyncio.create_task(one.run()))

    async def ended(self) -> None:
        """Wait until an agent ended by itself, and raise why."""
        if not self._tasks:
            return
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        error = done.pop().exception()
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if error is not None:
            raise error

    async def stop(self) -> None:
        await asyncio.gather(*(one.settle(_SETTLE_S) for one in self._running))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._sharing is not None:
            await self._sharing.stop()
        if self._near is not None:
            self._near.close()
        for endpoints in self._endpoints:
            await endpoints.close()
        await self._sockets.close()

    # ---- putting together ------------------------------------------------------------------------------------------

    def _agents(self) -> Iterator[agent.Agent]:
        if not self._chosen.nodes:
            if self._folder is None:
                raise errors.SettingError("an agent needs a data directory")
            yield self._one(self._folder)
            return
        width = max(3, len(str(self._chosen.nodes)))
        for number in range(1, self._chosen.nodes + 1):
            name = f"{self._chosen.node_name or 'synthetic'}-{number:0{width}}"
            yield self._one_of_many(name, None if self._folder is None else self._folder / f"node-{number:0{width}}")

    def _one(self, folder: Path) -> agent.Agent:
        """This host as a node, with templates really pulled."""
        chosen = self._chosen
        folder.mkdir(parents=True, exist_ok=True, mode=0o711)
        wakes = _Wakes()
        driver: hypervisor.Hypervisor
        if chosen.hypervisor == "synthetic":
            driver = synthetic.Synthetic(self._clock, _knobs(chosen), root=folder / "vms", wake=wakes)
        else:
            config = qemu.Config(
                root=folder / "vms",
                host_ip=self._ip,
                node_name=chosen.node_name,
                slots=chosen.max_vms,
                accel=chosen.qemu_accel,
                first_user=chosen.qemu_first_user,
            )
            driver = qemu.Qemu(config, self._clock, wake=wakes)
        identity.File(folder, self._clock).settle(identity.Home.of(folder, host.machine()), explicit=self._explicit)
        near = neighbours.Neighbours(self._clock, lambda: self._sockets.session) if chosen.share_layers else None
        cache = images.Cache(folder / "images", self._connect, near=near)
        made = agent.Agent(
            self._config("", folder),
            self._clock,
            driver,
            cache,
            self._controllers(folder),
            use=host.use,
            place=self._place,
            touch=self._contact,
            near=near,
        )
        if near is not None:
            self._near, standing = near, made.session
            self._sharing = sharing.Sharing(
                cache,
                near,
                lambda: standing.ticket_key,
                lambda: standing.seen.history,
                limit_bytes_s=chosen.share_limit_mib << 20,
            )
        wakes.agent = made
        return made

    def _share_at(self) -> list[tuple[str, int]]:
        """Where to listen for other nodes. Unless that was said: at a port that may be known to firewalls, or else at
        any; on every interface, but on loopback alone where the controllers are on this host."""
        everywhere = "::" if ":" in self._ip else "0.0.0.0"  # noqa: S104  whoever comes needs a ticket
        if self._chosen.share_listen is not None:
            return [(self._chosen.share_listen.host or everywhere, self._chosen.share_listen.port)]
        host = self._ip if settings_reader.Address(self._ip, 0).loopback else everywhere
        return [(host, _SHARE_PORT), (host, 0)]

    def _one_of_many(self, name: str, folder: Path | None) -> agent.Agent:
        """A node that pulls nothing: hundreds of them fit into one process."""
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True, mode=0o711)
        wakes = _Wakes()
        vms = None if folder is None else folder / "vms"
        driver = synthetic.Synthetic(self._clock, _knobs(self._chosen), root=vms, wake=wakes)
        cache = synthetic.Images(self._chosen.pull_s)
        # Pretended VMs need not survive the host, and hundreds of nodes in one process must not wait for its disk.
        config = self._config(name, folder, ip=self._ip, sync=False)
        made = agent.Agent(
            config, self._clock, driver, cache, self._controllers(folder), touch=self._contact, door=self._door
        )
        wakes.agent = made
        return made

    async def _place(self) -> host.Place:
        """This host's name and address, unless they were given: asked for anew as long as the agent runs."""
        urls = self._chosen.controllers
        learnt = identity.learnt(self._folder)  # should no name of those resolve any more
        ip = self._chosen.node_ip or await asyncio.to_thread(host.address_towards, (*urls, *learnt))
        return host.Place(self._chosen.node_name or socket.gethostname(), ip)

    def _config(self, name: str, folder: Path | None, *, ip: str = "", sync: bool = True) -> agent.Config:
        return agent.Config(
            data_dir="" if folder is None else str(folder),
            name=name,
            ip=ip,
            max_vms=self._chosen.max_vms,
            explicit=self._explicit,
            sync=sync,
        )

    def _controllers(self, folder: Path | None) -> http.Endpoints:
        """Each node chooses its controller by itself; their connections are in one pool."""
        learnt = identity.learnt(folder)
        made = http.Endpoints(self._chosen.controllers, learnt=learnt, salt=self._clock.token(), exchange=self._sockets)
        self._endpoints.append(made)
        return made

    def _connect(self, urls: tuple[str, ...]) -> images.Source:
        made = http.Endpoints(urls, salt=self._clock.token(), near=True, timeout_s=30, exchange=self._sockets)
        self._endpoints.append(made)
        return registry.Registry(made)


class _Wakes:
    """A hypervisor is made before the agent that it wakes."""

    def __init__(self) -> None:
        self.agent: agent.Agent | None = None

    def __call__(self) -> None:
        if self.agent is not None:
            self.agent.wake()


def _knobs(chosen: settings.Agent) -> synthetic.Knobs:
    return synthetic.Knobs(
        boot_s=chosen.boot_s,
        pull_s=chosen.pull_s,
        fail_share=chosen.fail_share,
        hang_share=chosen.hang_share,
        vanish_share=chosen.vanish_share,
    )
