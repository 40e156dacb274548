"""Three all-in-one hosts, one push registry among them, nodes joined to all three: any host may be killed or cut off.

The nodes hold nothing of what is started while a host is away, so each start is a pull of new bytes from the registries
that are left. Templates are pushed with two copies, and the push registry is hurt as soon as the push was answered.
"""

import os
import time
from collections.abc import Iterator

import pytest

from tests.support import all_in_one

MIB = 1 << 20
NODES = 2
COUNT = 4  # VMs of each step


@pytest.fixture
def cloud() -> Iterator[all_in_one.AllInOne]:
    with all_in_one.running(3, nodes=NODES, COVEY_REGISTRY_PUSH_COPIES="2") as made:
        yield made


class Story:
    """What was asked of the cloud so far."""

    def __init__(self, cloud: all_in_one.AllInOne) -> None:
        self.cloud = cloud
        self.tag, self.template, self.pushes = "", "", 0
        self.vms: list[str] = []
        self._begun = time.monotonic()

    def say(self, text: str) -> None:
        """For a failure's report."""
        print(f"[{time.monotonic() - self._begun:5.1f} s] {text}")  # noqa: T201

    def push(self) -> None:
        self.pushes += 1
        self.tag = f"v{self.pushes}"
        layer = f"layer {self.pushes} ".encode() + os.urandom(4 * MIB)
        self.template = self.cloud.push("small", self.tag, layer)
        self.say(f"{self.tag} is pushed")

    def start(self, *living: all_in_one.Host) -> None:
        """VMs of the newest version, which no node has yet, soon run."""
        ids = self.cloud.start_vms(self.template, self.tag, COUNT, f"start of {self.tag}")
        self.vms += ids
        self.cloud.wait_started(self.vms, *living)
        self.say(f"VMs of {self.tag} run")

    def everybody_agrees(self) -> None:
        """All that was accepted runs, once, whomever one asks."""
        self.cloud.wait_started(self.vms, *self.cloud.hosts)
        starts = self.cloud.cloud.guest_starts()
        assert starts == dict.fromkeys(self.vms, 1)


def test_any_host_may_be_killed_or_cut_off(cloud: all_in_one.AllInOne) -> None:
    story = Story(cloud)
    hurt: list[all_in_one.Host] = []
    lab = cloud.cloud.lab
    for fault in ("kill", "cut", "kill"):
        story.push()
        holder = cloud.holder()
        victim = holder if holder not in hurt else next(host for host in cloud.hosts if host not in hurt)
        living = [host for host in cloud.hosts if host is not victim]
        hurt.append(victim)
        story.say(f"{victim.name} is hurt: {fault}{', it took pushes' if victim is holder else ''}")
        if fault == "cut":
            lab.isolate(victim.name)
        else:
            victim.crash()
        story.start(*living)
        if victim is holder:
            cloud.holder(*living)  # another one takes the role over …
            story.push()  # … and pushes
            story.start(*living)
        if fault == "cut":
            lab.heal()
        else:
            victim.start()
        cloud.wait_ready(victim)
        story.say(f"{victim.name} is ready again")
        cloud.wait_current(victim)
        story.say(f"{victim.name} has caught up")
        story.everybody_agrees()
    assert {host.name for host in hurt} == {"h1", "h2", "h3"}
