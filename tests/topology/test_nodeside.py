"""No balancer: nodes are given all controllers, and go elsewhere by themselves."""

import time
from collections.abc import Callable, Iterator

import pytest

from tests.support import lab_cloud
from tests.topology import conftest

_NODES = 8  # each controller is the favourite of some of them
_HEARTBEAT_S = 1.0
_POLL_S = 10.0  # how long a node that does not go elsewhere waits for a frozen controller, at the least


@pytest.fixture(scope="module")
def cloud() -> Iterator[lab_cloud.Cloud]:
    with lab_cloud.running(env={"COVEY_HEARTBEAT": f"{_HEARTBEAT_S:g}s"}) as cloud:
        cloud.start_nodes("n1", _NODES, **conftest.ROOM)
        cloud.wait_nodes(_NODES)
        yield cloud


def test_an_idle_node_leaves_a_frozen_controller_with_its_next_sign_of_life(cloud: lab_cloud.Cloud) -> None:
    """Its poll is parked there and nothing breaks. What it says next is answered elsewhere a second later, and that
    ends the poll's wait: by design a heartbeat's interval and 1.5 s, where the poll alone would wait ten or more."""
    frozen, living = cloud.controllers[0], cloud.controllers[1]
    usual_s = _start_everywhere(cloud, living)
    assert _while_away(cloud, frozen, living, frozen.stop, frozen.cont) < usual_s + _POLL_S


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_node_leaves_a_killed_controller_at_once(cloud: lab_cloud.Cloud, which: int) -> None:
    """Whichever controller dies, VMs asked for at once run soon: their nodes asked another one when the connection
    broke. By design that is some hundredths of a second, and a third of one if it was the one that places."""
    dying, living = cloud.controllers[which], cloud.controllers[which - 1]
    usual_s = _start_everywhere(cloud, living)
    assert _while_away(cloud, dying, living, dying.kill, dying.start) < usual_s + _POLL_S / 2


def _while_away(
    cloud: lab_cloud.Cloud,
    away: lab_cloud.Program,
    living: lab_cloud.Program,
    go: Callable[[], None],
    come_back: Callable[[], None],
) -> float:
    """How long starts take while `away` is; it is back afterwards."""
    go()
    try:
        return _start_everywhere(cloud, living)
    finally:
        come_back()
        cloud.wait_ready(away)


def _start_everywhere(cloud: lab_cloud.Cloud, controller: lab_cloud.Program) -> float:
    """Start a VM on each node, which no other node can take over; how long until all are Started."""
    begun = time.monotonic()
    nodes = cloud.ask(f"{controller.url}/api/v1/node").body["body"]
    wanted: set[str] = set()
    for node in nodes:
        body = {"vmid": cloud.template, "node_id": node["node_id"]}
        started = cloud.ask(f"{controller.url}/api/v1/vm", "POST", body)
        assert started.body["status"] == "OK", started
        wanted.update(started.body["body"])
    assert len(wanted) == _NODES

    def running() -> bool:
        shown = cloud.ask(f"{controller.url}/api/v1/vm").body["body"]
        return wanted <= {each["instance_id"] for each in shown if each["vm"]["instance_state"] == "Started"}

    cloud.until(running, 60, "all are Started")
    return time.monotonic() - begun
