"""The cloud of the storm, and the hand that does faults to it.

Three etcd members on disk, three controllers, haproxy as it is shipped, a registry, and synthetic nodes in several
agent processes, each on a host of its own; half of the agents balance by themselves over the controllers, the other
half go through haproxy. All of it is real programs; this knows only how to start, signal and disconnect them.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.storm import faults
from tests.support import lab_cloud, netlab

MEMBERS = ("e1", "e2", "e3")
CONTROLLERS = ("c1", "c2", "c3")
AGENTS = ("n1", "n2", "n3", "n4")
BALANCER = "lb"
HOSTS = faults.Hosts(members=MEMBERS, controllers=CONTROLLERS, agents=AGENTS, balancers=(BALANCER,))
NODES_EACH = 8
_HAPROXY = lab_cloud.ROOT / ".deps" / "balancers" / "bin" / "haproxy"
_CONFIG = lab_cloud.ROOT / "deploy" / "haproxy" / "haproxy.cfg"


@contextlib.contextmanager
def cloud(folder: Path, seed: int) -> Iterator[lab_cloud.Cloud]:
    """Everything runs, is ready, and has a template; its files stay in `folder`."""
    hosts = [*MEMBERS, *CONTROLLERS, "r1", *AGENTS, BALANCER, "load"]
    with netlab.Lab(hosts, tap=True, seed=seed) as lab:
        made = lab_cloud.Cloud(lab, folder)
        made.start_etcd(MEMBERS)
        made.start_registry("r1")
        for host in CONTROLLERS:
            made.start_controller(host, COVEY_INSTANCE_TIME_OUT="8s", COVEY_UNKNOWN_VM_THRESHOLD="15")
        made.wait_all_ready()
        made.push_template()
        balancer = _start_haproxy(made)
        for host in AGENTS[:2]:
            made.start_nodes(host, NODES_EACH, **_node(host))
        for host in AGENTS[2:]:
            made.start_nodes(host, NODES_EACH, [balancer.url], **_node(host))
        try:
            made.wait_nodes(NODES_EACH * len(AGENTS))
        except lab_cloud.NotReady as error:
            raise lab_cloud.NotReady(f"{error}\n{made.agents[0].log()[-1500:]}") from None
        yield made


def _node(host: str) -> dict[str, str]:
    return {"COVEY_NODE_NAME": host, "COVEY_SYNTHETIC_BOOT": "200ms", "COVEY_SYNTHETIC_PULL": "100ms"}


def _start_haproxy(cloud: lab_cloud.Cloud) -> lab_cloud.Program:
    if not _HAPROXY.exists():
        raise lab_cloud.NotReady(f"{_HAPROXY} is missing: run `make setup`")
    addresses = {
        f"COVEY_CONTROLLER_{number}": each.url.partition("//")[2] for number, each in enumerate(cloud.controllers, 1)
    }
    addresses["COVEY_REGISTRY_1"] = cloud.registries[0].url.partition("//")[2]
    url = f"http://{cloud.lab[BALANCER].ip}:8090"
    program = cloud.start_other(BALANCER, BALANCER, [str(_HAPROXY), "-db", "-f", str(_CONFIG)], url, **addresses)
    cloud.wait_ready(program)
    return program


class Hand:
    """Does faults and undoes them. To be used by the main thread, which alone may start programs."""

    def __init__(self, cloud: lab_cloud.Cloud) -> None:
        self._cloud = cloud
        self._programs = {each.host.name: each for each in cloud.programs}
        self._links: list[faults.Fault] = []

    def begin(self, fault: faults.Fault) -> None:
        if fault.kind in faults.LINK:
            self._links.append(fault)
            self._disturb(fault)
            return
        for target in fault.targets:
            program = self._programs[target]
            {"kill -9": program.kill, "SIGSTOP": program.stop, "SIGTERM": program.term}[fault.kind]()

    def end(self, fault: faults.Fault) -> None:
        """Undo it; a program that was to end and has not yet (SIGTERM) is killed."""
        if fault.kind in faults.LINK:
            self._links.remove(fault)
            self._cloud.lab.heal()  # all of them: the others begin anew at once
            for other in self._links:
                self._disturb(other)
            return
        for target in fault.targets:
            program = self._programs[target]
            if fault.kind == "SIGSTOP":
                program.cont()
                continue
            if program.running:
                program.kill()
            program.start()

    def ended(self) -> list[str]:
        """Programs that have ended without being told to: there should be none."""
        return [program.name for program in self._programs.values() if not program.running]

    def _disturb(self, fault: faults.Fault) -> None:
        lab, (target, *_) = self._cloud.lab, fault.targets
        if fault.kind == "isolate":
            lab.isolate(target)
        elif fault.kind == "loss":
            lab.loss(target, fault.peer, fault.amount)
        elif fault.kind == "slow":
            lab.slow(target, fault.peer, delay_s=fault.amount, jitter_s=fault.amount / 2)
        else:
            lab.cut(target, fault.peer, one_way=fault.kind == "one-way cut")
