"""Nodes on hosts of their own whose lines carry so much and no more, and which all pull one template at once.

    with pulling.running(nodes=4, line_bytes_s=4 << 20) as fleet:
        fleet.push(32 << 20)
        took_s = fleet.pull()                     # one VM on each node, until all have started
        fleet.registry_bytes()                    # what left the registry's host since then

Each line is limited in both directions (`tc`, token buckets), the registry's too. The hypervisor is the synthetic one;
the templates are really pulled.
"""

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support import lab_cloud, netlab

_BURST = "64kb"
_PATIENCE_S = 300.0


class Fleet:
    """The nodes are n1, n2, …; `share` False: each pulls for itself."""

    def __init__(self, cloud: lab_cloud.Cloud, nodes: int, line_bytes_s: int) -> None:
        self.cloud = cloud
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self._line_bytes_s = line_bytes_s
        self._before = 0

    def start(self, *, share: bool = True, **env: str) -> None:
        """Nodes with empty caches, which are there when this returns."""
        for name in self.names:
            self.start_one(name, share=share, **env)
        self.cloud.wait_nodes(len(self.names))

    def start_one(self, name: str, *, share: bool = True, **env: str) -> None:
        settings = {
            "COVEY_HYPERVISOR": "synthetic",
            "COVEY_NODE_NAME": name,
            "COVEY_MAX_VMS": "1",
            "COVEY_CONTROLLER": self.cloud.controllers[0].url,
            "COVEY_DATA_DIR": str(self.cloud.directory / name),
            "COVEY_SHARE_LAYERS": str(share).lower(),
            **env,
        }
        program = self.cloud.program(name, name, [*lab_cloud.COVEY, "agent"], "", **settings)
        self.cloud.agents.append(program)
        program.start()

    def limit(self, *names: str) -> None:
        """Let each line carry so much, in each direction."""
        for name in names:
            rate = f"{self._line_bytes_s * 8}bit"
            shape = ["root", "tbf", "rate", rate, "burst", _BURST, "latency", "100ms"]
            self.cloud.lab[name].run(["tc", "qdisc", "replace", "dev", "eth0", *shape])
            self.cloud.lab.limit(name, shape)

    def push(self, size_bytes: int, name: str = "large") -> str:
        """A new template of noise, in two layers; its id."""
        layers = [self.cloud.directory / f"{name}-{number}.img" for number in (1, 2)]
        for path, size in zip(layers, (size_bytes - size_bytes // 4, size_bytes // 4), strict=True):
            path.write_bytes(os.urandom(size))
        where = ["--json", "--registry", self.cloud.registries[0].url]
        argv = [*lab_cloud.COVEY, "template", "push", name, "--tag", "v1", *map(str, layers), *where]
        pushed = self.cloud.lab["load"].run(argv, COVEY_CONFIG=os.devnull, PYTHONPATH=str(lab_cloud.ROOT))
        for path in layers:
            path.unlink()
        return str(json.loads(pushed.stdout)["template"])

    def begin(self, template: str, count: int) -> list[str]:
        """So many VMs of it, at once; their ids."""
        self._before = self._sent()
        url = f"{self.cloud.controllers[0].url}/api/v1/vm"
        started = self.cloud.ask(url, "POST", {"vmid": template, "count": count})
        assert started.body["status"] == "OK", started
        return list(started.body["body"])

    def finish(self, ids: list[str], timeout_s: float = _PATIENCE_S) -> None:
        left = list(ids)

        def look() -> bool:
            left[:] = [id for id in left if self.cloud.state(id) != "Started"]
            return not left

        self.cloud.until(look, timeout_s, f"{len(ids)} VMs are Started")

    def agent_of(self, id: str) -> lab_cloud.Program:
        """The agent of the node that an instance was placed on."""
        url = self.cloud.controllers[0].url
        node = self.cloud.ask(f"{url}/api/v1/vm?id={id}").body["body"]["node_id"]
        listed = self.cloud.ask(f"{url}/api/v1/node").body["body"]
        (name,) = [one["node_name"] for one in listed if one["node_id"] == node]
        (agent,) = [agent for agent in self.cloud.agents if agent.name == name]
        return agent

    def pull(self, template: str) -> float:
        """A VM on each node; how long it took until all had started."""
        began_s = time.monotonic()
        self.finish(self.begin(template, len(self.names)))
        return time.monotonic() - began_s

    def registry_bytes(self) -> int:
        """What has left the registry's host since the pull began: also heads, and what was sent again."""
        return self._sent() - self._before

    def _sent(self) -> int:
        lines = self.cloud.lab["r1"].run(["cat", "/proc/net/dev"]).stdout.splitlines()
        (counts,) = [line.partition(":")[2].split() for line in lines if line.strip().startswith("eth0:")]
        return int(counts[8])  # "bytes" of what it sends: proc(5)


@contextlib.contextmanager
def running(*, nodes: int, line_bytes_s: int) -> Iterator[Fleet]:
    """A cloud with one controller and a registry, whose nodes are still to be started."""
    directory = Path(tempfile.mkdtemp(prefix="covey-pull-", dir="/var/tmp"))
    names = [f"n{number}" for number in range(1, nodes + 1)]
    try:
        with netlab.Lab(["e1", "c1", "r1", "load", *names]) as lab:
            cloud = lab_cloud.Cloud(lab, directory)
            cloud.start_etcd(["e1"])
            cloud.start_registry("r1")
            cloud.start_controller("c1")
            cloud.wait_all_ready()
            fleet = Fleet(cloud, nodes, line_bytes_s)
            fleet.limit("r1", *names)
            yield fleet
    finally:
        shutil.rmtree(directory, ignore_errors=True)
