"""Real etcd for tests: one or three members on disk, with fsync, on free loopback ports.

    with etcd.running() as cluster:                     # one member, ready in half a second
        store = covey_etcd.Etcd(cluster.endpoints, world=world.System())

    with etcd.running(members=3) as cluster:
        cluster.leader().stop()                         # SIGSTOP: a hung member; .cont() wakes it up
        cluster.members[0].kill()                       # kill -9; .start() brings it back with its data
        await cluster.wait_ready()

`ctl` is ground truth: the answer of `etcdctl`, which shares no line with the client under test. Members end with the
test runner, even when that is killed (PR_SET_PDEATHSIG, set by util-linux's `setpriv` so that nothing of ours runs
between fork and exec: grpc's threads do not survive a fork). The signal fires when the *thread* that started a member
ends, so members are started from the main thread only.
"""

import asyncio
import base64
import contextlib
import fcntl
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
_LOCKS = pathlib.Path(tempfile.gettempdir()) / "covey-test-ports"


class NotInstalled(Exception):
    """The etcd binary is missing; a test must fail on this, never skip."""


def binary(name: str = "etcd") -> str:
    """Path of `etcd` or `etcdctl`: beside COVEY_ETCD_BINARY, on PATH, or where `make setup` puts it."""
    if named := os.environ.get("COVEY_ETCD_BINARY"):
        return named if name == "etcd" else str(pathlib.Path(named).with_name(name))
    if found := shutil.which(name):
        return found
    ours = REPOSITORY / ".deps" / "etcd" / "usr" / "bin" / name
    if ours.exists():
        return str(ours)
    raise NotInstalled(f"{name} is not installed: run `make setup`, or name it in COVEY_ETCD_BINARY")


def free_port() -> int:
    """A loopback port that is free and stays ours until this process ends.

    It lies below the range from which the kernel takes ports for outgoing connections, so it is still free when a
    member comes back to it; a locked file keeps other test processes away from it."""
    _LOCKS.mkdir(mode=0o777, exist_ok=True)
    while True:
        port = random.randrange(12_000, 32_000)
        held = os.open(_LOCKS / str(port), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            os.close(held)
            continue
        return port  # and `held` stays open


# Members share the machine with each other and with all that uses them. One that takes all cores for itself costs
# a sixth more processor time than one that is held to its share, as a container's limit would.
_SHARE = {"GOMAXPROCS": "1"}


class Security(NamedTuple):
    """Files of a TLS set-up: the server's, and what a client needs. With it clients must show a certificate."""

    ca: pathlib.Path
    server_cert: pathlib.Path
    server_key: pathlib.Path
    client_cert: pathlib.Path
    client_key: pathlib.Path


@dataclass
class Member:
    """One etcd process, which may be killed, stopped and started again on the same data."""

    name: str
    directory: pathlib.Path
    client_port: int
    peer_port: int
    health_port: int
    arguments: Sequence[str]
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.client_port}"

    def start(self) -> None:
        """Start the process; returns at once."""
        assert self.process is None, f"{self.name} runs already"
        with (self.directory / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*_die_with_us(), binary(), *self.arguments],
                env={**_SHARE, **os.environ},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def terminate(self) -> None:
        """SIGTERM, and wait for the end: an orderly restart."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        """SIGSTOP: its sockets stay open and nothing answers."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def cont(self) -> None:
        """SIGCONT after `stop`."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def healthy(self) -> bool:
        """It has a leader and answers a linearizable read."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.health_port}/health", timeout=3) as answer:
                return bool(json.load(answer)["health"] == "true")
        except (OSError, urllib.error.URLError, ValueError):
            return False

    def argument(self, name: str) -> str:
        """What it is started with."""
        return self.arguments[list(self.arguments).index(f"--{name}") + 1]

    def log(self) -> str:
        return (self.directory / f"{self.name}.log").read_text(errors="replace")


@dataclass
class Cluster:
    """All members. `endpoints` are the client addresses, `host:port`."""

    directory: pathlib.Path
    members: list[Member]
    security: Security | None = None
    login: str = ""  # "user:password" for etcdctl
    started_at: float = field(default_factory=time.monotonic)

    @property
    def endpoints(self) -> list[str]:
        return [member.endpoint for member in self.members]

    def start(self) -> None:
        for member in self.members:
            if member.process is None:
                member.start()

    def kill(self) -> None:
        """End everything, stopped members too."""
        for member in self.members:
            member.kill()

    def wait_ready_blocking(self, timeout_s: float = 120.0) -> None:
        """Until every member answers; for fixtures that are no coroutines."""
        deadline = time.monotonic() + timeout_s
        for member in self.members:
            while not member.healthy():
                dead = member.process is None or member.process.poll() is not None
                if dead or time.monotonic() > deadline:
                    raise AssertionError(f"etcd {member.name} is not ready:\n{member.log()[-3000:]}")
                time.sleep(0.02)

    async def wait_ready(self, timeout_s: float = 120.0) -> None:
        """Until every member answers."""
        await asyncio.to_thread(self.wait_ready_blocking, timeout_s)

    def ctl(self, *arguments: str, timeout_s: float = 60.0) -> str:
        """What `etcdctl` prints; raises AssertionError with its complaint when it fails."""
        done = subprocess.run(
            [*self._ctl(), *arguments], capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert done.returncode == 0, f"etcdctl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def save(self, path: pathlib.Path) -> None:
        """A backup as an operator makes it."""
        only = Cluster(self.directory, self.members[:1], self.security, self.login)
        only.ctl("snapshot", "save", str(path), timeout_s=60)

    def restore(self, path: pathlib.Path) -> None:
        """Put a backup in the place of everything, with the same names and token, and start again."""
        self.kill()
        for member in self.members:
            shutil.rmtree(member.directory / member.name)
            command = [binary("etcdctl"), "snapshot", "restore", str(path), "--data-dir", member.argument("data-dir")]
            for name in ("name", "initial-cluster", "initial-cluster-token"):
                command += [f"--{name}", member.argument(name)]
            command += ["--initial-advertise-peer-urls", member.argument("initial-advertise-peer-urls")]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, done.stderr
        self.start()
        self.wait_ready_blocking()

    def _ctl(self) -> list[str]:
        scheme = "https://" if self.security else ""
        command = [
            binary("etcdctl"),
            "--command-timeout=30s",
            "--endpoints=" + ",".join(scheme + endpoint for endpoint in self.endpoints),
        ]
        if self.security:
            command += [f"--cacert={self.security.ca}", f"--cert={self.security.client_cert}"]
            command += [f"--key={self.security.client_key}"]
        return [*command, f"--user={self.login}"] if self.login else command

    def leader(self) -> Member:
        """The member that all reachable members call their leader; waits for an election."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            named = set()
            for member in self.members:
                with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                    named |= self._leading(member)
            if len(named) == 1:
                return next(member for member in self.members if member.name in named)
            time.sleep(0.05)
        raise AssertionError("no leader")

    def _leading(self, member: Member) -> set[str]:
        """The name of `member` if it leads, else nothing."""
        only = Cluster(self.directory, [member], self.security, self.login)
        status = json.loads(only.ctl("endpoint", "status", "-w", "json", timeout_s=3))[0]["Status"]
        return {member.name} if status["leader"] == status["header"]["member_id"] else set()

    async def history(self, prefix: str, first: int, last: int) -> list[tuple[int, str, bytes | None]]:
        """Ground truth: every change of keys with `prefix` in revisions `first` to `last`, as (revision, key, value)
        in order; value None for a deletion. A marker is written behind `last` to know when all were told."""
        marker = f"{prefix}~history-{last}"
        watching = await asyncio.create_subprocess_exec(
            *self._ctl(), "watch", "--prefix", prefix, "--rev", str(first), "-w", "json",
            stdout=asyncio.subprocess.PIPE, limit=1 << 26,
        )  # fmt: skip
        assert watching.stdout is not None
        events: list[tuple[int, str, bytes | None]] = []
        try:
            self.ctl("put", marker, "x")
            async with asyncio.timeout(60):
                while not events or events[-1][1] != marker:
                    line = await watching.stdout.readline()
                    assert line, "etcdctl watch ended"
                    with contextlib.suppress(ValueError):
                        events += [_event(raw) for raw in json.loads(line).get("Events") or ()]
        finally:
            watching.kill()
            await watching.wait()
        return [event for event in events if event[0] <= last and not event[1].startswith(f"{prefix}~history-")]


def _event(raw: dict[str, Any]) -> tuple[int, str, bytes | None]:
    kv = raw["kv"]
    key = base64.b64decode(kv["key"]).decode("utf-8", "surrogateescape")
    value = None if raw.get("type") == 1 else base64.b64decode(kv.get("value", ""))
    return kv["mod_revision"], key, value


def _die_with_us() -> list[str]:
    return ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []


def prepare(
    directory: pathlib.Path, members: int = 1, *, security: Security | None = None, extra: Sequence[str] = ()
) -> Cluster:
    """A cluster with its data below `directory`, not yet started. `extra` are more flags of every member."""
    scheme = "https" if security else "http"
    ports = [(free_port(), free_port(), free_port()) for _ in range(members)]
    names = [f"m{number}" for number in range(members)]
    initial = ",".join(f"{name}=http://127.0.0.1:{peer}" for name, (_, peer, _) in zip(names, ports, strict=True))
    timing = ("--heartbeat-interval", "100", "--election-timeout", "1000") if members > 1 else ()
    made = []
    for name, (client, peer, health) in zip(names, ports, strict=True):
        arguments = [
            "--name", name,
            "--data-dir", str(directory / name),
            "--listen-client-urls", f"{scheme}://127.0.0.1:{client}",
            "--advertise-client-urls", f"{scheme}://127.0.0.1:{client}",
            "--listen-peer-urls", f"http://127.0.0.1:{peer}",
            "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
            "--listen-metrics-urls", f"http://127.0.0.1:{health}",
            "--initial-cluster", initial,
            "--initial-cluster-token", directory.name,
            "--logger", "zap", "--log-level", "warn", "--pre-vote", *timing, *extra,
        ]  # fmt: skip
        if security:
            arguments += ["--client-cert-auth", "--trusted-ca-file", str(security.ca)]
            arguments += ["--cert-file", str(security.server_cert), "--key-file", str(security.server_key)]
        made.append(Member(name, directory, client, peer, health, arguments))
    return Cluster(directory, made, security)


@contextlib.contextmanager
def folder() -> Iterator[pathlib.Path]:
    """A directory on a disk (/var/tmp: never a tmpfs), removed at the end."""
    directory = pathlib.Path(tempfile.mkdtemp(prefix="covey-etcd-", dir="/var/tmp"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def running(members: int = 1, *, security: Security | None = None, extra: Sequence[str] = ()) -> Iterator[Cluster]:
    """A cluster that is ready."""
    with folder() as directory:
        cluster = prepare(directory, members, security=security, extra=extra)
        try:
            cluster.start()
            cluster.wait_ready_blocking()
            yield cluster
        finally:
            cluster.kill()
