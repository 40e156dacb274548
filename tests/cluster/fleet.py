"""Three etcd members on disk, three controllers, a registry, and nodes that pretend: each a process, to be hurt alone.

    with fleet.running(folder) as cloud:
        node = cloud.node("alpha")             # `covey agent` on synthetic VMs, given all three controllers
        (id,) = cloud.start()
        cloud.wait_until(id, "Started")
        node.freeze(); cloud.controllers[0].kill(); cloud.etcd.leader().kill()

The truth about a node is what lies on its disk: `vms()` are the VMs that are there, `starts()` has one line for each
guest that ever ran. The truth about the store is `etcdctl`. Nothing here imports covey.
"""

import contextlib
import dataclasses
import json
import signal
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.cluster import conftest
from tests.support import etcd

eventually = conftest.eventually
DEFAULTS = {
    "COVEY_INSTANCE_TIME_OUT": "3s",
    "COVEY_UNKNOWN_VM_THRESHOLD": "2",
    "COVEY_HEARTBEAT": "1s",
    "COVEY_LOG_JSON": "true",
}


@dataclasses.dataclass
class Part:
    """A program with a fixed command, that may be killed and started again. `covey`: of whatever version."""

    argv: tuple[object, ...]
    env: Mapping[str, str]
    program: conftest.Program | None = None
    covey: Sequence[str] = conftest.COVEY

    def start(self) -> None:
        assert self.program is None, "it runs already"
        self.program = conftest.Program(*self.argv, covey=self.covey, **self.env)

    @property
    def running(self) -> conftest.Program:
        assert self.program is not None, "it does not run"
        return self.program

    def end(self, number: int = signal.SIGKILL) -> None:
        """End it by a signal; nothing if it does not run."""
        if self.program is not None:
            self.program.process.send_signal(signal.SIGCONT)
            self.program.end(number)
            self.program = None

    def kill(self) -> None:
        self.end(signal.SIGKILL)

    def freeze(self) -> None:
        self.running.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.running.process.send_signal(signal.SIGCONT)


@dataclasses.dataclass
class Controller(Part):
    url: str = ""

    def ready(self) -> bool:
        return conftest.ask(f"{self.url}/readyz")[0] == 200


@dataclasses.dataclass
class Node(Part):
    """One synthetic node with a process and a directory of its own."""

    folder: Path = Path()
    name: str = ""

    def identity(self) -> dict[str, Any]:
        """Its node id, its session's number and secret, as its agent keeps them."""
        known: dict[str, Any] = json.loads((self.folder / "node.json").read_text())
        return known

    @property
    def id(self) -> str:
        return str(self.identity()["node"])

    def vms(self) -> dict[str, str]:
        """Instance → phase of the VMs that are on its disk."""
        found = {}
        for path in (self.folder / "vms").glob("*/vm.json"):
            with contextlib.suppress(OSError, ValueError):  # removed, or written anew, while we look
                vm = json.loads(path.read_text())
                found[vm["instance"]] = vm.get("phase", "prepared")
        return found

    def starts(self) -> list[str]:
        """The instances whose guests ran here, in order, one entry for each start."""
        journal = self.folder / "vms" / "journal.log"
        lines = journal.read_text().splitlines() if journal.exists() else []
        return [line.split()[0] for line in lines if line.split()[2] == "start"]

    def reboot(self) -> None:
        """The host loses its power: agent and VMs are gone at once, the disks stay."""
        self.kill()
        for path in (self.folder / "vms").glob("*/vm.json"):
            vm = json.loads(path.read_text())
            path.write_text(json.dumps({**vm, "powered_off": True}))


@dataclasses.dataclass
class Fleet:
    """`ask` goes to the controller number `via`; the others must agree."""

    folder: Path
    etcd: etcd.Cluster
    registry: Part
    controllers: list[Controller]
    template: str = ""
    nodes: dict[str, Node] = dataclasses.field(default_factory=dict)

    @property
    def urls(self) -> list[str]:
        return [one.url for one in self.controllers]

    # ---- nodes -----------------------------------------------------------------------------------------------------

    def node(self, name: str, covey: Sequence[str] = conftest.COVEY, **env: str) -> Node:
        """A new node, once every controller shows it as Active."""
        data = self.folder / f"{name}-{uuid.uuid4()}"  # a host that was never here before
        argv = (
            *("agent", "--hypervisor", "synthetic", "--nodes", 1, "--node-name", name),
            *("--data-dir", data, "--controller", ",".join(self.urls)),
        )
        folder = data / "agent" / "node-001"
        made = Node(argv, {"COVEY_LOG_JSON": "true", **env}, covey=covey, folder=folder, name=name)
        self.nodes[name] = made
        made.start()
        made.running.wait_until_said("joined")
        self.wait_until_active(made)
        return made

    def wait_until_active(self, node: Node) -> None:
        for via in range(len(self.controllers)):
            eventually(lambda via=via: self.shown(node, via)["state"] == "Active")  # type: ignore[misc]

    def shown(self, node: Node, via: int = 0) -> dict[str, Any]:
        """The node as one controller shows it. Raises ValueError while it does not."""
        answer = self.ask("GET", f"/api/v1/node?id={node.id}", via=via)
        if answer["status"] != "OK":
            raise ValueError(answer["message"])
        (one,) = answer["body"]
        assert isinstance(one, dict)
        return one

    def remove(self, *names: str) -> None:
        """Take nodes out of the cloud again, however they stand."""
        for name in names:
            node = self.nodes.pop(name)
            with contextlib.suppress(OSError, ValueError):
                self.ask("DELETE", "/api/v1/node", {"node_id": node.id})
            node.kill()

    # ---- instances -------------------------------------------------------------------------------------------------

    def patiently(self, method: str, body: object, via: int) -> Any:
        """One write about instances; again while the answer is 503, by which nothing was done: the members of a busy
        machine's etcd elect a leader now and then."""
        url = f"{self.controllers[via].url}/api/v1/vm"
        deadline = time.monotonic() + conftest.PATIENCE_S
        while True:
            status, answer = conftest.ask(url, method, body)
            if status != 503 or time.monotonic() > deadline:
                return answer
            time.sleep(0.1)

    def ask(
        self, method: str, path: str, body: object = None, via: int = 0, headers: Mapping[str, str] | None = None
    ) -> Any:
        """One call of the API: the whole envelope."""
        return conftest.ask(self.controllers[via].url + path, method, body, headers)[1]

    def start(self, count: int = 1, via: int = 0, **more: object) -> list[str]:
        answer = self.patiently("POST", {"vmid": self.template, "count": count, **more}, via)
        assert answer["status"] == "OK", answer
        return list(answer["body"])

    def terminate(self, *ids: str, via: int = 0) -> None:
        for id in ids:
            answer = self.patiently("DELETE", {"id": id}, via)
            assert answer["status"] == "OK" or "not" in answer["message"].lower(), answer

    def instance(self, id: str, via: int = 0) -> dict[str, Any]:
        """The instance as one controller shows it; empty once it is forgotten."""
        answer = self.ask("GET", f"/api/v1/vm?id={id}", via=via)
        return dict(answer["body"]) if answer["status"] == "OK" else {}

    def state(self, id: str, via: int = 0) -> str:
        """Its state; "" once it is forgotten. Raises ValueError when the controller cannot tell."""
        answer = self.ask("GET", f"/api/v1/vm?id={id}", via=via)
        if answer["status"] != "OK" and "not found" not in answer["message"].lower():
            raise ValueError(answer["message"])
        return str(answer["body"]["instance_state"]) if answer["status"] == "OK" else ""

    def states(self, via: int = 0) -> dict[str, str]:
        """Every instance that is listed. Raises ValueError when the controller cannot tell."""
        answer = self.ask("GET", "/api/v1/vm", via=via)
        if answer["status"] != "OK":
            raise ValueError(answer["message"])
        return {one["instance_id"]: one["vm"]["instance_state"] for one in answer["body"]}

    def wait_until(self, id: str, *states: str, via: int = 0, timeout_s: float = conftest.PATIENCE_S) -> None:
        eventually(lambda: self.state(id, via) in states, timeout_s)

    def wait_until_all(self, ids: list[str], state: str, timeout_s: float = conftest.PATIENCE_S) -> None:
        eventually(lambda: [id for id in ids if self.states().get(id) == state] == ids, timeout_s)

    def clear(self) -> None:
        """End every instance; wait until no VM and no slot is left."""
        self.terminate(*self.states())
        eventually(lambda: not self.states())
        for node in self.nodes.values():
            eventually(lambda node=node: node.vms() == {})  # type: ignore[misc]
            eventually(lambda node=node: self.shown(node)["vm_count"] == 0)  # type: ignore[misc]

    # ---- the store -------------------------------------------------------------------------------------------------

    def keys(self, prefix: str) -> list[str]:
        """Keys below /covey/ that begin so, as etcdctl lists them."""
        printed = self.etcd.ctl("get", "--prefix", f"/covey/{prefix}", "--keys-only")
        return [line for line in printed.splitlines() if line]

    def value(self, key: str) -> dict[str, Any]:
        printed = self.etcd.ctl("get", f"/covey/{key}", "--print-value-only")
        found: dict[str, Any] = json.loads(printed)
        return found

    def put(self, key: str, value: object) -> None:
        self.etcd.ctl("put", f"/covey/{key}", "--", json.dumps(value))

    def revision(self) -> int:
        """Of the store, now."""
        head: dict[str, Any] = json.loads(self.etcd.ctl("get", "/covey/format", "-w", "json"))["header"]
        return int(head["revision"])

    def events(self, what: str, about: str) -> list[dict[str, Any]]:
        """What was decided about something, who and why."""
        printed = self.etcd.ctl("get", "--prefix", "/covey/event/", "--print-value-only")
        found = (json.loads(line) for line in printed.splitlines() if line)
        return [one for one in found if one["what"] == what and one["about"] == about]

    # ---- start and stop --------------------------------------------------------------------------------------------

    def wait_until_ready(self) -> None:
        for one in self.controllers:
            eventually(one.ready)

    def heal(self) -> None:
        """All that was killed or frozen runs again, and the controllers are ready."""
        for member in self.etcd.members:
            if member.process is not None:
                member.cont()
        self.etcd.start()
        for part in (self.registry, *self.controllers, *self.nodes.values()):
            if part.program is None:
                part.start()
            else:
                part.thaw()
        self.etcd.wait_ready_blocking()
        self.wait_until_ready()

    def end(self) -> None:
        for part in (*self.nodes.values(), *self.controllers, self.registry):
            part.end()


@contextlib.contextmanager
def running(
    folder: Path,
    controllers: int = 3,
    members: int = 3,
    covey: Sequence[str] = conftest.COVEY,
    *,
    etcd_flags: Sequence[str] = (),
    **env: str,
) -> Iterator[Fleet]:
    """A fleet without nodes, ready, with one template in its registry. `covey`: the controllers' version."""
    with etcd.running(members, extra=etcd_flags) as store:
        registry_port = etcd.free_port()
        registry = Part(
            ("registry", "--listen-addr", f"127.0.0.1:{registry_port}", "--data-dir", folder / "registry"), {}
        )
        cloud = Fleet(folder, store, registry, [])
        for _ in range(controllers):
            port = etcd.free_port()
            argv = (
                *("controller", "--listen-addr", f"127.0.0.1:{port}", "--etcd-endpoints", ",".join(store.endpoints)),
                *("--anka-registry", f"http://127.0.0.1:{registry_port}"),
            )
            url = f"http://127.0.0.1:{port}"
            cloud.controllers.append(Controller(argv, {**DEFAULTS, **env}, covey=covey, url=url))
        try:
            for part in (registry, *cloud.controllers):
                part.start()
            cloud.wait_until_ready()
            cloud.template = push(folder, f"http://127.0.0.1:{registry_port}")
            yield cloud
        finally:
            cloud.end()


def push(folder: Path, registry: str) -> str:
    """A template whose disk is a few bytes: synthetic nodes need no more; its id."""
    (folder / "disk").write_bytes(uuid.uuid4().bytes)
    url = f"{registry}/readyz"
    eventually(lambda: conftest.ask(url)[0] == 200)
    ran = conftest.covey("template", "push", "small", "--tag", "v1", folder / "disk", "--json", COVEY_REGISTRY=registry)
    assert ran.code == 0, ran
    return str(ran.json["template"])


def until(span_s: float) -> Iterator[None]:
    """Once now, and again and again for so long: what must be so all the while is asserted in the loop."""
    deadline = time.monotonic() + span_s
    while True:
        yield
        if time.monotonic() > deadline:
            return
        time.sleep(0.1)
