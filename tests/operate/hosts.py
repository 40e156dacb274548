"""Hosts that each run `covey etcd bootstrap`, as an operator's systemd unit would: real members on loopback.

with hosts.some(folder, 3) as cluster:
    for host in cluster.hosts:
        host.start()
    cluster.wait_until_well()
    cluster.hosts[1].kill(); cluster.hosts[1].wipe()
"""

import contextlib
import dataclasses
import json
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.cluster import conftest
from tests.support import etcd, ran

eventually = conftest.eventually
PATIENCE_S = 120.0


@dataclasses.dataclass
class Host:
    """One host: its member's name, its disk and its addresses. `peer_tls`: what members show to each other."""

    name: str
    folder: Path
    client_port: int
    peer_port: int
    peer_tls: etcd.Security | None = None
    program: conftest.Program | None = None

    @property
    def peer_url(self) -> str:
        return f"{'https' if self.peer_tls else 'http'}://127.0.0.1:{self.peer_port}"

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.client_port}"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def argv(self, members: str) -> tuple[object, ...]:
        return (
            *("etcd", "bootstrap", "--name", self.name, "--members", members, "--data-dir", self.data),
            *("--client-url", f"http://{self.endpoint}"),
            *("--", "--heartbeat-interval=100", "--election-timeout=1000", "--log-level=warn", *self._peer_flags()),
        )

    def _peer_flags(self) -> tuple[object, ...]:
        """Between members: one certificate for both sides, each asked for."""
        if self.peer_tls is None:
            return ()
        tls = self.peer_tls
        pair = ("--peer-cert-file", tls.server_cert, "--peer-key-file", tls.server_key)
        return (*pair, "--peer-trusted-ca-file", tls.ca, "--peer-client-cert-auth")

    @property
    def running(self) -> conftest.Program:
        assert self.program is not None, "it does not run"
        return self.program

    def end(self, number: int = signal.SIGTERM) -> None:
        if self.program is not None:
            self.program.end(number)
            self.program = None

    def kill(self) -> None:
        self.end(signal.SIGKILL)

    def refusal(self) -> str:
        """The command ends by itself with 1; the one line that it says why with."""
        assert self.running.process.wait(PATIENCE_S) == 1, self.running.err
        self.running.end()
        (line,) = [line for line in self.running.err if line.startswith("covey:")]
        self.program = None
        return line

    def wipe(self) -> None:
        """Its disk is lost."""
        shutil.rmtree(self.data)


@dataclasses.dataclass
class Cluster:
    folder: Path
    hosts: list[Host]

    @property
    def members(self) -> str:
        return ",".join(f"{host.name}={host.peer_url}" for host in self.hosts)

    @property
    def endpoints(self) -> str:
        return ",".join(host.endpoint for host in self.hosts)

    def start(self, *hosts: Host, more: Sequence[object] = ()) -> None:
        """Run the command on these hosts, or all."""
        for host in hosts or self.hosts:
            argv = host.argv(self.members)
            host.program = conftest.Program(*argv[:2], *more, *argv[2:], COVEY_ETCD_ENDPOINTS=self.endpoints)

    def host(self, name: str) -> Host:
        """A host that was never here before."""
        folder = self.folder / f"{name}-{len(list(self.folder.iterdir()))}"
        folder.mkdir()
        return Host(name, folder, etcd.free_port(), etcd.free_port())

    def covey(self, *words: object, at: Host | None = None) -> ran.Ran:
        """`covey etcd …`, told of one member or all."""
        where = self.endpoints if at is None else at.endpoint
        return conftest.covey("etcd", *words, COVEY_ETCD_ENDPOINTS=where)

    def rows(self, at: Host | None = None) -> dict[str, dict[str, Any]]:
        """The members by name, as `covey etcd status` has them."""
        ran = self.covey("status", "--json", at=at)
        return {one["name"]: one for one in ran.json["members"]} if ran.out else {}

    def wait_until_well(self, *names: str) -> None:
        """All (or these) are there, follow a leader and vote; by etcdctl's word, which costs less than ours."""
        wanted = set(names or (host.name for host in self.hosts))

        def well() -> bool:
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                listed = json.loads(self.ctl("member", "list", "-w", "json"))["members"]
                voters = {one.get("name", "") for one in listed if not one.get("isLearner")}
                return voters == wanted and len(listed) == len(wanted) and all(map(self._follows, self.hosts))
            return False

        eventually(well, PATIENCE_S)

    def _follows(self, host: Host) -> bool:
        (said,) = json.loads(self.ctl("endpoint", "status", "-w", "json", at=host))
        return bool(said["Status"].get("leader"))

    def wait_until_well_without(self, lost: Host) -> None:
        def well() -> bool:
            rows = self.rows()
            return all(row["role"] in ("leader", "follower") for name, row in rows.items() if name != lost.name)

        eventually(lambda: self.rows() and well(), PATIENCE_S)

    def put(self, key: str, value: str) -> None:
        eventually(lambda: self.ctl("put", key, value), PATIENCE_S)

    def get(self, key: str, at: Host) -> str:
        return self.ctl("get", key, "--print-value-only", at=at).strip()

    def ctl(self, *words: str, at: Host | None = None) -> str:
        """What `etcdctl` prints."""
        where = self.endpoints if at is None else at.endpoint
        cluster = etcd.Cluster(
            self.folder,
            [etcd.Member("", self.folder, int(port.rpartition(":")[2]), 0, 0, ()) for port in where.split(",")],
        )
        return cluster.ctl(*words)


@contextlib.contextmanager
def some(count: int) -> Iterator[Cluster]:
    """So many hosts, none started, their disks on a real disk."""
    with etcd.folder() as folder:
        cluster = Cluster(folder, [])
        for number in range(1, count + 1):
            cluster.hosts.append(cluster.host(f"n{number}"))
        everyone = list(cluster.hosts)
        try:
            yield cluster
        finally:
            for host in {id(one): one for one in (*everyone, *cluster.hosts)}.values():
                host.kill()
