"""Hosts that each run the whole cloud by `covey standalone`: controller, registry with a disk of its own, etcd member.

    with all_in_one.running(3, nodes=2) as cloud:             # h1, h2, h3 are ready; n1, n2 have joined all of them
        cloud.push("a", "v1", b"a layer")                     # to whichever of them takes pushes
        cloud.holder().crash()                                # power off; .start() brings it back with its data

Nodes pull for real, from the registries of the hosts; only their VMs are pretended.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import etcd, lab_cloud, netlab

SECRET = "a secret for tests only"


@dataclass
class Host:
    """One of them. `controller` and `registry` are URLs."""

    program: lab_cloud.Program
    controller: str
    registry: str

    @property
    def name(self) -> str:
        return self.program.name

    def crash(self) -> None:
        """Power off: all its programs at once, and the cable is dead."""
        self.program.host.crash()

    def start(self) -> None:
        self.program.start()


@dataclass
class AllInOne:
    """The hosts, and the cloud that they are together."""

    cloud: lab_cloud.Cloud
    hosts: list[Host] = field(default_factory=list)

    # ---- making it -------------------------------------------------------------------------------------------------

    def start_host(self, name: str, names: list[str], **env: str) -> None:
        """With the settings that docs/operate/topologies.md names."""
        lab = self.cloud.lab
        ip = lab[name].ip
        settings = {
            "COVEY_DATA_DIR": str(self.cloud.directory / name),
            "COVEY_LISTEN_ADDR": "0.0.0.0:8090",
            "COVEY_ALLOW_ANONYMOUS": "true",
            "COVEY_ADVERTISE_URL": f"http://{ip}:8090",
            "COVEY_ETCD_BINARY": etcd.binary(),
            "COVEY_NAME": name,
            "COVEY_LISTEN_CLIENT_URLS": f"http://{ip}:2379,http://127.0.0.1:2379",
            "COVEY_LISTEN_PEER_URLS": f"http://{ip}:2380",
            "COVEY_INITIAL_CLUSTER": ",".join(f"{each}=http://{lab[each].ip}:2380" for each in names),
            "COVEY_REGISTRY_LISTEN_ADDRESS": "0.0.0.0:8089",
            "COVEY_REGISTRY_MODE": "replica",
            "COVEY_REGISTRY_ADVERTISE_URL": f"http://{ip}:8089",
            "COVEY_REGISTRY_PEERS": ",".join(f"http://{lab[each].ip}:8089" for each in names),
            "COVEY_REGISTRY_PEER_SECRET": SECRET,
            **env,
        }
        program = self.cloud.program(name, name, [*lab_cloud.COVEY, "standalone"], f"http://{ip}:8090", **settings)
        self.cloud.others.append(program)
        self.hosts.append(Host(program, f"http://{ip}:8090", f"http://{ip}:8089"))
        program.start()

    def wait_ready(self, *hosts: Host) -> None:
        for host in hosts:
            self.cloud.wait_ready(host.program)
            self.cloud.until(lambda host=host: self.cloud.is_ready(host.registry), what=f"{host.name}'s registry")  # type: ignore[misc]

    # ---- registries ------------------------------------------------------------------------------------------------

    def standing(self, host: Host) -> dict[str, Any]:
        """What its registry says of itself; {} when it does not answer."""
        answer = self.cloud.ask(f"{host.registry}/registry/status", timeout_s=3)
        found: dict[str, Any] = (answer.body["body"].get("replica") or {}) if answer.status == 200 else {}
        return found

    def holder(self, *among: Host) -> Host:
        """The host that takes pushes, by its own word."""

        def look() -> Host | None:
            return next((host for host in among or self.hosts if self.standing(host).get("mine")), None)

        found = self.cloud.until(look, what="a push registry")
        assert found is not None
        return found

    def wait_current(self, host: Host) -> None:
        """Until its registry lacks nothing of the push registry's."""

        def current() -> bool:
            said = self.standing(host)
            return bool(said.get("holder") and said["reached"] and not said["lag_s"] and not said["missing_blobs"])

        self.cloud.until(current, what=f"{host.name} has caught up")

    def push(self, name: str, tag: str, layer: bytes) -> str:
        """As a user would, with all registries' URLs: the template's id. Raises LabError when it did not succeed."""
        disk = self.cloud.directory / f"{name}-{tag}.img"
        disk.write_bytes(layer)
        urls = ",".join(host.registry for host in self.hosts)
        pushed = self.cloud.lab["load"].run(
            [*lab_cloud.COVEY, "template", "push", name, "--tag", tag, "--no-compress", "--json", str(disk)],
            COVEY_CONFIG=os.devnull,
            PYTHONPATH=str(lab_cloud.ROOT),
            COVEY_PUSH_REGISTRY=urls,
        )
        return str(json.loads(pushed.stdout)["template"])

    # ---- starts ----------------------------------------------------------------------------------------------------

    def start_vms(self, template: str, tag: str, count: int, key: str) -> list[str]:
        """Asks one host after the other, as a client with all URLs does, until one accepts: the instances."""
        body = {"vmid": template, "tag": tag, "count": count}

        def accepted() -> list[str]:
            for host in self.hosts:
                url = f"{host.controller}/api/v1/vm"
                answer = self.cloud.ask(url, "POST", body, timeout_s=5, headers={"Idempotency-Key": key})
                if answer.status == 200 and answer.body["status"] == "OK":
                    return list(answer.body["body"])
            return []

        return self.cloud.until(accepted, what=f"a start of {tag} is accepted")

    def wait_started(self, ids: list[str], *by: Host) -> None:
        """Until each of `by` shows all of them Started."""
        for host in by:

            def started(host: Host = host) -> bool:
                answer = self.cloud.ask(f"{host.controller}/api/v1/vm", timeout_s=5)
                shown = answer.body["body"] if answer.status == 200 else []
                states = {one["instance_id"]: one["vm"]["instance_state"] for one in shown}
                assert "Error" not in [states.get(id) for id in ids], answer
                return all(states.get(id) == "Started" for id in ids)

            self.cloud.until(started, what=f"{host.name} shows all VMs Started")


@contextlib.contextmanager
def running(count: int = 3, *, nodes: int = 2, **env: str) -> Iterator[AllInOne]:
    """All of it, ready; data on a disk, gone at the end. `env` is for the hosts' services."""
    names = [f"h{number}" for number in range(1, count + 1)]
    agents = [f"n{number}" for number in range(1, nodes + 1)]
    directory = Path(tempfile.mkdtemp(prefix="covey-lab-", dir="/var/tmp"))
    try:
        with netlab.Lab([*names, *agents, "load"]) as lab:
            made = AllInOne(lab_cloud.Cloud(lab, directory))
            for name in names:
                made.start_host(name, names, **env)
            made.wait_ready(*made.hosts)
            made.cloud.controllers = [host.program for host in made.hosts]
            for name in agents:
                made.cloud.start_agent(name)
            made.cloud.wait_nodes(nodes)
            yield made
    finally:
        shutil.rmtree(directory, ignore_errors=True)
