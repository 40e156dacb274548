"""Two haproxys share a virtual address by the shipped keepalived files: whoever holds it may die in any way."""

from collections.abc import Iterator

import pytest

from tests.support import balancers, lab_cloud, netlab, open_load
from tests.topology import conftest

Kind = open_load.Kind
VIRTUAL = f"{netlab.NETWORK}.200"
HOSTS = ("lb1", "lb2")
STALL_S = 4.0  # two failed checks and the takeover


class Pair:
    """Two balancers; `holder` is the host that has the virtual address now."""

    def __init__(self, cloud: lab_cloud.Cloud) -> None:
        self.cloud = cloud
        self.url = f"http://{VIRTUAL}:8090"
        addresses = {"VIRTUAL": f"{VIRTUAL}/24", "A": cloud.lab["lb1"].ip, "B": cloud.lab["lb2"].ip, "CARD": "eth0"}
        self.haproxy = {host: balancers.haproxy(cloud, host) for host in HOSTS}
        self.keepalived = {
            host: balancers.keepalived(cloud, host, which, addresses) for host, which in zip(HOSTS, "ab", strict=True)
        }

    def holders(self) -> list[str]:
        return [host for host in HOSTS if VIRTUAL in self.cloud.lab[host].run(["ip", "-o", "addr"]).stdout]

    def wait_both_well(self) -> str:
        """Until one holds the address, through which the cloud answers, and the other could take it; the holder."""
        self.cloud.wait_ready(*self.haproxy.values())
        self.cloud.until(lambda: len(self.holders()) == 1 and self.cloud.is_ready(self.url), 30, "one holder")
        (holder,) = self.holders()
        spare = self.keepalived[next(host for host in HOSTS if host != holder)]
        self.cloud.until(lambda: spare.log().rfind("BACKUP STATE") > spare.log().rfind("FAULT STATE"), 30, "a spare")
        return holder


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with lab_cloud.running(more=HOSTS, env=conftest.BEHIND) as cloud:
        pair = Pair(cloud)
        pair.wait_both_well()
        cloud.start_nodes("n1", conftest.NODES, [pair.url], **conftest.ROOM)
        cloud.wait_nodes(conftest.NODES)
        yield pair


@pytest.mark.parametrize("fault", ["haproxy kill -9", "haproxy SIGSTOP", "power off"])
def test_the_address_moves(pair: Pair, fault: str) -> None:
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
