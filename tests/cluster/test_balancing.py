"""Nodes that are given several controllers, and no balancer: they spread, are served on, and learn of new controllers.

One etcd member, two controllers that live and a third one to be hurt, many synthetic nodes in one process, each of
which chooses by itself.
"""

import contextlib
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import conftest, fleet
from tests.support import etcd

eventually = conftest.eventually
NODES = 24  # in one of five thousand runs one of three controllers would be the choice of none
ESTABLISHED = "01"  # in /proc/net/tcp
POLL_S = 10.0  # for so long at the least waits a node for a frozen controller that it does not leave


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fleet.Fleet]:
    with fleet.running(tmp_path_factory.mktemp("balancing"), controllers=2, members=1) as one:
        yield one


@pytest.fixture
def third(cloud: fleet.Fleet) -> Iterator[fleet.Controller]:
    """A controller to be hurt: it ends with the test."""
    port = etcd.free_port()
    first = cloud.controllers[0]
    argv = ("controller", "--listen-addr", f"127.0.0.1:{port}", *first.argv[3:])
    made = fleet.Controller(argv, first.env, url=f"http://127.0.0.1:{port}")
    made.start()
    eventually(made.ready)
    yield made
    made.end()


@pytest.fixture
def nodes(cloud: fleet.Fleet, third: fleet.Controller, tmp_path: Path) -> Iterator[list[str]]:
    """The ids of many nodes; everything is gone after the test."""
    agents = conftest.Program(
        *("agent", "--hypervisor", "synthetic", "--nodes", NODES, "--data-dir", tmp_path / "agents"),
        *("--controller", ",".join((third.url, *cloud.urls))),
        COVEY_LOG_JSON="true",
    )
    try:
        eventually(lambda: len(active(cloud)) == NODES)
        yield active(cloud)
    finally:
        cloud.terminate(*cloud.states())
        eventually(lambda: not cloud.states())
        agents.end()
        for node in active(cloud):
            cloud.ask("DELETE", "/api/v1/node", {"node_id": node})


def active(cloud: fleet.Fleet, via: int = 0) -> list[str]:
    shown = cloud.ask("GET", "/api/v1/node", via=via)["body"]
    return [node["node_id"] for node in shown if node["state"] == "Active"]


def clients(controller: fleet.Controller) -> int:
    """Connections that others have to this controller."""
    port = f":{int(controller.url.rpartition(':')[2]):04X}"
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return sum(remote.endswith(port) and state == ESTABLISHED for _, _, remote, state, *_ in rows)


def seconds_until_each_runs_a_vm(cloud: fleet.Fleet, nodes: list[str]) -> float:
    """A VM on each node: the node must be asked, obtain launch and report."""
    began_s = time.monotonic()
    ids = [cloud.start(node_id=node)[0] for node in nodes]
    eventually(lambda: all(cloud.states().get(id) == "Started" for id in ids))
    return time.monotonic() - began_s


def test_nodes_are_served_on_when_a_controller_is_killed_and_come_back_to_it(
    cloud: fleet.Fleet, third: fleet.Controller, nodes: list[str]
) -> None:
    eventually(lambda: all(clients(one) > 0 for one in (third, *cloud.controllers)))
    usual_s = seconds_until_each_runs_a_vm(cloud, nodes)
    third.kill()
    assert seconds_until_each_runs_a_vm(cloud, nodes) < usual_s + POLL_S / 2
    third.start()
    eventually(third.ready)
    eventually(lambda: clients(third) > 1)  # beside ours


def test_nodes_are_served_on_when_a_controller_freezes(
    cloud: fleet.Fleet, third: fleet.Controller, nodes: list[str]
) -> None:
    eventually(lambda: all(clients(one) > 0 for one in (third, *cloud.controllers)))
    usual_s = seconds_until_each_runs_a_vm(cloud, nodes)
    third.freeze()  # by design they are late by the heartbeat's interval, one second here, and 1.5 s
    assert seconds_until_each_runs_a_vm(cloud, nodes) < usual_s + POLL_S
    assert len(active(cloud)) == NODES


# ---- learning ------------------------------------------------------------------------------------------------------


def announce(controller: fleet.Controller) -> None:
    """Start it anew, with the URL at which nodes reach it."""
    controller.end()
    controller.env = {**controller.env, "COVEY_ADVERTISE_URL": controller.url}
    controller.start()
    eventually(controller.ready)


def test_a_node_finds_controllers_that_it_was_never_given(tmp_path: Path) -> None:
    """It is joined by way of the first one, which is replaced by a second one; it lives on, and is restarted."""
    with fleet.running(tmp_path, controllers=2, members=1) as cloud:
        first, second = cloud.controllers
        second.end()
        announce(first)
        data = tmp_path / "host"
        ran = conftest.covey("join", first.url, *joined(data))
        assert ran.code == 0, ran
        try:
            announce(second)
            known = data / "agent" / "controllers.json"
            eventually(lambda: second.url in known.read_text())
            eventually(lambda: clients(second) > 0)
            first.kill()
            runs_a_vm(cloud)
            pid = int((data / "agent" / "agent.lock").read_text())
            conftest.kill(pid)
            eventually(lambda: not conftest.alive(pid))
            agent = conftest.Program("agent", *joined(data), "--controller", first.url, COVEY_LOG_JSON="true")
            try:
                agent.wait_until_said("joined")
                runs_a_vm(cloud)
            finally:
                agent.end()
        finally:
            left = conftest.covey("leave", "--data-dir", data)  # it was joined by way of one that is no more
        assert left.code == 0, left
        assert active(cloud, via=1) == []


def runs_a_vm(cloud: fleet.Fleet) -> None:
    (id,) = cloud.start(via=1)
    cloud.wait_until(id, "Started", via=1)
    cloud.terminate(id, via=1)
    cloud.wait_until(id, "Terminated", "", via=1)


def joined(data: Path) -> tuple[object, ...]:
    return ("--hypervisor", "synthetic", "--data-dir", data)


# ---- join ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def host(cloud: fleet.Fleet, tmp_path: Path) -> Iterator[Path]:
    """The data directory of a host that leaves in the end."""
    yield tmp_path / "host"
    with contextlib.suppress(AssertionError):
        conftest.covey("leave", "--force", "--data-dir", tmp_path / "host")


def test_joining_tests_every_controller_and_the_registry(cloud: fleet.Fleet, host: Path) -> None:
    ran = conftest.covey("join", ",".join(cloud.urls), *joined(host))
    lines = ran.out.splitlines()
    assert lines[:2] == [f"Testing connection to the controller...: Ok ({url})" for url in cloud.urls]
    assert re.fullmatch(r"Testing connection to the registry\.\.\.: Ok \(http://\S+\)", lines[2])
    assert lines[3].startswith("This host is node ")
    again = conftest.covey("join", ",".join(cloud.urls), *joined(host))
    assert again.code == 0, again
    assert "is restarted; VMs run on" in again.out
    assert again.out.splitlines()[4] == lines[3]  # the same node
    gone = conftest.covey("disjoin", "--data-dir", host)
    assert gone.code == 0, gone
    assert "has left its cloud" in gone.out


def test_one_dead_controller_does_not_stop_a_join(cloud: fleet.Fleet, host: Path) -> None:
    dead = f"http://127.0.0.1:{etcd.free_port()}"
    ran = conftest.covey("join", ",".join((dead, *cloud.urls)), *joined(host))
    assert ran.code == 0, ran
    why = f"({dead}: cannot connect (Connection refused))"
    assert ran.out.splitlines()[0] == f"Testing connection to the controller...: Failed {why}"
    assert "warning: 1 of 3 controllers cannot be reached now" in ran.err


def test_a_copied_data_directory_does_not_begin(cloud: fleet.Fleet, host: Path, tmp_path: Path) -> None:
    """Safety S7: not as an agent, not by a join while the first one runs; leaving there leaves the first one alone."""
    assert conftest.covey("join", ",".join(cloud.urls), *joined(host)).code == 0
    copy = tmp_path / "copy"
    shutil.copytree(host, copy, ignore=shutil.ignore_patterns("agent.lock", "agent.pid"))
    ran = conftest.covey("agent", *joined(copy), "--controller", ",".join(cloud.urls))
    assert (ran.code, "is a copy of" in ran.err) == (1, True), ran
    ran = conftest.covey("join", ",".join(cloud.urls), *joined(copy))
    assert (ran.code, f"is a copy of {host}, on which an agent runs" in ran.err) == (1, True), ran
    ran = conftest.covey("leave", "--data-dir", copy)
    assert (ran.code, "this is a copy of a node" in ran.err) == (0, True), ran
    assert len(active(cloud)) == 1
    ran = conftest.covey("join", ",".join(cloud.urls), *joined(copy))
    assert ran.code == 0, ran
    assert len(active(cloud)) == 2
    assert conftest.covey("leave", "--data-dir", copy).code == 0
