"""Sets of registries as in `fleet`, each on a host of its own in a `netlab` network, with etcd on hosts too.

    async with lab_fleet.running(folder, 3, etcd_hosts=["e1"]) as fleet:       # all are ready; clients are on `load`
        fleet.lab.cut("r0", "r1", one_way=True)                               # what r0 sends does not reach r1
        fleet.lab.heal()
        await fleet.crash(fleet.members[0])                                   # power off, etcd of that host too

Registries are on r0, r1, …; `etcd_hosts` may be those too. Clients are never cut off.
"""

import asyncio
import contextlib
import functools
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from tests.support import fleet, lab_cloud, netlab

_PORT = 8089


@dataclass
class Fleet:
    lab: netlab.Lab
    members: list[fleet.Member]
    etcd: list[lab_cloud.Program]

    async def crash(self, member: fleet.Member) -> None:
        """The power of its host goes off. `boot` ends that."""
        await asyncio.to_thread(self.lab[host_of(member)].crash)
        await member.kill()

    def boot(self, member: fleet.Member) -> None:
        """The host runs again, and etcd on it; the registry does not yet."""
        self.lab[host_of(member)].boot()
        self.revive()

    def revive(self) -> None:
        """Start the members of etcd that do not run."""
        for program in self.etcd:
            if not program.running and not program.host.off:
                program.start()


def host_of(member: fleet.Member) -> str:
    return f"r{member.number}"


class _Cable:
    """`fleet.Lines`: the host's network."""

    def __init__(self, lab: netlab.Lab, name: str, registries: Sequence[str], etcd_hosts: Sequence[str]) -> None:
        self._lab = lab
        self._name = name
        self._registries = registries
        self._etcd_hosts = etcd_hosts

    async def cut(self, *, peers: bool, etcd: bool) -> None:
        for other in {*(self._registries if peers else ()), *(self._etcd_hosts if etcd else ())} - {self._name}:
            self._lab.cut(self._name, other)

    async def heal(self) -> None:
        self._lab.heal()


@contextlib.asynccontextmanager
async def running(
    folder: Path, count: int, *, etcd_hosts: Sequence[str] = ("e1",), start: bool = True, **more: str
) -> AsyncIterator[Fleet]:
    """`more` are settings of all. Without `etcd_hosts` the first server takes pushes first."""
    registries = [f"r{number}" for number in range(count)]
    names = [*registries, *(name for name in etcd_hosts if name not in registries), "load"]
    with netlab.Lab(names) as lab:
        cloud = lab_cloud.Cloud(lab, folder)
        if etcd_hosts:
            cloud.start_etcd(etcd_hosts)
        connector = aiohttp.TCPConnector(socket_factory=functools.partial(_socket, lab["load"]), force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as session:
            members = []
            for number, name in enumerate(registries):
                url = f"http://{lab[name].ip}:{_PORT}"
                lines = _Cable(lab, name, registries, etcd_hosts)
                inside = lab[name].inside()
                members.append(fleet.Member(number, folder / name, session, url, url, lines, inside))
            for member in members:
                endpoints = [f"{lab[name].ip}:2379" for name in etcd_hosts]
                member.environ = fleet.environ(
                    member, members, f"0.0.0.0:{_PORT}", endpoints, ALLOW_ANONYMOUS="true", **more
                )
            try:
                if start:
                    await asyncio.gather(*(member.start() for member in members))
                yield Fleet(lab, members, cloud.members)
            finally:
                await asyncio.gather(*(member.kill() for member in members))


def _socket(host: netlab.Host, info: tuple[object, ...]) -> socket.socket:
    """A socket belongs to the network in which it was made, whoever uses it."""
    family, kind, proto, *_ = info
    assert isinstance(family, int)
    assert isinstance(kind, int)
    assert isinstance(proto, int)
    return host.call(lambda: socket.socket(family, kind, proto))
