"""Why an instance waits, as a user sees it: real programs, small and large starts on a node that counts processors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import conftest

eventually = conftest.eventually


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[conftest.Cloud]:
    with conftest.running_cloud(tmp_path / "data", "up", "--nodes", 2, COVEY_INSTANCE_TIME_OUT="1s") as one:
        yield one


def nodes(cloud: conftest.Cloud) -> list[dict[str, Any]]:
    return list(cloud.ask("GET", "/api/v1/node")["body"])


def verdicts(cloud: conftest.Cloud, id: str) -> dict[str, str]:
    """By node: the verdict and its numbers."""
    told = cloud.ask("GET", f"/api/v1/vm/explain?id={id}")["body"]
    return {node["node_name"]: f"{node['verdict']}: {node['text']}" for node in told["nodes"]}


def test_small_ones_pass_by_until_a_node_is_kept_free_for_the_large_one(cloud: conftest.Cloud, tmp_path: Path) -> None:
    template = cloud.push(tmp_path)
    eventually(lambda: len(nodes(cloud)) == 2)
    one, other = (node["node_id"] for node in nodes(cloud))
    cloud.ask("POST", "/api/v1/node/config", {"node_id": one, "name": "counts", "capacity_mode": "resource"})
    cloud.ask("POST", "/api/v1/node/config", {"node_id": other, "name": "drains", "drain_mode": True})
    before = cloud.start(template, vcpu=8)
    eventually(lambda: cloud.state(before) == "Started")

    large = cloud.start(template, vcpu=16)
    shown = cloud.ask("GET", f"/api/v1/vm?id={large}")["body"]
    assert shown["message"] == "Waiting: all nodes that could take it are full (of 2 nodes: 1 full, 1 draining)"
    assert verdicts(cloud, large) == {
        "counts": "full: needs 16 processors, 8 of 16 are free",
        "drains": "draining: takes nothing new; 0 VMs still there",
    }
    younger = cloud.start(template, vcpu=4)
    eventually(lambda: cloud.state(younger) == "Started")

    cloud.ask("DELETE", "/api/v1/vm", {"id": before})
    eventually(lambda: verdicts(cloud, large)["counts"] == "full: needs 16 processors, 12 of 16 are free")
    last = cloud.start(template, vcpu=4)
    assert verdicts(cloud, last)["counts"] == (
        f"reserved: is kept free for instance {large}, which stands before this one in the queue"
    )
    told = cloud.covey("vm", "explain", last)
    assert f"queue     2 of 2 waiting; before it, for the same nodes: 1 ({large})" in told.out
    assert cloud.ask("GET", f"/api/v1/vm?id={large}")["body"]["message"].endswith("; counts is kept free for it")

    cloud.ask("DELETE", "/api/v1/vm", {"id": younger})
    eventually(lambda: cloud.state(large) == "Started")
    assert verdicts(cloud, last)["counts"] == "full: needs 4 processors, 0 of 16 are free"
    assert "It runs on node counts and waits for nothing" in cloud.covey("vm", "explain", large).out
