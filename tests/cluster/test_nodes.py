"""Nodes from end to end: join, leave, come back, be removed while cut off, fall silent; and whose VMs are touched.

One etcd member, two controllers, and hosts as their operators run them: `covey join`, `covey leave`, the agent in the
background. Every host has a data directory of its own; what lies there is the truth about its VMs.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import conftest, fleet

eventually = conftest.eventually
QUIET_S = 3.0  # how long something must stay as it is


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fleet.Fleet]:
    spans = {"COVEY_NODE_ACTIVE_TIMEOUT": "32s", "COVEY_INSTANCE_ACTIVE_TIMEOUT": "32s"}
    with fleet.running(tmp_path_factory.mktemp("nodes"), controllers=2, members=1, **spans) as one:
        yield one


@dataclasses.dataclass
class Host:
    """A host whose operator types commands."""

    cloud: fleet.Fleet
    data: Path

    def join(self, *flags: object) -> conftest.Ran:
        urls = ",".join(self.cloud.urls)
        return conftest.covey("join", urls, "--hypervisor", "synthetic", "--data-dir", self.data, *flags)

    def leave(self, *flags: object, verb: str = "leave") -> conftest.Ran:
        return conftest.covey(verb, "--data-dir", self.data, *flags)

    @property
    def node(self) -> fleet.Node:
        return fleet.Node((), {}, folder=self.data / "agent", name="host")

    @property
    def pid(self) -> int:
        """Of its agent."""
        return int((self.data / "agent" / "agent.lock").read_text())

    def kill(self) -> None:
        pid = self.pid
        conftest.kill(pid)
        eventually(lambda: not conftest.alive(pid))

    def log(self) -> str:
        return (self.data / "agent" / "agent.log").read_text()


@pytest.fixture
def host(cloud: fleet.Fleet, tmp_path: Path) -> Iterator[Host]:
    """A host that has joined; everything is gone after the test."""
    one = Host(cloud, tmp_path / "host")
    ran = one.join("--node-name", "host-1", "--max-vms", 3)
    try:
        assert ran.code == 0, ran
        cloud.wait_until_active(one.node)
        yield one
    finally:
        with contextlib.suppress(OSError, ValueError):
            os.kill(one.pid, signal.SIGCONT)
        one.leave("--force")
        for shown in cloud.ask("GET", "/api/v1/node")["body"]:
            cloud.ask("DELETE", "/api/v1/node", {"node_id": shown["node_id"]})
        cloud.terminate(*cloud.states())
        eventually(lambda: not cloud.states())


def started(cloud: fleet.Fleet) -> str:
    (id,) = cloud.start()
    cloud.wait_until(id, "Started")
    return id


# ---- leave and come back -------------------------------------------------------------------------------------------


def test_leaving_with_vms_is_refused_and_forced_ends_them_by_order(cloud: fleet.Fleet, host: Host) -> None:
    """Refused: nothing changes. Forced: it is a removal (safety S12), and what stays on the disk goes by an order."""
    id, node = started(cloud), host.node
    refused = host.leave()
    assert (refused.code, "still holds 1 VMs" in refused.err) == (1, True), refused
    assert (cloud.state(id), cloud.shown(node)["state"], node.vms()) == ("Started", "Active", {id: "running"})
    forced = host.leave("--force")
    assert forced.code == 0, forced
    cloud.wait_until(id, "Error", via=1)
    assert cloud.instance(id)["message"] == "Its node was removed"
    assert cloud.ask("GET", "/api/v1/node", via=1)["body"] == []
    assert node.vms() == {id: "running"}  # nobody was there who could have ended it
    assert host.join().code == 0
    eventually(lambda: node.vms() == {})


def test_joining_again_keeps_what_the_operator_configured(cloud: fleet.Fleet, host: Host) -> None:
    """Groups, limits and VMs outlive an agent that is killed and joined again (safety S7)."""
    id, node = started(cloud), host.node
    me = node.id
    cloud.put(f"node/{me}", {**cloud.value(f"node/{me}"), "groups": ["ios"]})
    limits = {"node_id": me, "max_vm_count": 2, "vcpu_override": 5, "name": "the quick one"}
    assert cloud.ask("POST", "/api/v1/node/config", limits)["status"] == "OK"
    host.kill()
    assert host.join().code == 0
    cloud.wait_until_active(node)
    shown = cloud.shown(node, via=1)
    assert node.id == me
    assert [group["name"] for group in shown["groups"]] == ["ios"]
    assert (shown["capacity"], shown["vcpu_override"], shown["node_name"]) == (2, 5, "the quick one")
    assert (cloud.state(id), node.vms(), node.starts()) == ("Started", {id: "running"}, [id])


def test_a_changed_address_and_name_are_the_same_node(cloud: fleet.Fleet, host: Host) -> None:
    id, node = started(cloud), host.node
    me = node.id
    host.kill()
    assert host.join("--node-name", "moved", "--node-ip", "127.0.0.2").code == 0
    cloud.wait_until_active(node)
    shown = cloud.shown(node, via=1)
    assert (shown["node_id"], shown["node_name"], shown["ip_address"]) == (me, "moved", "127.0.0.2")
    assert [one["node_id"] for one in cloud.ask("GET", "/api/v1/node")["body"]] == [me]
    second = started(cloud)
    assert cloud.instance(second, via=1)["vminfo"]["host_ip"] == "127.0.0.2"
    assert (cloud.state(id), sorted(node.vms())) == ("Started", sorted([id, second]))


def test_a_node_that_left_comes_back_as_if_new_and_runs_vms(cloud: fleet.Fleet, host: Host) -> None:
    left = host.leave()
    assert left.code == 0, left
    assert cloud.ask("GET", "/api/v1/node", via=1)["body"] == []
    assert [key for key in cloud.keys("") if "/event/" not in key and host.data.name in key] == []
    assert host.leave().code == 1  # there is nothing to leave
    assert host.join().code == 0
    cloud.wait_until_active(host.node)
    started(cloud)


# ---- two agents with one id ----------------------------------------------------------------------------------------


def test_another_host_with_the_same_id_is_refused(cloud: fleet.Fleet, host: Host, tmp_path: Path) -> None:
    """Safety S7: it shows the node's id and even its secret, but its data directory is another one. (A whole copy of it
    does not even begin: test_balancing.py.)"""
    id, node = started(cloud), host.node
    shutil.copytree(host.data / "agent", tmp_path / "other" / "agent", ignore=shutil.ignore_patterns("agent.lock"))
    copied = tmp_path / "other" / "agent" / "node.json"
    copied.write_text(json.dumps({**json.loads(copied.read_text()), "host_key": uuid.uuid4().hex, "home": None}))
    session = cloud.value(f"session/{node.id}")["counter"]
    program = conftest.Program(
        *("agent", "--hypervisor", "synthetic", "--data-dir", tmp_path / "other"),
        *("--controller", ",".join(cloud.urls)),
        COVEY_LOG_JSON="true",
    )
    try:
        program.wait_until_said("belongs to another host")
        for _ in fleet.until(QUIET_S):
            assert cloud.value(f"session/{node.id}")["counter"] == session
            assert (cloud.state(id), node.vms()) == ("Started", {id: "running"})
    finally:
        program.end()


# ---- removed while cut off -----------------------------------------------------------------------------------------


def test_a_node_removed_while_cut_off_holds_until_its_operator_joins_it(cloud: fleet.Fleet, host: Host) -> None:
    """Safety S12: its instance goes to Error, its agent is told 410 and touches nothing; joined again by its operator
    it gets the order, and destroys."""
    id, node = started(cloud), host.node
    me = node.id
    os.kill(host.pid, signal.SIGSTOP)
    assert cloud.ask("DELETE", "/api/v1/node", {"node_id": me})["status"] == "OK"
    cloud.wait_until(id, "Error", via=1)
    os.kill(host.pid, signal.SIGCONT)
    eventually(lambda: "removed" in host.log())
    for _ in fleet.until(2 * QUIET_S):  # longer than UNKNOWN_VM_THRESHOLD
        assert node.vms() == {id: "running"}
        assert cloud.ask("GET", "/api/v1/node")["body"] == []
    host.kill()
    assert host.join().code == 0
    cloud.wait_until_active(node)
    eventually(lambda: node.vms() == {})
    assert node.id == me
    eventually(lambda: cloud.keys(f"order/{me}/") == [])
    assert cloud.shown(node, via=1)["vm_count"] == 0


# ---- silent --------------------------------------------------------------------------------------------------------


def test_a_silent_node_is_offline_after_its_time_out_and_its_vms_stay(cloud: fleet.Fleet, host: Host) -> None:
    """NODE_ACTIVE_TIMEOUT, on every controller; the instance is shown as not communicating, and stays (safety S1)."""
    id, node = started(cloud), host.node
    os.kill(host.pid, signal.SIGSTOP)
    for _ in fleet.until(20):
        assert cloud.shown(node)["state"] == "Active"
    eventually(lambda: [cloud.shown(node, via)["state"] for via in range(2)] == ["Offline"] * 2)
    eventually(lambda: all("not communicating" in cloud.instance(id, via).get("message", "") for via in range(2)))
    assert [cloud.state(id, via) for via in range(2)] == ["Started"] * 2
    (waits,) = cloud.start()
    assert cloud.state(waits) == "Scheduling"
    os.kill(host.pid, signal.SIGCONT)
    cloud.wait_until_active(node)
    cloud.wait_until(waits, "Started", via=1)
    assert sorted(node.vms()) == sorted([id, waits])
    assert "message" not in cloud.instance(id, via=1)


# ---- whose VMs -----------------------------------------------------------------------------------------------------


def test_a_vm_that_nothing_wants_goes_by_an_order_that_says_why(cloud: fleet.Fleet, host: Host) -> None:
    """A VM of this cloud that no instance wants (UNKNOWN_VM_THRESHOLD; promise I3). The one beside it stays."""
    id, node = started(cloud), host.node
    host.kill()
    stray = str(uuid.uuid4())
    _copy_of(node, id, instance=stray)
    before = cloud.revision()
    assert host.join().code == 0
    eventually(lambda: cloud.events("ordered-destroyed", stray))
    eventually(lambda: node.vms() == {id: "running"})
    eventually(lambda: cloud.shown(node, via=1)["vm_count"] == 1)
    told = asyncio.run(cloud.etcd.history(f"/covey/ledger/{node.id}", before, cloud.revision()))
    assert any(f'"{stray}"'.encode() in (value or b"") for _, _, value in told), "it held a slot (S11)"
    (event,) = cloud.events("ordered-destroyed", stray)
    assert (event["why"], event["who"].split()[0]) == ("no instance wants this VM", "controller")
    assert event["details"]["node"] == node.id
    assert f'"{stray}"' in host.log()
    assert "no instance wants this VM" in host.log()
    assert cloud.state(id) == "Started"


def test_a_vm_of_another_cloud_is_counted_and_never_touched(cloud: fleet.Fleet, host: Host) -> None:
    """Safety S12: also when this cloud knows the same instance, orders it destroyed, and the node leaves."""
    id, node = started(cloud), host.node
    host.kill()
    foreign = str(uuid.uuid4())
    _copy_of(node, id, instance=foreign, cloud="the-cloud-next-door")
    _copy_of(node, id, epoch=7, cloud="the-cloud-next-door")
    assert host.join().code == 0
    eventually(lambda: cloud.value(f"word/{node.id}").get("foreign_vms") == 2)
    cloud.terminate(id)
    cloud.wait_until(id, "")
    theirs = {path.name for path in (node.folder / "vms").iterdir() if path.is_dir()}
    assert theirs == {f"{foreign}.1", f"{id}.7"}
    for _ in fleet.until(QUIET_S):
        assert cloud.shown(node)["vm_count"] == 0
    assert host.leave().code == 0
    assert {path.name for path in (node.folder / "vms").iterdir() if path.is_dir()} == theirs
    assert cloud.events("ordered-destroyed", foreign) == []


def _copy_of(node: fleet.Node, id: str, **changes: object) -> None:
    """Another VM like that of `id`, but for these facts."""
    (path,) = (node.folder / "vms").glob(f"{id}.1/vm.json")
    vm = {**json.loads(path.read_text()), **changes}
    made = node.folder / "vms" / f"{vm['instance']}.{vm['epoch']}"
    made.mkdir()
    (made / "vm.json").write_text(json.dumps(vm))


def test_a_qemu_that_covey_did_not_start_is_never_touched(cloud: fleet.Fleet, tmp_path: Path) -> None:
    """A machine that somebody else runs on the host, named as ours are: not listed, not counted, not ended."""
    stray = str(uuid.uuid4())
    theirs = subprocess.Popen(
        [
            *(*conftest.ENDS_WITH_US, "qemu-system-x86_64", "-machine", "none", "-S", "-display", "none"),
            *("-nodefaults", "-name", f"covey-{stray}.1,process={stray}.1"),
        ]
    )
    host = Host(cloud, tmp_path / "host")
    try:
        ran = host.join("--hypervisor", "qemu")
        assert ran.code == 0, ran
        cloud.wait_until_active(host.node)
        eventually(lambda: cloud.keys(f"word/{host.node.id}"))
        for _ in fleet.until(QUIET_S):  # longer than UNKNOWN_VM_THRESHOLD
            assert cloud.shown(host.node)["vm_count"] == 0
            assert theirs.poll() is None
        left = host.leave()
        assert left.code == 0, left
        assert theirs.poll() is None
        assert cloud.events("ordered-destroyed", stray) == []
    finally:
        theirs.kill()
        theirs.wait()
        host.leave("--force")
