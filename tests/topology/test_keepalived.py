"""Two haproxys share a virtual address by the shipped keepalived files: whoever holds it may die in any way."""

from collections.abc import Iterator

import pytest

from tests.support import balancers, lab_cloud, open_load
from tests.topology import conftest

Kind = open_load.Kind
STALL_S = 8.0  # two failed checks and the takeover: measured 1.6 to 3.4, on a machine with nothing else to do


@pytest.fixture(scope="module")
def pair() -> Iterator[balancers.Pair]:
    with lab_cloud.running(more=balancers.PAIR, env=conftest.BEHIND) as cloud:
        pair = balancers.Pair(cloud)
        pair.wait_both_well()
        cloud.start_nodes("n1", conftest.NODES, [pair.url], **conftest.ROOM)
        cloud.wait_nodes(conftest.NODES)
        yield pair


@pytest.mark.parametrize("fault", ["haproxy kill -9", "haproxy SIGSTOP", "power off"])
def test_the_address_moves(pair: balancers.Pair, fault: str) -> None:
    holder = pair.wait_both_well()
    with open_load.running(pair.cloud, pair.url, label=fault.replace(" ", "-"), mix=(Kind.GET, Kind.KEYED)) as load:
        load.wait(1.0)
        load.fault_at_s = load.now_s
        if fault == "power off":
            pair.cloud.lab[holder].crash()
        elif fault == "haproxy SIGSTOP":
            pair.haproxy[holder].stop()
        else:
            pair.haproxy[holder].kill()
        load.wait(STALL_S + 1)
    assert [host for host in pair.holders() if host != holder], "the other one has taken it"
    assert load.resumed_s(Kind.GET) < STALL_S + load.noise_s()
    late = load.fault_at_s + STALL_S
    assert [shot for shot in load.shots if shot.at_s > late and not shot.ok] == []
    load.settle()
    load.assert_exactly_once()
    if fault == "power off":
        pair.haproxy[holder].start()  # boots
        pair.keepalived[holder].start()
    elif fault == "haproxy SIGSTOP":
        pair.haproxy[holder].cont()
    else:
        pair.haproxy[holder].start()
