"""A cloud on members that `covey etcd bootstrap` began: controllers, a registry, many synthetic nodes in one process.

Their VMs never end by themselves. The truth about them is what lies on the nodes' disks.
"""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

from tests.cluster import conftest, fleet
from tests.operate import hosts
from tests.support import etcd

eventually = conftest.eventually
SLOTS = 300  # of each node


def lesser_troubles(url: str) -> list[str]:
    """What a controller that is green says in the body of /readyz. Raises ValueError while it is red."""
    status, said = conftest.ask(f"{url}/readyz")
    if status != 200:
        raise ValueError(said)
    return list(said["body"]["troubles"])


@dataclasses.dataclass
class Cloud(fleet.Fleet):
    """`store` are the hosts of etcd's members."""

    store: hosts.Cluster = dataclasses.field(default_factory=lambda: hosts.Cluster(Path(), []))
    agent: fleet.Part = dataclasses.field(default_factory=lambda: fleet.Part((), {}))

    @property
    def places(self) -> list[fleet.Node]:
        """The nodes, as their disks show them."""
        return [fleet.Node((), {}, folder=path) for path in sorted((self.folder / "nodes" / "agent").glob("node-*"))]

    def vms(self) -> dict[str, str]:
        """Instance → phase of every VM on any node."""
        return {id: phase for place in self.places for id, phase in place.vms().items()}

    def journal(self, what: str) -> collections.Counter[str]:
        """How often something befell each instance's VM, on all nodes: start, destroy."""
        found = collections.Counter[str]()
        for place in self.places:
            path = place.folder / "vms" / "journal.log"
            if path.exists():
                found.update(line.split()[0] for line in path.read_text().splitlines() if line.split()[2] == what)
        return found

    def wait_until_started(self, ids: list[str], timeout_s: float = 180.0) -> None:
        def all_started() -> bool:
            time.sleep(0.2)  # a list of thousands is no small question
            return {id for id, state in self.states().items() if state == "Started"} >= wanted

        wanted = set(ids)
        eventually(all_started, timeout_s)


@contextlib.contextmanager
def running(folder: Path, *, nodes: int = 10, controllers: int = 2, **env: str) -> Iterator[Cloud]:
    """Ready, with every node Active. Each controller is told of one member only: the others it learns."""
    with hosts.some(3) as store:
        store.start()
        store.wait_until_well()
        registry_url = f"http://127.0.0.1:{etcd.free_port()}"
        words = ("registry", "--listen-addr", registry_url.removeprefix("http://"), "--data-dir", folder / "registry")
        seen = etcd.Cluster(
            folder, [etcd.Member(host.name, folder, host.client_port, 0, 0, ()) for host in store.hosts]
        )
        cloud = Cloud(folder, seen, fleet.Part(words, {}), [], store=store)
        for number in range(controllers):
            port = etcd.free_port()
            argv = (
                *("controller", "--listen-addr", f"127.0.0.1:{port}", "--anka-registry", registry_url),
                *("--etcd-endpoints", store.hosts[number].endpoint),
            )
            cloud.controllers.append(fleet.Controller(argv, {**fleet.DEFAULTS, **env}, url=f"http://127.0.0.1:{port}"))
        agent = ("agent", "--hypervisor", "synthetic", "--nodes", nodes, "--data-dir", folder / "nodes")
        cloud.agent = fleet.Part((*agent, "--controller", ",".join(cloud.urls), "--max-vms", SLOTS), {})
        try:
            for part in (cloud.registry, *cloud.controllers):
                part.start()
            cloud.wait_until_ready()
            cloud.template = fleet.push(folder, registry_url)
            cloud.agent.start()
            eventually(lambda: _active(cloud) == nodes)
            yield cloud
        finally:
            cloud.agent.end()
            cloud.end()


def _active(cloud: Cloud) -> int:
    return sum(node["state"] == "Active" for node in cloud.ask("GET", "/api/v1/node")["body"])
