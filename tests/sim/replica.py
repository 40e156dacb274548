"""One controller of the simulation: the product's `controller.replica`, whole, without sockets.

Its store is behind a line to the sea, its requests come over the network, its clocks are its host's. It can be killed,
frozen and begun again; it keeps nothing.
"""

import asyncio
import random
from collections.abc import Callable

from covey import errors, model, serve, server, settings
from covey.client import oci
from covey.controller import replica
from covey.store import etcd_connect
from tests.sim import clockwork, network, sea
from tests.support import flaky

REGISTRY = "registry"
TEMPLATES = tuple(model.TemplateId(f"{n}1111111-1111-4111-8111-111111111111") for n in (1, 2))
_SETTINGS = {
    "COVEY_ANKA_REGISTRY": f"http://{REGISTRY}",
    "COVEY_INSTANCE_TIME_OUT": "10s",
    "COVEY_UNKNOWN_VM_THRESHOLD": "20",
    "COVEY_GRACEFUL_SHUTDOWN_TIMEOUT": "5s",
}


async def _looks_nowhere(access: etcd_connect.Access) -> str:
    """A story's store is at no address. Whoever looks for it in the real world waits there in real time, and no two
    runs of a seed are the same."""
    return ""


etcd_connect.trouble = _looks_nowhere


class Replica:
    """`name` is its host. `weather` says what happens to each of its commits."""

    def __init__(
        self, name: str, world: clockwork.World, net: network.Net, ocean: sea.Sea, weather: Callable[[], flaky.Fate]
    ) -> None:
        self.name = name
        self.url = f"http://{name}"
        self.world = clockwork.HostWorld(world, name)
        self.line = sea.Line(ocean, random.Random(f"{world.seed} {name} line"), weather)
        self.process = clockwork.Process(name)
        self.process.kill()
        self.program: replica.Replica | None = None
        self._net = net
        self._lives = 0

    def start(self) -> None:
        """A new process: nothing is known. Harmless when one lives."""
        if not self.process.dead:
            return
        self._lives += 1
        self.line.doom, self.line.closed = "", False
        self.process = clockwork.Process(f"{self.name}.{self._lives}")
        self.process.spawn(self._live(self.process))

    async def _live(self, process: clockwork.Process) -> None:
        chosen = settings.controller({**_SETTINGS, "COVEY_ADVERTISE_URL": self.url})
        self.program = replica.Replica(chosen, self.world, self.line, exchange=self._net.exchange(self.name))
        await self.program.start(listen=False)
        self._net.listen(self.name, process, self.program.server)
        await asyncio.Event().wait()

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()

    async def stop(self) -> None:
        """SIGTERM, as in a rolling restart: it answers what it has and ends by itself."""
        process, program = self.process, self.program
        if not process.dead and not process.frozen and program is not None:
            stopping = process.spawn(program.stop())
            killed = clockwork.depart(process.ended.wait())
            await asyncio.wait((stopping, killed), return_when=asyncio.FIRST_COMPLETED)  # the dead finish nothing
            process.kill()
            if stopping.done():
                stopping.result()


class Registry:
    """A registry that knows two templates; the controllers ask it what a tag is. It never fails, its network does."""

    def __init__(self, world: clockwork.World, net: network.Net) -> None:
        self.process = clockwork.Process(REGISTRY)
        self._world = clockwork.HostWorld(world, REGISTRY)
        self._net = net

    def start(self) -> None:
        routes = [
            serve.Route("GET", "/registry/vm/info", self._info),
            serve.Route("GET", "/registry/disk", self._disk),
        ]
        program = server.Server(routes, world=self._world)
        self.process.call(program.begin)
        self._net.listen(REGISTRY, self.process, program)

    async def _info(self, call: serve.Call) -> object:
        id = model.TemplateId(call.query["id"])
        if id not in TEMPLATES:
            raise errors.NotFound("Not found")
        digest = model.Digest("sha256:" + id[0] * 64)
        return oci.Resolved(
            id=id, name=f"template {id[0]}", tag="v1", number=0, digest=digest, size=1000, arch=model.Arch.AMD64,
            creation_date=0, vcpu=2, ram_mb=2048,
        )  # fmt: skip

    async def _disk(self, _call: serve.Call) -> object:
        return oci.DiskView(total=1 << 40, free=1 << 39)
