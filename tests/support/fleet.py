"""Sets of registries with disks of their own, as real processes that can be killed, frozen and cut off.

    async with fleet.running(tmp_path, 3, cluster.endpoints) as servers:      # etcd says who takes pushes
        holder = await fleet.holder(servers)
        holder.freeze()                                                        # SIGSTOP; .thaw()
        await servers[1].cut()                                                 # no peer and no etcd; .heal()

What servers say to each other and to etcd goes through a `proxy.Proxy` of each, what clients say does not. On hosts
with networks of their own: `lab_fleet`.
"""

import asyncio
import contextlib
import json
import os
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Protocol

import aiohttp

from tests.support import etcd, proxy, registry

SECRET = "a secret for tests only"
DEADLINE_S = 100.0


class Lines(Protocol):
    """What connects a server with its peers and with etcd."""

    async def cut(self, *, peers: bool, etcd: bool) -> None: ...

    async def heal(self) -> None: ...


class Proxies:
    """`Lines` of one machine's loopback."""

    def __init__(self, line: proxy.Proxy, to_etcd: Sequence[proxy.Proxy]) -> None:
        self.line = line
        self.to_etcd = to_etcd

    async def cut(self, *, peers: bool, etcd: bool) -> None:
        for one in (*([self.line] if peers else ()), *(self.to_etcd if etcd else ())):
            await one.turn(proxy.Mood.CLOSED)

    async def heal(self) -> None:
        for one in (self.line, *self.to_etcd):
            await one.turn(proxy.Mood.HONEST)


class Member(registry.Server):
    """One server of a set, whether it runs or not. `known_as`: its URL for its peers; `inside`: what puts a command
    into the place where it runs."""

    def __init__(
        self,
        number: int,
        base: Path,
        session: aiohttp.ClientSession,
        url: str,
        known_as: str,
        lines: Lines,
        inside: Sequence[str] = (),
    ) -> None:
        super().__init__(0, session, url)
        self.number = number
        self.base = base
        self.known_as = known_as
        self.environ: dict[str, str] = {}
        self.child: asyncio.subprocess.Process | None = None
        self.within: Sequence[str] = ()  # words before its command, which become it
        self._lines = lines
        self._inside = inside

    async def start(self, *, failpoints: str = "") -> None:
        """And wait until it answers."""
        await self.launch(failpoints=failpoints)
        async with asyncio.timeout(DEADLINE_S):
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    if (await self.call("GET", "/livez"))[0] == 200:
                        return
                assert self.child is not None
                assert self.child.returncode is None, self.log()[-3000:]
                await asyncio.sleep(0.05)

    async def launch(self, *, failpoints: str = "") -> None:
        with (self.base.parent / f"r{self.number}.log").open("ab") as log:
            self.child = await asyncio.create_subprocess_exec(
                *("setpriv", "--pdeathsig", "KILL", *self._inside, *self.within),
                *(sys.executable, "-m", "covey", "registry"),
                env={**os.environ, **self.environ, "COVEY_FAILPOINTS": failpoints},
                stdout=log,
                stderr=log,
            )

    def log(self) -> str:
        return (self.base.parent / f"r{self.number}.log").read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self.child is not None and self.child.returncode is None

    def _send(self, number: signal.Signals) -> None:
        """To all processes of the server. What put it into its place hears only what wakes up: it stops by itself when
        its child does."""
        if self.child is None or self.child.returncode is not None:
            return
        first = self.child.pid
        for pid in _tree(first):
            if pid != first or not self._inside or number != signal.SIGSTOP:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    async def kill(self) -> None:
        """kill -9 of all its processes, and wait for its end."""
        self._send(signal.SIGKILL)
        if self.child is not None:
            await self.child.wait()
            self.child = None

    async def terminate(self) -> None:
        if self.child is not None and self.child.returncode is None:
            pids = _tree(self.child.pid)
            os.kill(pids[1 if self._inside else 0], signal.SIGTERM)
            await asyncio.wait_for(self.child.wait(), DEADLINE_S)
        self.child = None

    def freeze(self) -> None:
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        self._send(signal.SIGCONT)

    async def cut(self, *, peers: bool = True, etcd: bool = True) -> None:
        """Its peers do not reach it, and it does not reach etcd."""
        await self._lines.cut(peers=peers, etcd=etcd)

    async def heal(self) -> None:
        await self._lines.heal()

    async def says(self) -> dict[str, object]:
        """How it stands: `standing.Standing`; nothing when it does not answer."""
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with asyncio.timeout(5):
                status, _, content = await self.call("GET", "/readyz")
                if status == 200:
                    found: dict[str, object] = json.loads(content)["body"].get("replica") or {}
                    return found
        return {}

    async def holds(self) -> bool:
        """Whether it believes to be the one that takes pushes."""
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with asyncio.timeout(5):
                status, _, content = await self.call("GET", "/replica/v1/word", Covey_Peer_Secret=SECRET)
                return status == 200 and json.loads(content)["holder"] == self.known_as
        return False

    async def promote(self, *, force: bool = False) -> str:
        """ "" or why not."""
        body = json.dumps({"force": force}).encode()
        status, _, content = await self.call("POST", "/replica/v1/promote", body, Covey_Peer_Secret=SECRET)
        return "" if status == 200 and json.loads(content)["status"] == "OK" else content.decode()

    def entries(self, name: str) -> list[bytes]:
        """A log, as it lies on the disk."""
        folder = self.base / "repositories" / name / "_log"
        return [path.read_bytes() for path in sorted(folder.glob("*"))] if folder.exists() else []


@contextlib.asynccontextmanager
async def running(
    folder: Path,
    count: int,
    etcd_endpoints: Sequence[str] = (),
    *,
    start: bool = True,
    tls: etcd.Security | None = None,
    **more: str,
) -> AsyncIterator[list[Member]]:
    """A set, all of it started unless `start` is False. Without etcd the first one takes pushes first. With `tls` all
    speak https. `more` are settings of all."""
    scheme = "http" if tls is None else "https"
    if tls is not None:
        files = {"SERVER_CERT": str(tls.server_cert), "SERVER_KEY": str(tls.server_key), "CA_CERT": str(tls.ca)}
        more = {"USE_HTTPS": "true", **files, **more}
    async with contextlib.AsyncExitStack() as stack:
        timeout = aiohttp.ClientTimeout(total=120)
        trust = True if tls is None else ssl.create_default_context(cafile=tls.ca)
        connector = aiohttp.TCPConnector(ssl=trust)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector, timeout=timeout))
        members = []
        ways = []
        for number in range(count):
            line = await stack.enter_async_context(proxy.before(etcd.free_port()))
            ports = [int(endpoint.rpartition(":")[2]) for endpoint in etcd_endpoints]
            ways.append([await stack.enter_async_context(proxy.before(port)) for port in ports])
            url = f"{scheme}://127.0.0.1:{line.target}"
            known_as, lines = f"{scheme}://{line.address}", Proxies(line, ways[-1])
            members.append(Member(number, folder / f"r{number}", session, url, known_as, lines))
        for member, to_etcd in zip(members, ways, strict=True):
            endpoints = [one.address for one in to_etcd]
            member.environ = environ(member, members, member.url.rpartition("/")[2], endpoints, **more)
        try:
            if start:
                await asyncio.gather(*(member.start() for member in members))
            yield members
        finally:
            await asyncio.gather(*(member.kill() for member in members))


def environ(
    member: Member, members: Sequence[Member], listen: str, etcd_endpoints: Sequence[str], **more: str
) -> dict[str, str]:
    """The settings of one of a set."""
    settings = {
        "CONFIG": "/dev/null",
        "LISTEN_ADDR": listen,
        "BASE_PATH": str(member.base),
        "REGISTRY_WORKERS": "1",
        "REGISTRY_MODE": "replica",
        "REGISTRY_ADVERTISE_URL": member.known_as,
        "REGISTRY_PEERS": ",".join(one.known_as for one in members),
        "REGISTRY_PEER_SECRET": SECRET,
        "LOG_LEVEL": "info",
        "LOG_JSON": "false",
        "GRACEFUL_SHUTDOWN_TIMEOUT": "2s",
    }
    if etcd_endpoints:
        settings["ETCD_ENDPOINTS"] = ",".join(etcd_endpoints)
        settings["ETCD_REQUEST_TIMEOUT"] = "5s"
    else:
        settings["REGISTRY_PUSH"] = members[0].known_as
    return {f"COVEY_{name}": text for name, text in {**settings, **more}.items()}


def _tree(pid: int) -> list[int]:
    """A process and all that came of it, parents first."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            threads = Path(f"/proc/{one}/task").iterdir()
            found += [int(word) for thread in threads for word in (thread / "children").read_text().split()]
    return found


async def holder(members: Sequence[Member], *, but: Member | None = None) -> Member:
    """Wait until one of them, other than `but`, says that it takes pushes."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            for member in members:
                if member is not but and await member.holds():
                    return member
            await asyncio.sleep(0.1)
