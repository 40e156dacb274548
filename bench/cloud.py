"""A whole cloud of real processes for a measurement: etcd on disk with fsync, registry, controllers, synthetic nodes.

Everything listens on free ports of 127.0.0.1, keeps its data in a temporary directory on a disk, and ends with the
measurement, also when that is killed (`setpriv --pdeathsig`).
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import etcd

ROOT = Path(__file__).resolve().parent.parent
COVEY = (sys.executable, "-m", "covey")


class NotReady(Exception):
    """A program did not come up; the text holds the end of its log."""


@dataclass
class Cloud:
    """The running processes by name, and where to reach them."""

    directory: Path
    members: etcd.Cluster
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    controllers: list[str] = field(default_factory=list)
    registry: str = ""

    def start(self, name: str, *arguments: str, **environ: str) -> None:
        """Run `covey …` with its log beside the data; settings of the caller's environment are not seen."""
        # Synthetic nodes in numbers keep nothing: each would have a disk of its own, which is not measured here.
        kept = {} if arguments[0] == "agent" else {"COVEY_DATA_DIR": str(self.directory / name)}
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("COVEY_", "ANKA_"))}
        guard = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*guard, *COVEY, *arguments],
                env={**clean, **kept, **environ},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def pids(self) -> dict[str, int]:
        """Every process by name, etcd's too."""
        found = {name: process.pid for name, process in self.processes.items()}
        for number, member in enumerate(self.members.members, 1):
            assert member.process is not None
            found[f"etcd {number}"] = member.process.pid
        return found

    def tail(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text(errors="replace")[-2000:]

    def wait_ready(self, name: str, url: str, limit_s: float = 30.0) -> None:
        """Until `url`/readyz is green."""
        deadline = time.monotonic() + limit_s
        while not _is_ready(url):
            if self.processes[name].poll() is not None or time.monotonic() > deadline:
                raise NotReady(f"{name} is not ready:\n{self.tail(name)}")
            time.sleep(0.05)

    def run(self, *arguments: str) -> str:
        """A `covey` command to its end; what it prints."""
        done = subprocess.run([*COVEY, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise NotReady(f"covey {' '.join(arguments)}: {done.stderr or done.stdout}")
        return done.stdout

    def end(self) -> None:
        """Agents first, so that nothing complains; those that do not end in time are killed."""
        for process in reversed(self.processes.values()):
            process.terminate()
        deadline = time.monotonic() + 15
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
            process.kill()
            process.wait()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextlib.contextmanager
def running(
    *, nodes: int, members: int = 1, controllers: int = 1, slots: int = 0, forget_s: float = 2.0
) -> Iterator[Cloud]:
    """A cloud whose nodes have joined and which holds the template `bench`, tag `v1`. `slots` of each node; 0: as many
    as the hypervisor thinks. A terminated instance is forgotten after `forget_s`. Without nodes, see `start_nodes`."""
    directory = Path(tempfile.mkdtemp(prefix="covey-bench-", dir="/var/tmp"))
    with etcd.running(members) as cluster:
        cloud = Cloud(directory, cluster)
        try:
            _start(cloud, nodes, controllers, slots, forget_s)
            yield cloud
        finally:
            cloud.end()
            shutil.rmtree(directory, ignore_errors=True)


def _start(cloud: Cloud, nodes: int, controllers: int, slots: int, forget_s: float) -> None:
    port = etcd.free_port()
    cloud.registry = f"http://127.0.0.1:{port}"
    cloud.start("registry", "registry", COVEY_LISTEN_ADDR=f"127.0.0.1:{port}")
    for number in range(1, controllers + 1):
        port = etcd.free_port()
        cloud.controllers.append(f"http://127.0.0.1:{port}")
        cloud.start(
            f"controller {number}",
            "controller",
            COVEY_LISTEN_ADDR=f"127.0.0.1:{port}",
            COVEY_ETCD_ENDPOINTS=",".join(cloud.members.endpoints),
            COVEY_ANKA_REGISTRY=cloud.registry,
            COVEY_INSTANCE_TIME_OUT=f"{forget_s:g}s",
        )
    cloud.wait_ready("registry", cloud.registry)
    for number, url in enumerate(cloud.controllers, 1):
        cloud.wait_ready(f"controller {number}", url)
    disk = cloud.directory / "disk.img"
    disk.write_bytes(os.urandom(4096))
    cloud.run("template", "push", "bench", "--tag", "v1", str(disk), "--registry", cloud.registry)
    if nodes:
        start_nodes(cloud, "agent", nodes, slots)
        _wait_for_nodes(cloud, nodes)


def start_nodes(cloud: Cloud, name: str, nodes: int, slots: int = 0) -> None:
    """So many synthetic nodes in one process called `name`; they join in their own time."""
    cloud.start(
        name,
        "agent",
        COVEY_HYPERVISOR="synthetic",
        COVEY_NODES=str(nodes),
        COVEY_CONTROLLER=",".join(cloud.controllers),
        COVEY_NODE_NAME=name.replace(" ", "-"),
        COVEY_SYNTHETIC_BOOT="0s",
        COVEY_SYNTHETIC_PULL="0s",
        COVEY_MAX_VMS=str(slots),
    )


def _wait_for_nodes(cloud: Cloud, nodes: int, limit_s: float = 180.0) -> None:
    deadline = time.monotonic() + limit_s
    there = 0
    while there < nodes:
        if cloud.processes["agent"].poll() is not None or time.monotonic() > deadline:
            raise NotReady(f"{there} of {nodes} nodes have joined:\n{cloud.tail('agent')}")
        time.sleep(0.2)
        with contextlib.suppress(OSError):  # on a busy machine a controller may be red for a moment: ask again
            there = sum(node["state"] == "Active" for node in body(cloud.controllers[0] + "/api/v1/node"))


def body(url: str) -> Any:
    """The envelope's body of a GET."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)["body"]


def asked_of_etcd(endpoints: list[str]) -> dict[str, float]:
    """What etcd has done so far by its own count: raft proposals, and calls of each kind over all members."""
    found: dict[str, float] = {}
    for number, endpoint in enumerate(endpoints):
        with urllib.request.urlopen(f"http://{endpoint}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        for line in lines:
            name, _, value = line.rpartition(" ")
            if name == "etcd_server_proposals_committed_total" and not number:
                found["proposals"] = float(value)
            elif name.startswith(("grpc_server_started_total", "grpc_server_msg_received_total")):
                kind = name.partition('grpc_method="')[2].partition('"')[0]
                if ("msg_received" in name) == (kind == "LeaseKeepAlive"):
                    found[kind] = found.get(kind, 0.0) + float(value)
    return found


def memory_mb(pid: int) -> tuple[float, float]:
    """(RSS, PSS) of one process in MiB: what it touches, and its fair share of it."""
    found = {"Rss": 0.0, "Pss": 0.0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        if name in found:
            found[name] = int(rest.split()[0]) / 1024
    return found["Rss"], found["Pss"]


def cpu_s(pid: int) -> float:
    """Processor seconds that one process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
