"""No balancer: nodes are given all controllers, and go elsewhere by themselves."""

import time
from collections.abc import Iterator

import pytest

from tests.support import lab_cloud
from tests.topology import conftest


@pytest.fixture(scope="module")
def cloud() -> Iterator[lab_cloud.Cloud]:
    with lab_cloud.running() as cloud:
        cloud.start_nodes("n1", conftest.NODES, **conftest.ROOM)
        cloud.wait_nodes(conftest.NODES)
        yield cloud


@pytest.mark.parametrize(("fault", "which"), [("kill -9", 0), ("kill -9", 1), ("kill -9", 2), ("SIGSTOP", 0)])
def test_a_node_is_served_again_within_a_second(cloud: lab_cloud.Cloud, fault: str, which: int) -> None:
    """Whichever controller dies, VMs asked for at once run soon: their nodes asked another one. A frozen one holds
    parked polls for some seconds; the second poll of its node is with another controller."""
    dying, living = cloud.controllers[which], cloud.controllers[which - 1]
    usual_s = _start_all(cloud, living)
    if fault == "kill -9":
        dying.kill()
    else:
        dying.stop()
    took_s = _start_all(cloud, living)
    if fault == "kill -9":
        dying.start()
    else:
        dying.cont()
    cloud.wait_ready(dying)
    assert took_s < usual_s + (1.0 if fault == "kill -9" else 5.0)


def _start_all(cloud: lab_cloud.Cloud, controller: lab_cloud.Program) -> float:
    """Start two VMs a node; how long until all are Started."""
    begun = time.monotonic()
    count = 2 * conftest.NODES
    started = cloud.ask(f"{controller.url}/api/v1/vm", "POST", {"vmid": cloud.template, "count": count})
    assert started.body["status"] == "OK", started
    wanted = set(started.body["body"])

    def running() -> bool:
        shown = cloud.ask(f"{controller.url}/api/v1/vm").body["body"]
        return wanted <= {each["instance_id"] for each in shown if each["vm"]["instance_state"] == "Started"}

    cloud.until(running, 30, "all are Started")
    return time.monotonic() - begun
