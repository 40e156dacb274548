"""Each kept version and this tree serve one store together, under load, up and down again (safety S27).

    controllers   old old   new old   new new                       old new   old old
    agents        old old             old old   new old   new new   new new             old old

So an old agent talks to a new controller, a new one to an old controller, and controllers of both versions decide side
by side. Users (`users`) start and end instances all the while through the client's fail-over; some instances stand from
the first to the last step. No request may fail, no instance may be lost, and no guest may run twice.
One of them carries a field that no version knows yet: each controller changes it, and keeps that.
"""

import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.cluster import conftest, fleet
from tests.support import wheels
from tests.upgrade import users

STANDING = 4  # instances that stand all the while
PATIENCE_S = 120.0
PROGRESS = 4  # instances that users see through in each step
NEW = conftest.COVEY
FUTURE = {"future": {"of": ["a newer program"]}}


@pytest.mark.timeout(550)
@pytest.mark.parametrize("wheel", wheels.kept(), ids=wheels.version_of)
def test_controllers_and_agents_go_up_and_down_again_under_load(wheel: Path, tmp_path: Path) -> None:
    old = (str(wheels.covey_of(wheel, tmp_path / "env")),)
    with fleet.running(tmp_path, controllers=2, members=1, covey=old, COVEY_SHUTDOWN_DELAY="1s") as cloud:
        for name in ("alpha", "beta"):
            cloud.node(name, covey=old)
        standing = cloud.start(STANDING)
        cloud.wait_until_all(standing, "Started")
        newer = standing[0]
        cloud.put(f"instance/{newer}", {**cloud.value(f"instance/{newer}"), **FUTURE})
        load = users.Users(cloud.urls, cloud.template)
        load.begin()
        try:
            goes_on(cloud, load)
            for covey in (NEW, old):
                for controller in cloud.controllers:
                    exchange(controller, covey)
                    conftest.eventually(controller.ready, PATIENCE_S)
                    rewrite(cloud, newer, via=cloud.controllers.index(controller))
                    goes_on(cloud, load)
                for node in cloud.nodes.values():
                    quieten(cloud, node)
                    exchange(node, covey)
                    node.running.wait_until_said("joined")
                    drain(cloud, node, False)
                    cloud.wait_until_active(node)
                    goes_on(cloud, load)
        finally:
            load.end()
        assert load.faults == []
        assert load.failed == {}
        assert set(load.ended) == set(load.started)
        assert {id: cloud.state(id) for id in standing} == dict.fromkeys(standing, "Started")
        starts = guests(cloud)
        assert users.doubled(starts) == {}
        assert starts.keys() == {*standing, *load.started}
        cloud.clear()


def rewrite(cloud: fleet.Fleet, id: str, via: int) -> None:
    """Whatever its version, a controller that changes an instance keeps what only a newer one knows."""
    before = cloud.value(f"instance/{id}")["tx"]
    answer = cloud.ask("PUT", f"/api/v1/vm?id={id}", {"name": f"by-{before}"}, via)
    assert answer["status"] == "OK", answer
    value = cloud.value(f"instance/{id}")
    assert value["tx"] != before
    assert {name: value.get(name) for name in FUTURE} == FUTURE


def exchange(part: fleet.Part, covey: tuple[str, ...]) -> None:
    """End a program in good order, and start the other version in its place."""
    assert part.running.end(signal.SIGTERM) == 0, part.running.err[-5:]
    part.program, part.covey = None, covey
    part.start()


def quieten(cloud: fleet.Fleet, node: fleet.Node) -> None:
    """Nothing new is placed on the node, and what was placed there runs or has ended; its VMs stay. An agent that ends
    between the leave to launch and the start would fail that instance (safety S4)."""
    drain(cloud, node, True)
    conftest.eventually(lambda: set(of_node(cloud, node).values()) <= {"Started"}, PATIENCE_S)


def drain(cloud: fleet.Fleet, node: fleet.Node, wish: bool) -> None:
    answer = cloud.ask("POST", "/api/v1/node/config", {"node_id": node.id, "drain_mode": wish})
    assert answer["status"] == "OK", answer


def of_node(cloud: fleet.Fleet, node: fleet.Node) -> dict[str, str]:
    """The states of the instances that are on the node."""
    listed = [one["vm"] for one in cloud.ask("GET", "/api/v1/vm")["body"]]
    return {
        one["instance_id"]: one["instance_state"]
        for one in listed
        if one.get("node_id") == node.id and one["instance_state"] != "Terminated"
    }


def goes_on(cloud: fleet.Fleet, load: users.Users) -> None:
    """Users see some more instances through, and each node has run some of them."""
    ended = len(load.ended)
    before = {name: len(journal(node)) for name, node in cloud.nodes.items()}
    conftest.eventually(lambda: len(load.ended) >= ended + PROGRESS or load.faults, PATIENCE_S)
    conftest.eventually(
        lambda: all(len(journal(node)) > before[name] for name, node in cloud.nodes.items()), PATIENCE_S
    )
    assert load.faults == []


def guests(cloud: fleet.Fleet) -> Counter[str]:
    """How often each instance's guest ran, on whatever node."""
    return Counter(id for node in cloud.nodes.values() for id in journal(node))


def journal(node: fleet.Node) -> list[str]:
    """The guests that ran on the node; version 0.1.0 wrote them elsewhere."""
    early = node.folder / "vms" / "starts.log"
    lines = early.read_text().splitlines() if early.exists() else []
    return [*(line.split()[0] for line in lines), *node.starts()]
