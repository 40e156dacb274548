"""Clouds behind balancers, one for each module, and patience."""

from collections.abc import Iterator

import pytest

from tests import conftest as leaks
from tests.support import balancers, lab_cloud, netlab

BEHIND = {"COVEY_TRUSTED_PROXIES": f"{netlab.NETWORK}.0/24"}
NODES = 4
ROOM = {"COVEY_MAX_VMS": "2000"}  # of a node: the load never waits for a slot


@pytest.fixture(scope="module", autouse=True)
def nothing_left() -> Iterator[None]:
    """Clouds live as long as their module, and their programs start again within a test: leaks are looked for at the
    module's end."""
    before = leaks.processes()
    yield
    assert leaks.processes_left(before) == set()


@pytest.fixture(autouse=True)
def no_leaks() -> None:
    """In place of the check after each test: see above."""


@pytest.fixture(scope="module")
def behind_haproxy() -> Iterator[lab_cloud.Cloud]:
    """3 etcd, 3 controllers, haproxy on `lb` (the last of `others`), a registry, nodes that go through it."""
    with lab_cloud.running(more=("lb",), env=BEHIND) as cloud:
        balancer = balancers.haproxy(cloud, "lb")
        cloud.start_nodes("n1", NODES, [balancer.url], **ROOM)
        cloud.wait_nodes(NODES)
        yield cloud


@pytest.fixture(scope="module")
def behind_nginx() -> Iterator[lab_cloud.Cloud]:
    with lab_cloud.running(more=("lb",), env=BEHIND) as cloud:
        balancer = balancers.nginx(cloud, "lb")
        cloud.start_nodes("n1", NODES, [balancer.url], **ROOM)
        cloud.wait_nodes(NODES)
        yield cloud
